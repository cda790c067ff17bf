"""Edges of the arithmetic, by numbers worked out by hand: limits, ties, groups of zeros, cut rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantmatrix import kernels
from quantmatrix.families import load
from quantmatrix.kernels import (
    gguf_arithmetic,
    int8_arithmetic,
    int8_npu,
    launching,
    linear_convrot,
    linear_fp8,
    linear_gguf,
    linear_int8,
    linear_mxfp4,
    linear_nvfp4,
    linear_svdq,
    linear_w4a16,
    number_formats,
    nvfp4_arithmetic,
    packed_triton,
    scale_layouts,
    svdq_arithmetic,
)
from quantmatrix.scheme import Scheme

NVFP4 = load("modelopt-nvfp4").SCHEMES["NVFP4"]
FP8 = Scheme("linear.fp8", "fp8", "e4m3", "tensor", "tensor-dynamic", block=(2, 3))
SVDQ = Scheme("linear.svdq", "svdq", "int4", "group", "group-dynamic", group_size=4)


@pytest.mark.parametrize("biased", [True, False])
def test_the_packed_kernel_of_codes_with_zeros_adds_a_bias(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)
    monkeypatch.setattr(packed_triton, "decode_zeros", lambda *all: given.extend(all) or weight)
    buffers: Any = {"weight": 1, "weight_scale": 2, "weight_zero": 3}
    x = torch.tensor([[1.0, 10.0]], dtype=torch.bfloat16)
    bias = torch.tensor([0.5, 0.0, -1.0]) if biased else None
    found = linear_w4a16.run_packed(x, buffers, bias, FP8)
    assert given == [1, 2, 3, torch.bfloat16]
    assert (found.tolist(), found.dtype) == (
        [[21.5, 43.0, 64.0] if biased else [21.0, 43.0, 65.0]], torch.bfloat16,
    )  # fmt: skip


def fill(columns: int, *first: float) -> torch.Tensor:
    """One row of float32, zeros behind the numbers given."""
    row = torch.zeros(1, columns)
    row[0, : len(first)] = torch.tensor(first)
    return row


# --- GGUF ------------------------------------------------------------------------------------------


def test_q8_0_rounds_half_away_from_zero() -> None:
    row = fill(64, 127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 2.4, -126.5, 126.4, -127.0)
    blocks = gguf_arithmetic.encode_q8_0(row)
    found = gguf_arithmetic.decode_blocks(blocks, "Q8_0")
    assert found[:11].tolist() == [127, 1, -1, 2, 3, -3, 2, -127, 126, -127, 0]
    assert blocks[0, :2].view(torch.float16).item() == 1.0
    assert not blocks[0, 34:].any()  # a group of zeros: no scale, no codes
    assert not found[11:].any()


def test_q5_0_holds_its_codes_within_five_bits() -> None:
    """The largest magnitude is code 0; what has the other sign ends at code 31."""
    row = fill(96, -16.0, 16.0, 15.6, 15.4, 14.5, 14.4, 0.5, 0.4, -0.5, -0.6, -15.5, -15.6)
    row[0, 32:35] = torch.tensor([16.0, -16.0, 3.0])
    found = gguf_arithmetic.decode_blocks(gguf_arithmetic.encode_q5_0(row), "Q5_0")
    assert found[:13].tolist() == [-16, 15, 15, 15, 15, 14, 1, 0, 0, -1, -15, -16, 0]
    assert found[32:36].tolist() == [16, -15, 3, 0]
    assert not found[64:].any()


def encode_groups(**groups: tuple[float, ...]) -> list[list[float]]:
    """What a block of Q4_K decodes to, by its eight groups; `g1=(...)` begins one with numbers."""
    block = torch.zeros(8, 32)
    for name, numbers in groups.items():
        block[int(name[1:]), : len(numbers)] = torch.tensor(numbers)
    blocks = gguf_arithmetic.encode_q4_k(block.view(1, 256))
    assert blocks.shape == (1, 144)
    decoded: list[list[float]] = gguf_arithmetic.decode_blocks(blocks, "Q4_K").view(8, 32).tolist()
    return decoded


def test_q4_k_codes_end_at_fifteen() -> None:
    """A scale of 1.4 is stored as 1, so that 21 is out of reach; ties go to the even code."""
    found = encode_groups(g0=(945.0, 63.0, 94.5), g1=(21.0, 15.4, 6.5, 7.5, 14.4))
    assert found[0][:4] == [945, 63, 126, 0]
    assert found[1][:6] == [15, 15, 6, 8, 14, 0]
    assert not any(map(any, found[2:]))


def test_q4_k_codes_begin_at_zero() -> None:
    """A minimum of -1.4 is stored as -1, so that it is out of reach."""
    found = encode_groups(g0=(236.25,), g2=(-1.4, 2.75, 0.5), g7=(-63.0, -1.0))
    assert found[0][:2] == [236.25, 0]
    assert found[2][:4] == [-1, 2.75, 0.5, 0]
    assert found[7][:3] == [-63, 0.75, 0.75]


def test_q4_k_of_numbers_below_zero_alone() -> None:
    """The range of a group always holds zero."""
    block = torch.full((1, 256), -6.3)
    found = gguf_arithmetic.decode_blocks(gguf_arithmetic.encode_q4_k(block), "Q4_K")
    torch.testing.assert_close(found, torch.full((256,), -6.3), rtol=1e-3, atol=0)


def test_six_bits_hold_what_a_scale_rounded_down_leaves() -> None:
    """1.4 steps of float16 become one, and 63 times 1.4 is more than 63."""
    step = 2.0**-24
    d, codes = gguf_arithmetic._round_six_bits(
        torch.tensor([[88.2, 62.6, 62.4, 0.6, 0.4, 2.5, 3.5, 0.0]]) * step
    )
    assert d.tolist() == [[step]]
    assert codes.tolist() == [[63, 63, 62, 1, 0, 2, 4, 0]]
    zeros = gguf_arithmetic._round_six_bits(torch.zeros(1, 8))
    assert zeros[0].tolist() == [[0.0]]
    assert zeros[1].tolist() == [[0.0] * 8]
    assert gguf_arithmetic._round_six_bits(torch.tensor([[63.0, -2.0]]))[1].tolist() == [[63, 0]]


def test_twelve_bytes_hold_sixteen_numbers_of_six_bits() -> None:
    scales = torch.tensor([[1, 62, 5, 35, 16, 33, 47, 63]], dtype=torch.uint8)
    minima = torch.tensor([[63, 2, 40, 7, 31, 48, 9, 18]], dtype=torch.uint8)
    packed = gguf_arithmetic._pack_k_scales(scales, minima)
    assert packed.shape == (1, 12)
    found = gguf_arithmetic.read_k_scales(packed)
    assert found[0].tolist() == scales.tolist()
    assert found[1].tolist() == minima.tolist()
    assert packed[0].tolist() == [
        *(1 | 1 << 6, 62 | 2 << 6, 5 | 2 << 6, 35 | 3 << 6),
        *(63 | 1 << 6, 2 | 3 << 6, 40, 7 | 1 << 6),
        *(0 | 15 << 4, 1 | 0 << 4, 15 | 9 << 4, 15 | 2 << 4),
    ]


@pytest.mark.parametrize(
    ("kind", "at"), [(k, at) for k, places in gguf_arithmetic.HALVES.items() for at in places]
)
def test_the_largest_scales_are_numbers(kind: str, at: int) -> None:
    size = gguf_arithmetic.BLOCKS[kind][1]
    blocks = torch.full((2, size), 0x01, dtype=torch.uint8)
    for number in (65504.0, -65504.0):
        blocks[1, at : at + 2] = torch.tensor([number]).half().view(torch.uint8)
        assert not gguf_arithmetic.holds_bad_scale(blocks, kind)


@pytest.mark.parametrize(
    ("low", "high", "bad"),
    [
        (0xC0, 0x70, True), (0xFF, 0xFF, True), (0xC0, 0x60, False), (0x80, 0x70, False),
        (0x40, 0x70, False), (0xC0, 0x50, False), (0xC0, 0x30, False), (0x3F, 0xFF, False),
        (0xFF, 0x8F, False),
    ],
)  # fmt: skip
def test_the_scale_of_iq1_m_lies_in_high_halves(low: int, high: int, bad: bool) -> None:
    blocks = torch.zeros(2, gguf_arithmetic.BLOCKS["IQ1_M"][1], dtype=torch.uint8)
    blocks[1, 53], blocks[1, 55] = low, high
    assert gguf_arithmetic.holds_bad_scale(blocks, "IQ1_M") is bad


def test_blocks_are_decoded_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme("linear.gguf", "Q8_0", "q8_0", "group", "none", group_size=32)
    weight = gguf_arithmetic.encode_q8_0(torch.arange(-160.0, 320.0).view(5, 96))
    whole = linear_gguf.decode({"weight": weight}, scheme)
    monkeypatch.setattr(nvfp4_arithmetic, "CHUNK", 2 * 96)
    found = linear_gguf.decode_to(weight, scheme, torch.float16)
    assert found.shape == (5, 96)
    assert torch.equal(found, whole.half())


# --- number formats and layouts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (7.4, 7), (7.5, 7), (7.6, 7), (6.5, 6), (5.5, 6), (0.5, 0), (-0.5, 0), (-0.6, -1),
        (-7.4, -7), (-7.6, -8), (-8.4, -8), (-8.6, -8), (-100.0, -8), (100.0, 7),
    ],
)  # fmt: skip
def test_int4_ends_and_ties(number: float, found: int) -> None:
    code = number_formats.encode_int4(torch.tensor([number]))
    assert code.item() == found & 15
    assert number_formats.decode_int4(code).item() == found


def test_every_code_of_e2m1() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    found = number_formats.decode_e2m1(torch.arange(16))
    assert found.tolist() == [*magnitudes, *(-x for x in magnitudes)]
    assert torch.signbit(found).tolist() == [False] * 8 + [True] * 8
    assert number_formats.encode_e2m1(found).tolist() == list(range(16))


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (447.0, 448.0), (463.0, 448.0), (465.0, 448.0), (1e9, 448.0), (431.0, 416.0),
        (-431.0, -416.0), (-1e9, -448.0), (2.0**-9, 2.0**-9), (2.0**-10, 0.0), (1.0625, 1.0),
        (1.1875, 1.25),
    ],
)  # fmt: skip
def test_e4m3_ends_and_ties(number: float, found: float) -> None:
    assert number_formats.round_e4m3(torch.tensor([number])).float().item() == found


def test_odd_columns_in_words() -> None:
    words = "an even number of columns is needed to pack nibbles: 5"
    with pytest.raises(ValueError, match=f"^{words}$"):
        number_formats.pack_nibbles(torch.zeros(4, 5))


def test_blocks_that_are_no_squares() -> None:
    x = torch.tensor([[1.0, -9, 2, 3], [4, 5, 6, -7], [0, -1, 0, 8]])
    found = number_formats.find_block_amax(x, (2, 3))
    assert found.tolist() == [[9, 7], [1, 8]]
    spread = number_formats.expand_blocks(found, (2, 3), (3, 4))
    assert spread.tolist() == [[9, 9, 9, 7], [9, 9, 9, 7], [1, 1, 1, 8]]


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ((128, 4), (128, 4)), ((129, 4), (256, 4)), ((128, 5), (128, 8)), ((1, 1), (128, 4)),
        ((300, 10), (384, 12)),
    ],
)  # fmt: skip
def test_tables_are_padded_to_whole_tiles(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    assert scale_layouts.pad_shape(*shape) == padded


def test_layouts_refuse_in_words() -> None:
    words = "tiled scales [128, 8]: expected 128 x 4 values for 100 rows and 3 columns"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        scale_layouts.untile_scales(torch.zeros(128, 8, dtype=torch.uint8), 100, 3)
    with pytest.raises(ValueError, match=r"^48 rows: expected a multiple of 32$"):
        scale_layouts.find_shuffle(48)


@pytest.mark.parametrize(("rows", "found"), [(1, 128), (127, 128), (128, 128), (129, 256)])
def test_rows_are_padded_with_zeros(rows: int, found: int) -> None:
    matrix = torch.full((rows, 3), 7, dtype=torch.uint8)
    padded = scale_layouts.pad_rows(matrix)
    assert padded.shape == (found, 3)
    assert (padded is matrix) == (rows == found)
    assert torch.equal(padded[:rows], matrix)
    assert not padded[rows:].any()


# --- NVFP4 -----------------------------------------------------------------------------------------


def test_groups_of_zeros_and_groups_of_almost_nothing() -> None:
    """The whole scale is 1 here: the largest magnitude is 6 * 448."""
    weight = fill(80, 2688.0, -224.0)
    weight[0, 16:18] = torch.tensor([6.0, -1.0])
    weight[0, 48:50] = torch.tensor([0.0010, -0.0029])
    weight[0, 64:66] = torch.tensor([0.06, 0.005])
    packed, scales, whole = nvfp4_arithmetic.encode(weight)
    assert whole.item() == 1.0
    assert scales.float().tolist() == [[448.0, 1.0, 1.0, 2.0**-9, 5 * 2.0**-9]]
    codes = number_formats.unpack_nibbles(packed)[0].view(5, 16)
    assert codes[:, :2].tolist() == [[7, 9], [7, 10], [0, 0], [1, 11], [7, 1]]
    assert not codes[:, 2:].any()


def test_a_weight_of_zeros_is_zeros() -> None:
    packed, scales, whole = nvfp4_arithmetic.encode(torch.zeros(2, 32))
    assert whole.item() == 1.0
    assert scales.float().tolist() == [[1.0, 1.0]] * 2
    assert not packed.any()
    assert nvfp4_arithmetic.find_scale(torch.tensor([0.5, -3.0]), 4.0).item() == 0.75
    assert nvfp4_arithmetic.find_scale(torch.zeros(3), 4.0).item() == 1.0


def test_scales_of_inputs_end_on_both_sides() -> None:
    row = fill(64, 5376.0, -448.0)
    row[0, 16:18] = torch.tensor([0.0009, 0.0011])
    row[0, 32:35] = torch.tensor([6.0, 1.25, -0.25])
    found = nvfp4_arithmetic.round_inputs(row, torch.tensor(1.0))
    assert found[0, :3].tolist() == [2688, -448, 0]
    assert found[0, 16:19].tolist() == [2.0**-10, 2.0**-10, 0]
    assert found[0, 32:36].tolist() == [6, 1, 0, 0]
    assert not found[0, 48:].any()


@pytest.mark.parametrize(
    ("rows", "columns", "starts"),
    [(5, 300, [0, 2, 4]), (4, 300, [0, 2]), (3, 700, [0, 1, 2]), (3, 1000, [0, 1, 2]),
     (2, 0, [0]), (0, 7, [])],
)  # fmt: skip
def test_rows_are_cut_by_how_much_they_hold(
    rows: int, columns: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvfp4_arithmetic, "CHUNK", 700)
    cuts = list(nvfp4_arithmetic.cut_rows(rows, columns))
    assert [cut.start for cut in cuts] == starts
    step = {300: 2, 700: 1, 1000: 1, 0: 700, 7: 100}[columns]
    assert all(cut.stop - cut.start == step for cut in cuts)


def test_half_a_million_numbers_are_decoded_at_a_time() -> None:
    assert next(nvfp4_arithmetic.cut_rows(9999, 1024)) == slice(0, 512)


@pytest.mark.parametrize("rows_at_a_time", [1, 4])
def test_recoding_a_merged_layer_row_by_row(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's largest magnitude becomes 448; a row of zeros stays one."""
    monkeypatch.setattr(nvfp4_arithmetic, "CHUNK", 16 * rows_at_a_time)
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    codes[0, :3] = torch.tensor([7, 10, 3])  # 6, -1, 1.5
    codes[2, :2] = torch.tensor([9, 4])  # -0.5, 2
    codes[3, 5] = 1
    layer = {
        "weight": number_formats.pack_nibbles(codes),
        "weight_scale": torch.tensor([[2.0], [1.0], [1.0], [1.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
        "pre_quant_scale": torch.full((16,), 4.0),
    }
    found = linear_nvfp4.recode(layer, replace(NVFP4, smoothed=True))
    assert set(found) == {"weight", "weight_scale"}
    scales = found["weight_scale"]
    assert scales.shape == (4, 1)
    expected = torch.tensor([[12.0], [1.0], [2.0], [0.5]]) / 448
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)
    numbers = found["weight"].float()
    assert numbers[0, :4].tolist() == [448, -72, 112, 0]
    assert not numbers[1].any()
    assert numbers[2, :3].tolist() == [-112, 448, 0]
    assert numbers[3].tolist() == [0] * 5 + [448] + [0] * 10


# --- int8 ------------------------------------------------------------------------------------------


def test_static_codes_end_on_both_sides() -> None:
    x = torch.tensor([63.7, 63.2, 62.7, -64.2, -64.8, -70.0, 1.25, 1.75, 0.0])
    codes = int8_arithmetic.quantize_static(x, torch.tensor(0.5), torch.tensor(0.0))
    assert codes.dtype == torch.int8
    assert codes.tolist() == [127, 126, 125, -128, -128, -128, 2, 4, 0]
    moved = int8_arithmetic.quantize_static(x, torch.tensor(0.5), torch.tensor(-3.0))
    assert moved.tolist() == [124, 123, 122, -128, -128, -128, 0, 0, -3]


def test_tokens_have_a_scale_of_their_own() -> None:
    x = torch.tensor([[254.0, -3.0, 5.0], [0.0, 0.0, 0.0], [-0.127, 0.0005, 0.0634]])
    codes, scale = int8_arithmetic.quantize_tokens(x, 127)
    torch.testing.assert_close(scale, torch.tensor([[2.0], [0.0], [0.001]]))
    assert codes.tolist() == [[127, -2, 2], [0, 0, 0], [-127, 0, 63]]
    codes, scale = int8_arithmetic.quantize_tokens(x[:2], 7)
    torch.testing.assert_close(scale, torch.tensor([[254 / 7], [0.0]]))
    assert codes.tolist() == [[7, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 2000])
def test_sums_are_exact_at_every_length(columns: int) -> None:
    codes = torch.full((1, columns), -128, dtype=torch.int8)
    codes[0, -1] = 1
    total = int8_arithmetic.accumulate(codes, codes)
    assert total.dtype == torch.float64
    assert total.item() == (columns - 1) * 16384 + 1


# --- SVDQuant --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "x", "found"),
    [
        (SVDQ, [7, -7, 2.5, 3.5], [7, -7, 2, 4]),
        (SVDQ, [0, 0, 0, 0], [0, 0, 0, 0]),
        (SVDQ, [-14, 1, 3, 13], [-14, 0, 4, 12]),
        (replace(SVDQ, unsigned=True), [15, 2.5, -3, 14.4], [15, 2, 0, 14]),
        (replace(SVDQ, unsigned=True), [0, -30, 4, 5], [0, 0, 4, 4]),
        (replace(SVDQ, weight="e2m1"), [6, -2.5, 0.25, 5.1], [6, -2, 0, 6]),
        (replace(SVDQ, weight="e2m1"), [5376, -448, 224, 1000], [2688, -448, 224, 896]),
        (replace(SVDQ, weight="e2m1"), [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_inputs_of_a_group_are_coded(scheme: Scheme, x: list[float], found: list[float]) -> None:
    coded = svdq_arithmetic.code_inputs(torch.tensor([x]), scheme, torch.bfloat16)
    assert coded.tolist() == [found]


def test_the_scale_of_a_group_is_kept_in_its_dtype() -> None:
    x = torch.tensor([[10.0, -3.0, 5.2, 0.5]])
    for dtype in (torch.bfloat16, torch.float16):
        kept = torch.tensor(10 / 7).to(dtype).float().item()
        coded = svdq_arithmetic.code_inputs(x, SVDQ, dtype)
        assert coded.tolist() == [[7 * kept, -2 * kept, 4 * kept, 0]]


# --- FP8, rotations, MXFP4 ------------------------------------------------------------------------


X = torch.tensor([[1.0, -896.0, 2.0, 3.0], [0.0, 0.0, 0.0, 224.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("tensor-dynamic", 2.0),
        ("token-dynamic", [[2.0], [0.5], [1.0]]),
        ("group-dynamic", [[2.0, 3 / 448], [1.0, 0.5], [1.0, 1.0]]),
        ("group-power", [[2.0, 2.0**-7], [2.0**-9, 0.5], [2.0**-9, 2.0**-9]]),
        ("tensor-static", 0.125),
    ],
)
def test_scales_of_inputs(activation: str, expected: Any) -> None:
    scheme = replace(FP8, activation=activation)
    found = linear_fp8.find_input_scale(X, {"input_scale": torch.tensor(0.125)}, scheme)
    torch.testing.assert_close(found, torch.tensor(expected))
    if activation.startswith("t"):
        zeros = linear_fp8.find_input_scale(X[2:], {"input_scale": torch.tensor(0.125)}, scheme)
        assert zeros.flatten().tolist() == [0.125 if activation == "tensor-static" else 1.0]


@pytest.mark.parametrize(
    ("largest", "scale"), [(448.0, 1), (511.0, 1), (512.0, 2), (255.0, 0.5), (256.0, 1)]
)
def test_powers_keep_the_largest_code_between_256_and_448(largest: float, scale: float) -> None:
    scheme = replace(FP8, activation="group-power")
    found = linear_fp8.find_input_scale(torch.tensor([[largest, -1.0, 0.0]]), {}, scheme)
    assert found.tolist() == [[scale]]


def test_rounded_inputs_follow_their_scales() -> None:
    x = torch.tensor([[512.0, -3.0, 17.0, 0.3]])
    found = linear_fp8.round_input(x, {}, replace(FP8, activation="group-power"))
    assert found[0, :3].tolist() == [512, -3, 16]
    assert found[0, 3].item() == 0.3125  # 0.3 is 307.2 steps of 2^-10, and codes there are 32 apart
    assert linear_fp8.round_input(x, {}, replace(FP8, activation="none")).equal(x)


def test_an_activation_that_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"^linear\.fp8 knows no activation group-dual$"):
        linear_fp8.find_input_scale(X, {}, replace(FP8, activation="group-dual"))


@pytest.mark.parametrize(
    ("rows", "count", "blocks"),
    [
        (slice(3, 9), 10, [1, 2]), (slice(9, 10), 10, [3]), (slice(0, 10), 10, [0, 1, 2, 3]),
        (torch.tensor([6, 7, 8, 0, 1, 2]), 10, [2, 0]), (torch.tensor([9]), 10, [3]),
    ],
)  # fmt: skip
def test_rows_that_are_whole_blocks(rows: Any, count: int, blocks: list[int]) -> None:
    assert linear_fp8.find_blocks(rows, count, 3).tolist() == blocks


@pytest.mark.parametrize(
    "rows",
    [slice(1, 4), slice(2, 3), torch.tensor([1, 0, 2]), torch.tensor([0, 1, 3]),
     torch.tensor([3, 4, 5, 1])],
)  # fmt: skip
def test_rows_that_part_a_block(rows: Any) -> None:
    words = "its rows are cut within blocks of 3 rows that share a scale"
    with pytest.raises(ValueError, match=f"^{words}$"):
        linear_fp8.find_blocks(rows, 10, 3)


@pytest.mark.parametrize(
    ("scale", "activation", "expected"),
    [
        ("tensor", "tensor-dynamic", 5 * 7 + 4 + 2 * 5),
        ("tensor", "tensor-static", 5 * 7 + 8 + 2 * 5),
        ("channel", "token-dynamic", 5 * 7 + 4 * 5 + 2 * 5),
        ("channel", "tensor-static", 5 * 7 + 4 * 6 + 2 * 5),
        ("block", "group-dynamic", 5 * 7 + 4 * 3 * 3 + 2 * 5),
        ("none", "none", 5 * 7 + 2 * 5),
    ],
)
def test_bytes_of_fp8_layers(scale: str, activation: str, expected: int) -> None:
    scheme = replace(FP8, scale=scale, activation=activation)
    assert linear_fp8.count_bytes(scheme, 5, 7, 2) == expected
    assert linear_fp8.count_decoded(scheme, 5, 7, 2) == 5 * 8 * 2


COUNTS: list[tuple[Callable[[Scheme, int, int, int], int], Scheme, int]] = [
    (linear_nvfp4.measure_stored, NVFP4, 5 * (24 + 3 + 2) + 8),
    (linear_nvfp4.measure_stored, replace(NVFP4, smoothed=True), 5 * 29 + 8 + 48 * 2),
    (linear_nvfp4.measure_stored, replace(NVFP4, rank=3), 5 * 29 + 8 + 3 * 53 * 2),
    (linear_nvfp4.measure_decoded, NVFP4, 5 * 49 * 2),
    (linear_nvfp4.measure_recoded, NVFP4, 5 * 50 + 8),
    (linear_nvfp4.measure_recoded, replace(NVFP4, smoothed=True), 5 * 50 + 4 * 5),
    (linear_mxfp4.count_bytes, FP8, 5 * 24 + 4 * 5 * 2 + 5 * 2),
    (linear_mxfp4.count_bytes, replace(FP8, smoothed=True), 5 * 24 + 40 + 48 * 2 + 10),
    (linear_mxfp4.count_decoded, FP8, 5 * 49 * 2),
    (int8_arithmetic.count_codes, FP8, 5 * 48 + 5 * 4),
    (int8_arithmetic.count_codes, replace(FP8, activation="tensor-static"), 5 * 48 + 5 * 8 + 8),
    (int8_arithmetic.count_codes, replace(FP8, smoothed=True), 5 * 48 + 5 * 4 + 48 * 2),
]


@pytest.mark.parametrize(("count", "scheme", "expected"), COUNTS)
def test_bytes_of_a_layer_of_5_x_48(
    count: Callable[[Scheme, int, int, int], int], scheme: Scheme, expected: int
) -> None:
    assert count(scheme, 5, 48, 2) == expected


def test_a_rotation_of_four_columns() -> None:
    found = linear_convrot.rotate(torch.tensor([[1.0, 2, 4, 8, 0, 0, 0, 6]]), 4)
    assert found.tolist() == [[-0.5, 3.5, 5.5, 6.5, -3.0, 3.0, 3.0, 3.0]]


def test_rotations_that_are_known() -> None:
    assert linear_convrot.SIZES == (4, 16, 64, 256, 1024, 4096)
    for size in (4, 16, 64):
        matrix = linear_convrot.build_hadamard(size)
        assert torch.equal(matrix @ matrix.T, torch.eye(size))
        assert set(matrix.abs().flatten().tolist()) == {size**-0.5}
    for wrong in (0, 1, 2, 8, 32, 16384):
        words = (
            f"a rotation of {wrong} columns is not known: expected one of "
            "(4, 16, 64, 256, 1024, 4096)"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            linear_convrot.build_hadamard(wrong)
    numbers = torch.tensor([1.0, 2.0])
    assert linear_convrot.rotate(numbers, 0) is numbers


def test_coarse_scales_of_five_hundred_and_twelve_columns() -> None:
    row = fill(1100, 3.0)
    row[0, 511], row[0, 512] = -12.0, 1.5
    assert linear_mxfp4.find_coarse(row).tolist() == [[2.0, 0.25, 1.0]]


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (0.24, 0.0), (0.25, 0.5), (0.74, 0.5), (0.75, 1.0), (1.24, 1.0), (1.25, 1.5), (1.75, 2.0),
        (2.49, 2.0), (2.5, 3.0), (3.49, 3.0), (3.5, 4.0), (4.99, 4.0), (5.0, 6.0), (-5.0, -6.0),
        (-0.25, -0.5),
    ],
)  # fmt: skip
def test_ties_of_mxfp4_go_away_from_zero(number: float, found: float) -> None:
    numbers, exponents = linear_mxfp4.round_groups(fill(40, 6.0, number))
    assert numbers[0, :3].tolist() == [6.0, found, 0.0]
    assert numbers.shape == (1, 40)
    assert exponents.tolist() == [[0, -22]]


# --- bytes and launches ---------------------------------------------------------------------------


W4 = Scheme("linear.w4a16", "awq", "uint4", "group", "none", group_size=16)
SVDQ_COUNTS: list[tuple[Callable[[Scheme, int, int, int], int], Scheme, int]] = [
    (
        linear_svdq.measure_stored,
        replace(SVDQ, rank=3),
        5 * 24 + 5 * 12 * 2 + 20 + 96 + 15 + 6 * 53,
    ),
    (linear_svdq.measure_stored, replace(SVDQ, weight="e2m1"), 5 * 24 + 5 * 12 + 20 + 96 + 15),
    (linear_svdq.measure_packed, replace(SVDQ, rank=3), 689 + 96),
    (linear_svdq.measure_packed, replace(SVDQ, rank=3, unsigned=True), 689 + 96 + 20),
    (linear_svdq.measure_merged, SVDQ, 5 * 3 * 49),
    (linear_svdq.measure_merged, replace(SVDQ, unsigned=True), 5 * 3 * 49 + 20),
    (linear_svdq.measure_decoded, replace(SVDQ, rank=7), 5 * 3 * 49 + 3 * 7 * 53),
    (linear_svdq.measure_decoded, replace(SVDQ, rank=7, unsigned=True), 735 + 1113 + 20),
    (linear_w4a16.measure_stored, W4, 5 * (24 + 4 * 3 + 3)),
    (linear_w4a16.measure_decoded, W4, 5 * 49 * 3),
    (linear_fp8.count_decoded, FP8, 5 * 49 * 3),
    (linear_int8.count_decoded, FP8, 5 * 48 * 3),
]


@pytest.mark.parametrize(("count", "scheme", "expected"), SVDQ_COUNTS)
def test_bytes_of_a_layer_of_5_x_48_with_items_of_three(
    count: Callable[[Scheme, int, int, int], int], scheme: Scheme, expected: int
) -> None:
    assert count(scheme, 5, 48, 3) == expected


def test_packed_svdquant_divides_by_what_smooths() -> None:
    tensors = {
        "weight": torch.zeros(2, 2, dtype=torch.uint8), "weight_scale": torch.ones(2, 1),
        "channel_scale": torch.ones(2), "smooth": torch.tensor([4.0, 0.5, -8.0, 1.0]),
        "proj_down": torch.ones(1, 4), "proj_up": torch.ones(2, 1),
    }  # fmt: skip
    kept = linear_svdq.prepare_packed(tensors, SVDQ, torch.float16)
    assert kept["unsmooth"].tolist() == [0.25, 2.0, -0.125, 1.0]
    assert set(kept) == {*tensors, "unsmooth"} - {"smooth"}
    assert kept["proj_up"].dtype == kept["proj_down"].dtype == torch.float16
    kept = linear_svdq.prepare_packed(tensors, replace(SVDQ, unsigned=True), torch.float16)
    assert kept["shift"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arch", "has"),
    [
        ("sm89", True), ("sm90", True), ("sm100", True), ("sm103", True), ("sm120", True),
        ("sm88", False), ("sm86", False), ("sm80", False), ("sm75", False), ("gfx942", False),
        ("cpu", False), ("sm", False), ("910b", False),
    ],
)  # fmt: skip
def test_who_has_e4m3(arch: str, has: bool) -> None:
    assert launching.has_e4m3(arch) is has


class Started:
    """A kernel, or the program that its first start made."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Started]:
        def start(*arguments: Any, **options: int) -> Started:
            self.calls.append((self.name, grid, arguments[1:], options))
            return Started("program", self.calls)

        return start


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, False), ({"numbers": (7, 48)}, False), ({"numbers": (1, 32)}, True),
        ({"numbers": (16, 32)}, True), ({"numbers": (7, 33)}, True), ({"numbers": (7, 2**31)}, True),
        ({"numbers": (7, 2**31 - 16)}, False), ({"constants": ("b",)}, True), ({"grid": (9, 4)}, False),
        ({"tensors": (torch.zeros(64, dtype=torch.int8),)}, True),
        ({"tensors": (torch.zeros(64, dtype=torch.uint8)[1:],)}, True),
        ({"tensors": (torch.zeros(64, dtype=torch.uint8)[32:],)}, False),
    ],
)  # fmt: skip
def test_a_kernel_is_looked_up_once_for_what_it_is_specialised_on(
    change: dict[str, Any], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_programs", {})
    calls: list[Any] = []
    kernel = Started("kernel", calls)
    first: dict[str, Any] = {
        "grid": (3,), "tensors": (torch.zeros(64, dtype=torch.uint8),), "numbers": (5, 32),
        "constants": ("a",),
    }  # fmt: skip
    for given in (first, {**first, **change}):
        launching.launch(kernel, *given.values(), num_warps=4)
    second = {**first, **change}
    arguments = (*second["numbers"], *second["constants"])
    assert calls[0] == ("kernel", (3,), (5, 32, "a"), {"num_warps": 4})
    if again:
        assert calls[1] == ("kernel", second["grid"], arguments, {"num_warps": 4})
    else:
        assert calls[1] == ("program", (*second["grid"], 1, 1)[:3], arguments, {})


def test_what_a_launch_is_started_with() -> None:
    tensor = torch.zeros(2, device="meta")
    with launching.watch("sm90") as seen, launching.watch("gfx942") as inner:
        launching.launch("k", (3, 5), [tensor], [7], ["c"], num_stages=2)
        assert launching.find_arch(tensor) == "gfx942"
        assert launching.is_watched(tensor)
        assert not launching.is_watched(torch.zeros(2))
    assert seen == []
    assert inner == [launching.Launch("k", (3, 5), (tensor,), (7,), ("c",), {"num_stages": 2})]
    assert inner[0].arguments == (tensor, 7, "c")
    assert not launching.is_watched(tensor)
    assert launching.find_arch(torch.zeros(1)) == "cpu"


@pytest.mark.parametrize(
    ("count", "scheme", "expected"),
    [
        (linear_nvfp4.measure_stored, NVFP4, 5 * (72 + 9 + 3) + 8),
        (int8_npu.count_npu, replace(FP8, weight="int4"), 5 * 143 - 357 + 20),
        (int8_npu.count_npu, replace(FP8, weight="int8"), 5 * 143 + 20),
        (int8_npu.count_npu, replace(FP8, weight="zz"), 5 * 143 + 20),
        (int8_npu.count_npu, replace(FP8, weight="int8", activation="tensor-static"),
         5 * 143 + 5 * 8 + 8 + 2 * 143 * 3),
        (linear_mxfp4.count_bytes, FP8, 715 // 2 + 4 * 5 * 5 + 3 * 5),
        (linear_w4a16.measure_stored, W4, 5 * (72 + 36 + 3)),
        (linear_fp8.count_bytes, replace(FP8, scale="block"), 715 + 4 * 3 * 48 + 15),
    ],
)  # fmt: skip
def test_bytes_of_a_layer_whose_sides_are_odd(
    count: Callable[[Scheme, int, int, int], int], scheme: Scheme, expected: int
) -> None:
    whole = count in (linear_nvfp4.measure_stored, linear_w4a16.measure_stored)
    found = count(scheme, 5, 144 if whole else 143, 3)
    assert found == expected
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("columns", "compiler", "fuses"),
    [(8, True, True), (16384, True, True), (16385, True, False), (8, False, False)],
)
def test_rows_that_a_fused_kernel_quantizes(
    columns: int, compiler: bool, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_int8, "has_compiler", lambda: compiler)
    assert linear_int8.can_fuse(torch.empty(1, columns)) is fuses
    with launching.watch("sm90"):
        assert linear_int8.can_fuse(torch.empty(1, columns, device="meta")) is (columns <= 16384)


@pytest.mark.parametrize(
    ("shape", "sides", "found"),
    [((5, 7), (4, 8), (8, 8)), ((8, 8), (4, 8), (8, 8)), ((1, 9), (32, 8), (32, 16)), ((3, 4), (3, 2), (3, 4))],
)  # fmt: skip
def test_sides_are_padded_to_multiples(
    shape: tuple[int, int], sides: tuple[int, int], found: tuple[int, int]
) -> None:
    matrix = torch.ones(shape)
    padded = linear_int8.pad_to(matrix, *sides)
    assert padded.shape == found
    assert padded.sum() == shape[0] * shape[1]
    assert torch.equal(padded[: shape[0], : shape[1]], matrix)
    assert (padded is matrix) == (shape == found)


def test_every_kernel_says_what_it_multiplies_with() -> None:
    """`plain`: no smoothed layer, none with a branch; `matmul`: what a profiler must see."""
    plain, matmul = {}, {}
    for op in kernels.OPS:
        for kernel in kernels.kernels_of(op):
            plain[f"{op} {kernel.backend}"] = kernel.needs.plain
            matmul[f"{op} {kernel.backend}"] = kernel.matmul
    assert {name for name, asked in plain.items() if asked} == {"linear.nvfp4 packed-fp8"}
    codes = {name for name, found in matmul.items() if found != ("aten::linear",)}
    assert codes == {
        "linear.fp8 torch", "linear.fp8 torch-block", "linear.int8 int8", "linear.int8 npu",
        "linear.convrot int8", "linear.nvfp4 fp8-recode", "linear.nvfp4 packed-fp8",
        *(f"linear.nvfp4 flashinfer-{name}" for name in ("trtllm", "cutlass", "cudnn")),
        *(f"linear.{op} {name}" for op in ("svdq", "w4a16") for name in ("nunchaku", "comfy-kitchen")),
    }  # fmt: skip
