"""Triton kernels that decode 4-bit weights on every call, so that memory keeps the packed codes.

One pass reads half a byte per weight and writes the number that the matmul takes, bfloat16 or e4m3,
into memory that the next layer uses again. Beside a matmul of thousands of rows that costs little:
2.5 bytes of traffic per weight, where plain torch moves about 45.

| code | number |
| ---- | ------ |
| e2m1 | its three low bits, placed as exponent and mantissa of a float16, times 2^14; bit 3 is the sign |
| int4 | two's complement |
| uint4 | the code itself |

    decode          code * (scale of its group * scale of the whole)    bfloat16, as `decode`
                    code * (scale of its group / 6)                      e4m3, as `fp8-recode`
    decode_smoothed code * (scale of its group * row_scale[n]) * unsmooth[k]   bfloat16
    decode_zeros    code * scale of its group + zero of its group              bfloat16, as `decode`

Products are formed in float32 in this order and rounded once. Scales in e4m3 are read as bytes, with
the same numbers for all 256 codes, where a GPU lacks the type (see `launching.view_scales`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from quantmatrix.kernels.launching import launch, view_scales

BLOCK = 4096
"""Bytes of codes per program."""
TILE = (4, 512)
"""Rows, and bytes of codes in each, per program of `decode_smoothed`."""


@cache
def compile_kernels() -> tuple[Any, Any, Any]:
    """(decode, decode_smoothed, decode_zeros), defined where triton is."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def read(code, INT4: tl.constexpr):  # type: ignore
        if INT4:
            return ((code ^ 8) - 8).to(tl.float32)
        bits = ((code & 7) << 9) | ((code & 8) << 12)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0

    # e4m3 placed as exponent and mantissa of a float16, which has denormal numbers, too; no infinity
    @triton.jit
    def read_scale(scale):  # type: ignore
        if scale.dtype == tl.uint8:
            byte = scale.to(tl.int32)
            bits = ((byte & 127) << 7) | ((byte & 128) << 8)
            number = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            return tl.where((byte & 127) == 127, float("nan"), number)
        else:  # noqa: RET505  Triton parses both branches
            return scale.to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def decode(  # type: ignore
        codes, scales, whole, out, size,
        GROUP: tl.constexpr, RECODE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        start = tl.program_id(0).to(tl.int64) * BLOCK
        places = start + tl.arange(0, BLOCK)
        inside = places < size
        byte = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
        scale = read_scale(tl.load(scales + places // GROUP, mask=inside, other=0.0))
        if RECODE:
            scale = tl.math.div_rn(scale, tl.full((BLOCK,), 6.0, tl.float32))
        else:
            scale = scale * tl.load(whole)
        both = tl.interleave(read(byte & 15, False) * scale, read(byte >> 4, False) * scale)
        targets = 2 * start + tl.arange(0, 2 * BLOCK)
        tl.store(out + targets, both.to(out.dtype.element_ty), mask=targets < 2 * size)

    @triton.jit  # type: ignore[untyped-decorator]
    def decode_smoothed(  # type: ignore
        codes, scales, row_scale, unsmooth, out, rows,
        HALF: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
        ROWS: tl.constexpr, BYTES: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        k = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
        in_n = n < rows
        inside = in_n[:, None] & (k < HALF)[None, :]
        wide = n.to(tl.int64)[:, None]
        byte = tl.load(codes + wide * HALF + k[None, :], mask=inside, other=0).to(tl.int32)
        at = scales + wide * (HALF // GROUP) + (k // GROUP)[None, :]
        scale = read_scale(tl.load(at, mask=inside, other=0.0))
        scale = scale * tl.load(row_scale + n, mask=in_n, other=0.0)[:, None]
        both = tl.interleave(read(byte & 15, INT4) * scale, read(byte >> 4, INT4) * scale)
        columns = 2 * tl.program_id(1) * BYTES + tl.arange(0, 2 * BYTES)
        in_columns = columns < 2 * HALF
        both = both * tl.load(unsmooth + columns, mask=in_columns, other=0.0)[None, :]
        place = out + wide * (2 * HALF) + columns[None, :]
        tl.store(place, both.to(out.dtype.element_ty), mask=in_n[:, None] & in_columns[None, :])

    @triton.jit  # type: ignore[untyped-decorator]
    def decode_zeros(codes, scales, zeros, out, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
        start = tl.program_id(0).to(tl.int64) * BLOCK
        places = start + tl.arange(0, BLOCK)
        inside = places < size
        byte = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + places // GROUP, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + places // GROUP, mask=inside, other=0.0).to(tl.float32)
        low = (byte & 15).to(tl.float32) * scale + zero
        high = (byte >> 4).to(tl.float32) * scale + zero
        targets = 2 * start + tl.arange(0, 2 * BLOCK)
        both = tl.interleave(low, high)
        tl.store(out + targets, both.to(out.dtype.element_ty), mask=targets < 2 * size)

    return decode, decode_smoothed, decode_zeros


def decode(
    codes: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers [N, K] of e2m1 codes [N, K/2] and e4m3 scales [N, K/16].

    `whole` is a float32 [] scale; None recodes to e4m3, which then takes 6 * the scale of the whole.
    """
    rows, half = codes.shape
    out = torch.empty(rows, 2 * half, dtype=dtype, device=codes.device)
    read = view_scales(scales)
    kernel, *_ = compile_kernels()
    launch(
        kernel,
        (-(-codes.numel() // BLOCK),),
        (codes, read, read if whole is None else whole, out),
        (codes.numel(),),
        (half // scales.shape[1], whole is None, BLOCK),
        num_warps=8,
    )
    return out


def decode_smoothed(
    codes: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    unsmooth: torch.Tensor,
    dtype: torch.dtype,
    *,
    int4: bool,
) -> torch.Tensor:
    """Numbers [N, K] of what an SVDQuant layer's codes do to the raw input.

    Codes [N, K/2], scales [N, groups], row_scale float32 [N], unsmooth float32 [K].
    """
    rows, half = codes.shape
    out = torch.empty(rows, 2 * half, dtype=dtype, device=codes.device)
    _, kernel, _ = compile_kernels()
    launch(
        kernel,
        (-(-rows // TILE[0]), -(-half // TILE[1])),
        (codes, view_scales(scales), row_scale, unsmooth, out),
        (rows,),
        (half, half // scales.shape[1], int4, *TILE),
        num_warps=4,
    )
    return out


def decode_zeros(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers [N, K] of uint4 codes [N, K/2] with a scale and a zero [N, groups] per group."""
    rows, half = codes.shape
    out = torch.empty(rows, 2 * half, dtype=dtype, device=codes.device)
    *_, kernel = compile_kernels()
    launch(
        kernel,
        (-(-codes.numel() // BLOCK),),
        (codes, scales, zeros, out),
        (codes.numel(),),
        (half // scales.shape[1], BLOCK),
        num_warps=8,
    )
    return out
