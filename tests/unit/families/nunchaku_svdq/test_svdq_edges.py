"""SVDQuant: numbers that are written, told and refused, each edge from both sides."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import nunchaku_svdq as svdq
from quantmatrix.families.nunchaku_svdq import choices, faults, flags, layers, writer
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import svdq_packing as packing
from quantmatrix.kernels.number_formats import unpack_nibbles
from quantmatrix.request import Request

INT4, NVFP4, AWQ = (svdq.SCHEMES[word] for word in ("int4_r32", "nvfp4_r32", "awq"))
Shape = tuple[int, ...]
Headers = Mapping[str, tuple[str, Shape]]


# --- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ],
)
def test_the_dtype_of_a_layer(dtype: torch.dtype, found: torch.dtype) -> None:
    assert writer.find_layer_dtype(torch.zeros(2, dtype=dtype)) == found


AWQ_TEXT = (
    "an AWQ layer needs out_features a multiple of 4 and in_features of 64, this one is {} x {}: keep "
    "it in full precision"
)
SVDQ_TEXT = (
    "an SVDQuant layer needs out_features and in_features that are multiples of 128, this one is {} x "
    "{}: keep it in full precision"
)


@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "text"),
    [
        (AWQ, 4, 64, ""),
        (AWQ, 12, 192, ""),
        (AWQ, 6, 64, AWQ_TEXT),
        (AWQ, 5, 64, AWQ_TEXT),
        (AWQ, 4, 96, AWQ_TEXT),
        (AWQ, 4, 65, AWQ_TEXT),
        (INT4, 128, 256, ""),
        (NVFP4, 384, 128, ""),
        (INT4, 64, 128, SVDQ_TEXT),
        (INT4, 128, 192, SVDQ_TEXT),
        (INT4, 129, 128, SVDQ_TEXT),
        (NVFP4, 128, 127, SVDQ_TEXT),
    ],
)
def test_sizes_of_layers(scheme: Any, rows: int, columns: int, text: str) -> None:
    weight = torch.zeros(rows, columns)
    if not text:
        writer.check_shape(weight, scheme)
        return
    with pytest.raises(UsageError, match=f"^{re.escape(text.format(rows, columns))}$"):
        writer.check_shape(weight, scheme)


def test_codes_of_int4() -> None:
    """Scales are amax / 7, those of zeros 1; codes are two's complement."""
    rest = torch.zeros(128, 128)
    rest[0, :4] = torch.tensor([3.5, -3.5, 1.0, -0.5])
    rest[0, 64:67] = torch.tensor([-14.0, 6.0, 3.1])
    codes, decoded, stored = writer.code_int4(rest, 64, torch.bfloat16, 1)
    scales = packing.unpack_scales(stored["wscales"])
    assert scales.dtype == torch.bfloat16
    assert scales[0].tolist() == [0.5, 2.0]
    assert scales[1:].eq(1).all()
    assert codes[0, :4].tolist() == [7, 9, 2, 15]
    assert codes[0, 64:67].tolist() == [9, 3, 2]
    assert decoded[0, :4].tolist() == [3.5, -3.5, 1.0, -0.5]
    assert decoded[0, 64:67].tolist() == [-14.0, 6.0, 4.0]
    assert not decoded[1:].any()
    assert not codes[1:].any()
    assert list(stored) == ["wscales"]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_codes_of_nvfp4(parts: int) -> None:
    """One scale a layer, or one a part of it; that of zeros is 1."""
    rest = torch.zeros(384, 128)
    rest[0, 0], rest[1, 16], rest[383, 127] = 2688.0, 1344.0, -672.0
    codes, decoded, stored = writer.code_nvfp4(rest, 16, torch.bfloat16, parts)
    outer = [1.0, 1.0, 1.0] if parts == 1 else [1.0, 0.25] if parts == 2 else [1.0, 1.0, 0.25]
    if parts == 1:
        assert list(stored) == ["wscales", "wtscale"]
        assert stored["wtscale"].tolist() == [1.0]
        assert stored["wtscale"].dtype == torch.bfloat16
    else:
        assert list(stored) == ["wscales", "wcscales"]
        found = packing.unpack_channels(stored["wcscales"])
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [scale for scale in outer for _ in range(384 // parts)]
    scales = packing.unpack_scales(stored["wscales"]).float()
    assert scales[0].tolist() == [448.0, *[0.0] * 7]
    assert scales[1].tolist() == [0.0, 224.0, *[0.0] * 6]
    assert scales[383, 7] == 112.0 / outer[-1]
    assert (codes[0, 0], codes[1, 16], codes[383, 127]) == (7, 7, 15)
    assert decoded.equal(rest)


def test_codes_of_awq() -> None:
    """Codes 0 to 15 stand for scale x (code - 7); what is outside is held at the ends."""
    groups = torch.tensor([[[-3.5, 0.0, 0.5, 3.5, 4.0, 9.0, -9.0, 0.3]]], dtype=torch.float64)
    numbers, codes, scales, zeros = writer.code_awq(groups, torch.tensor([[0.5]]).bfloat16())
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[[0, 7, 8, 14, 15, 15, 0, 8]]]
    assert numbers.tolist() == [[[-3.5, 0.0, 0.5, 3.5, 4.0, 4.0, -3.5, 0.5]]]
    assert scales.tolist() == [[0.5]]
    assert zeros.tolist() == [[-3.5]]
    assert (numbers.dtype, scales.dtype, zeros.dtype) == (
        torch.float64,
        torch.bfloat16,
        torch.bfloat16,
    )


def test_a_group_of_zeros_in_awq() -> None:
    """Its scale is 1: by 0 nothing could be divided, and the bias would be no number."""
    weight = torch.zeros(8, 128)
    weight[:, 64:] = torch.linspace(-7.0, 7.0, 64)
    calibration = Calibration(torch.full((128,), -1.0), torch.full((128,), 3.0))
    stored = svdq.quantize(weight, AWQ, bias=torch.full((8,), 2.0), calibration=calibration)
    assert stored["wscales"][0].tolist() == [1.0] * 8
    assert stored["wzeros"][0].tolist() == [-7.0] * 8
    codes = unpack_nibbles(packing.unpack_awq(stored["qweight"]))
    assert set(codes[:, :64].flatten().tolist()) == {7}
    assert torch.isfinite(stored["bias"]).all()
    assert stored["wscales"].shape == (2, 8)


def test_the_middle_of_inputs_is_taken_out_of_the_bias() -> None:
    """Middle (low + high) / 2: what rounding loses times it is added."""
    low, high = torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([4.0, 3.0, -7.0])
    found = writer.find_middle(torch.zeros(2, 3), Calibration(low, high))
    assert found.dtype == torch.float64
    assert found.tolist() == [1.5, 2.5, -3.5]
    none = writer.find_middle(torch.zeros(2, 3), None)
    assert (none.dtype, none.tolist()) == (torch.float64, [0.0, 0.0, 0.0])
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    calibration = Calibration(torch.full((64,), 1.0), torch.full((64,), 5.0))
    stored = svdq.quantize(weight, AWQ, bias=torch.full((4,), 10.0), calibration=calibration)
    lost = (weight.double() - svdq.dequantize(stored, AWQ).double()).sum(dim=1) * 3
    assert lost.abs().max() > 0.1
    assert stored["bias"].equal((10 + lost).bfloat16())
    plain = svdq.quantize(weight, AWQ, bias=torch.full((4,), 10.0))
    assert plain["bias"].tolist() == [10.0] * 4


def test_awq_tries_smaller_ranges() -> None:
    """One outlier among many: cut off by the range that costs least, found here one by one."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(6)) * 0.3
    weight[:, 70] = torch.tensor([0.8, -1.6, 3.0, 1.1])
    stored = svdq.quantize(weight, AWQ)
    amax = weight.double().unflatten(1, (2, 64)).abs().amax(dim=-1)
    best = None
    for part in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        scale = (amax / 7 * part).bfloat16().double()
        zero = (-7 * scale).bfloat16().double()
        groups = weight.double().unflatten(1, (2, 64))
        codes = ((groups - zero[..., None]) / scale[..., None]).round().clamp(0, 15)
        cost = (codes * scale[..., None] + zero[..., None] - groups).square().sum(-1)
        best = cost if best is None else torch.minimum(best, cost)
    error = (svdq.dequantize(stored, AWQ).double() - weight.double()).square()
    torch.testing.assert_close(error.unflatten(1, (2, 64)).sum(-1), best, rtol=1e-4, atol=1e-9)
    assert (stored["wscales"].T.double() / (amax / 7) < 0.95).any()


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (256, 128)])
@pytest.mark.parametrize("sign", [1, -1])
def test_directions_have_a_sign(rows: int, columns: int, sign: int) -> None:
    """The largest part of each is positive, whichever side of the weight is the smaller one."""
    generator = torch.Generator().manual_seed(8)
    left = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, columns, generator=generator, dtype=torch.float64)
    down, up = writer.find_low_rank(sign * left @ right, 16)
    assert (down.shape, up.shape) == ((16, columns), (rows, 16))
    torch.testing.assert_close(up @ down, sign * left @ right)
    side = up[:, 0] if rows <= columns else down[0]
    assert side[side.abs().argmax()] > 0
    torch.testing.assert_close(side.norm(), torch.tensor(1.0, dtype=torch.float64))


# --- what a header says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "number", "group", "scale"),
    [(INT4, "int4", 64, None), (NVFP4, "fp4_e2m1_all", 16, "fp8_e4m3_nan")],
)
def test_a_declaration(scheme: Any, number: str, group: int, scale: str | None) -> None:
    declared = svdq.declare({"m": AWQ, "a": scheme}, ["x"])
    block = json.loads(declared.metadata["quantization_config"])
    weight = None if scale is None else [None, scale]
    assert block == {
        "method": "svdquant",
        "rank": 32,
        "weight": {"dtype": number, "group_size": group, "scale_dtype": weight},
        "activation": {"dtype": number, "group_size": group, "scale_dtype": scale},
    }
    for kept, skipped in (
        ("noise_refiner.0.attention.to_q", True),
        ("noise_refiner.0.attention.to_k", False),
        ("layers.0.attention.to_q", False),
    ):
        text = svdq.declare({"a": scheme}, ["x", kept]).metadata["quantization_config"]
        assert json.loads(text).get("skip_refiners", False) is skipped
    assert json.loads(svdq.declare({"m": AWQ}, []).metadata["quantization_config"])["rank"] == 0


@pytest.mark.parametrize("said", ["fp4", "fp4_e2m1", "fp4_e2m1_all"])
def test_names_of_four_bit_floats(said: str) -> None:
    block = {"weight": {"dtype": said, "group_size": 16}, "rank": 32}
    layers.check_header(Checkpoint("here", (), {}, quantization=block), "a", NVFP4)
    with pytest.raises(CheckpointError) as caught:
        layers.check_header(Checkpoint("here", (), {}, quantization=block), "a", INT4)
    assert str(caught.value) == (
        'here: weight.dtype is "fp4_e2m1_all", but the tensors of a say "int4": the header belongs to '
        "another file"
    )


@pytest.mark.parametrize("said", ["e", "int4", "zz"])
def test_names_of_other_numbers(said: str) -> None:
    block = {"activation": {"dtype": said}}
    with pytest.raises(CheckpointError) as caught:
        layers.check_header(Checkpoint("here", (), {}, quantization=block), "a", NVFP4)
    assert str(caught.value) == (
        f'here: activation.dtype is "{said}", but the tensors of a say "fp4_e2m1_all": the header '
        "belongs to another file"
    )


@pytest.mark.parametrize(
    ("skip", "name", "refused"),
    [(True, "noise_refiner.0.a", True), (True, "refiner.a", False), (False, "x_refiner.a", False),
     (None, "x_refiner.a", False)],
)  # fmt: skip
def test_refiners_that_are_skipped(skip: bool | None, name: str, refused: bool) -> None:
    checkpoint = Checkpoint("here", (), {}, quantization={"skip_refiners": skip})
    if not refused:
        layers.check_header(checkpoint, name, INT4)
        return
    with pytest.raises(CheckpointError) as caught:
        layers.check_header(checkpoint, name, INT4)
    assert str(caught.value) == (
        f"here: skip_refiners is true, but {name} is quantized: the header belongs to another file"
    )


# --- layers ----------------------------------------------------------------------------------

NEW: Headers = {
    "qweight": ("I8", (256, 192)),
    "wscales": ("BF16", (6, 256)),
    "smooth_factor": ("BF16", (384,)),
    "proj_down": ("BF16", (384, 32)),
    "proj_up": ("BF16", (256, 32)),
}
FP4: Headers = {**NEW, "wscales": ("F8_E4M3", (24, 256))}


def make(stored: Mapping[str, Headers], **more: Any) -> Checkpoint:
    tensors = {
        f"{layer}.{suffix}": TensorHeader(f"{layer}.{suffix}", dtype, shape, f"{layer}.st")
        for layer, headers in stored.items()
        for suffix, (dtype, shape) in headers.items()
    }
    return Checkpoint("here", ("f.st",), tensors, **more)


def refuse(stored: Mapping[str, Headers], act: Any = layers.schemes, **more: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        act(make(stored, **more))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"wscales": ("BF16", (6, 128))},
            "a.st: tensor a.wscales is BF16 [6, 128], expected BF16 or F16 [6, 256] beside a qweight of "
            "[256, 192]: the file is damaged or of another format",
        ),
        (
            {"qweight": ("I8", (256, 96))},
            "a.st: tensor a.qweight has shape [256, 96], which is no layer whose sizes are multiples of "
            "128: the file is damaged or of another format",
        ),
        (
            {"qweight": ("I8", (256,))},
            "a.st: tensor a.qweight has shape [256], which is no layer whose sizes are multiples of "
            "128: the file is damaged or of another format",
        ),
        (
            {"qweight": ("I8", (0, 192))},
            "a.st: tensor a.qweight has shape [0, 192], which is no layer whose sizes are multiples of "
            "128: the file is damaged or of another format",
        ),
        (
            {"qweight": ("I8", (256, 0))},
            "a.st: tensor a.qweight has shape [256, 0], which is no layer whose sizes are multiples of "
            "128: the file is damaged or of another format",
        ),
        (
            {"proj_down": ("BF16", (384,))},
            "a.st: tensor a.proj_down has shape [384]: expected [K, rank] with a rank that is a "
            "multiple of 16; the file is damaged or of another format",
        ),
        (
            {"proj_down": ("BF16", (384, 24))},
            "a.st: tensor a.proj_down has shape [384, 24]: expected [K, rank] with a rank that is a "
            "multiple of 16; the file is damaged or of another format",
        ),
        (
            {"smooth": ("BF16", (384,))},
            "a.st: tensors a.smooth and a.smooth_factor are two names of one thing, of which a layer has "
            "one: remove the one that is not meant",
        ),
        (
            {"extra": ("BF16", (384,))},
            "a.st: tensor a.extra is not part of an SVDQuant layer (int4) as the engine reads it, and a "
            "is one: leaving it out could change the result. Take it out of the file if it means "
            "nothing (a LoRA must be merged before a model is quantized)",
        ),
        (
            {"qweight": ("I32", (64, 192)), "wzeros": ("BF16", (6, 256)), "extra": ("BF16", ())},
            "a.st: tensor a.extra is not part of an AWQ layer as the engine reads it, and a is "
            "one: leaving it out could change the result. Take it out of the file if it means nothing "
            "(a LoRA must be merged before a model is quantized)",
        ),
    ],
)
def test_a_layer_that_is_not_whole(changes: Any, text: str) -> None:
    assert refuse({"a": {**NEW, **changes}}) == text


@pytest.mark.parametrize(
    ("form", "kind"), [(NEW, "an SVDQuant layer (int4)"), (FP4, "an SVDQuant layer (nvfp4)")]
)
@pytest.mark.parametrize("suffix", ["smooth_factor", "proj_up"])
def test_a_tensor_that_is_missing(form: Headers, kind: str, suffix: str) -> None:
    kept = {name: spec for name, spec in form.items() if name != suffix}
    assert refuse({"a": kept}) == (
        f"a.st: tensor a.{suffix} is missing beside a.qweight: expected the tensors of {kind}; the file "
        "is incomplete"
    )


def test_codes_that_are_missing() -> None:
    assert refuse({"b": NEW, "a": {"wzeros": ("BF16", (6, 256)), "smooth": ("BF16", (3,))}}) == (
        "a.st: tensor a.qweight is missing beside a.smooth: expected the codes of the layer; the file "
        "is incomplete"
    )


def test_what_lies_below_a_layer() -> None:
    assert refuse({"a": NEW, "a.lora": {"up": ("BF16", (2, 2)), "down": ("BF16", (2, 2))}}) == (
        "a.lora.st: tensor a.lora.down is not part of a quantized layer as the engine reads it, and a "
        "is one: leaving it out could change the result. Take it out of the file if it means nothing "
        "(a LoRA must be merged before a model is quantized)"
    )


def test_two_kinds_of_layers() -> None:
    assert refuse({"c": NEW, "a": NEW, "b": FP4}) == (
        "b.st: layer c is int4 of rank 32, layer b is nvfp4 of rank 32: expected one of each throughout a "
        "file; it was put together from two checkpoints"
    )


@pytest.mark.parametrize("word", ["int4_r32", "nvfp4_r32", "awq"])
def test_only_int4_is_unsigned_after_a_gelu(word: str) -> None:
    scheme = svdq.SCHEMES[word]
    assert layers.after_gelu(scheme) == replace(scheme, unsigned=word == "int4_r32")


# --- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "groups", "columns"),
    [
        ("BF16", 6, 0),
        ("F16", 6, 0),
        ("BF16", 24, 16),
        ("F8_E4M3", 24, 0),
        ("F8_E4M3", 6, 64),
        ("BF16", 3, 128),
        ("BF16", 12, 32),
        ("F32", 6, 64),
        ("BF16", 5, 0),
        ("BF16", 0, 0),
    ],
)
def test_groups_of_scales(dtype: str, groups: int, columns: int) -> None:
    header = TensorHeader("a.wscales", dtype, (groups, 256), "f.st")
    if not columns:
        faults.check_groups(header, 256, 384)
        return
    with pytest.raises(CheckpointError) as caught:
        faults.check_groups(header, 256, 384)
    assert str(caught.value) == (
        f"f.st: tensor a.wscales holds one {dtype} scale per {columns} columns: expected one of BF16 or "
        "F16 per 64 (int4) or of F8_E4M3 per 16 (nvfp4), which is what the engine reads. Quantize with "
        "one of these"
    )


@pytest.mark.parametrize("shape", [(24, 255), (24, 257), (24,), (24, 256, 1)])
def test_scales_of_other_shapes_are_no_groups(shape: Shape) -> None:
    faults.check_groups(TensorHeader("a.wscales", "BF16", shape, "f.st"), 256, 384)


@pytest.mark.parametrize(
    ("stored", "rank"),
    [
        ({"a.proj_down": (384, 48)}, 48),
        ({"a.lora_down": (384, 64)}, 64),
        ({"a.proj_down": (384,), "b.proj_down": (384, 80)}, 80),
        ({"a.proj_down": (384, 0), "b.proj_down": (384, 80)}, 80),
        ({"a.proj_down": (3, 4, 5)}, 16),
        ({"a.proj_up": (384, 48)}, 16),
        ({}, 16),
    ],
)
def test_the_rank_of_a_file(stored: Mapping[str, Shape], rank: int) -> None:
    tensors = {name: TensorHeader(name, "BF16", shape, "f.st") for name, shape in stored.items()}
    assert faults.find_rank(Checkpoint("here", ("f.st",), tensors)) == rank


def test_a_layer_without_a_branch() -> None:
    bare = {n: spec for n, spec in NEW.items() if not n.startswith("proj_")}
    assert refuse({"b": NEW, "a": bare}, faults.check) == (
        "a.st: layer a has no low-rank branch (proj_down and proj_up, of old lora_down and lora_up): "
        "expected one in every layer, all of one rank. If it was quantized without, add one of zeros, "
        "which changes nothing: proj_down [384, 32] and proj_up [256, 32]"
    )
    for changes in (
        {"proj_up": NEW["proj_up"]},
        {"lora_down": NEW["proj_down"]},
        {"wzeros": ("BF16", (6, 256))},
        {"qweight": ("I8", (256, 192, 1))},
    ):
        faults.check(make({"a": {**bare, **changes}}))
    for suffix in ("smooth_factor", "wscales", "qweight"):
        faults.check(make({"a": {n: spec for n, spec in bare.items() if n != suffix}}))
    old = {"smooth": bare["smooth_factor"], "qweight": NEW["qweight"], "wscales": NEW["wscales"]}
    assert "[384, 16] and proj_up [256, 16]" in refuse({"a": old}, faults.check)


@pytest.mark.parametrize(
    ("scheme", "outer", "largest", "told"),
    [
        (NVFP4, {"wcscales": 1.0}, 18.0, True),
        (NVFP4, {"wtscale": 1.0}, 18.0, True),
        (NVFP4, {"wtscale": 1.0, "wcscales": 1.0}, 448.0, True),
        (NVFP4, {"wtscale": 1.0}, 16.0, False),
        (NVFP4, {"wtscale": 1.0, "wcscales": 1.5}, 18.0, False),
        (NVFP4, {"wtscale": 0.5}, 18.0, False),
        (NVFP4, {}, 18.0, False),
        (INT4, {"wcscales": 1.0}, 18.0, False),
        (replace(NVFP4, weight="int8"), {"wcscales": 1.0}, 18.0, False),
        (replace(NVFP4, weight="a"), {"wcscales": 1.0}, 18.0, False),
        (replace(NVFP4, op="linear.a"), {"wcscales": 1.0}, 18.0, False),
        (AWQ, {"wcscales": 1.0}, 18.0, False),
    ],
)
def test_an_outer_scale_that_was_lost(
    scheme: Any, outer: Mapping[str, float], largest: float, told: bool
) -> None:
    scales = torch.full((24, 128), 2.0)
    scales[5, 7] = largest
    stored = {name: torch.full((1 if name == "wtscale" else 128,), v) for name, v in outer.items()}
    found = faults.find_lost_scale({"wscales": scales, **stored}, scheme)
    if not told:
        assert found is None
        return
    assert found == (
        "wscales",
        f"holds scales of up to {largest:g}, and what stands beside them is 1 throughout: expected the "
        "scale of the layer that they go with. The engine keeps wtscale as a plain number, so that "
        "saving a model of its classes drops it; name the file which that model was loaded from",
    )


def test_scales_without_an_outer_one_in_words() -> None:
    scales = torch.tensor([[2.0, 18.5]])
    for scheme, told in ((NVFP4, True), (replace(NVFP4, weight="a"), False)):
        found = layers.find_wrong_number({"wscales": scales, "qweight": torch.ones(1)}, scheme)
        text = (
            "holds scales of up to 18.5 with neither wtscale nor wcscales beside it: expected the scale "
            "of the layer, or of its outputs, that they go with"
        )
        assert found == (("wscales", text) if told else None)


@pytest.mark.parametrize(
    ("suffix", "value", "text"),
    [
        ("smooth", math.nan, "holds NaN or infinite numbers: expected finite ones"),
        ("smooth", 0.0, "holds zero or negative numbers: expected positive ones"),
        ("smooth_orig", math.nan, ""),
        ("smooth_factor_orig", -1.0, ""),
        ("proj_up", -1.0, ""),
        ("proj_up", math.inf, "holds NaN or infinite numbers: expected finite ones"),
        ("bias", -1.0, ""),
        ("wscales", -0.5, "holds negative scales: expected positive ones"),
    ],
)
def test_numbers_of_a_layer(suffix: str, value: float, text: str) -> None:
    numbers = {"wscales": torch.ones(2, 128), "qweight": torch.zeros(128, 64, dtype=torch.int8)}
    own = numbers.get(suffix, torch.ones(128)).clone()
    own.view(-1)[-1] = value
    found = layers.find_wrong_number({**numbers, suffix: own}, INT4)
    assert found == ((suffix, text) if text else None)


# --- flags and names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"enable_svdquant": True},
         "--enable-svdquant needs --transformer-weights-path: name the SVDQuant file"),
        ({"enable_svdquant": True, "weights_paths": {"transformer": "x"}}, ""),
        ({"enable_svdquant": False}, ""),
        ({"quantization_precision": "int4"}, ""),
        ({"quantization_precision": "nvfp4"}, ""),
        ({"quantization_precision": "fp4"},
         "--quantization-precision fp4: expected int4 or nvfp4 (fp4 in file names is written nvfp4 "
         "here)"),
        ({"quantization_precision": "fp3"},
         "--quantization-precision fp3: expected int4 or nvfp4"),
        ({"quantization_precision": "fp5"},
         "--quantization-precision fp5: expected int4 or nvfp4"),
        ({"quantization_rank": 1}, ""),
        ({"quantization_rank": 0}, "--quantization-rank 0: must be greater than 0"),
        ({"quantization_rank": -3}, "--quantization-rank -3: must be greater than 0"),
    ],
)  # fmt: skip
def test_flags_before_a_file_is_opened(words: Any, text: str) -> None:
    request = Request(model_path="m", **words)
    if not text:
        flags.check_flags(request)
        return
    with pytest.raises(UsageError) as caught:
        flags.check_flags(request)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("name", "steps", "text"),
    [
        ("x-lightning-8steps.st", 8, ""),
        ("x-lightning-8steps.st", None, ""),
        ("x-8steps.st", 4, ""),
        *(
            ("x-lightning-8steps.st", steps, f"x-lightning-8steps.st is a Lightning checkpoint for 8 "
             f"steps, this run takes {steps}: pass --num-inference-steps 8")
            for steps in (7, 9, 50)
        ),
    ],
)  # fmt: skip
def test_steps_of_lightning(name: str, steps: int | None, text: str) -> None:
    checkpoint = replace(make({"a": NEW}), reference=name)
    request = Request(model_path="m", num_inference_steps=steps)
    assert flags.check_file(request, checkpoint, "why") == ([text] if text else [])


@pytest.mark.parametrize(
    ("words", "name", "text"),
    [
        ({"quantization_rank": 33}, "x",
         "f.st: --quantization-rank 33, but its tensors are of 32: correct the flag"),
        ({"quantization_precision": "nvfp4"}, "x",
         "f.st: --quantization-precision nvfp4, but its tensors are of int4: correct the flag"),
        ({}, "svdq-fp4_r32-x",
         "f.st: the file name says nvfp4, but its tensors are of int4: correct the name, or overrule it "
         "with --quantization-precision"),
        ({"quantization_precision": "int4"}, "svdq-fp4_r64-x",
         "f.st: the file name says 64, but its tensors are of 32: correct the name, or overrule it with "
         "--quantization-rank"),
        ({"quantization_precision": "int4", "quantization_rank": 32}, "svdq-fp4_r64-x", ""),
    ],
)  # fmt: skip
def test_flags_and_name_beside_the_tensors(words: Any, name: str, text: str) -> None:
    checkpoint = replace(make({"a": NEW}), reference=name)
    request = Request(model_path="m", **words)
    if not text:
        assert flags.check_file(request, checkpoint, "why") == []
        return
    with pytest.raises(CheckpointError) as caught:
        flags.check_file(request, checkpoint, "why")
    assert str(caught.value) == text


def test_modulation_alone_has_no_rank() -> None:
    codes: Headers = {
        "qweight": ("I32", (64, 192)),
        "wscales": ("BF16", (6, 256)),
        "wzeros": ("BF16", (6, 256)),
    }
    request = Request(model_path="m", quantization_rank=32)
    with pytest.raises(CheckpointError) as caught:
        flags.check_file(request, make({"a": codes}), "why")
    assert str(caught.value) == (
        "f.st: --quantization-rank 32, but its tensors are of AWQ layers only, which have neither: "
        "correct the flag"
    )


@pytest.mark.parametrize("named", [None, ("int4", 32)])
@pytest.mark.parametrize("enable", [True, False])
def test_files_that_are_not_svdquant(enable: bool, named: tuple[str, int] | None) -> None:
    checkpoint = make({"a": NEW})
    if not enable and named is None:
        note = "--quantization-precision and --quantization-rank count for SVDQuant files only"
        assert flags.refuse_plain(checkpoint, enable, named, (None, None)) == []
        for given in (("int4", None), (None, 32), ("int4", 32)):
            assert flags.refuse_plain(checkpoint, enable, named, given) == [note]
        return
    promise = "--enable-svdquant was given" if enable else "it is named like an SVDQuant file"
    with pytest.raises(CheckpointError) as caught:
        flags.refuse_plain(checkpoint, enable, named, (None, None))
    assert str(caught.value) == (
        f"here: {promise}, but no header says svdquant and no layer has qweight and wscales; "
        "--enable-svdquant false loads it as what it is"
    )


@pytest.mark.parametrize(
    ("precision", "rank", "found"),
    [
        ("int4", None, "int4_r32"),
        ("nvfp4", 16, "nvfp4_r16"),
        ("nvfp4", 256, "nvfp4_r256"),
        ("int4", 0, "--rank 0: expected one of 16, 32, 64, 128, 256"),
        ("int4", 33, "--rank 33: expected one of 16, 32, 64, 128, 256"),
        ("fp4", 32, "--precision fp4: expected int4 or nvfp4"),
        (None, 32, "--precision None: expected int4 or nvfp4"),
    ],
)
def test_names_of_schemes(precision: str | None, rank: int | None, found: str) -> None:
    if found in svdq.SCHEMES:
        assert choices.name_scheme(None, precision, rank) == found
        return
    with pytest.raises(UsageError) as caught:
        choices.name_scheme(None, precision, rank)
    assert str(caught.value) == found
    with pytest.raises(UsageError) as caught:
        choices.name_scheme("int4", precision, rank)
    assert str(caught.value) == "--scheme is not for nunchaku-svdq: give --precision and --rank"


@pytest.mark.parametrize(
    ("layer", "gelu", "interleaved", "found"),
    [
        ("a.to_q", False, False, "same"),
        ("a.to_q", True, False, "unsigned"),
        ("a.norm1.linear", False, True, "awq"),
        ("a.norm1.linear", True, False, "none"),
        ("a.adaLN_modulation", False, False, "none"),
    ],
)
def test_which_layer_gets_which_scheme(
    layer: str, gelu: bool, interleaved: bool, found: str
) -> None:
    expected = {"same": INT4, "unsigned": replace(INT4, unsigned=True), "awq": AWQ, "none": None}
    given = {"raw": False, "gelu": gelu, "interleaved": interleaved, "columns": 384}
    assert choices.scheme_of(layer, INT4, **given) == expected[found]


@pytest.mark.parametrize(
    ("word", "name", "good"),
    [
        ("int4_r32", "svdq-int4_r32-flux.safetensors", True),
        ("nvfp4_r32", "svdq-fp4_r32-flux.safetensors", True),
        ("nvfp4_r128", "x-svdq-fp4_r128-flux.safetensors", True),
        ("int4_r32", "svdq-int4_r32-flux.st", False),
        ("int4_r32", "svdq-int4_r32-flux.zip", False),
        ("int4_r32", "svdq-fp4_r32-flux.safetensors", False),
        ("int4_r32", "svdq-int4_r16-flux.safetensors", False),
        ("nvfp4_r32", "svdq-int4_r32-flux.safetensors", False),
    ],
)
def test_names_of_files(word: str, name: str, good: bool) -> None:
    scheme = svdq.SCHEMES[word]
    if good:
        choices.check_output("flux-1", scheme, Path("out") / name)
        return
    wanted = "svdq-fp4_r32-" if word.startswith("nv") else "svdq-int4_r32-"
    with pytest.raises(UsageError) as caught:
        choices.check_output("flux-1", scheme, Path("out") / name)
    assert str(caught.value) == (
        f"--output-path out/{name}: readers take precision and rank from the file's name: call it "
        f"{wanted}flux-1.safetensors"
    )
