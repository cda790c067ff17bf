"""What families refuse among stored numbers, each beside the nearest number that is right.

A refusal alone is half a test: it would pass, too, if good checkpoints were refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import modelopt_fp8, modelopt_nvfp4, msmodelslim, nunchaku_svdq
from quantmatrix.families.nunchaku_svdq.layers import BARE_SCALE
from quantmatrix.families.nunchaku_svdq.writer import code_nvfp4, find_smoothing
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import kernels_of, svdq_packing
from quantmatrix.kernels.number_formats import E4M3_MAX, decode_e2m1
from quantmatrix.kernels.nvfp4_arithmetic import decode_residual, encode, round_inputs
from quantmatrix.runtime.plan.placement import ignored_names
from quantmatrix.runtime.stored_values import NUMBERS, check_plain, check_stored

TINY = torch.finfo(torch.float32).tiny
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
          torch.float8_e5m2: "F8_E5M2", torch.uint8: "U8", torch.int8: "I8"}  # fmt: skip


def make_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


# --- msmodelslim -----------------------------------------------------------------------------


def make_int8(word: str) -> dict[str, torch.Tensor]:
    """A layer of 6 outputs and 8 inputs with a bias."""
    calibration = Calibration(torch.full((8,), -2.0), torch.full((8,), 3.0))
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0, -1.0, 0.125])
    scheme = msmodelslim.SCHEMES[word]
    return msmodelslim.quantize(make_weight(6, 8), scheme, bias=bias, calibration=calibration)


def find_int8(word: str, **changes: torch.Tensor) -> tuple[str, str] | None:
    return msmodelslim.find_fault(make_int8(word) | changes, msmodelslim.SCHEMES[word])


@pytest.mark.parametrize("name", modelopt_nvfp4.SCHEMES)
def test_inputs_are_declared_where_they_are_coded(name: str) -> None:
    group = modelopt_nvfp4.describe_group(name, {"a": modelopt_nvfp4.SCHEMES[name]})
    number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    coded = {} if name == modelopt_nvfp4.WEIGHT_ONLY else {"input_activations": number}
    assert {key: group.get(key) for key in ("weights", *coded)} == {"weights": number, **coded}
    assert ("input_activations" in group) is bool(coded)


@pytest.mark.parametrize(
    ("offset", "ok"),
    [(-128.0, True), (128.0, True), (127.0, True), (0.0, True),
     (-129.0, False), (129.0, False), (0.5, False), (127.5, False)],
)  # fmt: skip
def test_zero_points(offset: float, ok: bool) -> None:
    """The zero point is a whole number of -128 to 128: the whole range may be on one side of 0."""
    stored = make_int8("W8A8")
    moved = torch.tensor([offset])
    shift = (stored["input_offset"] - moved).double() * stored["weight"].double().sum(dim=1)
    folded = (stored["quant_bias"].double() + shift).round().to(torch.int32)
    found = find_int8("W8A8", input_offset=moved, quant_bias=folded)
    assert found == (
        None if ok else ("input_offset", f"holds {offset:g}: expected a whole number, -128 to 128")
    )


def test_codes_of_four_bits() -> None:
    stored = make_int8("W4A4_DYNAMIC")["weight"]
    for code, text in ((-8, ""), (7, ""), (-9, "-9 to"), (8, "to 8: expected -8 to 7")):
        codes = stored.clamp(-7, 6)
        codes[2, 3] = code
        found = find_int8("W4A4_DYNAMIC", weight=codes)
        assert (found is None) if not text else (found is not None and text in found[1])
    wide = make_int8("W8A8_DYNAMIC")["weight"].clone()
    wide[0, 0] = -128
    assert find_int8("W8A8_DYNAMIC", weight=wide) is None


@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "deq_scale"])
@pytest.mark.parametrize(
    ("value", "ok"),
    [(TINY, True), (TINY / 2, False), (0.0, False), (-1.0, False), (math.inf, False),
     (math.nan, False)],
)  # fmt: skip
def test_scales_are_normal_numbers(name: str, value: float, ok: bool) -> None:
    word = "W8A8_DYNAMIC" if name == "weight_scale" else "W8A8"
    stored = make_int8(word)
    scales = stored[name].clone()
    scales.view(-1)[-1] = value
    found = find_int8(word, **{name: scales})
    if ok:
        assert found is None or "expected positive" not in found[1]
    else:
        assert found == (name, f"holds {value:g}: expected positive, finite numbers")


def test_a_row_of_zeros_may_have_a_scale_of_zero() -> None:
    stored = make_int8("W8A8_DYNAMIC")
    scales, codes = stored["weight_scale"].clone(), stored["weight"].clone()
    scales[3], codes[3] = 0.0, 0
    assert find_int8("W8A8_DYNAMIC", weight=codes, weight_scale=scales) is None
    codes[3, 7] = 1
    found = find_int8("W8A8_DYNAMIC", weight=codes, weight_scale=scales)
    assert found == ("weight_scale", "holds 0: expected positive, finite numbers")


def test_offsets_of_weights_are_zeros() -> None:
    offsets = torch.zeros(6, 1)
    assert find_int8("W8A8_DYNAMIC", weight_offset=offsets) is None
    offsets[5] = -1
    found = find_int8("W8A8_DYNAMIC", weight_offset=offsets)
    assert found is not None
    assert found[0] == "weight_offset"
    assert found[1].startswith("holds 1: expected zeros")
    scheme = msmodelslim.SCHEMES["W8A8_DYNAMIC"]
    stored = make_int8("W8A8_DYNAMIC")
    assert "weight_scale" in msmodelslim.canonical(stored, scheme)
    with pytest.raises(CheckpointError, match="weight_offset of a W8A8_DYNAMIC layer holds 1"):
        msmodelslim.canonical(stored | {"weight_offset": offsets}, scheme)


@pytest.mark.parametrize(
    ("share", "ok"), [(0.019, True), (-0.019, True), (0.021, False), (-0.021, False)]
)
def test_two_records_of_one_scale(share: float, ok: bool) -> None:
    stored = make_int8("W8A8")
    product = stored["deq_scale"].double() / stored["input_scale"].double()
    scales = (product * (1 + share)).float().unsqueeze(-1)
    found = find_int8("W8A8", weight_scale=scales)
    assert (found is None) is ok
    assert ok or (found is not None and found[0] == "deq_scale")


@pytest.mark.parametrize(("steps", "ok"), [(2, True), (-2, True), (3, False), (-3, False)])
def test_two_records_of_one_bias(steps: int, ok: bool) -> None:
    """A bias of 0 leaves only what rounding gives; row 2 has one."""
    folded = make_int8("W8A8")["quant_bias"].clone()
    folded[2] += steps
    found = find_int8("W8A8", quant_bias=folded)
    assert (found is None) is ok
    assert ok or (found is not None and found[0] == "quant_bias")


@pytest.mark.parametrize(("exponent", "ok"), [(0, True), (254, True), (255, False)])
def test_exponents_of_mx_blocks(exponent: int, ok: bool) -> None:
    scheme = msmodelslim.SCHEMES["W8A8_MXFP8"]
    stored = msmodelslim.quantize(make_weight(4, 64), scheme)
    stored["weight_scale"][3, 1] = exponent
    found = msmodelslim.find_fault(stored, scheme)
    assert (found is None) is ok


# --- SVDQuant --------------------------------------------------------------------------------

INT4 = replace(nunchaku_svdq.SCHEMES["int4_r16"])
FP4 = replace(nunchaku_svdq.SCHEMES["nvfp4_r16"])


def make_svdq(scheme: Any) -> dict[str, torch.Tensor]:
    limit = torch.full((128,), 2.0)
    weight = make_weight(128, 128).bfloat16()
    return dict(nunchaku_svdq.quantize(weight, scheme, calibration=Calibration(-limit, limit)))


@pytest.mark.parametrize("name", ["smooth_factor", "wcscales", "wtscale"])
@pytest.mark.parametrize(
    ("value", "ok"), [(1e-6, True), (0.0, False), (-1e-6, False), (math.inf, False)]
)
def test_what_inputs_are_divided_by(name: str, value: float, ok: bool) -> None:
    stored = make_svdq(FP4)
    numbers = stored.get(name, torch.ones(128 if name == "wcscales" else 1)).clone()
    numbers.view(-1)[-1] = value
    found = nunchaku_svdq.find_fault(stored | {name: numbers}, FP4)
    assert (found is None) is ok
    assert ok or (found is not None and found[0] == name)


def test_group_scales_of_zero() -> None:
    """Of int4 a group of zeros may have a scale of zero, another may not; a negative one never."""
    codes, scales = torch.ones(128, 128, dtype=torch.int8), torch.ones(128, 2)
    codes[5, 64:], scales[5, 1] = 0, 0.0
    bytes_ = ((codes[:, 1::2] << 4) | (codes[:, ::2] & 15)).view(torch.uint8)
    stored = make_svdq(INT4)
    own = {"qweight": svdq_packing.pack_codes(bytes_).view(torch.int8),
           "wscales": svdq_packing.pack_scales(scales.bfloat16())}  # fmt: skip
    assert nunchaku_svdq.find_fault(stored | own, INT4) is None
    scales[6, 1] = 0.0
    own["wscales"] = svdq_packing.pack_scales(scales.bfloat16())
    found = nunchaku_svdq.find_fault(stored | own, INT4)
    assert found is not None
    assert found[1].startswith("holds zero scales beside codes that are not 0")
    scales[6, 1] = -1.0
    own["wscales"] = svdq_packing.pack_scales(scales.bfloat16())
    found = nunchaku_svdq.find_fault(stored | own, INT4)
    assert found is not None
    assert found[1].startswith("holds negative scales")


@pytest.mark.parametrize(("largest", "ok"), [(BARE_SCALE, True), (18.0, False)])
def test_group_scales_that_stand_alone(largest: float, ok: bool) -> None:
    """18 is the next e4m3 number above 16."""
    stored = {k: v for k, v in make_svdq(FP4).items() if k not in ("wtscale", "wcscales")}
    scales = stored["wscales"].float().clamp(max=8)
    scales[0, 0] = largest
    stored["wscales"] = scales.to(torch.float8_e4m3fn)
    found = nunchaku_svdq.find_fault(stored, FP4)
    assert (found is None) is ok
    beside = nunchaku_svdq.find_fault(stored | {"wtscale": torch.tensor([0.5])}, FP4)
    assert beside is None


# --- scales and codes of every family --------------------------------------------------------


def check(scheme: Any, **tensors: torch.Tensor) -> None:
    headers = {
        f"a.{suffix}": TensorHeader(f"a.{suffix}", DTYPES[t.dtype], tuple(t.shape), "x.safetensors")
        for suffix, t in tensors.items()
    }
    checkpoint: Any = object.__new__(Checkpoint)
    object.__setattr__(checkpoint, "tensors", headers)
    check_stored(checkpoint, "a", scheme, tensors)


FP8 = modelopt_fp8.FP8
CODES = torch.tensor([[0.0, -0.0], [0.0, 2.0]]).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("suffix", "value", "text"),
    [
        ("input_scale", 1e-30, ""),
        ("input_scale", 0.0, "zero or negative"),
        ("input_scale", -1e-30, "zero or negative"),
        ("input_scale", math.inf, "NaN or infinite"),
        ("weight_scale", 1e-30, ""),
        ("weight_scale", -1e-30, "negative"),
        ("weight_scale", math.nan, "NaN or infinite"),
        ("weight_scale", 0.0, "zero \\(beside codes that are not\\)"),
        ("pre_quant_scale", -1.0, ""),
    ],
)
def test_scales_of_a_layer(suffix: str, value: float, text: str) -> None:
    tensors = {"weight": CODES, suffix: torch.tensor(value)}
    if not text:
        check(FP8, **tensors)
        return
    with pytest.raises(CheckpointError, match=f"x.safetensors: tensor a.{suffix} holds {text}"):
        check(FP8, **tensors)


def test_zero_scales_stand_beside_zero_codes_only() -> None:
    """A code of -0 is a zero; of rows and of blocks only their own codes count."""
    check(FP8, weight=CODES[:1], weight_scale=torch.tensor(0.0))
    channel = families.load("fp8").SCHEMES["channel-dynamic"]
    check(channel, weight=CODES, weight_scale=torch.tensor([0.0, 1.0]))
    with pytest.raises(CheckpointError, match="zero \\(beside"):
        check(channel, weight=CODES, weight_scale=torch.tensor([1.0, 0.0]))
    block = replace(families.load("fp8").SCHEMES["block-dynamic"], block=(1, 1))
    table = torch.ones(2, 2)
    table[0, 1] = table[1, 0] = 0.0
    check(block, weight=CODES, weight_scale_inv=table)
    table[1, 1] = 0.0
    with pytest.raises(CheckpointError, match="weight_scale_inv holds zero"):
        check(block, weight=CODES, weight_scale_inv=table)


def test_codes_and_biases_are_numbers() -> None:
    largest = torch.tensor([[E4M3_MAX, -E4M3_MAX]]).to(torch.float8_e4m3fn)
    check(FP8, weight=largest, weight_scale=torch.tensor(1.0))
    broken = torch.tensor([[0x7E, 0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="holds NaN codes"):
        check(FP8, weight=broken, weight_scale=torch.tensor(1.0))
    checkpoint: Any = object.__new__(Checkpoint)
    header = TensorHeader("a.bias", "I8", (2,), "x.safetensors")
    object.__setattr__(checkpoint, "tensors", {"a.bias": header})
    for dtype in NUMBERS:
        check_plain(checkpoint, "a.bias", "a.bias", torch.zeros(2, dtype=dtype))
    with pytest.raises(CheckpointError, match=r"tensor a.bias holds torch.int8 codes"):
        check_plain(checkpoint, "a.bias", "a.bias", torch.zeros(2, dtype=torch.int8))


@pytest.mark.parametrize(
    ("word", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_codes_up_to_the_largest_number_are_numbers_and_the_next_is_none(
    word: str, dtype: torch.dtype
) -> None:
    """What is refused says within which numbers a cast gives codes of numbers."""
    scheme = replace(FP8, weight=word)
    largest = torch.finfo(dtype).max
    codes = torch.tensor([[largest, -largest]]).to(dtype)
    assert codes.float().tolist() == [[largest, -largest]]
    check(scheme, weight=codes, weight_scale=torch.tensor(1.0))
    said = rf"within {largest:.0f}; casts .*: hold values within {largest:.0f} before the cast"
    for place in (0, 1):
        above = codes.view(torch.uint8).clone()
        above[0, place] += 1
        with pytest.raises(CheckpointError, match=said):
            check(scheme, weight=above.view(dtype), weight_scale=torch.tensor(1.0))


# --- NVFP4 groups of every amplitude ---------------------------------------------------------


@pytest.mark.parametrize("amplitude", [0.0, 1e-30, 1e-12, 1e-6, 1e-3, 1.0])
def test_a_group_that_is_tiny_beside_another_has_numbers(amplitude: float) -> None:
    """Its scale would round to zero in e4m3, and zeros divided by it to NaN."""
    weight = torch.zeros(2, 32)
    weight[0, :16] = torch.linspace(-6.0, 6.0, 16)
    weight[1, 18:20] = amplitude
    codes, scales, whole = encode(weight)
    decoded = decode_residual(
        {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}, torch.float32
    )
    assert (scales.float() > 0).all()
    assert torch.isfinite(decoded).all()
    assert not decoded[1, :18].any()
    # not farther than half of the smallest step: code 0.5 of the smallest scale, 2^-9
    assert (decoded[1] - weight[1]).abs().max() <= max(amplitude / 8, 2.0**-9 * whole / 4)


@pytest.mark.parametrize("amplitude", [0.0, 1e-30, 1e-12, 1e-6, 1.0])
def test_inputs_of_tiny_amplitude_have_numbers(amplitude: float) -> None:
    x = torch.zeros(3, 32)
    x[0, 16:] = 4.0
    x[2, :2] = amplitude
    found = round_inputs(x, torch.tensor(4.0 / (6 * 448)))
    assert torch.isfinite(found).all()
    assert not found[1].any()
    assert not found[2, 2:].any()
    assert found[0, 16:].equal(x[0, 16:])


# --- tensors that are left aside -------------------------------------------------------------

LEFTOVERS = [
    ("msmodelslim", "blocks.0.attn1.q_rot", True),
    ("msmodelslim", "blocks.0.attn1.k_rot", True),
    ("msmodelslim", "blocks.0.attn1.to_q_rot", True),
    ("msmodelslim", "blocks.0.attn1.to_k_rot", True),
    ("msmodelslim", "blocks.0.attn1.v_rot", False),
    ("msmodelslim", "blocks.0.attn1.q_rot.weight", False),
    ("msmodelslim", "blocks.0.attn1.to_q.weight", False),
    ("modelopt-fp8", "blocks.0.to_q.input_quantizer._amax", True),
    ("modelopt-fp8", "blocks.0.to_q.weight_quantizer._scale", True),
    ("modelopt-fp8", "blocks.0.quantizer.weight", False),
    ("modelopt-fp8", "blocks.0.to_q.input_scale", False),
    ("modelopt-nvfp4", "blocks.0.to_q.output_quantizer._amax", True),
    ("modelopt-nvfp4", "blocks.0.to_q.comfy_quant", True),
    ("modelopt-nvfp4", "blocks.0.to_q.input_scale", True),
    ("modelopt-nvfp4", "blocks.0.to_q.weight_scale", False),
    ("modelopt-nvfp4", "blocks.0.comfy_quant.weight", False),
]


@pytest.mark.parametrize(("family", "name", "aside"), LEFTOVERS)
def test_leftovers_of_writers(family: str, name: str, aside: bool) -> None:
    ignored: Any = families.load(family)
    assert bool(ignored.ignored(name)) is aside
    checkpoint: Any = object.__new__(Checkpoint)
    object.__setattr__(checkpoint, "tensors", {name: None, "proj_out.weight": None})
    assert set(ignored_names(checkpoint, family)) == ({name} if aside else set())
    assert ignored_names(checkpoint, None) == {}


def test_reasons_are_those_of_the_tensors() -> None:
    assert "attention scores do not see" in str(msmodelslim.ignored("a.q_rot"))
    assert "calibration" in str(modelopt_fp8.ignored("a.input_quantizer._amax"))
    assert "calibration state" in str(modelopt_nvfp4.ignored("a.input_quantizer._amax"))
    assert "format marker" in str(modelopt_nvfp4.ignored("a.comfy_quant"))
    assert "unused where the layer" in str(modelopt_nvfp4.ignored("a.input_scale"))


@pytest.mark.parametrize("largest", [2.0**-120, 0.3, 0.999, 1.0, 1.5, 448.0, 1e30])
def test_blocks_of_mxfp8_have_the_power_of_two_of_their_largest_number(largest: float) -> None:
    """OCP MX: the exponent of the largest number less 8, so that its code lies in 256 to 448."""
    weight = torch.zeros(2, 64)
    weight[0, 32:34] = torch.tensor([-largest, largest / 3])
    stored = msmodelslim.quantize(weight, msmodelslim.SCHEMES["W8A8_MXFP8"])
    exponents = stored["weight_scale"].int() - 127
    assert exponents[0, 1] == max(math.frexp(largest)[1] - 1 - 8, -127)
    assert (exponents[1] == -127).all()
    code = abs(float(stored["weight"][0, 32].float()))
    assert 256 <= code <= 448 or largest < 2.0**-118
    decoded = msmodelslim.dequantize(stored, msmodelslim.SCHEMES["W8A8_MXFP8"])
    assert (decoded - weight).abs().max() <= largest / 8


def test_nvfp4_codes_of_svdquant_have_no_negative_zero() -> None:
    """Small negative numbers round to code 0, never to 8, which the engine's format lacks."""
    rest = torch.full((128, 128), -0.01)
    rest[:, ::16] = 6.0
    codes, decoded, _ = code_nvfp4(rest, 16, torch.bfloat16, 1)
    assert set(codes.unique().tolist()) == {0, 7}
    assert decoded[:, 1].abs().max() == 0
    assert decode_e2m1(codes[:1, :2]).tolist() == [[6.0, 0.0]]


def test_channels_that_are_never_used_are_smoothed_by_numbers() -> None:
    """sqrt(input range / weight range): a range of zero counts as 1e-5, on either side."""
    weight = torch.ones(4, 4)
    weight[:, 1] = 0.0
    limit = torch.tensor([1.0, 1.0, 0.0, 1.0])
    found = find_smoothing(weight, Calibration(-limit, limit))
    plain = torch.tensor([1.0, 1e5, 1e-5, 1.0], dtype=torch.float64).sqrt()
    assert torch.allclose(found, plain / plain.log().mean().exp(), rtol=1e-6)
    assert found.log().mean().abs() < 1e-12
    assert find_smoothing(weight, None).equal(torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(("item", "size"), [(2, 256 * 2 * 129), (4, 256 * 4 * 129)])
def test_bytes_of_a_merged_layer(item: int, size: int, unsigned: bool) -> None:
    """A weight of 256 x 128 and a bias; of an unsigned layer a float32 sum per output, too."""
    merged = next(k for k in kernels_of("linear.svdq") if k.backend == "merged")
    scheme = replace(INT4, unsigned=unsigned)
    assert merged.footprint(scheme, 256, 128, item) == size + 4 * 256 * unsigned


def test_inputs_that_mxfp8_cannot_cut_are_told() -> None:
    scheme = msmodelslim.SCHEMES["W8A8_MXFP8"]
    assert msmodelslim.quantize(make_weight(4, 96), scheme)["weight_scale"].shape == (4, 3)
    with pytest.raises(UsageError, match="inputs are a multiple of 32, not 80: keep"):
        msmodelslim.quantize(make_weight(4, 80), scheme)
