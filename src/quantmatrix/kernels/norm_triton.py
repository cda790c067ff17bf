"""Triton kernel before quantized layers: a norm, its modulation and the codes of the result, in one pass.

A compiler writes such codes once for every layer that reads them, reads each row twice, and the
modulation again for every row. `quantmatrix::norm_codes` is put in place of the operations where blocks
are compiled (`quantmatrix.runtime.rewrites`).

| argument | what it holds |
| -------- | ------------- |
| `parts` | [B, S, K] each, of any float dtype: sequences that are joined along their tokens |
| `weight` | [K], the norm's own, or None |
| `scale`, `shift` | [B, K] of the modulation, or None |
| `step` | float32 [], what the result is divided by |
| `center` | whether the mean is taken off first: a layer norm, else an RMS norm |

A row becomes norm(x) weight (1 + scale) + shift, in float32, then codes e4m3 of it over `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from quantmatrix.kernels.launching import can_launch, launch

ROWS = 4
"""Rows per program, which read weight, scale and shift once."""


@cache
def compile_kernels() -> tuple[Any]:
    """The kernel, defined where triton is."""
    import triton
    import triton.language as tl

    @triton.jit
    def load(vector, column, width):  # type: ignore
        return tl.load(vector + column, mask=column < width, other=0.0).to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def find_gain(  # type: ignore
        weight, scale, column, width, WEIGHTED: tl.constexpr, SCALED: tl.constexpr
    ):
        gain = tl.full(column.shape, 1.0, tl.float32)
        if SCALED:
            gain += load(scale, column, width)
        if WEIGHTED:
            gain *= load(weight, column, width)
        return gain

    @triton.jit
    def store(codes, column, width, numbers):  # type: ignore
        held = tl.minimum(tl.maximum(numbers, -448.0), 448.0)
        tl.store(codes + column, held.to(tl.float8e4nv), mask=column < width)

    @triton.jit  # type: ignore[untyped-decorator]
    def norm_codes(  # type: ignore
        x, weight, scale, shift, step, codes,
        tokens, total, start, width, batch_stride, token_stride, scale_stride, shift_stride,
        EPS: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
        CENTER: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0).to(tl.int64) * ROWS
        batch, token = first // tokens, first % tokens
        left = tl.arange(0, LEFT)
        right = LEFT + tl.arange(0, RIGHT)
        back = 1.0 / tl.load(step)
        scale += batch * scale_stride
        left_gain = find_gain(weight, scale, left, width, WEIGHTED, SCALED) * back
        right_gain = find_gain(weight, scale, right, width, WEIGHTED, SCALED) * back
        left_shift = tl.zeros((LEFT,), tl.float32)
        right_shift = tl.zeros((RIGHT,), tl.float32)
        if SHIFTED:
            shift += batch * shift_stride
            left_shift = load(shift, left, width) * back
            right_shift = load(shift, right, width) * back
        given = x + batch * batch_stride + token * token_stride
        target = codes + (batch * total + start + token) * width
        for row in tl.static_range(ROWS):
            one = load(given + row * token_stride, left, width)
            other = load(given + row * token_stride, right, width)
            if CENTER:
                mean = (tl.sum(one, axis=0) + tl.sum(other, axis=0)) / width
                one = tl.where(left < width, one - mean, 0.0)
                other = tl.where(right < width, other - mean, 0.0)
            square = (tl.sum(one * one, axis=0) + tl.sum(other * other, axis=0)) / width
            turn = tl.rsqrt(square + EPS)
            store(target + row * width, left, width, one * turn * left_gain + left_shift)
            store(target + row * width, right, width, other * turn * right_gain + right_shift)

    return (norm_codes,)


def launch_norm_codes(
    parts: Sequence[torch.Tensor],
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    step: torch.Tensor,
    eps: float,
    center: bool,
) -> torch.Tensor:
    """Codes float8_e4m3fn [B x all tokens, K] from the module's arguments; plain torch where nothing launches."""
    if not can_launch(parts[0]):
        numbers = [normalize(part, weight, scale, shift, eps, center) for part in parts]
        return to_codes(torch.cat(numbers, dim=1).flatten(0, 1), step)
    codes, start, (kernel,) = draw_codes(parts), 0, compile_kernels()
    total, width = sum(part.shape[1] for part in parts), parts[0].shape[2]
    left, right = split_width(width)
    for x in parts:
        x = x if x.stride(2) == 1 else x.contiguous()
        batch, tokens, _ = x.shape
        rows = ROWS if tokens % ROWS == 0 else 1
        absent = (step if one is None else one for one in (weight, scale, shift))
        strides = [0 if one is None else one.stride(0) for one in (scale, shift)]
        launch(
            kernel,
            (batch * tokens // rows,),
            (x, *absent, step, codes),
            (tokens, total, start, width, x.stride(0), x.stride(1), *strides),
            (
                eps,
                rows,
                left,
                right,
                center,
                weight is not None,
                scale is not None,
                shift is not None,
            ),
            num_warps=4,
        )
        start += tokens
    return codes


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two that a row of so many numbers fits in: 5120 is 4096 + 1024, 4096 is twice 2048."""
    left = 1 << (width - 1).bit_length() - 1
    return left, 1 << (width - left - 1).bit_length()


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    center: bool,
) -> torch.Tensor:
    """The normalized and modulated numbers of one part in plain torch: float32 [B, S, K]."""
    numbers = x.float()
    if center:
        numbers = numbers - numbers.mean(dim=-1, keepdim=True)
    numbers = numbers * (numbers.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        numbers = numbers * weight.float()
    if scale is not None:
        numbers = numbers * (1 + scale.float().unsqueeze(1))
    return numbers if shift is None else numbers + shift.float().unsqueeze(1)


def to_codes(numbers: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Numbers float32 [M, K] over a step float32 [], as float8_e4m3fn; what exceeds its largest is held there."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (numbers / step).clamp(-largest, largest).to(torch.float8_e4m3fn)


def draw_codes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Memory for the codes of joined parts [B, S, K]: float8_e4m3fn [B x all tokens, K]."""
    batch, _, width = parts[0].shape
    rows = batch * sum(part.shape[1] for part in parts)
    return parts[0].new_empty(rows, width, dtype=torch.float8_e4m3fn)


norm_codes = torch.library.custom_op("quantmatrix::norm_codes", launch_norm_codes, mutates_args=())


@norm_codes.register_fake
def _(
    parts: Sequence[torch.Tensor],
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    step: torch.Tensor,
    eps: float,
    center: bool,
) -> torch.Tensor:
    return draw_codes(parts)
