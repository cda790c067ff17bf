"""Plain casts: weights that were cast to eight bits, with no scale anywhere; the code is the number.

`*_fp8_e4m3fn.safetensors` files of ComfyUI's users and diffusers' layerwise casting are such files. Every
tensor may be cast, biases and norms, too. Weights alone have codes: inputs are left alone. That a file
is one is known by what it lacks, so nothing in it may name a quantization, and no tensor be a scale.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from quantmatrix.families.fp8.layers import CAST, CAST_E5M2, CODES, is_cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.scheme import Scheme

CASTS = {"F8_E4M3": CAST, "F8_E5M2": CAST_E5M2}
"""The scheme of a cast layer, by the dtype of its codes."""
LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}
"""The code of the largest number, 448 and 57344, without its sign."""
SCALES = re.compile(r"(^|[._])(weight|input)_scale|(^|\.)scale_(weight|input)\Z|_scale_inv\Z")
"""Names of tensors that are scales, in whichever form of the family."""
OWN = frozenset({"weight", "bias"})
"""All that a cast layer has."""


def list_coded(checkpoint: Checkpoint) -> list[str]:
    """Layers whose weight is a matrix of eight-bit floats."""
    return [
        name.removesuffix(".weight")
        for name, header in checkpoint.tensors.items()
        if header.dtype in CODES and len(header.shape) == 2 and name.endswith(".weight")
    ]


def is_plain_cast(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has eight-bit weights, no scale, and nothing that names a quantization."""
    named = checkpoint.quantization or checkpoint.description
    if named or checkpoint.metadata.get("quantization"):
        return False
    coded = list_coded(checkpoint)
    if not coded or any(map(SCALES.search, checkpoint.tensors)):
        return False
    layers = checkpoint.layers()
    return all(layers[layer] <= OWN for layer in coded)


def describe_cast(checkpoint: Checkpoint) -> str:
    """What a plain cast was taken for, as text."""
    dtypes = sorted(
        {checkpoint.tensors[f"{layer}.weight"].dtype for layer in list_coded(checkpoint)}
    )
    return (
        f"a plain cast to {' and '.join(dtypes)} (no tensor of {', '.join(checkpoint.files)} is a scale, "
        "nothing declares one): codes are the numbers, scale 1, weights only"
    )


def find_saturated(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds) of a cast weight with the largest code there is; None: it has none.

    Weights are far below 448, but divided by a scale their largest is just that. Takes
    tensors as in the table of `families.fp8`.
    """
    if not is_cast(scheme):
        return None
    magnitude = tensors["weight"].view(torch.uint8) & 0x7F
    if int(magnitude.amax()) != LARGEST[scheme.weight]:
        return None
    return "weight", (
        f"holds the largest number of {scheme.weight}, as codes do that need a scale, and the file has "
        "none: expected a plain cast, whose numbers are weights, or a weight_scale beside it"
    )
