"""linear.mxfp4: e2m1 codes with a power of two for each 32 columns of a row, weights and inputs alike.

Canonical tensors of a layer with N outputs and K inputs:

| tensor | dtype, shape | when |
| ------ | ------------ | ---- |
| `weight` | uint8 [N, K/2], the even column in the low nibble | always |
| `weight_scale` | float32 [N, ceil(K/32)], a coarse scale multiplied in | always |
| `mul_scale` | float [K] | `smoothed`: inputs are multiplied by it first |
| `bias` | any float [N] | when the layer has one |

Real weight = code x scale. Inputs are rounded in the same way (`group-power`): a group of 32 with the
largest magnitude m has the exponent floor(log2(m x 8/7)) - 2, which lets m round to 6 at most, and codes
are rounded half away from zero. With `group-dual` every 512 columns are divided by their largest
magnitude / 6 before that, in plain numbers. Source: msmodelslim 26.1.0 (`ir/api/impl/mx_quantization`,
`W4A4MXDynamicDualScaleFakeQuantLinear`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors
from quantmatrix.kernels.int8_arithmetic import smooth
from quantmatrix.kernels.linear_fp8 import find_blocks as find_blocks
from quantmatrix.kernels.number_formats import E2M1_MAX, decode_e2m1, unpack_nibbles
from quantmatrix.kernels.portable import keep_all, run_decoded, run_exactly
from quantmatrix.scheme import Scheme

GROUP, COARSE = 32, 512
"""Columns that share a power of two, and those that share a coarse scale."""
ROOM = 0.875
"""Share of a power of two above which a magnitude would round to the next one."""
NOTHING = 9.6e-7
"""What the writer adds before a logarithm."""
PER_ROW = ("weight", "weight_scale", "bias")


def take_rows(tensors: Tensors, rows: torch.Tensor | slice, height: int = 1) -> Tensors:
    """The layer with some of its outputs only; `rows` (a slice or int64 [rows]) indexes them.

    Tensors as in the module's table; those of the input side are shared.
    """
    return {name: t[rows] if name in PER_ROW else t for name, t in tensors.items()}


def split_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [..., K] as groups [..., ceil(K/size), size] in float32, zeros added at the end."""
    padded = functional.pad(x.float(), (0, -x.shape[-1] % size))
    groups: torch.Tensor = padded.unflatten(-1, (-1, size))
    return groups


def round_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e2m1 numbers float32 [..., K], exponents int32 [..., ceil(K/32)]) of x [..., K]."""
    groups = split_groups(x, GROUP)
    exponents = torch.frexp(groups.abs().amax(dim=-1) / ROOM + NOTHING).exponent - 3
    scaled = torch.ldexp(groups.abs(), -exponents[..., None])
    steps = (torch.frexp(scaled + NOTHING).exponent - 1).clamp(0, 2) - 1
    rounded = torch.ldexp((torch.ldexp(scaled, -steps) + 0.5).floor(), steps).clamp(max=E2M1_MAX)
    return (rounded * groups.sign()).flatten(-2)[..., : x.shape[-1]], exponents


def spread(scales: torch.Tensor, size: int, columns: int) -> torch.Tensor:
    """One scale per column, float32 [..., columns], from one per `size` of them."""
    return scales.repeat_interleave(size, dim=-1)[..., :columns]


def find_coarse(x: torch.Tensor) -> torch.Tensor:
    """Coarse scales float32 [..., ceil(K/512)] of x [..., K]; 1 where there are zeros only."""
    amax = split_groups(x, COARSE).abs().amax(dim=-1)
    return torch.where(amax > 0, amax / E2M1_MAX, 1.0)


def round_input(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """x [..., K] as the numbers that its codes stand for, float32."""
    columns, coarse = x.shape[-1], torch.ones((), device=x.device)
    if scheme.activation == "group-dual":
        coarse = spread(find_coarse(x), COARSE, columns)
    numbers, exponents = round_groups(x.float() / coarse)
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return numbers * spread(scales, GROUP, columns) * coarse


def decode_codes(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Code x scale, float32 [N, K], what smoothing asks left out."""
    numbers = decode_e2m1(unpack_nibbles(tensors["weight"]))
    return numbers * spread(tensors["weight_scale"], GROUP, numbers.shape[-1])


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K], smoothing included."""
    weight = decode_codes(tensors)
    return weight * tensors["mul_scale"].float() if scheme.smoothed else weight


def reference(x: torch.Tensor, tensors: Tensors, scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype, bias included."""
    bias = tensors.get("bias")
    y = functional.linear(round_input(smooth(x, tensors, scheme), scheme), decode_codes(tensors))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the weight decoded once, in the compute dtype."""
    return {"decoded": decode(tensors, scheme).to(dtype)}


def count_bytes(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of codes and scales."""
    scales = 4 * out_features * -(-in_features // GROUP)
    smoothing = in_features * item if scheme.smoothed else 0
    return out_features * in_features // 2 + scales + smoothing + item * out_features


def count_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of a decoded weight and a bias."""
    return item * out_features * (in_features + 1)


KERNELS = (
    Kernel(
        "linear.mxfp4", "reference", "W4A4", Needs(rule="mxfp4-reference"),
        keep_all, run_exactly(reference), count_bytes,
    ),
    Kernel(
        "linear.mxfp4", "decode", "W4A16", Needs(rule="mxfp4-decode"),
        prepare_decode, run_decoded, count_decoded,
    ),
)  # fmt: skip
ORDER: Mapping[str, tuple[str, ...]] = {"*": ("decode", "reference")}
