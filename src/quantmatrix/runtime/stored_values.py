"""Stored values: numbers of a checkpoint that cannot be meant are refused before a layer is built.

Every check names the file, the tensor and what was found. A family adds what only it knows in a
function `find_fault`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from quantmatrix import families
from quantmatrix.errors import CheckpointError
from quantmatrix.kernels.number_formats import expand_blocks, holds_nan, is_finite
from quantmatrix.scheme import Scheme

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.runtime.plan.types import ComponentPlan, Piece

NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a tensor in full precision may hold; anything else is codes, or damage."""
LARGEST = {"e4m3": 448, "e5m2": 57344}
"""The largest number of each format of eight-bit floats."""


def check_stored(
    checkpoint: Checkpoint, layer: str, scheme: Scheme, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Scales and biases of a quantized layer [N, K] that would void the image.

    Scales must be finite and weights' not negative, inputs' positive; a weight's may be zero where
    its codes are. Biases are numbers, and so are all codes. `tensors` are as on disk, by suffix, of
    any dtype. Raises CheckpointError for one that breaks this.
    """
    for suffix, tensor in tensors.items():
        name = f"{layer}.{suffix}"
        if suffix in ("bias", "linear.bias"):
            check_plain(checkpoint, name, name, tensor)
        if suffix == "weight" and lacks_numbers(tensor, scheme):
            raise CheckpointError(
                f"{checkpoint.tensors[name].file}: tensor {name} holds NaN codes: expected numbers "
                f"within {LARGEST[scheme.weight]}; casts of older writers gave NaN above: hold values "
                f"within {LARGEST[scheme.weight]} before the cast, and quantize again"
                f"{explain_zeros(tensors)}"
            )
        if "scale" not in suffix or not tensor.is_floating_point():
            continue
        what, expected = "", "finite"
        if not torch.isfinite(tensor.float()).all():
            what = "NaN or infinite"
        elif suffix == "input_scale" and not (tensor > 0).all():
            what, expected = "zero or negative", "positive"
        elif suffix.startswith("weight_scale") and (tensor.float() < 0).any():
            what, expected = "negative", "positive"
        elif suffix.startswith("weight_scale") and voids_codes(tensor, scheme, tensors):
            what, expected = "zero (beside codes that are not)", "positive"
        if what:
            raise CheckpointError(
                f"{checkpoint.tensors[name].file}: tensor {name} holds {what} scales: "
                f"expected {expected} numbers; the checkpoint is damaged or was exported wrongly"
                f"{explain_zeros(tensors)}"
            )


def lacks_numbers(codes: torch.Tensor, scheme: Scheme) -> bool:
    """Whether codes of eight-bit floats, of any shape, hold one that is no number."""
    if scheme.weight == "e5m2":  # infinite, too: all five bits of the exponent are set
        return bool(((codes.view(torch.uint8) & 0x7C) == 0x7C).any())
    return scheme.weight == "e4m3" and holds_nan(codes)


def explain_zeros(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hint for the end of an error about a layer whose largest scale is zero.

    It looks at the one float scale [] or [1] of the weight, and says nothing where there are more.
    ModelOpt divides a weight by its own scale, so that one of zeros alone gives NaN: in the codes
    of FP8, in the block scales of NVFP4.
    """
    scale = tensors.get("weight_scale_2", tensors.get("weight_scale"))
    if scale is None or scale.numel() != 1 or scale.any():
        return ""
    return (
        ". ModelOpt writes this of a layer whose weights are all zero: switch its quantizers off "
        "and export again"
    )


def voids_codes(scales: torch.Tensor, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a scale of zero stands beside e4m3 codes [N, K] that are not zero.

    `scales` are of any float dtype: one number, [N], [N, 1], or [ceil(N/bn), ceil(K/bk)] for blocks,
    which may lack sides of 1.
    """
    zero = scales.float() == 0
    if scheme.weight not in LARGEST or not zero.any():
        return False
    codes = tensors["weight"].view(torch.uint8) & 0x7F
    if scheme.scale == "block":
        (rows, columns), (high, wide) = codes.shape, scheme.block
        zero = zero.reshape(-(-rows // high), -(-columns // wide))
        zero = expand_blocks(zero, scheme.block, (rows, columns))
    elif scheme.scale == "channel":
        zero = zero.reshape(-1, 1)
    return bool((codes * zero).any())


def check_values(
    component: ComponentPlan, piece: Piece, tensors: Mapping[str, torch.Tensor]
) -> None:
    """What the family says can never be among a layer's values is refused, and so is NaN.

    `tensors` are as on disk, by suffix, of any shape and dtype. Raises CheckpointError.
    """
    assert component.family is not None
    family = families.load(component.family)
    fault = family.find_fault(tensors, piece.scheme)
    if fault is not None:
        suffix, what = fault
        name = f"{piece.layer}.{suffix}"
        raise CheckpointError(
            f"{component.checkpoint.tensors[name].file}: tensor {name} {what}. The checkpoint is "
            "damaged or was exported wrongly: download it again, or quantize again"
        )
    for suffix, tensor in tensors.items():
        if tensor.dtype in NUMBERS and suffix not in family.UNUSED:
            check_finite(component.checkpoint, f"{piece.layer}.{suffix}", tensor)


def check_plain(checkpoint: Checkpoint, name: str, parameter: str, tensor: torch.Tensor) -> None:
    """Codes must never be taken as numbers, and numbers are finite.

    The tensor has any shape. Raises CheckpointError for another dtype than bfloat16, float16,
    float32 or float64, and for NaN.
    """
    if tensor.dtype not in NUMBERS:
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: tensor {name} holds {tensor.dtype} codes, but the "
            f"checkpoint describes {parameter} as full precision: its scale is missing, or its "
            "exclusion list is wrong; expected BF16, F16 or F32"
        )
    check_finite(checkpoint, name, tensor)


def check_finite(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """One NaN or infinite number in a model makes every picture of it black, or noise.

    The tensor has any shape and float dtype. Raises CheckpointError where it holds one.
    """
    if not is_finite(tensor):
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: tensor {name} holds NaN or infinite numbers: expected "
            "finite ones; the checkpoint is damaged, or its numbers were too large for the dtype "
            "that they were cast to"
        )
