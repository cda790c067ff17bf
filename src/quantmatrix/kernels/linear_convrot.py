"""linear.convrot: int8 codes of a weight that was rotated; inputs are rotated in the same way.

Canonical tensors of a layer with N outputs and K inputs are `weight` int8 [N, K], `weight_scale`
float32 [N] and `bias` [N], as in `linear_int8`. `group_size` columns of a scheme are rotated together,
0: none. With H, the regular Hadamard matrix of that size divided by its root (its own inverse):

    codes x weight_scale = W H per group of columns        y = (x H) (W H)^T = x W^T

A rotation spreads outliers of a channel over its group. H is the Kronecker power of one matrix of 4 x
4, so that a size is a power of 4. Inputs are rotated in their own dtype, then rounded to int8, one
scale per token (`token-dynamic`), or left as they are (`none`). Source: comfy-kitchen, `int8_linear`
and `_build_hadamard` of its eager backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors, int8_arithmetic, linear_int8
from quantmatrix.kernels.int8_arithmetic import count_codes
from quantmatrix.kernels.linear_int8 import take_rows as take_rows
from quantmatrix.kernels.portable import keep_used, run_decoded, run_exactly
from quantmatrix.scheme import Scheme

H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
SIZES = tuple(4**power for power in range(1, 7))
"""Columns that can be rotated together; 256 is what everybody writes."""


@lru_cache(maxsize=8)
def build_hadamard(size: int) -> torch.Tensor:
    """The matrix float32 [size, size] that rotates so many columns; ValueError for another size."""
    if size not in SIZES:
        raise ValueError(f"a rotation of {size} columns is not known: expected one of {SIZES}")
    quarter = torch.tensor(H4, dtype=torch.float32)
    found = quarter
    while len(found) < size:
        found = torch.kron(found, quarter)
    root: float = size**0.5
    return found / root


def rotate(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers [..., K] of any float dtype, which stays, each `size` columns rotated; 0: as they are.

    Twice gives the numbers again, but for rounding.
    """
    if not size:
        return numbers
    matrix = build_hadamard(size).to(numbers.device, numbers.dtype)
    groups: torch.Tensor = numbers.unflatten(-1, (-1, size))
    return (groups @ matrix).flatten(-2)


def decode(tensors: Tensors, scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K], rotated back."""
    return rotate(int8_arithmetic.decode(tensors, scheme), scheme.group_size)


def reference(x: torch.Tensor, tensors: Tensors, scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype, bias included."""
    if scheme.activation != "none":
        return int8_arithmetic.reference(rotate(x, scheme.group_size), tensors, scheme)
    bias = tensors.get("bias")
    y = functional.linear(x.float(), decode(tensors, scheme))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the weight decoded and rotated back once, in the compute dtype."""
    return {"decoded": decode(tensors, scheme).to(dtype)}


def run_int8(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype: rotated, then as `linear_int8` multiplies int8 codes.

    `buffers` are what its `prepare_int8` kept, `bias` is float [N] or None.
    """
    return linear_int8.run_int8(rotate(x, scheme.group_size), buffers, bias, scheme)


KERNELS = (
    Kernel(
        "linear.convrot", "reference", "W8A8", Needs(rule="convrot-reference"),
        keep_used, run_exactly(reference), count_codes,
    ),
    Kernel(
        "linear.convrot", "decode", "W8A16", Needs(rule="convrot-decode"),
        prepare_decode, run_decoded, linear_int8.count_decoded,
    ),
    Kernel(
        "linear.convrot", "int8", "W8A8",
        replace(
            linear_int8.INT8, rule="convrot-int8-matmul", activations=("token-dynamic",),
            scales=("tensor", "channel"),  # canonical tensors have one a row in both
        ),
        linear_int8.prepare_int8, run_int8, count_codes, matmul=("aten::_int_mm", "multiply"),
    ),
)  # fmt: skip
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("int8", "decode", "reference"),
    "nvidia": ("int8", "decode"),
    "*": ("decode",),
}
