"""Triton kernel after a feed-forward's first layer: GELU and the codes of the result, in one pass.

A compiler takes twice as long as the traffic: it spends its instructions on a tanh and a division per
number and, where a second input stands before the result (FLUX's single blocks), on finding the place
in it. `quantmatrix::gelu_codes` is put in place of the operations where blocks are compiled
(`quantmatrix.runtime.rewrites`).

GELU by its tanh form is x / (1 + exp(-2 u)) with u = sqrt(2/pi) (x + 0.044715 x^3). It is computed in
float32; codes are of it over a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from quantmatrix.kernels.launching import can_launch, launch
from quantmatrix.kernels.norm_triton import to_codes

BLOCK = 2048
LINEAR = -2 * math.sqrt(2 / math.pi) * math.log2(math.e)
CUBIC = 0.044715 * LINEAR
"""exp(-2 u) is 2 to the power of x (LINEAR + CUBIC x^2)."""


@cache
def compile_kernels() -> tuple[Any]:
    """The kernel, defined where triton is."""
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    @triton.jit  # type: ignore[untyped-decorator]
    def gelu_codes(  # type: ignore
        x, step, codes, width, stride, total, start,
        ACTIVE: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        result = values * (1.0 / tl.load(step))
        if ACTIVE:
            power = values * (LINEAR + CUBIC * values * values)
            result = libdevice.fast_dividef(result, 1.0 + tl.exp2(power))
        held = tl.minimum(tl.maximum(result, -448.0), 448.0)
        tl.store(codes + row * total + start + column, held.to(tl.float8e4nv), mask=inside)

    return (gelu_codes,)


def launch_gelu_codes(
    parts: Sequence[torch.Tensor], active: Sequence[bool], step: torch.Tensor
) -> torch.Tensor:
    """Codes float8_e4m3fn [M, all columns] of parts [M, K] beside each other; plain torch where nothing launches.

    Parts are of any float dtype; GELU is taken of those that are `active`. `step` is float32 [].
    """
    if not can_launch(parts[0]):
        taken = [
            functional.gelu(part.float(), approximate="tanh") if chosen else part.float()
            for part, chosen in zip(parts, active, strict=True)
        ]
        return to_codes(torch.cat(taken, dim=1), step)
    codes, start, (kernel,) = draw_codes(parts), 0, compile_kernels()
    for x, chosen in zip(parts, active, strict=True):
        x = x if x.stride(1) == 1 else x.contiguous()
        rows, width = x.shape
        launch(
            kernel,
            (rows, -(-width // BLOCK)),
            (x, step, codes),
            (width, x.stride(0), codes.shape[1], start),
            (chosen, LINEAR, CUBIC, BLOCK),
            num_warps=4,
        )
        start += width
    return codes


def draw_codes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Memory for the codes of parts [M, K] beside each other: float8_e4m3fn [M, all columns]."""
    columns = sum(part.shape[1] for part in parts)
    return parts[0].new_empty(parts[0].shape[0], columns, dtype=torch.float8_e4m3fn)


gelu_codes = torch.library.custom_op("quantmatrix::gelu_codes", launch_gelu_codes, mutates_args=())


@gelu_codes.register_fake
def _(parts: Sequence[torch.Tensor], active: Sequence[bool], step: torch.Tensor) -> torch.Tensor:
    return draw_codes(parts)
