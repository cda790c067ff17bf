"""Inspect against: every reading of a checkpoint's layers beside a base model's own weights.

What `quantmatrix inspect CHECKPOINT --against BASE` prints: a line per layer and reading, with the
cosine and the verdict of the witness. Where nothing declares a layout every open reading is there;
nothing is chosen and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.errors import CheckpointError
from quantmatrix.hardware.machine import Machine
from quantmatrix.request import WEIGHT_FILES, Hub, Request
from quantmatrix.runtime.plan.decide import plan_component
from quantmatrix.runtime.plan.inspect import open_any
from quantmatrix.runtime.plan.sources import Source, find_sources
from quantmatrix.runtime.plan.types import ComponentPlan
from quantmatrix.runtime.witness import verdict


def compare(path: str, base: str, hub: Hub, component: str | None = None) -> dict[str, Any]:
    """The witness's findings of every transformer component of a checkpoint, as plain data.

    A single file is compared with `component` of the base (its first, when none is named). Raises
    CheckpointError where the base model's weights are not on this machine.
    """
    found = open_any(path, hub)
    single = path.endswith((*WEIGHT_FILES, ".safetensors.index.json")) or len(found) == 1
    names = [component or "transformer"] if single else list(found)
    compared = {name: compare_component(path, base, hub, name) for name in names}
    return {"reference": path, "against": base, "components": compared}


def compare_component(path: str, base: str, hub: Hub, name: str) -> dict[str, Any]:
    """The findings of one component, under every reading that is open.

    Raises CheckpointError for a component that the base does not have, and where the base's weights
    are not at hand.
    """
    request = describe_request(path, base, hub, name)
    found = find_sources(request)
    if name not in found.components:
        known = ", ".join(found.components)
        raise CheckpointError(f"{base} has no transformer component {name}; it has {known}")
    reports = [
        verdict.judge(verdict.examine(part, request), part, request)
        for part in plan_readings(name, found.components[name], found.model, request)
    ]
    first = reports[0]
    if not any(report.findings for report in reports):
        raise CheckpointError(
            f"{path}: {name} cannot be compared with {base}: {first.base.missing or 'no layer'}; "
            "expected the weights of the model in full precision, on this machine"
        )
    agreeing = [report for report in reports if report.verdict == verdict.AGREES]
    return {
        "base": first.base.reference,
        "layout": first.layout or None if len(reports) == 1 else "nothing declares it",
        "verdict": agreeing[0].verdict if len(agreeing) == 1 else worst_verdict(reports),
        "problems": []
        if agreeing
        else [text for report in reports for text in report.problems][:1],
        "layers": [finding.to_json() for report in reports for finding in report.findings],
        "bytes": sum(report.nbytes for report in reports),
    }


def worst_verdict(reports: list[verdict.Report]) -> str:
    """The verdict where not exactly one reading agrees."""
    if sum(report.verdict == verdict.AGREES for report in reports) > 1:
        return "more than one reading agrees"
    return reports[0].verdict


def describe_request(path: str, base: str, hub: Hub, name: str) -> Request:
    """The request that loads a component of a base model from a checkpoint."""
    weights = path.endswith((*WEIGHT_FILES, ".safetensors.index.json"))
    request = Request(model_path=base, hub=hub, witness="auto")
    if not weights:
        try:
            find_sources(replace(request, component_paths={name: path}))
        except CheckpointError:
            weights = True  # a folder of weights without a config.json
    key = "weights_paths" if weights else "component_paths"
    return replace(request, **{key: {name: path}})  # type: ignore[arg-type]


def plan_readings(
    name: str, source: Source, model: str, request: Request
) -> Iterator[ComponentPlan]:
    """The component's plan under each reading that is open; one where nothing is.

    Raises CheckpointError where nothing is quantized, and where no reading can be planned.
    """
    machine = Machine(name="cpu", vendor="cpu", arch="cpu", memory_bytes=0)
    if families.detect(source.checkpoint) is None:
        raise CheckpointError(f"{source.checkpoint.reference}: nothing in it is quantized")
    errors = []
    plans = []
    for checkpoint in list_checkpoints(source.checkpoint):
        try:
            own = replace(source, checkpoint=checkpoint)
            plans.append(plan_component(name, own, model, request, machine, []))
        except CheckpointError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    yield from plans


def list_checkpoints(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoint under each open reading."""
    layout = families.find_layout(checkpoint)
    if layout is None or layout.known:
        return [checkpoint]
    return [replace(checkpoint, chosen={**reading, "why": "tried"}) for reading in layout.readings]
