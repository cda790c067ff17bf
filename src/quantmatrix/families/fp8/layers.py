"""Layers of fp8 files: schemes, the tensors that each has on disk, and what the kernels take.

Shapes and dtypes are those of the table in `quantmatrix.families.fp8`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from quantmatrix.kernels.scale_layouts import TILE_ROWS, pad_shape, untile_scales
from quantmatrix.scheme import Scheme, TensorSpec

TENSOR = Scheme("linear.fp8", "fp8", "e4m3", "tensor", "tensor-dynamic")
CHANNEL = Scheme("linear.fp8", "fp8-channel", "e4m3", "channel", "token-dynamic")
BLOCK = Scheme("linear.fp8", "fp8-block", "e4m3", "block", "group-dynamic", block=(128, 128))
STATIC = {
    "tensor": replace(TENSOR, activation="tensor-static"),
    "channel": replace(CHANNEL, activation="tensor-static"),
}
"""Schemes with one calibrated scale of the inputs, by the granularity of the weights' scales."""
CAST = Scheme("linear.fp8", "fp8-cast", "e4m3", "tensor", "none")
"""Codes that are the numbers (`casts`): one scale, which is 1 and stored nowhere."""
CAST_E5M2 = Scheme("linear.fp8", "fp8-cast-e5m2", "e5m2", "tensor", "none")
MXFP8 = Scheme(
    "linear.fp8", "fp8-mxfp8", "e4m3", "block", "group-power", block=(1, 32), tiled_scales=True
)
"""Powers of two per 32 columns, in tiles of 128 x 4."""
CODES = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""Formats of codes that are read, by dtype."""
DTYPES = {form: dtype for dtype, form in CODES.items()}
FLOATS = ("F32", "BF16", "F16")
"""Dtypes of scales: float32, or the model's own."""
SCALARS: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
"""Shapes of a scale that is alone."""
SCALES = ("weight_scale_inv", "weight_scale")
"""Names of a weight's scales, the one that blocks have where both are possible first."""


def is_cast(scheme: Scheme) -> bool:
    """Whether the codes of a layer are its numbers."""
    return scheme.name in (CAST.name, CAST_E5M2.name)


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    specs = {"weight": TensorSpec((DTYPES[scheme.weight],), ((out_features, in_features),))}
    if scheme.tiled_scales:
        tiles = pad_shape(*count_blocks(scheme, (out_features, in_features)))
        specs["weight_scale"] = TensorSpec(("F8_E8M0", "U8"), (tiles,))
    elif scheme.scale == "block":
        blocks = count_blocks(scheme, (out_features, in_features))
        specs["weight_scale_inv"] = TensorSpec(FLOATS, list_squeezed(blocks))
    elif scheme.scale == "channel":
        specs["weight_scale"] = TensorSpec(FLOATS, ((out_features,), (out_features, 1)))
    elif not is_cast(scheme):
        specs["weight_scale"] = TensorSpec(FLOATS, SCALARS)
    if scheme.activation == "tensor-static":
        specs["input_scale"] = TensorSpec(FLOATS, SCALARS)
    return specs


def name_tensors(
    scheme: Scheme, shape: tuple[int, ...], suffixes: Collection[str]
) -> dict[str, TensorSpec]:
    """The tensors of a layer [N, K] with these suffixes: its scales under the name that is there."""
    specs = tensors(scheme, *shape)
    if "weight_scale_inv" in specs:
        specs[find_scale_name(scheme, suffixes)] = specs.pop("weight_scale_inv")
    return specs


def count_blocks(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a weight [N, K], down and across; the last of each may be ragged."""
    return -(-shape[0] // scheme.block[0]), -(-shape[1] // scheme.block[1])


def list_squeezed(blocks: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes that scales of so many blocks may have: sides of 1 may be left out."""
    bare = tuple(count for count in blocks if count != 1)
    return tuple(dict.fromkeys((blocks, bare, *(SCALARS if not bare else ()))))


def find_scale_name(scheme: Scheme, suffixes: Collection[str]) -> str:
    """The suffix of a weight's scales: blocks may have either name."""
    either = scheme.scale == "block" and not scheme.tiled_scales
    names = SCALES if either else ("weight_scale",)
    return next((name for name in names if name in suffixes), names[0])


def fit_granularity(shape: tuple[int, ...], weight: tuple[int, ...]) -> str:
    """What scales of this shape are for a weight [N, K] of which no blocks are declared.

    `channel`, `block` (of 128 x 128) or `tensor`, which is also said of a shape that fits nothing.
    """
    if shape in ((weight[0],), (weight[0], 1)) and shape not in SCALARS:
        return "channel"
    blocks = count_blocks(BLOCK, weight)
    return "block" if shape == blocks and shape not in SCALARS else "tensor"


def canonical(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Canonical tensors of linear.fp8; takes tensors as in the table of `families.fp8`."""
    weight = stored["weight"]
    found = {"weight": weight, "weight_scale": shape_scale(stored, scheme)}
    if scheme.activation == "tensor-static":
        found["input_scale"] = stored["input_scale"].float().reshape(())
    if "bias" in stored:
        bias = stored["bias"]
        found["bias"] = bias.float() if bias.element_size() == 1 else bias
    return found


def shape_scale(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight's scale as the kernels take it: float32 [], [N, 1] or one per block.

    A plain cast, which has none, gets a 1. Takes tensors as in the table of `families.fp8`.
    """
    scale = stored.get(find_scale_name(scheme, stored))
    weight = stored["weight"]
    if scale is None:
        return torch.ones((), device=weight.device)
    if scheme.tiled_scales:
        exponents = untile_scales(scale.view(torch.uint8), *count_blocks(scheme, weight.shape))
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
    if scheme.scale == "block":
        return scale.float().reshape(count_blocks(scheme, weight.shape))
    return scale.float().reshape((-1, 1) if scheme.scale == "channel" else ())


def cut_rows(
    stored: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the table of `families.fp8`.
    """
    cut = dict(stored)
    suffixes = ["weight", "bias", *(["weight_scale"] if scheme.scale == "channel" else [])]
    for suffix in suffixes:
        if suffix in stored:
            cut[suffix] = stored[suffix][start:stop]
    if scheme.tiled_scales:  # whole rows of tiles lie together
        cut["weight_scale"] = stored["weight_scale"][start : -(-stop // TILE_ROWS) * TILE_ROWS]
    elif scheme.scale == "block":
        height, name = scheme.block[0], find_scale_name(scheme, stored)
        cut[name] = shape_scale(stored, scheme)[start // height : -(-stop // height)]
    return cut
