"""Triton kernels of linear.fp8: an input is read once and its e4m3 codes are written once.

In plain torch the same takes half a dozen kernels and up to 39 bytes of traffic per element, which
eats the whole gain of an FP8 matmul; here it is 3. Layers call `launch_*` as they are. Each is a
`torch.library` op, too, so that graphs that are traced or compiled around it see one node with shapes.
Divisions are rounded to nearest, so codes equal those of `reference`.

| op | input | codes | scales |
| -- | ----- | ----- | ------ |
| `quantmatrix::fp8_static` | [M, K] and a scale [] | [M, K] | as given |
| `quantmatrix::fp8_tokens` | [M, K] | [M, K] | float32 [M, 1] |
| `quantmatrix::fp8_tensor` | [M, K] | [M, K] | float32 [] |
| (`launch_groups`) | [M, K] | [M, K] | float32 [M, K/group], column by column |

Imported where CUDA runs, never elsewhere: triton is no dependency of the package.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from quantmatrix.kernels.launching import launch

BLOCK = 8192
GROUPS = 16
"""Groups of a row per program."""


@cache
def compile_kernels() -> tuple[Any, Any, Any, Any, Any]:
    """(divide by a scale, divide by what maps a magnitude to 448, quantize tokens, largest magnitude,
    quantize groups), defined where triton is."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def divide(x, codes, scale, size, BLOCK: tl.constexpr):  # type: ignore
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        quotient = tl.math.div_rn(values, tl.broadcast_to(tl.load(scale), (BLOCK,)))
        held = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
        tl.store(codes + places, held.to(tl.float8e4nv), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def divide_by_amax(x, codes, amax, scale, size, BLOCK: tl.constexpr):  # type: ignore
        magnitude = tl.load(amax)
        magnitude = tl.where(magnitude > 0, magnitude, 448.0)
        step = tl.math.div_rn(magnitude, tl.full((), 448.0, tl.float32))
        tl.store(scale, step, mask=tl.program_id(0) == 0)
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        quotient = tl.math.div_rn(values, tl.broadcast_to(step, (BLOCK,)))
        held = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
        tl.store(codes + places, held.to(tl.float8e4nv), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def quantize_tokens(x, codes, scales, width, BLOCK: tl.constexpr):  # type: ignore
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(values), axis=0)
        amax = tl.where(amax > 0, amax, 448.0)
        scale = tl.math.div_rn(amax, tl.full((), 448.0, tl.float32))
        tl.store(scales + row, scale)
        quotient = tl.math.div_rn(values, tl.broadcast_to(scale, (BLOCK,)))
        held = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
        tl.store(codes + row * width + columns, held.to(tl.float8e4nv), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def find_amax(x, amax, size, BLOCK: tl.constexpr):  # type: ignore
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + places, mask=places < size, other=0.0).to(tl.float32)
        tl.atomic_max(amax, tl.max(tl.abs(values), axis=0))

    @triton.jit  # type: ignore[untyped-decorator]
    def quantize_groups(  # type: ignore
        x, codes, scales, rows,
        GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        places = row * GROUPS * GROUP + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = group < GROUPS
        values = tl.load(x + places, mask=inside[:, None], other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(values), axis=1)
        amax = tl.where(amax > 0, amax, 448.0)
        scale = tl.math.div_rn(amax, tl.full((BLOCK,), 448.0, tl.float32))
        tl.store(scales + group * rows + row, scale, mask=inside)
        quotient = tl.math.div_rn(values, tl.broadcast_to(scale[:, None], (BLOCK, GROUP)))
        held = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
        tl.store(codes + places, held.to(tl.float8e4nv), mask=inside[:, None])

    return divide, divide_by_amax, quantize_tokens, find_amax, quantize_groups


def launch_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes e4m3 [M, K] of x [M, K] divided by a float32 scale []."""
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    divide, *_ = compile_kernels()
    grid = (-(-x.numel() // BLOCK),)
    launch(divide, grid, (x, codes, scale), (x.numel(),), (BLOCK,), num_warps=8)
    return codes


def launch_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 [M, K], scales float32 [M, 1]) of x [M, K]."""
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    _, _, tokens, *_ = compile_kernels()
    rows, width = x.shape
    block = 1 << (width - 1).bit_length()
    launch(tokens, (rows,), (x, codes, scales), (width,), (block,), num_warps=8)
    return codes, scales


def launch_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 [M, K], scale float32 []) of x [M, K]; the largest magnitude is found first."""
    x = x.contiguous()
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    scale = torch.empty_like(amax)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _, divide, _, find_amax, _ = compile_kernels()
    blocks = (-(-x.numel() // BLOCK),)
    launch(find_amax, blocks, (x, amax), (x.numel(),), (BLOCK,), num_warps=8)
    launch(divide, blocks, (x, codes, amax, scale), (x.numel(),), (BLOCK,), num_warps=8)
    return codes, scale


def launch_groups(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 [M, K], scales float32 [M, K/group] with stride (1, M)) of x [M, K]."""
    x = x.contiguous()
    rows, width = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(width // group, rows, dtype=torch.float32, device=x.device)
    *_, kernel = compile_kernels()
    groups = width // group
    grid = (rows, -(-groups // GROUPS))
    launch(kernel, grid, (x, codes, scales), (rows,), (groups, group, GROUPS), num_warps=4)
    return codes, scales.t()


quantize_static = torch.library.custom_op("quantmatrix::fp8_static", launch_static, mutates_args=())


@quantize_static.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


quantize_tokens = torch.library.custom_op("quantmatrix::fp8_tokens", launch_tokens, mutates_args=())


@quantize_tokens.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


quantize_tensor = torch.library.custom_op("quantmatrix::fp8_tensor", launch_tensor, mutates_args=())


@quantize_tensor.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scale
