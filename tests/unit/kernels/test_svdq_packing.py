"""SVDQuant's tile order against the index formulas of the format, one element at a time.

The package describes the permutations as views and transpositions. Here they are written as
positions in the flattened array, taken from the format's description and computed by plain loops.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantmatrix.kernels import svdq_packing as packing

SHAPES = [(128, 128), (256, 128), (128, 256), (384, 256)]
EACH = pytest.mark.parametrize(("rows", "columns"), SHAPES)


def place_code(n: int, k: int, columns: int) -> tuple[int, int]:
    """(byte, nibble) of a code in `qweight`."""
    word = (((n // 128) * (columns // 64) + k // 64) * 8 + (n % 128) // 16) * 8 + n % 8
    word = (word * 4 + (k % 32) // 8) * 4 + ((n % 16) // 8) * 2 + (k % 64) // 32
    return 4 * word + (k % 8) // 2, k % 2


def place_channel(c: int) -> int:
    inside = ((c % 128) // 16) * 16 + ((c % 8) // 2) * 4 + ((c % 16) // 8) * 2 + c % 2
    return (c // 128) * 128 + inside


def place_int4_scale(n: int, group: int, columns: int) -> int:
    return (n // 128) * (columns // 64) * 128 + group * 128 + place_channel(n % 128)


def place_nvfp4_scale(n: int, group: int, columns: int) -> int:
    start = (n // 128) * (columns // 16) * 128 + (group // 4) * 512
    return start + (n % 8) * 64 + ((n % 32) // 8) * 16 + ((n % 128) // 32) * 4 + group % 4


def place_factor(i: int, j: int, block: int) -> int:
    """Row i and column j of a 16 x 16 block."""
    inside = (i % 8) * 32 + ((j % 8) // 2) * 8 + (i // 8) * 4 + (j // 8) * 2 + j % 2
    return block * 256 + inside


def place_down(r: int, k: int, rank: int) -> int:
    return place_factor(r % 16, k % 16, (k // 16) * (rank // 16) + r // 16)


def place_up(n: int, r: int, rank: int) -> int:
    return place_factor(n % 16, r % 16, (n // 16) * (rank // 16) + r // 16)


def fill(shape: tuple[int, int], size: int, place: Callable[[int, int], int]) -> torch.Tensor:
    """Flat stored positions: element (a, b) of a plain tensor of `shape` lies at place(a, b)."""
    positions = [place(a, b) for a in range(shape[0]) for b in range(shape[1])]
    assert sorted(positions) == list(range(size))  # a permutation: nothing is lost or read twice
    return torch.tensor(positions).view(shape)


@EACH
def test_codes(rows: int, columns: int) -> None:
    stored = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
    flat = stored.view(torch.uint8).flatten().tolist()
    plain = packing.unpack_codes(stored)
    assert plain.dtype == torch.uint8
    found = plain.tolist()
    for n in range(rows):
        for k in range(columns):
            byte, nibble = place_code(n, k, columns)
            expected = flat[byte] >> 4 if nibble else flat[byte] & 15
            got = found[n][k // 2] >> 4 if k % 2 else found[n][k // 2] & 15
            assert got == expected, (n, k)
    assert torch.equal(packing.pack_codes(plain), stored)


def test_codes_may_begin_anywhere_in_a_file() -> None:
    whole = torch.randint(-128, 128, (2 + 128 * 64,), dtype=torch.int8)
    odd = whole[2:].view(128, 64)
    assert torch.equal(packing.unpack_codes(odd), packing.unpack_codes(odd.clone()))


@pytest.mark.parametrize("size", [128, 256, 384])
def test_channels(size: int) -> None:
    stored = torch.randn(size)
    expected = torch.stack([stored[place_channel(c)] for c in range(size)])
    plain = packing.unpack_channels(stored)
    assert torch.equal(plain, expected)
    assert torch.equal(packing.pack_channels(plain), stored)


def test_channels_begin_as_the_format_says() -> None:
    start = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 16, 17, 24, 25]
    assert packing.pack_channels(torch.arange(128))[:20].tolist() == start


@EACH
def test_int4_scales(rows: int, columns: int) -> None:
    groups = columns // 64
    stored = torch.randn(groups, rows).bfloat16()
    places = fill((rows, groups), groups * rows, lambda n, g: place_int4_scale(n, g, columns))
    plain = packing.unpack_scales(stored)
    assert torch.equal(plain, stored.flatten()[places])
    assert torch.equal(packing.pack_scales(plain), stored)


@EACH
def test_nvfp4_scales(rows: int, columns: int) -> None:
    groups = columns // 16
    stored = torch.rand(groups, rows).mul(400).to(torch.float8_e4m3fn)
    places = fill((rows, groups), groups * rows, lambda n, g: place_nvfp4_scale(n, g, columns))
    plain = packing.unpack_scales(stored)
    assert plain.dtype == stored.dtype
    assert torch.equal(plain.float(), stored.float().flatten()[places])
    assert torch.equal(packing.pack_scales(plain).view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("rank", [16, 32, 48])
@pytest.mark.parametrize("channels", [128, 256])
def test_low_rank_factors(channels: int, rank: int) -> None:
    stored = torch.randn(channels, rank).bfloat16()
    size = channels * rank
    places = fill((rank, channels), size, lambda r, k: place_down(r, k, rank))
    down = packing.unpack_down(stored)
    assert torch.equal(down, stored.flatten()[places])
    assert torch.equal(packing.pack_down(down), stored)
    places = fill((channels, rank), size, lambda n, r: place_up(n, r, rank))
    up = packing.unpack_up(stored)
    assert torch.equal(up, stored.flatten()[places])
    assert torch.equal(packing.pack_up(up), stored)


@pytest.mark.parametrize(("rows", "columns"), [(4, 64), (8, 128), (128, 192)])
def test_awq_codes(rows: int, columns: int) -> None:
    stored = torch.randint(-(2**31), 2**31, (rows // 4, columns // 2), dtype=torch.int32)
    data = stored.contiguous().view(torch.uint8).flatten().tolist()  # little-endian
    words = [low + 256 * high for low, high in zip(data[::2], data[1::2], strict=True)]
    found = packing.unpack_awq(stored).tolist()
    for n in range(rows):
        for k in range(columns):
            tile, half, c, j = k // 64, (k % 64) // 32, (k % 32) // 8, k % 8
            word = ((((n // 4) * (columns // 64) + tile) * 4 + n % 4) * 2 + half) * 8 + j
            expected = (words[word] >> (4 * c)) & 15
            got = found[n][k // 2] >> 4 if k % 2 else found[n][k // 2] & 15
            assert got == expected, (n, k)
    assert torch.equal(packing.pack_awq(packing.unpack_awq(stored)), stored)


def test_fused_rows_can_be_cut_after_unpacking_only() -> None:
    """The declared [groups, N] shape is nominal: slicing it gives other scales (N > 128)."""
    plain = torch.randn(384, 4).bfloat16()
    stored = packing.pack_scales(plain)
    assert torch.equal(packing.unpack_scales(stored)[128:256], plain[128:256])
    assert not torch.equal(packing.unpack_scales(stored[:, 128:256].contiguous()), plain[128:256])


def test_a_plain_reading_is_wrong_everywhere() -> None:
    """Mistakes 1 and 9 of the format: vectors and scales whose shape only looks plain."""
    vector = torch.arange(256.0)
    assert not torch.equal(packing.unpack_channels(vector), vector)
    scales = torch.arange(4 * 256.0).view(4, 256)
    assert not torch.equal(packing.unpack_scales(scales), scales.T)
