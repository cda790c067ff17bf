"""Triton kernels that decode GGUF blocks on every call: one pass from the file's bytes to numbers.

A program takes some blocks, whatever row they are of, for rows are whole blocks one after another.

| type | block | a code's bits |
| ---- | ----- | ------------- |
| Q8_0 | 34 bytes, 32 columns | a byte; two are read together, since blocks begin at even bytes only |
| Q4_K | 144 bytes, 256 columns | of 32 bytes: low halves, then high ones |
| Q5_K | 176 bytes, 256 columns | the same, and a bit of a byte for every eighth column group |
| Q6_K | 210 bytes, 256 columns | of 64 bytes: low halves, then high ones; two bits of a byte beside |

Numbers are those of `gguf_arithmetic`, bit by bit: scale times code has at most 24 bits, so that it
is exact in float32 whether or not the compiler joins a product and a sum.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.kernels.launching import can_launch, launch
from quantmatrix.scheme import BLOCKS

if TYPE_CHECKING:
    from quantmatrix.scheme import Scheme

TYPES = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types that have a kernel."""
PER_PROGRAM = {"Q8_0": 64, "Q4_K": 16, "Q5_K": 16, "Q6_K": 16}
"""Blocks that one program decodes."""


@cache
def compile_kernels() -> tuple[Any, Any, Any]:
    """(decode_q8_0, decode_k, decode_q6_k), defined where triton is."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def decode_q8_0(pairs, halves, out, count, BLOCKS: tl.constexpr):  # type: ignore
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = (block < count)[:, None]
        column = tl.arange(0, 16)[None, :]
        d = tl.load(halves + block[:, None] * 17, mask=inside, other=0.0).to(tl.float32)
        pair = tl.load(pairs + block[:, None] * 17 + 1 + column, mask=inside, other=0).to(tl.int32)
        low = ((pair << 24) >> 24).to(tl.float32) * d
        high = (pair >> 8).to(tl.float32) * d
        columns = tl.arange(0, 32)[None, :]
        both = tl.interleave(low, high).to(out.dtype.element_ty)
        tl.store(out + block[:, None] * 32 + columns, both, mask=inside)

    # scales and minima of the eight groups of 32 columns: six bits each, in twelve bytes
    @triton.jit  # type: ignore[untyped-decorator]
    def read_scales(codes, halves, block, inside, SIZE: tl.constexpr):  # type: ignore
        group = tl.arange(0, 8)[None, :]
        at = codes + block * SIZE + 4
        own = tl.load(at + group, mask=inside, other=0).to(tl.int32)
        other = tl.load(at + (group ^ 4), mask=inside, other=0).to(tl.int32)
        last = tl.load(at + 4 + group, mask=inside, other=0).to(tl.int32)
        scale = tl.where(group < 4, own & 63, (last & 15) | ((other >> 6) << 4))
        minimum = tl.where(group < 4, other & 63, (last >> 4) | ((own >> 6) << 4))
        d = tl.load(halves + block * (SIZE // 2), mask=inside, other=0.0).to(tl.float32)
        dmin = tl.load(halves + block * (SIZE // 2) + 1, mask=inside, other=0.0).to(tl.float32)
        return d * scale.to(tl.float32), dmin * minimum.to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def decode_k(  # type: ignore
        codes, halves, out, count, SIZE: tl.constexpr, FIFTH: tl.constexpr, BLOCKS: tl.constexpr
    ):  # fmt: skip
        block = (tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
        scales, minima = read_scales(codes, halves, block, block < count, SIZE)
        low_scale, high_scale = tl.split(tl.reshape(scales, (BLOCKS, 4, 2)))
        low_least, high_least = tl.split(tl.reshape(minima, (BLOCKS, 4, 2)))
        block = block[:, :, None]
        inside = block < count
        run = tl.arange(0, 4)[None, :, None]
        column = tl.arange(0, 32)[None, None, :]
        at = codes + block * SIZE + (SIZE - 128)
        byte = tl.load(at + run * 32 + column, mask=inside, other=0).to(tl.int32)
        low, high = byte & 15, byte >> 4
        if FIFTH:
            bits = tl.load(codes + block * SIZE + 16 + column, mask=inside, other=0).to(tl.int32)
            low |= ((bits >> (2 * run)) & 1) << 4
            high |= ((bits >> (2 * run + 1)) & 1) << 4
        first = low.to(tl.float32) * low_scale[:, :, None] - low_least[:, :, None]
        second = high.to(tl.float32) * high_scale[:, :, None] - high_least[:, :, None]
        target = out + block * 256 + run * 64 + column
        tl.store(target, first.to(out.dtype.element_ty), mask=inside)
        tl.store(target + 32, second.to(out.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def decode_q6_k(codes, halves, out, count, BLOCKS: tl.constexpr):  # type: ignore
        block = (tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
        inside = block < count
        index = tl.arange(0, 128)[None, :]
        half, part, column = index // 64, (index // 32) % 2, index % 32
        at = codes + block * 210
        byte = tl.load(at + index, mask=inside, other=0).to(tl.int32)
        bits = tl.load(at + 128 + half * 32 + column, mask=inside, other=0).to(tl.int32)
        low = (byte & 15) | (((bits >> (2 * part)) & 3) << 4)
        high = (byte >> 4) | (((bits >> (2 * part + 4)) & 3) << 4)
        d = tl.load(halves + block * 105 + 104, mask=inside, other=0.0).to(tl.float32)
        scale = at + 192 + half * 8 + part * 2 + column // 16
        first = tl.load(scale, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        second = tl.load(scale + 4, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        target = out + block * 256 + half * 128 + part * 32 + column
        first = d * first * (low - 32).to(tl.float32)
        second = d * second * (high - 32).to(tl.float32)
        tl.store(target, first.to(out.dtype.element_ty), mask=inside)
        tl.store(target + 64, second.to(out.dtype.element_ty), mask=inside)

    return decode_q8_0, decode_k, decode_q6_k


def takes(weight: torch.Tensor, scheme: Scheme) -> bool:
    """Whether a kernel decodes these blocks, uint8 [N, bytes of a row], where they lie."""
    return scheme.weight.upper() in TYPES and can_launch(weight)


def decode(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Numbers [N, K] in `dtype` of blocks of one of `TYPES`, uint8 [N, bytes of a row]."""
    kind = scheme.weight.upper()
    columns, size = BLOCKS[kind]
    count = weight.numel() // size
    shape = (weight.shape[0], weight.shape[1] // size * columns)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    codes = weight.view(torch.int16) if kind == "Q8_0" else weight
    step = PER_PROGRAM[kind]
    constants = (size, kind == "Q5_K", step) if kind in ("Q4_K", "Q5_K") else (step,)
    decode_q8_0, decode_k, decode_q6_k = compile_kernels()
    launch(
        {"Q8_0": decode_q8_0, "Q6_K": decode_q6_k}.get(kind, decode_k),
        (-(-count // step),),
        (codes, weight.view(torch.float16), out),
        (count,),
        constants,
        num_warps=4,
    )
    return out
