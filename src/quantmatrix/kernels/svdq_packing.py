"""The tile order in which SVDQuant files store a layer, and the way back to rows and columns.

The engine reads its tensors as the fragments of a matrix instruction, so nothing on disk lies in
the order that its shape suggests. Each function here is one permutation, written as a view of the
stored tensor with one axis per part of an index, a transposition, and a reshape. With n an output
and k an input channel of a layer [N, K], G a group of inputs, r a direction of the low-rank branch:

| stored | axes, slowest first |
| ------ | ------------------- |
| `qweight` [N, K/2] | n/128, k/64, n/16 of 8, n of 8, k/8 of 4, n/8 of 2, k/32 of 2, k of 8 |
| vector of N or K channels c | c/16, c/2 of 4, c/8 of 2, c of 2 |
| `wscales`, int4 [K/64, N] | n/128, G, then n in its 128 as in a vector |
| `wscales`, nvfp4 [K/16, N] | n/128, G/4, n of 8, n/8 of 4, n/32 of 4, G of 4 |
| `proj_down` [K, R] | k/16, r/16, then r of 8, k/2 of 4, r/8 of 2, k/8 of 2, k of 2 |
| `proj_up` [N, R] | n/16, r/16, then n of 8, r/2 of 4, n/8 of 2, r/8 of 2, r of 2 |
| AWQ `qweight` int32 [N/4, K/2] | n/4, k/64, n of 4, k/32 of 2, k of 8, k/8 of 4 |

("n/8 of 2" is the part floor(n / 8) mod 2.) Two neighbouring k share a byte, the even one in the
low nibble, on disk and here. N and K are multiples of 128, R is one of 16. Every `pack` undoes its
`unpack` exactly; float8 tensors travel as bytes. Source: the nunchaku engine, 1.3.0dev, and the
packer of its quantizer.
"""

from __future__ import annotations

import torch

from quantmatrix.kernels.number_formats import pack_nibbles, unpack_nibbles

TILE = 128
"""N and K are multiples of this."""
RANK_TILE = 16
"""R is a multiple of this."""


def unpack_codes(stored: torch.Tensor) -> torch.Tensor:
    """`qweight` int8 [N, K/2] as row-major codes, uint8 [N, K/2]."""
    rows, half = stored.shape
    words = _as_words(stored).view(rows // TILE, half // 32, 8, 8, 4, 2, 2)
    plain = words.permute(0, 2, 5, 3, 1, 6, 4).reshape(rows, half // 4)
    return plain.view(torch.uint8)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Row-major codes, uint8 [N, K/2], as `qweight` int8 [N, K/2]."""
    rows, half = codes.shape
    words = _as_words(codes).view(rows // TILE, 8, 2, 8, half // 32, 2, 4)
    tiled = words.permute(0, 4, 1, 3, 6, 2, 5).reshape(rows, half // 4)
    return tiled.view(torch.int8)


def _as_words(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [N, K/2] as int32 [N, K/8]: eight neighbouring k are never parted."""
    flat = codes.contiguous()
    if flat.storage_offset() % 4:  # a mapped file may begin a tensor anywhere
        flat = flat.clone()
    return flat.view(torch.int32)


def unpack_channels(stored: torch.Tensor) -> torch.Tensor:
    """A vector (or vectors, [..., channels]) of any dtype in plain channel order."""
    tiles: torch.Tensor = stored.unflatten(-1, (-1, 4, 2, 2))
    return tiles.transpose(-3, -2).flatten(-4)


def pack_channels(plain: torch.Tensor) -> torch.Tensor:
    """A vector (or vectors, [..., channels]) of any dtype in stored order."""
    tiles: torch.Tensor = plain.unflatten(-1, (-1, 2, 4, 2))
    return tiles.transpose(-3, -2).flatten(-4)


def unpack_scales(stored: torch.Tensor) -> torch.Tensor:
    """`wscales` [K/g, N] as scales [N, K/g]; float8 means nvfp4, anything else int4."""
    groups, rows = stored.shape
    if stored.dtype == torch.float8_e4m3fn:
        tiles = stored.view(torch.uint8).reshape(rows // TILE, groups // 4, 8, 4, 4, 4)
        plain = tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)
        return plain.view(stored.dtype)
    blocks = unpack_channels(stored.reshape(rows // TILE, groups, TILE))
    return blocks.transpose(1, 2).reshape(rows, groups)


def pack_scales(plain: torch.Tensor) -> torch.Tensor:
    """Scales [N, K/g] as `wscales` [K/g, N]: float8_e4m3fn (g = 16) or 16-bit (g = 64), kept."""
    rows, groups = plain.shape
    if plain.dtype == torch.float8_e4m3fn:
        tiles = plain.view(torch.uint8).reshape(rows // TILE, 4, 4, 8, groups // 4, 4)
        stored = tiles.permute(0, 4, 3, 2, 1, 5).reshape(groups, rows)
        return stored.view(plain.dtype)
    blocks = plain.reshape(rows // TILE, TILE, groups).transpose(1, 2)
    return pack_channels(blocks).reshape(groups, rows)


def unpack_down(stored: torch.Tensor) -> torch.Tensor:
    """`proj_down` [K, R], of any dtype, as the factor [R, K] that multiplies the input."""
    tiles, (columns, rank) = _cut_factor(stored), stored.shape
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, columns)


def pack_down(plain: torch.Tensor) -> torch.Tensor:
    """The factor [R, K], of any dtype, as `proj_down` [K, R]."""
    rank, columns = plain.shape
    tiles = plain.reshape(rank // 16, 2, 8, columns // 16, 2, 4, 2)
    return tiles.permute(3, 0, 2, 5, 1, 4, 6).reshape(columns, rank)


def unpack_up(stored: torch.Tensor) -> torch.Tensor:
    """`proj_up` [N, R], of any dtype, as the factor [N, R] that makes outputs."""
    return _cut_factor(stored).permute(0, 4, 2, 1, 5, 3, 6).reshape(stored.shape)


def pack_up(plain: torch.Tensor) -> torch.Tensor:
    """The factor [N, R], of any dtype, as `proj_up` [N, R]."""
    rows, rank = plain.shape
    tiles = plain.reshape(rows // 16, 2, 8, rank // 16, 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 1, 4, 6).reshape(rows, rank)


def _cut_factor(stored: torch.Tensor) -> torch.Tensor:
    channels, rank = stored.shape
    return stored.reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)


def unpack_awq(stored: torch.Tensor) -> torch.Tensor:
    """AWQ `qweight` int32 [N/4, K/2] as row-major codes 0..15, uint8 [N, K/2]."""
    quads, half = stored.shape
    words = stored.contiguous().view(torch.int16).view(quads, half // 32, 4, 2, 8).int()
    codes = torch.stack([(words >> (4 * place)) & 15 for place in range(4)], dim=-2)
    return pack_nibbles(codes.transpose(1, 2).reshape(4 * quads, 2 * half).to(torch.uint8))


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Row-major codes 0..15, uint8 [N, K/2], as AWQ `qweight` int32 [N/4, K/2]."""
    rows, half = codes.shape
    plain = unpack_nibbles(codes).int().view(rows // 4, 4, half // 32, 2, 4, 8)
    words = sum(plain[..., place, :] << (4 * place) for place in range(4))
    assert isinstance(words, torch.Tensor)
    signed = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
    return signed.transpose(1, 2).contiguous().view(torch.int32).reshape(rows // 4, half)
