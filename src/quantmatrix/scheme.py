"""Scheme: how one linear layer is stored and multiplied. Plain data, shared by everybody.

A family reads schemes from a checkpoint, a kernel declares which schemes it serves, and the plan
records one per layer. Names used in the fields:

| field       | values |
| ----------- | ------ |
| `op`        | what is computed: `linear.fp8`, `linear.nvfp4`, `linear.svdq`, `linear.int8` ... |
| `name`      | the checkpoint's own name of it: `FP8`, `NVFP4`, `W8A8_DYNAMIC`, `svdq-int4` ... |
| `weight`    | number format of the codes: `e4m3`, `e5m2`, `e2m1`, `int4`, `int8`, `q4_k` ... |
| `scale`     | granularity of the weight scales: `tensor`, `channel`, `block`, `group` |
| `activation`| `none`, `tensor-static`, `tensor-dynamic`, `token-dynamic`, `group-dynamic`, |
|             | `group-power` (a power of two per group), `group-dual` (and a coarse scale) |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored and multiplied; equal schemes behave equally."""

    op: str
    name: str
    weight: str
    scale: str
    activation: str
    block: tuple[int, int] = (0, 0)
    """Rows and columns that share one scale, when `scale` is `block`."""
    group_size: int = 0
    """Input columns that share one scale, when `scale` is `group`, or are rotated together."""
    rank: int = 0
    """Rank of a low-rank branch; 0 when there is none."""
    unsigned: bool = False
    """Activations are shifted and coded without a sign (SVDQuant int4 after a GELU)."""
    swap_nibbles: bool = False
    """On disk the even column lies in the high nibble (BFL and Comfy order)."""
    tiled_scales: bool = False
    """On disk the scales lie in 128 x 4 tiles instead of rows."""
    smoothed: bool = False
    """Inputs are multiplied by a stored vector before they are quantized."""


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a layer must look like on disk."""

    dtypes: tuple[str, ...]
    """Accepted dtypes, in safetensors spelling (`F8_E4M3`, `F32`, `BF16`, `U8` ...)."""
    shapes: tuple[tuple[int, ...], ...]
    """Accepted shapes."""
    optional: bool = False


POWERS = ("group-power", "group-dual")
"""Activations of the MX formats, whose weights have a power of two per group, too."""
MX, WHOLE = "mx-", "-tensor"
"""What stands before and behind the name of a format in `name_format`."""


def name_format(scheme: Scheme) -> str:
    """How the weights of a layer are rounded: the number format, and the scale where that counts.

    `mx-e4m3` where scales are powers of two, which cut the largest numbers off; `int8-tensor` where
    all integers of a layer share one scale. A float's rounding does not depend on how many share one.
    """
    if scheme.activation in POWERS:
        return MX + scheme.weight
    if scheme.weight.startswith("int") and scheme.scale == "tensor":
        return scheme.weight + WHOLE
    return scheme.weight


def explain_width(scheme: Scheme, in_features: int) -> str:
    """Why a scheme cannot store a layer of so many input columns, or ''."""
    if scheme.scale == "group" and scheme.group_size and in_features % scheme.group_size:
        return f"{scheme.name} has one scale per {scheme.group_size} columns, the layer has {in_features}"
    return ""


BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17),
    "NVFP4": (64, 36), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ1_S": (256, 50), "IQ1_M": (256, 56),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
"""Columns and bytes of a block, by the name of a GGUF type."""

PACKED_OPS = {
    "linear.nvfp4": (1, 2),
    "linear.mxfp4": (1, 2),
    "linear.svdq": (1, 2),
    "linear.w4a16": (4, 2),
}
"""Rows and columns of the layer per row and column of the code tensor on disk; others: (1, 1)."""


def measure_features(scheme: Scheme, code_shape: tuple[int, ...]) -> tuple[int, int]:
    """(out_features, in_features) of a layer from the shape of its code tensor on disk."""
    rows, columns = PACKED_OPS.get(scheme.op, (1, 1))
    return code_shape[0] * rows, code_shape[1] * columns
