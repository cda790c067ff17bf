"""Exact arithmetic of int8 layers: codes, scales, offsets, smoothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantmatrix.kernels import Tensors
    from quantmatrix.scheme import Scheme


LARGEST = {"int8": 127, "int4": 7}
"""Largest code of a symmetric number format."""

PER_ROW = ("weight", "weight_scale", "deq_scale", "quant_bias", "bias")

ROWS = 512
"""Rows per integer matmul on a CPU."""

WHOLE_ROW = 16384
"""Longest row that the fused kernel quantizes."""


def decode(tensors: Tensors, scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K], smoothing included."""
    weight = tensors["weight"].float() * tensors["weight_scale"].float()[:, None]
    return weight * tensors["mul_scale"].float() if scheme.smoothed else weight


def smooth(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """x [..., K] times `mul_scale` [K] where the scheme is smoothed; in x's dtype."""
    return x * tensors["mul_scale"].to(x.dtype) if scheme.smoothed else x


def quantize_static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Codes int8 [..., K] of x [..., K], with one scale and zero point, float32 [], for all of it."""
    return (x.float() / scale + offset).round_().clamp_(-128, 127).to(torch.int8)


def quantize_tokens(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [..., K], scales float32 [..., 1]): each token's largest magnitude fits."""
    wide = x.float()
    amax = wide.abs().amax(dim=-1, keepdim=True)
    scale = amax / torch.full_like(amax, largest)  # CUDA multiplies by a number's reciprocal
    return (wide / torch.where(scale > 0, scale, 1)).round().to(torch.int8), scale


def accumulate(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The exact product of int8 codes [..., K] and weight codes [N, K], integral float64.

    Float32 holds every integer up to 2**24 and float64 up to 2**53, so sums of K products of at
    most 2**14 are exact in the one for K <= 1024 and in the other always.
    """
    exact = torch.float32 if codes.shape[-1] * 128 * 128 <= 2**24 else torch.float64
    return functional.linear(codes.to(exact), weight.to(exact)).double()


def reference(x: torch.Tensor, tensors: Tensors, scheme: Scheme) -> torch.Tensor:
    """The layer's arithmetic with an exact accumulator; `bias` defaults to that of `tensors`.

    x [..., K] of any float dtype gives [..., N] in x's dtype; `bias` is float [N]; tensors as in
    the table of `kernels.linear_int8`.
    """
    bias = tensors.get("bias")
    smoothed = smooth(x, tensors, scheme)
    if scheme.activation == "tensor-static":
        codes = quantize_static(smoothed, tensors["input_scale"], tensors["input_offset"])
        total = accumulate(codes, tensors["weight"]) + tensors["quant_bias"]
        return (total.float() * tensors["deq_scale"]).to(x.dtype)
    codes, scale = quantize_tokens(smoothed, LARGEST[scheme.weight])
    total = accumulate(codes, tensors["weight"]).float() * tensors["weight_scale"] * scale
    return (total if bias is None else total + bias.float()).to(x.dtype)


def count_codes(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of int8 codes with their scales."""
    static = scheme.activation == "tensor-static"
    vectors = out_features * 8 + 8 if static else out_features * 4
    return out_features * in_features + vectors + (in_features * item if scheme.smoothed else 0)
