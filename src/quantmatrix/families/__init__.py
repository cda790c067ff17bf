"""The quant families: one module per id. Two families claiming one checkpoint is an error."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from quantmatrix.checkpoint import METHOD_KEYS
from quantmatrix.errors import CheckpointError

if TYPE_CHECKING:
    from quantmatrix.checkpoint import Checkpoint
    from quantmatrix.families.protocol import Family

PLAIN_DTYPES = ("BF16", "F16", "F32", "F64", "I64", "I32", "BOOL")
SCALE = re.compile(r"\.(weight_scale|input_scale|comfy_quant|qweight)$")
"""Tensors that stand beside codes only."""

IDS = ("fp8", "modelopt-fp8", "modelopt-nvfp4", "nunchaku-svdq", "msmodelslim")


def load(family: str) -> Family:
    """The module of a family id."""
    if family not in IDS:
        raise KeyError(f"no such quant family: {family}; known: {', '.join(IDS)}")
    return cast("Family", import_module(f"quantmatrix.families.{family.replace('-', '_')}"))


def written() -> tuple[str, ...]:
    """Ids of the families that have a module; the tables may name more."""
    folder = Path(__file__).parent
    return tuple(name for name in IDS if (folder / f"{name.replace('-', '_')}.py").is_file())


def detect(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(family id, reason) of a checkpoint, or None when nothing in it is quantized."""
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


def explain_unknown(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint that no family takes is not one in full precision; None: it is one.

    Its declaration counts even where every tensor is plain: whoever named it expects a quantized
    model. ModelOpt writes many more algorithms than are served here; each is named as in the file.
    """
    block = checkpoint.quantization or {}
    nested = block.get("quantization")
    block = {**block, **nested} if isinstance(nested, dict) else block
    words = ", ".join(f"{key} {block[key]}" for key in METHOD_KEYS if block.get(key))
    if words:
        lists = (getattr(load(family), "ALGORITHMS", ()) for family in written())
        known = ", ".join(word for algorithms in lists for word in algorithms)
        return (
            f"{checkpoint.quantization_from} declares {words}, which no quant family takes: known "
            f"are {', '.join(written())}, of ModelOpt the quant_algo {known}. Quantize with one of "
            "these, or name a checkpoint in full precision"
        )
    if block and "format_version" not in block:
        return (
            f"{checkpoint.quantization_from} describes a quantization by {', '.join(block)}, but "
            "says nowhere which: expected a quant_method. Add it, or remove the description"
        )
    for name, header in checkpoint.tensors.items():
        coded = header.dtype not in PLAIN_DTYPES and name.endswith("weight")
        if coded or SCALE.search(name):
            return (
                f"{header.file}: tensor {name} ({header.dtype} {list(header.shape)}) is quantized, "
                "but nothing declares how: expected a quantization_config in config.json or in the "
                "file's header, or a quant_model_description.json"
            )
    return None
