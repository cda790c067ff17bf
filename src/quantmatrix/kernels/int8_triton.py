"""Triton kernels of linear.int8: quantization in one pass, and an integer matmul with its epilogue.

`torch._int_mm` writes its accumulators, 4 bytes each, for another kernel to read; on a Hopper it is
not faster than a BF16 matmul either (measured on an H100: 1.0 to 1.2 times its time at the shapes of
FLUX.1 and Wan2.2, where the matmul below takes 0.68 to 0.84). Here the accumulators never leave the
registers. Divisions are rounded to nearest and codes half to even, so that codes equal those of
`reference`.

Imported where CUDA runs, never elsewhere: triton is no dependency of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from quantmatrix.kernels.launching import find_arch, launch

Tile = tuple[int, int, int, int, int]
"""Rows, columns, depth, warps, stages."""
TILES: Mapping[str, tuple[Tile, Tile]] = {
    "sm90": ((128, 128, 128, 4, 3), (64, 128, 128, 4, 4)),
    "*": ((128, 128, 128, 8, 3), (64, 128, 128, 4, 3)),
}
"""Per architecture: of many rows, and of at most `FEW`. Elsewhere than on a Hopper, whose warps
multiply together, the accumulators of 128 x 128 do not fit into the registers of four warps (up to
624 bytes per thread were spilled), and four stages do not fit into the 64 KiB of a gfx942."""
FEW = 64
BLOCK = 4096
"""Elements that a program of `quantize_static` works on."""
GROUP = 8
"""Rows of tiles that are worked on together, so that they share columns in the cache."""


@cache
def compile_kernels() -> tuple[Any, Any, Any]:
    """(quantize tokens, quantize with a fixed scale, multiply), defined where triton is."""
    import triton
    import triton.language as tl

    # Adding 1.5 * 2**23 leaves no bits for fractions, and rounds half to even on the way.
    @triton.jit  # type: ignore[untyped-decorator]
    def quantize_tokens(x, codes, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.math.div_rn(tl.max(tl.abs(values), axis=0), tl.full((), LARGEST, tl.float32))
        tl.store(scales + row, scale)
        divisor = tl.where(scale > 0, scale, 1.0)
        quotient = tl.math.div_rn(values, tl.broadcast_to(divisor, (BLOCK,)))
        rounded = (quotient + 12582912.0) - 12582912.0
        tl.store(codes + row * width + columns, rounded.to(tl.int8), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def quantize_static(x, codes, scale, offset, size, BLOCK: tl.constexpr):  # type: ignore
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        divisor = tl.broadcast_to(tl.load(scale), (BLOCK,))
        shifted = tl.math.div_rn(values, divisor) + tl.load(offset)
        held = tl.minimum(tl.maximum(shifted, -128.0), 127.0)
        rounded = (held + 12582912.0) - 12582912.0
        tl.store(codes + places, rounded.to(tl.int8), mask=inside)

    return quantize_tokens, quantize_static, make_multiply(triton, tl)


def make_multiply(triton: Any, tl: Any) -> Any:
    """codes [M, K] times weight [N, K], scaled in registers: [M, N]."""

    @triton.jit  # type: ignore[untyped-decorator]
    def multiply(  # type: ignore
        codes, weight, out, column_scale, row_scale, bias, m, n,
        WIDTH: tl.constexpr, STATIC: tl.constexpr, BIASED: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        tiles_m, tiles_n = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
        first = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        tile_m = first + tile % (GROUP * tiles_n) % height
        tile_n = tile % (GROUP * tiles_n) // height
        rows = tile_m * ROWS + tl.arange(0, ROWS)
        columns = tile_n * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        left = codes + (rows % m).to(tl.int64)[:, None] * WIDTH + depth[None, :]
        right = weight + (columns % n).to(tl.int64)[None, :] * WIDTH + depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for start in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0:
                a, b = tl.load(left), tl.load(right)
            else:
                inside = depth < WIDTH - start
                a = tl.load(left, mask=inside[None, :], other=0)
                b = tl.load(right, mask=inside[:, None], other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
            left += DEPTH
            right += DEPTH
        in_n, in_m = columns < n, rows < m
        scales = tl.load(column_scale + columns, mask=in_n, other=0.0)
        if STATIC:
            total += tl.load(bias + columns, mask=in_n, other=0)[None, :]
            result = total.to(tl.float32) * scales[None, :]
        else:
            tokens = tl.load(row_scale + rows, mask=in_m, other=0.0)
            result = total.to(tl.float32) * scales[None, :] * tokens[:, None]
            if BIASED:
                result += tl.load(bias + columns, mask=in_n, other=0).to(tl.float32)[None, :]
        place = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])

    return multiply


def quantize_tokens(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [M, K], scales float32 [M, 1]) of a contiguous x [M, K], K <= 16384."""
    rows, width = x.shape
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = 1 << (width - 1).bit_length()
    kernel, _, _ = compile_kernels()
    constants = (float(largest), block)
    launch(kernel, (rows,), (x, codes, scales), (width,), constants, num_warps=8)
    return codes, scales


def quantize_static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Codes int8 [M, K] of a contiguous x [M, K]; scale and offset are float32 []."""
    codes = torch.empty_like(x, dtype=torch.int8)
    _, kernel, _ = compile_kernels()
    grid = (-(-x.numel() // BLOCK),)
    launch(kernel, grid, (x, codes, scale, offset), (x.numel(),), (BLOCK,))
    return codes


def multiply(
    codes: torch.Tensor,
    weight: torch.Tensor,
    column_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codes [M, K] and weight [N, K] to outputs [M, N].

    With `row_scale` [M, 1]: acc * column_scale * row_scale + bias. Without: (acc + bias) *
    column_scale, the bias being int32.
    """
    (m, k), n = codes.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    _, _, kernel = compile_kernels()
    usual, few = TILES.get(find_arch(codes), TILES["*"])
    rows, columns, depth, warps, stages = usual if m > FEW else few
    scale = column_scale if row_scale is None else row_scale
    added = column_scale if bias is None else bias
    launch(
        kernel,
        (-(-m // rows) * -(-n // columns),),
        (codes, weight, out, column_scale, scale, added),
        (m, n),
        (k, row_scale is None, bias is not None, rows, columns, depth, GROUP),
        num_warps=warps,
        num_stages=stages,
    )
    return out


multiply_op = torch.library.custom_op("quantmatrix::int8_multiply", multiply, mutates_args=())
"""`multiply` as one node of a compiled graph."""


@multiply_op.register_fake
def _(
    codes: torch.Tensor,
    weight: torch.Tensor,
    column_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(codes.shape[0], weight.shape[0], dtype=dtype, device=codes.device)
