"""Latents: every denoising step stays near the BF16 run of the same seed, and repeats its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Job

    from quantmatrix.matrix import Cell
    from quantmatrix.recorder import Proof
    from quantmatrix.workbench import Workbench


@pytest.mark.check("latents")
def test_latents(cell: Cell, job: Job, workbench: Workbench, proof: Proof) -> None:
    from quantmatrix import compare

    baseline = workbench.baseline(cell, job.request)
    run = workbench.run(job.request, job.plan)
    again = workbench.run(job.request, job.plan)
    steps = compare.compare_trajectories(baseline.latents, run.latents)
    pieces = [piece for part in job.quantized.values() for piece in part.pieces()]
    name, limits = compare.find_limits((p.scheme.weight, p.numerics) for p in pieces)
    proof.metrics.update(
        {
            **compare.summarize(steps),
            "media": compare.compare_media(baseline.media, run.media),
            "repeats": compare.digest_latents(run.latents) == compare.digest_latents(again.latents),
            "quantized_layers": {part: sum(found.values()) for part, found in run.census.items()},
            "transformer_calls": run.calls,
        }
    )
    proof.limits.update({"class": name, **limits.to_json(), "repeats": True})
    proof.latents_digest = compare.digest_latents(run.latents)
    proof.timings.update(run.seconds)
    for part in job.quantized:
        assert run.calls.get(part), f"{part} is quantized, but was not called in any step"
    problems = compare.judge(steps, limits)
    assert not problems, "; ".join(problems)
    assert proof.metrics["repeats"], "the same seed gave other bits the second time"
