"""The quant families: one module per id. Two families claiming one checkpoint is an error."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from quantmatrix.errors import CheckpointError

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.families.protocol import Family

IDS = ("fp8", "modelopt-fp8", "modelopt-nvfp4", "nunchaku-svdq", "msmodelslim")


def load(family: str) -> Family:
    """The module of a family id; raises KeyError for an unknown one."""
    if family not in IDS:
        raise KeyError(f"no such quant family: {family}; known: {', '.join(IDS)}")
    return cast("Family", import_module(f"quantmatrix.families.{family.replace('-', '_')}"))


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


def find_caveat(family: str, checkpoint: Checkpoint) -> str | None:
    """A warning that a family has about a checkpoint that it takes, or None."""
    caveat = getattr(load(family), "caveat", None)
    return None if caveat is None else cast("str | None", caveat(checkpoint))
