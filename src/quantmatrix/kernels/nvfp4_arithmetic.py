"""The numbers of NVFP4: decoding weights, rounding inputs, and the layer in plain arithmetic.

The tensors and the formulas are those of `linear_nvfp4`. A byte holds two codes, so decoding is one
lookup per byte: a table of 256 pairs of float32, each pair read as one int64. Products are formed
in float32 and rounded once, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch.nn import functional

from quantmatrix.kernels import Tensors
from quantmatrix.kernels.number_formats import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    encode_e2m1,
    pack_nibbles,
)
from quantmatrix.scheme import Scheme

GROUP = 16
SMALLEST_SCALE = 2.0**-9
"""Of a group of inputs; the least positive e4m3 number."""
CHUNK = 2**19
"""Weights decoded at a time: few enough to stay in a CPU's cache."""


@lru_cache(maxsize=16)
def find_pairs(device: torch.device, values: tuple[float, ...] = E2M1_VALUES) -> torch.Tensor:
    """int64 [256]: the numbers of each byte's two codes, low nibble first, as float32 pairs."""
    numbers = torch.tensor(values, dtype=torch.float32)
    byte = torch.arange(256)
    pairs = torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=-1)
    return pairs.view(torch.int64).flatten().to(device)


def decode_codes(
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    values: tuple[float, ...] = E2M1_VALUES,
) -> torch.Tensor:
    """Numbers [N, K] of packed codes [N, K/2] times float32 scales [N, groups].

    `values` are the numbers of the sixteen codes. Each product is formed in float32 and rounded
    once to `dtype`.
    """
    rows, half = weight.shape
    out = torch.empty(rows, 2 * half, dtype=dtype, device=weight.device)
    pairs = find_pairs(weight.device, values)
    for part in cut_rows(rows, 2 * half):
        codes = pairs.index_select(0, weight[part].flatten().int()).view(torch.float32)
        grouped = codes.view(-1, scales.shape[1], 2 * half // scales.shape[1])
        out[part] = (grouped.mul_(scales[part].unsqueeze(-1))).view(-1, 2 * half)
    return out


def cut_rows(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive runs of rows that hold about CHUNK numbers each."""
    step = max(1, CHUNK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def decode_residual(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The coded part of the weight, [N, K] in `dtype`, without smoothing and low-rank branch."""
    scales = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return decode_codes(tensors["weight"], scales, dtype)


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight that multiplies the unsmoothed input, float32 [N, K], low-rank part included."""
    whole = decode_residual(tensors, torch.float32)
    if scheme.rank:
        whole.addmm_(tensors["lora_b"].float(), tensors["lora_a"].float())
    if scheme.smoothed:
        whole.mul_(tensors["pre_quant_scale"].float())
    return whole


def decode_to(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype
) -> torch.Tensor:
    """`decode`, [N, K] rounded to `dtype` without a float32 copy of the whole weight."""
    if not (scheme.rank or scheme.smoothed):
        return decode_residual(tensors, dtype)
    rows, columns = tensors["weight"].shape[0], 2 * tensors["weight"].shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=tensors["weight"].device)
    for part in cut_rows(rows, columns):
        out[part] = decode(take_rows(tensors, part), scheme)
    return out


def find_scale(values: torch.Tensor, largest: float) -> torch.Tensor:
    """float32 []: the scale that maps the largest magnitude to `largest`; 1 for zeros alone."""
    amax = values.abs().amax().float()
    return torch.where(amax > 0, amax / largest, 1.0)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`weight`, `weight_scale`, `weight_scale_2`) of a float32 weight [N, K], as ModelOpt's."""
    whole = find_scale(weight, E2M1_MAX * E4M3_MAX)
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    amax = groups.abs().amax(dim=-1)
    scales = torch.where(amax == 0, 1.0, amax / (E2M1_MAX * whole))
    scales = scales.clamp(SMALLEST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = encode_e2m1((groups / (scales.float() * whole).unsqueeze(-1)).flatten(-2))
    return pack_nibbles(codes), scales, whole


def take_rows(tensors: Mapping[str, torch.Tensor], rows: torch.Tensor | slice) -> Tensors:
    """Tensors of some output rows, in the order given, as in the table of `kernels.linear_nvfp4`.

    `rows` is a slice or int64 [rows]; tensors of the input side are shared.
    """
    taken = dict(tensors)
    for name in ("weight", "lora_b", "bias"):
        if name in taken:
            taken[name] = taken[name][rows]
    scales = taken["weight_scale"]
    taken["weight_scale"] = scales.view(torch.uint8)[rows].view(scales.dtype)
    return taken


def find_input_scale(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 []: the calibrated scale of the whole input, else the one that its amax asks for."""
    if "input_scale" in tensors:
        return tensors["input_scale"].float()
    return find_scale(x, E2M1_MAX * E4M3_MAX)


def round_inputs(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """float32 x [..., K] rounded to e2m1 codes times their two scales."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    amax = groups.abs().amax(dim=-1, keepdim=True)
    scale = (amax / (E2M1_MAX * input_scale)).clamp(SMALLEST_SCALE, E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float()
    scale = torch.where(amax == 0, 1.0, scale) * input_scale
    return (round_to_e2m1(groups / scale) * scale).flatten(-2)


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 numbers, ties to the even code, magnitudes above 5 to 6.

    x has any shape and float dtype; both are kept.
    """
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step).copysign(x)


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic with float32 sums; x [..., K] -> [..., N] in x's dtype."""
    wide = x.float()
    if scheme.smoothed:
        wide = wide * tensors["pre_quant_scale"].float()
    coded = wide
    if scheme.activation != "none":
        coded = round_inputs(wide, find_input_scale(wide, tensors))
    y = functional.linear(coded, decode_residual(tensors, torch.float32))
    if scheme.rank:
        low = functional.linear(wide, tensors["lora_a"].float())
        y = y + functional.linear(low, tensors["lora_b"].float())
    if "bias" in tensors:
        y = y + tensors["bias"].float()
    return y.to(x.dtype)
