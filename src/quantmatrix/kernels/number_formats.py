"""Number formats: what codes mean, how numbers are rounded to them, how they are packed.

| format | bits | values | rounding to the nearest |
| ------ | ---- | ------ | -------- |
| e4m3 (`float8_e4m3fn`) | 8 | 4 exponent bits, 3 mantissa bits; largest 448 | ties to even; saturating here |
| e2m1 | 4 | 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign | ties to the even code; saturating at 6 |
| int4 | 4 | -8..7, two's complement | ties to even |
| int8 | 8 | -128..127 | ties to even |

Two 4-bit codes share a byte: the even column in the low nibble, the odd one in the high nibble. That
is ModelOpt's order; BFL and Comfy files have it the other way round (`swap_nibbles`).
Sources: the OCP microscaling formats specification (e4m3, e2m1) and ModelOpt's exports.
"""

from __future__ import annotations

import math

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = E2M1_MAGNITUDES + tuple(-value for value in E2M1_MAGNITUDES)
"""The number of each of the sixteen e2m1 codes; code 8 is minus zero."""
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes."""


PIECE = 2**16
"""Codes that are looked up at once, so that their places in the table stay in the processor's cache."""


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x as float8_e4m3fn, any shape, values above 448 clamped to it (older casts gave NaN)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def widen_float8(codes: torch.Tensor) -> torch.Tensor:
    """Codes of any shape and dtype of 8 bits as float32, with the bits that `codes.float()` gives.

    On a processor it is a table of 256 numbers: torch converts one code after the other there, which
    takes two to four times as long.
    """
    elsewhere = codes.device.type != "cpu" or torch.compiler.is_compiling()
    if elsewhere or not codes.is_contiguous():
        return codes.float()
    numbers = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    flat = codes.view(torch.uint8).flatten()
    found = torch.empty(flat.numel())
    for part, target in zip(flat.split(PIECE), found.split(PIECE), strict=True):
        torch.index_select(numbers, 0, part.int(), out=target)
    return found.view(codes.shape)


def holds_nan(codes: torch.Tensor) -> bool:
    """Whether e4m3 codes (float8_e4m3fn, any shape) hold one of the two NaNs, 0x7F and 0xFF.

    Each is the largest byte in one reading, signed and unsigned, so that nothing is copied.
    """
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    return bool((signed.amax() == 0x7F) | (unsigned.amax() == 0xFF))


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether numbers of any shape and floating dtype hold neither NaN nor infinity.

    Either stays in a sum, which is read ten times as fast as `torch.isfinite` writes its answers;
    only where the sum itself is too large do these decide.
    """
    wide = torch.float32 if numbers.dtype == torch.float16 else None
    if math.isfinite(numbers.sum(dtype=wide).item()):
        return True
    return bool(torch.isfinite(numbers).all())


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 (uint8, x's shape) of the nearest e2m1 numbers, ties to the even code.

    x has any shape and float dtype. A tie lies on a bound: it goes down when the code below the
    bound is even, up when it is odd.
    """
    magnitude = x.abs().float()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for below, bound in enumerate(E2M1_BOUNDS):
        code += magnitude > bound if below % 2 == 0 else magnitude >= bound
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Numbers (float32) of e2m1 codes 0..15, which have any shape and integer dtype."""
    table = torch.tensor(E2M1_VALUES, device=codes.device)
    return table[codes.int()]


def encode_int4(x: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 (uint8) of numbers, in any shape, rounded to -8..7, two's complement."""
    return (x.round().clamp(-8, 7).to(torch.int8) & 15).to(torch.uint8)


def decode_int4(codes: torch.Tensor) -> torch.Tensor:
    """Numbers (int8) of two's-complement codes 0..15, in any shape."""
    signed = codes.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] (0..15) to bytes [..., K/2], uint8, the even column in the low nibble.

    Raises ValueError for an odd number of columns.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"an even number of columns is needed to pack nibbles: {codes.shape[-1]}")
    pairs: torch.Tensor = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., K/2] to codes [..., K] (uint8, 0..15), the low nibble first."""
    data = packed.view(torch.uint8) if packed.dtype == torch.int8 else packed
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (uint8, any shape) with their two nibbles exchanged: 0xAB to 0xBA."""
    return (packed << 4) | (packed >> 4)


def expand_blocks(
    scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]
) -> torch.Tensor:
    """One scale per element [rows, columns] from one per block; ragged edges are cut off.

    `scales` are [ceil(rows/bn), ceil(columns/bk)] for `block` (bn, bk), of any dtype, which is
    kept.
    """
    tall = scales.repeat_interleave(block[0], dim=0)[: shape[0]]
    return tall.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def find_block_amax(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude of each block of x [rows, columns]: [ceil(rows/bn), ceil(columns/bk)].

    `block` is (bn, bk); the result has x's dtype.
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    cut: torch.Tensor = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    return cut.amax(dim=(1, 3))
