"""Scale layouts against the position formula, written out in plain Python."""

import pytest
import torch

from quantmatrix.kernels import scale_layouts as layouts

SHAPES = [(128, 4), (256, 12), (130, 5), (1, 1), (384, 6), (127, 64)]


def find_position(row: int, column: int, columns: int) -> int:
    tiles = -(-columns // 4)
    line = (row // 128 * tiles + column // 4) * 32 + row % 32
    return line * 16 + row % 128 // 32 * 4 + column % 4


def make_scales(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(1, 127, (rows, columns), generator=generator, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_tiles_follow_the_formula(rows: int, columns: int) -> None:
    scales = make_scales(rows, columns)
    tiled = layouts.tile_scales(scales)
    assert tiled.dtype == scales.dtype
    assert tuple(tiled.shape) == layouts.pad_shape(rows, columns)
    flat = tiled.view(torch.uint8).flatten().tolist()
    plain = scales.view(torch.uint8).tolist()
    expected = [0] * len(flat)
    for row in range(rows):
        for column in range(columns):
            expected[find_position(row, column, columns)] = plain[row][column]
    assert flat == expected


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_untile_undoes_tile_in_any_shape(rows: int, columns: int) -> None:
    scales = make_scales(rows, columns)
    tiled = layouts.tile_scales(scales)
    for shaped in (tiled, tiled.flatten(), tiled.reshape(-1, 16)):
        plain = layouts.untile_scales(shaped, rows, columns)
        assert plain.dtype == scales.dtype
        assert torch.equal(plain.view(torch.uint8), scales.view(torch.uint8))


def test_same_shape_but_another_order() -> None:
    scales = make_scales(256, 8)
    tiled = layouts.tile_scales(scales)
    assert tiled.shape == scales.shape
    assert not torch.equal(tiled.view(torch.uint8), scales.view(torch.uint8))


def test_untile_refuses_another_count() -> None:
    with pytest.raises(ValueError, match="expected 128 x 4 values"):
        layouts.untile_scales(torch.zeros(128, 8, dtype=torch.uint8), 100, 4)


def test_shuffle_moves_row_i_to_i_mod_4_times_8_plus_i_div_4() -> None:
    order = layouts.find_shuffle(96).tolist()
    assert sorted(order) == list(range(96))
    for row in range(96):
        place = row // 32 * 32 + row % 32 % 4 * 8 + row % 32 // 4
        assert order[place] == row
    with pytest.raises(ValueError, match="multiple of 32"):
        layouts.find_shuffle(100)


def test_shuffled_weight_and_scales_stay_together() -> None:
    rows, columns = 200, 6
    weight = torch.randint(0, 256, (rows, columns * 8), dtype=torch.uint8)
    scales = make_scales(rows, columns)
    moved = layouts.shuffle_rows(weight)
    assert moved.shape == (256, columns * 8)
    scale_table = layouts.untile_scales(layouts.shuffle_scales(scales), 256, columns)
    back = torch.argsort(layouts.find_shuffle(256))[:rows]
    assert torch.equal(moved[back], weight)
    assert torch.equal(scale_table.view(torch.uint8)[back], scales.view(torch.uint8))
