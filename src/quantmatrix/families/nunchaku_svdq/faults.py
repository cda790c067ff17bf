"""SVDQuant faults: what its writers leave out of a file, named by its cause.

The tensors of a file say what it is, but not what was lost on the way. Some losses look like another
fault, or like none:

| what is found | what happened |
| ------------- | ------------- |
| group scales of another size | quantized for another engine, which is no damage |
| codes without `proj_down` and `proj_up` | quantized without a low-rank branch, which is no damage |
| `wcscales` of ones, no `wtscale` | a model of the engine was saved, whose state has no `wtscale` |
| one file of an older folder of two | the other one was not downloaded, or was not named |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from quantmatrix.errors import CheckpointError
from quantmatrix.families.nunchaku_svdq.layers import BARE_SCALE, OLDER_NAMES, find_wrong_number
from quantmatrix.kernels.svdq_packing import RANK_TILE
from quantmatrix.scheme import Scheme

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader

GROUPS = {"BF16": 64, "F16": 64, "F8_E4M3": 16}
"""Columns that a group scale of a dtype stands for."""


def check(checkpoint: Checkpoint) -> None:
    """Refuse W4A4 layers with scales of other groups than the engine's, or without a branch.

    Raises CheckpointError for the first of them.
    """
    rank = find_rank(checkpoint)
    for layer, suffixes in checkpoint.layers().items():
        today = {OLDER_NAMES.get(suffix, suffix) for suffix in suffixes}
        code = checkpoint.tensors.get(f"{layer}.qweight")
        whole = {"wscales", "smooth_factor"} <= today
        if code is None or not whole or "wzeros" in today or len(code.shape) != 2:
            continue
        rows, columns = code.shape[0], 2 * code.shape[1]
        check_groups(checkpoint.tensors[f"{layer}.wscales"], rows, columns)
        if not today & {"proj_down", "proj_up"}:
            raise CheckpointError(
                f"{code.file}: layer {layer} has no low-rank branch (proj_down and proj_up, of old "
                "lora_down and lora_up): expected one in every layer, all of one rank. If it was "
                "quantized without, add one of zeros, which changes nothing: proj_down "
                f"[{columns}, {rank}] and proj_up [{rows}, {rank}]"
            )


def find_rank(checkpoint: Checkpoint) -> int:
    """Rank of the branches of a file, or the smallest that there is."""
    ends = (".proj_down", ".lora_down")
    shapes = (header.shape for name, header in checkpoint.tensors.items() if name.endswith(ends))
    return next((shape[1] for shape in shapes if len(shape) == 2 and shape[1]), RANK_TILE)


def check_groups(scales: TensorHeader, rows: int, columns: int) -> None:
    """Refuse group scales [groups, rows] that are whole, but not of the engine's two kinds.

    Raises CheckpointError for them.
    """
    groups = scales.shape[0] if len(scales.shape) == 2 and scales.shape[1] == rows else 0
    if not groups or columns % groups or GROUPS.get(scales.dtype) == columns // groups:
        return
    raise CheckpointError(
        f"{scales.file}: tensor {scales.name} holds one {scales.dtype} scale per "
        f"{columns // groups} columns: expected one of BF16 or F16 per 64 (int4) or of F8_E4M3 per "
        "16 (nvfp4), which is what the engine reads. Quantize with one of these"
    )


def find_fault(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds and what was expected) of numbers that cannot be meant.

    None where there are none. Tensors as in the table of `families.nunchaku_svdq`.
    """
    return find_wrong_number(tensors, scheme) or find_lost_scale(tensors, scheme)


def find_lost_scale(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds and what was expected) of group scales whose outer scale is gone.

    None where there are none. Tensors as in the table of `families.nunchaku_svdq`.
    """
    if scheme.op != "linear.svdq" or scheme.weight != "e2m1":
        return None
    outer = [tensors[name] for name in ("wtscale", "wcscales") if name in tensors]
    largest = tensors["wscales"].float().amax().item()
    if not outer or any((scale != 1).any() for scale in outer) or largest <= BARE_SCALE:
        return None
    return "wscales", (
        f"holds scales of up to {largest:g}, and what stands beside them is 1 throughout: expected "
        "the scale of the layer that they go with. The engine keeps wtscale as a plain number, so "
        "that saving a model of its classes drops it; name the file which that model was loaded "
        "from"
    )
