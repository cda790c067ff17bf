"""Number formats against brute force: nearest code, ties to even, packing both ways."""

from __future__ import annotations

import pytest
import torch

from quantmatrix.kernels import number_formats


def test_e2m1_codes_are_the_nearest_numbers() -> None:
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.0, -0.0])])
    codes = number_formats.encode_e2m1(x)
    table = torch.tensor(number_formats.E2M1_VALUES)
    best = (x.clamp(-6, 6).unsqueeze(-1) - table).abs().amin(dim=-1)
    assert torch.allclose((number_formats.decode_e2m1(codes) - x.clamp(-6, 6)).abs(), best)


@pytest.mark.parametrize(
    ("tie", "code"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_ties_go_to_the_even_code(tie: float, code: int, sign: int) -> None:
    expected = code | (8 if sign < 0 else 0)
    assert number_formats.encode_e2m1(torch.tensor([sign * tie])).item() == expected


def test_e2m1_saturates_and_keeps_the_sign_of_zero() -> None:
    codes = number_formats.encode_e2m1(torch.tensor([100.0, -100.0, -0.0, 0.1]))
    assert codes.tolist() == [7, 15, 8, 0]


def test_e4m3_saturates() -> None:
    x = torch.tensor([1e9, -1e9, 448.0, 449.0, 0.3])
    assert number_formats.round_e4m3(x).float().tolist() == [448.0, -448.0, 448.0, 448.0, 0.3125]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_of_8_bits_are_widened_to_the_bits_of_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All codes, infinities and NaN too; in pieces, of which the last is shorter, and in any layout."""
    codes = torch.arange(3 * 256).to(torch.uint8).view(dtype).view(6, 128)
    expected = codes.float()
    tables: list[int] = []
    arange = torch.arange
    monkeypatch.setattr(
        torch, "arange", lambda n, **words: (tables.append(n), arange(n, **words))[1]
    )
    for piece in (1, 100, 768, number_formats.PIECE):
        monkeypatch.setattr(number_formats, "PIECE", piece)
        found = number_formats.widen_float8(codes)
        assert found.view(torch.int32).equal(expected.view(torch.int32))
    assert tables == [256] * 4
    turned = number_formats.widen_float8(codes.t())
    assert turned.stride() == codes.t().float().stride()
    assert turned.nan_to_num(7).equal(expected.t().nan_to_num(7))
    assert number_formats.widen_float8(codes[:0]).shape == (0, 128)
    assert number_formats.widen_float8(codes.to("meta")).dtype == torch.float32


def test_nibbles_even_column_low() -> None:
    packed = number_formats.pack_nibbles(torch.tensor([[0xA, 0xB, 1, 2]]))
    assert packed.tolist() == [[0xBA, 0x21]]
    assert number_formats.unpack_nibbles(packed).tolist() == [[0xA, 0xB, 1, 2]]
    assert number_formats.swap_nibbles(packed).tolist() == [[0xAB, 0x12]]


def test_nibbles_of_signed_storage() -> None:
    packed = number_formats.pack_nibbles(torch.arange(16).view(1, 16)).view(torch.int8)
    assert number_formats.unpack_nibbles(packed).flatten().tolist() == list(range(16))


def test_odd_columns_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="even number of columns"):
        number_formats.pack_nibbles(torch.zeros(2, 3))


def test_int4_is_twos_complement() -> None:
    numbers = torch.arange(-8, 8).float()
    codes = number_formats.encode_int4(numbers)
    assert codes.tolist() == [*range(8, 16), *range(8)]
    assert number_formats.decode_int4(codes).tolist() == numbers.tolist()
    assert number_formats.encode_int4(torch.tensor([9.0, -9.0, 2.5])).tolist() == [7, 8, 2]


@pytest.mark.parametrize("shape", [(256, 256), (130, 200), (1, 1), (128, 129)])
def test_blocks_ragged_edges(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    amax = number_formats.find_block_amax(x, (128, 128))
    spread = number_formats.expand_blocks(amax, (128, 128), shape)
    assert spread.shape == x.shape
    for row in range(amax.shape[0]):
        for column in range(amax.shape[1]):
            rows = slice(row * 128, row * 128 + 128)
            columns = slice(column * 128, column * 128 + 128)
            assert (spread[rows, columns] == x[rows, columns].abs().max()).all()


@pytest.mark.parametrize("code", range(256))
def test_every_code_of_e4m3_is_a_nan_or_not(code: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    codes[1, 2] = code
    codes = codes.view(torch.float8_e4m3fn)
    assert number_formats.holds_nan(codes) == bool(codes.float().isnan().any())
