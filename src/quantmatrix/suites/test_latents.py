"""Latents: every denoising step stays near the BF16 run of the same seed, and repeats its bits.

So does every layer: on the inputs that it really gets, it stays near the base model's layer. A text encoder
that the row's flags name is that of both runs; its layers are held to the limit of a layer alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quantmatrix.suites.command import show

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.layers import LayerErrors
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.suites.command import Commanded, Shown
    from quantmatrix.suites.conftest import Job
    from quantmatrix.tables.rows import Cell


@pytest.mark.check("latents")
def test_latents(
    cell: Cell,
    job: Job,
    workbench: Workbench,
    proof: Proof,
    reports: Path,
    command: Callable[[], Commanded],
) -> None:
    from quantmatrix.measure import latents, layers, pictures, rounding_bounds, thumbnails
    from quantmatrix.proof import known_limits, limit_classes

    baseline = show(workbench.baseline(cell, job.request))
    run, again = run_twice(job, workbench, command)
    with layers.watch_encoders(workbench.pipeline(job.request, job.plan), job.plan) as encoders:
        alone, errors = workbench.run_watched(cell, job.request, job.plan)
    again = again or show(alone)
    steps = latents.compare_trajectories(baseline.latents, run.latents)
    frames = baseline.frames, run.frames
    kind = limit_classes.name_run(job.quantized.values())
    proof.metrics.update(
        {
            **latents.summarize(steps),
            "class": kind,
            "layers": errors.to_json(),
            **({"text_encoders": encoders.to_json()} if job.plan.encoders else {}),
            "media": pictures.measure_frames(*frames),
            "thumbnails": thumbnails.draw(*frames),
            "repeats": latents.digest_latents(run.latents) == latents.digest_latents(again.latents),
            "quantized_layers": {part: sum(found.values()) for part, found in run.census.items()},
            "transformer_calls": run.calls,
        }
    )
    proof.latents_digest = latents.digest_latents(run.latents)
    proof.timings.update(run.seconds)
    for name, part in job.quantized.items():
        uncalled = set(part.layers) - set(errors.found[name])
        assert not uncalled, f"layers of {name} that no step called: {sorted(uncalled)}"
    assert proof.metrics["repeats"], "the same seed gave other bits the second time"
    ledger = known_limits.read(reports)
    allowed = ledger.find(kind, cell.model, cell.hardware)
    proof.limits.update({**allowed.to_json(), "repeats": True})
    problems = latents.judge(steps, allowed)
    for name in job.quantized:
        problems += judge_layers(name, errors, allowed.layer_error)
    for name, part in job.plan.encoders.items():
        assert set(encoders.found.get(name, ())) == set(part.layers), (
            f"layers of {name} without a run"
        )
        most = ledger.find(limit_classes.name_run([part]), cell.model, cell.hardware).layer_error
        proof.limits[f"layer_error of {name}"] = {"at_most": most}
        problems += judge_layers(name, encoders, most)
    if workbench.tiny:  # a real checkpoint's codes may be searched for instead of rounded
        base = workbench.plan(workbench.base_request(cell, job.request))
        problems += rounding_bounds.judge_weights(job.plan, base)
    assert not problems, "; ".join(problems)


def run_twice(
    job: Job, workbench: Workbench, command: Callable[[], Commanded]
) -> tuple[Shown, Shown | None]:
    """The run that is judged, and of several processes another one; one process runs again while its
    layers are watched.

    The command's run is one of the two. Where it failed, the same is run here, to say why.
    """
    if job.plan.processes == 1:
        workbench.pipeline(job.request, job.plan)  # in no seconds of the command
        return command().show() or show(workbench.run(job.request, job.plan)), None
    first = show(workbench.run(job.request, job.plan))
    return first, command().show() or show(workbench.run(job.request, job.plan))


def judge_layers(name: str, errors: LayerErrors, most: float) -> list[str]:
    """Layers of a component that are further from the base model's than allowed, as text."""
    return [
        f"{name}.{layer}: relative error {error:.4g} on its own input, the limit is {most:.4g}"
        for layer, error in errors.found[name].items()
        if not error <= most
    ]
