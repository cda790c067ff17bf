"""The quant families: one module per id, and what is asked of all of them.

`quantmatrix.families.protocol` has every name that a family offers. Two families claiming one
checkpoint is an error.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.errors import CheckpointError

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.families.layouts import Layout
    from quantmatrix.families.protocol import Family
    from quantmatrix.request import Request

IDS = (
    "fp8",
    "modelopt-fp8",
    "modelopt-nvfp4",
    "nunchaku-svdq",
    "msmodelslim",
    "comfyui-int8",
    "gguf",
)
ENCODERS = ("fp8", "modelopt-fp8", "modelopt-nvfp4", "comfyui-int8")
"""Families whose files of text encoders are read."""


@cache
def load(family: str) -> Family:
    """The module of a family id, with the protocol's defaults; raises KeyError for an unknown one."""
    from quantmatrix.families.protocol import complete

    if family not in IDS:
        raise KeyError(f"no such quant family: {family}; known: {', '.join(IDS)}")
    return complete(import_module(f"quantmatrix.families.{family.replace('-', '_')}"))


def written() -> tuple[str, ...]:
    """Ids of the families that have a module; the tables may name more."""
    files = {path.stem for path in Path(__file__).parent.iterdir()}
    return tuple(name for name in IDS if name.replace("-", "_") in files)


def detect(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(family id, reason) of a checkpoint, or None when no family takes it.

    `quantmatrix.families.unknown_quantization` tells then what it is. Raises CheckpointError where
    more than one family claims it.
    """
    found = {name: why for name in written() if (why := load(name).detect(checkpoint))}
    if len(found) > 1:
        claims = "; ".join(f"{name}: {why}" for name, why in found.items())
        raise CheckpointError(
            f"{checkpoint.reference}: more than one quant family claims it: {claims}"
        )
    return next(iter(found.items()), None)


def check(checkpoint: Checkpoint) -> None:
    """Refuse what the writers of any family left out of a checkpoint; CheckpointError."""
    for name in written():
        load(name).check(checkpoint)


def check_flags(request: Request) -> None:
    """Refuse flags of one family that contradict each other; UsageError."""
    for name in written():
        load(name).check_flags(request)


def check_fit(request: Request, checkpoint: Checkpoint) -> list[str]:
    """Warnings where flags of a family, or a file's name, do not fit what the file holds.

    Contradictions raise UsageError or CheckpointError.
    """
    return [note for name in written() for note in load(name).check_fit(request, checkpoint)]


def find_layout(checkpoint: Checkpoint) -> Layout | None:
    """Where codes and scales of a checkpoint lie; None where there is one way only."""
    detected = detect(checkpoint)
    return None if detected is None else load(detected[0]).layout(checkpoint)
