"""Layout choice: one reading for a file whose tensors can be read in several, before it is planned.

Flags come first, then what the file declares; what both leave open is decided by the base model's
weights (`quantmatrix.runtime.witness.verdict`, the one step of a plan that reads tensors: a few rows of two local
files), or the file is refused with every open reading named. Nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from quantmatrix import families
from quantmatrix.families.layouts import Layout, describe_reading, explain_open

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.request import Request
    from quantmatrix.runtime.plan.sources import Source
    from quantmatrix.runtime.plan.types import ComponentPlan

FLAGS = ("nibble_order", "nvfp4_layout")


def settle(
    source: Source,
    request: Request,
    plan_reading: Callable[[Checkpoint], ComponentPlan],
    warnings: list[str],
) -> tuple[Source, str]:
    """(the source with one reading, what the reading rests on); CheckpointError where it is open.

    `plan_reading` plans the component under a reading.
    """
    checkpoint = source.checkpoint
    chosen = {name: str(getattr(request, name)) for name in FLAGS if getattr(request, name)}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    declared = families.find_layout(checkpoint)
    if declared is None:
        if chosen:
            warnings.append(f"{flags} is not used: {checkpoint.reference} has no NVFP4 codes")
        return source, ""
    if checkpoint.chosen:
        return source, checkpoint.chosen.get("why", "chosen")
    if chosen:
        warnings += list_contradictions(checkpoint, declared, chosen, flags)
        checkpoint = replace(checkpoint, chosen={**chosen, "why": f"chosen with {flags}"})
    layout = families.find_layout(checkpoint)
    assert layout is not None
    if layout.known:
        return replace(source, checkpoint=checkpoint), layout.why
    from quantmatrix.runtime.witness import verdict

    decided = verdict.decide(
        checkpoint,
        layout.readings,
        plan_reading,
        request,
        lambda why: explain_open(checkpoint, layout, why),
    )
    return replace(source, checkpoint=decided), decided.chosen["why"]


def list_contradictions(
    checkpoint: Checkpoint, declared: Layout, chosen: dict[str, str], flags: str
) -> list[str]:
    """A warning where flags choose another layout than the file declares."""
    said = {"nibble_order": declared.nibbles, "nvfp4_layout": declared.scales}
    if all(said[name] in (None, value) for name, value in chosen.items()):
        return []
    return [
        f"{checkpoint.reference}: {flags} is used, although the file declares "
        f"{describe_known(declared)} ({declared.why})"
    ]


def describe_known(layout: Layout) -> str:
    """A layout as text, with what is not known."""
    return describe_reading(layout.nibbles or "unknown", layout.scales or "unknown order")
