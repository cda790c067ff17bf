"""The numbers of SVDQuant layers: decoding weights, coding inputs, the layer in plain arithmetic.

The tensors and the formulas are those of `linear_svdq`. Sums are formed in float32, a few rows of
the input at a time, in an order that depends on the shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from quantmatrix.kernels import Tensors
from quantmatrix.kernels.number_formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, round_e4m3
from quantmatrix.kernels.nvfp4_arithmetic import decode_codes, round_to_e2m1
from quantmatrix.scheme import Scheme

SHIFT = 0.171875
"""Added to what follows a GELU (tanh form, never below -0.170) so that it is coded unsigned."""
INT4_VALUES = tuple(float(code - 16 if code > 7 else code) for code in range(16))
"""Numbers of the sixteen two's-complement codes."""
SIGNED_MAX, UNSIGNED_MAX = 7.0, 15.0
CHUNK_ROWS = 1024
"""Rows of an input that are coded and multiplied at a time."""


def decode_residual(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """What multiplies the smoothed, coded input: float32 [N, K]; `channel_scale` not included."""
    values = INT4_VALUES if scheme.weight == "int4" else E2M1_VALUES
    scales = tensors["weight_scale"].float()
    return decode_codes(tensors["weight"], scales, torch.float32, values)


def decode_main(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """What the codes contribute to the weight of the raw input: float32 [N, K]."""
    whole = decode_residual(tensors, scheme)
    whole.mul_(tensors["channel_scale"].unsqueeze(1))
    return whole.div_(tensors["smooth"].float())


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight that multiplies the raw input, low-rank part included: float32 [N, K]."""
    whole = decode_main(tensors, scheme)
    return whole.addmm_(tensors["proj_up"].float(), tensors["proj_down"].float())


def sum_shift(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """What the shift adds to each output of an unsigned layer: float32 [N]."""
    return SHIFT * decode_main(tensors, scheme).sum(dim=1)


def decode_bias(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor | None:
    """The layer's bias [N] in plain numbers, the shift of an unsigned layer taken out of it again.

    float32 for an unsigned layer, which always has one; else as stored, or None.
    """
    bias = tensors.get("bias")
    if not scheme.unsigned:
        return bias
    shift = sum_shift(tensors, scheme)
    return shift if bias is None else bias.float() + shift


def take_rows(tensors: Mapping[str, torch.Tensor], rows: torch.Tensor | slice) -> Tensors:
    """Tensors of some output rows, in the order given, as in the table of `kernels.linear_svdq`.

    `rows` is a slice or int64 [rows]; tensors of the input side are shared.
    """
    taken = dict(tensors)
    for name in ("weight", "channel_scale", "proj_up", "bias"):
        if name in taken:
            taken[name] = taken[name][rows]
    scales = taken["weight_scale"]
    if scales.dtype == torch.float8_e4m3fn:
        taken["weight_scale"] = scales.view(torch.uint8)[rows].view(scales.dtype)
    else:
        taken["weight_scale"] = scales[rows]
    return taken


def code_inputs(x: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """float32 x [M, K], smoothed and shifted already, as the numbers that its codes stand for.

    A code is found with the exact scale of its group; the product is scaled with the scale as it
    is kept, rounded to `dtype` (int4) or to e4m3 (nvfp4).
    """
    groups: torch.Tensor = x.unflatten(-1, (-1, scheme.group_size))
    amax = groups.abs().amax(dim=-1, keepdim=True)
    if scheme.weight == "int4":
        low, high = (0.0, UNSIGNED_MAX) if scheme.unsigned else (-SIGNED_MAX - 1, SIGNED_MAX)
        scale = amax / high
        codes = (groups / torch.where(scale > 0, scale, 1.0)).round_().clamp_(low, high)
        kept = scale.to(dtype)
    else:
        scale = (amax / E2M1_MAX).clamp(max=E4M3_MAX)
        codes = round_to_e2m1(groups / torch.where(scale > 0, scale, 1.0))
        kept = round_e4m3(scale)
    return (codes * kept.float()).view(x.shape)


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype, bias included."""
    residual = decode_residual(tensors, scheme)
    smooth, down = tensors["smooth"].float(), tensors["proj_down"].float()
    up, bias = tensors["proj_up"].float(), tensors.get("bias")
    shift = SHIFT if scheme.unsigned else 0.0
    stored = tensors["weight_scale"].dtype
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(rows.shape[0], residual.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, rows.shape[0], CHUNK_ROWS):
        raw = rows[start : start + CHUNK_ROWS].float()
        coded = code_inputs((raw + shift) / smooth, scheme, stored)
        part = functional.linear(coded, residual).mul_(tensors["channel_scale"])
        if bias is not None:
            part += bias.float()
        part += functional.linear(functional.linear(raw, down), up)
        y[start : start + CHUNK_ROWS] = part.to(x.dtype)
    return y.view(*x.shape[:-1], residual.shape[0])
