"""Every scheme of every family: what is written is what is announced, and rows can be cut out of it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantmatrix import families
from quantmatrix.checkpoints.dtypes import from_torch
from quantmatrix.families import comfyui_int8, modelopt_nvfp4, nunchaku_svdq
from quantmatrix.families.protocol import Calibration
from quantmatrix.scheme import Scheme

ALL = [(name, word) for name in families.IDS for word in families.load(name).SCHEMES]
SPANS = ((0, 128), (128, 256), (256, 384), (128, 384))
RAW = replace(modelopt_nvfp4.NVFP4, swap_nibbles=True, tiled_scales=True)


def draw(rows: int, columns: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 3.0, rows)[:, None]
    return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()


def make(name: str, scheme: Scheme, rows: int = 384, columns: int = 512) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    high = torch.rand(columns, generator=generator) + 1
    weight, bias = draw(rows, columns), torch.linspace(-1.0, 1.0, rows).bfloat16()
    calibration = Calibration(-high / 2, high)
    return families.load(name).quantize(weight, scheme, bias=bias, calibration=calibration)


@pytest.mark.parametrize(("name", "word"), ALL)
def test_rows_of_a_layer_are_those_of_the_whole(name: str, word: str) -> None:
    family = families.load(name)
    scheme = family.SCHEMES[word]
    stored = make(name, scheme)
    whole, plain = family.canonical(stored, scheme), family.dequantize(stored, scheme)
    assert plain.shape == (384, 512)
    for start, stop in SPANS:
        cut = family.cut_rows(stored, scheme, start, stop)
        assert cut.keys() == stored.keys()
        torch.testing.assert_close(
            family.dequantize(cut, scheme), plain[start:stop], rtol=1e-6, atol=0
        )
        bias = family.canonical(cut, scheme)["bias"]
        torch.testing.assert_close(bias, whole["bias"][start:stop])


def test_rows_of_the_first_releases_layout() -> None:
    stored = make("modelopt-nvfp4", RAW, 300, 160)
    plain = modelopt_nvfp4.dequantize(stored, RAW)
    assert stored["weight_scale"].shape == (384, 12)
    for start, stop, tiles in ((0, 128, 128), (128, 300, 256), (256, 300, 128)):
        cut = modelopt_nvfp4.cut_rows(stored, RAW, start, stop)
        assert cut["weight_scale"].shape == (tiles, 12)
        assert modelopt_nvfp4.dequantize(cut, RAW).equal(plain[start:stop])


def test_rows_of_an_fp8_layer_keep_its_scales() -> None:
    fp8 = families.load("modelopt-fp8").SCHEMES["FP8"]
    stored = make("modelopt-nvfp4", fp8)
    cut = modelopt_nvfp4.cut_rows(stored, fp8, 128, 256)
    assert cut["weight_scale"] is stored["weight_scale"]
    assert cut["input_scale"] is stored["input_scale"]
    assert modelopt_nvfp4.dequantize(cut, fp8).equal(
        modelopt_nvfp4.dequantize(stored, fp8)[128:256]
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_that_is_alone_is_not_cut(shape: tuple[int, ...]) -> None:
    """A layer of one row, too: its only scale is that of its row."""
    scheme = comfyui_int8.INT8
    for rows in (1, 5):
        codes = torch.arange(-8, -8 + 4 * rows, dtype=torch.int8).reshape(rows, 4)
        stored = {"weight": codes, "weight_scale": torch.full(shape, 0.5), "bias": torch.ones(rows)}
        cut = comfyui_int8.cut_rows(stored, scheme, 0, 1)
        assert cut["weight_scale"] is stored["weight_scale"]
        assert comfyui_int8.dequantize(cut, scheme).tolist() == [[-4.0, -3.5, -3.0, -2.5]]
        last = comfyui_int8.cut_rows(stored, scheme, rows - 1, rows)
        assert last["weight_scale"].shape == shape
        assert comfyui_int8.canonical(last, scheme)["weight_scale"].tolist() == [0.5]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (2,)])
def test_scales_of_rows_are_cut(shape: tuple[int, ...]) -> None:
    rows = shape[0]
    stored = {
        "weight": torch.ones(rows, 4, dtype=torch.int8),
        "weight_scale": torch.arange(1.0, rows + 1).reshape(shape),
    }
    cut = comfyui_int8.cut_rows(stored, comfyui_int8.INT8, 1, 2)
    assert list(cut) == ["weight", "weight_scale"]
    assert cut["weight_scale"].shape == (1, *shape[1:])
    assert comfyui_int8.dequantize(cut, comfyui_int8.INT8).tolist() == [[2.0] * 4]


@pytest.mark.parametrize(("name", "word"), ALL)
def test_what_is_written_is_what_is_announced_for_uneven_sizes(name: str, word: str) -> None:
    family = families.load(name)
    scheme = family.SCHEMES[word]
    stored = make(name, scheme, 256, 768)
    bias = stored.pop("bias")
    assert bias.shape == (256,)
    specs = family.tensors(scheme, 256, 768)
    for suffix, tensor in stored.items():
        spec = specs.pop(suffix)
        assert from_torch(tensor.dtype) in spec.dtypes, suffix
        assert tuple(tensor.shape) in spec.shapes, suffix
    assert all(spec.optional for spec in specs.values()), specs


@pytest.mark.parametrize(
    ("rows", "columns", "padded"),
    [(64, 1024, 16), (64, 1088, 32), (8, 64, 16), (12, 2048, 32), (12, 2112, 48)],
)
def test_scales_of_awq_may_be_padded(rows: int, columns: int, padded: int) -> None:
    specs = nunchaku_svdq.tensors(nunchaku_svdq.SCHEMES["awq"], rows, columns)
    assert specs["qweight"].shapes == ((rows // 4, columns // 2),)
    for name in ("wscales", "wzeros"):
        assert specs[name].shapes == ((columns // 64, rows), (padded, rows))
        assert specs[name].dtypes == ("BF16", "F16")
    assert list(specs) == ["qweight", "wscales", "wzeros"]


@pytest.mark.parametrize(("word", "columns"), [("int4_r32", 64), ("nvfp4_r32", 16)])
def test_tensors_of_svdquant(word: str, columns: int) -> None:
    specs = nunchaku_svdq.tensors(nunchaku_svdq.SCHEMES[word], 256, 384)
    found: dict[str, Any] = {n: (s.dtypes, s.shapes, s.optional) for n, s in specs.items()}
    halves = ("BF16", "F16")
    outer = {
        "wcscales": (("BF16", "F16", "F32"), ((256,),), True),
        "wtscale": (("BF16", "F16", "F32"), ((1,), ()), True),
    }
    assert found == {
        "qweight": (("I8",), ((256, 192),), False),
        "wscales": (halves if columns == 64 else ("F8_E4M3",), ((384 // columns, 256),), False),
        "smooth_factor": (halves, ((384,),), False),
        "smooth_factor_orig": (halves, ((384,),), True),
        "proj_down": (halves, ((384, 32),), False),
        "proj_up": (halves, ((256, 32),), False),
        **({} if columns == 64 else outer),
    }


@pytest.mark.parametrize("name", families.IDS)
def test_a_layer_is_one_part_unless_more_are_named(name: str) -> None:
    given = inspect.signature(families.load(name).quantize).parameters
    assert [(n, p.default) for n, p in given.items()][2:] == [
        ("bias", None),
        ("calibration", None),
        ("parts", 1),
    ]


@pytest.mark.parametrize(("name", "word"), ALL)
def test_weights_of_zeros_stay_zeros(name: str, word: str) -> None:
    family = families.load(name)
    scheme = family.SCHEMES[word]
    calibration = Calibration(torch.zeros(512), torch.zeros(512))
    stored = family.quantize(torch.zeros(128, 512), scheme, calibration=calibration)
    assert not family.dequantize(stored, scheme).any()
    for suffix in ("weight_scale", "weight_scale_inv", "input_scale"):
        if suffix in stored and stored[suffix].is_floating_point():
            assert (stored[suffix].float() > 0).all(), suffix


@pytest.mark.parametrize("largest", [0.25, 0.75, 1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "word"),
    [("fp8", "tensor-static"), ("fp8", "channel-static"), ("modelopt-fp8", "FP8")],
)
def test_scales_of_fp8_are_those_of_the_largest(name: str, word: str, largest: float) -> None:
    weight = torch.full((2, 3), largest / 4)
    weight[0, 1] = weight[1, 2] = -largest
    calibration = Calibration(torch.full((3,), -5 * largest), torch.full((3,), 2 * largest))
    family = families.load(name)
    stored = family.quantize(weight, family.SCHEMES[word], calibration=calibration)
    expected = torch.tensor(largest) / 448
    assert (stored["weight_scale"] == expected).all()
    assert stored["input_scale"] == torch.tensor(5 * largest) / 448
    codes = stored["weight"].float()
    assert codes.flatten().tolist() == [112.0, -448.0, 112.0, 112.0, 112.0, -448.0]
    silent = Calibration(torch.zeros(3), torch.zeros(3))
    stored = family.quantize(weight, family.SCHEMES[word], calibration=silent)
    assert stored["input_scale"] == torch.tensor(1e-12) / 448


def test_scales_of_blocks_are_those_of_their_largest() -> None:
    scheme = replace(families.load("fp8").SCHEMES["block-dynamic"], block=(2, 3))
    weight = torch.zeros(3, 4)
    weight[0, 0], weight[1, 3], weight[2, 2] = 0.5, -3.0, 0.25
    stored = families.load("fp8").quantize(weight, scheme)
    scales = torch.tensor([[0.5, 3.0], [0.25, 1.0]]) / 448
    assert stored["weight_scale_inv"].equal(scales)
    assert families.load("fp8").dequantize(stored, scheme).equal(weight)


@pytest.mark.parametrize(
    ("offset", "low", "high"), [(-128, 0.0, 5.1), (127, -5.1, 0.0), (-53, -1.5, 3.6)]
)
def test_ranges_of_static_integers(offset: int, low: float, high: float) -> None:
    """Zero included, a range spreads over 255 steps; the bias is folded with the zero point."""
    family = families.load("msmodelslim")
    weight = torch.tensor([[1.27, -0.64, 0.0], [0.02, 2.54, -2.54]])
    limits = Calibration(torch.tensor([low, 0.5, 1.0]), torch.tensor([high, -0.5, -1.0]))
    if low == 0.0:
        limits = Calibration(torch.tensor([2.0, 0.5, 1.0]), torch.tensor([high, 1.0, 1.0]))
    if high == 0.0:
        limits = Calibration(torch.tensor([low, -0.5, -1.0]), torch.tensor([-2.0, -0.5, -1.0]))
    bias = torch.tensor([0.3, -0.1])
    stored = family.quantize(weight, family.SCHEMES["W8A8"], bias=bias, calibration=limits)
    scale = torch.tensor(high - low) / 255
    assert stored["weight"].tolist() == [[127, -64, 0], [1, 127, -127]]
    torch.testing.assert_close(stored["input_scale"], scale.reshape(1))
    assert stored["input_offset"].tolist() == [offset]
    deq = scale * torch.tensor([0.01, 0.02])
    torch.testing.assert_close(stored["deq_scale"], deq)
    folded = (
        bias.double() / stored["deq_scale"].double() - offset * torch.tensor([63.0, 1.0])
    ).round()
    assert stored["quant_bias"].tolist() == folded.int().tolist()
    assert stored["bias"].equal(bias)


def test_scales_of_integers() -> None:
    family = families.load("msmodelslim")
    weight = torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0]])
    eight = family.quantize(weight, family.SCHEMES["W8A8_DYNAMIC"])
    assert list(eight) == ["weight", "weight_scale", "weight_offset"]
    torch.testing.assert_close(eight["weight_scale"][0], torch.tensor([0.01]))
    assert eight["weight_scale"][1].item() == torch.finfo(torch.float32).eps
    four = family.quantize(weight, family.SCHEMES["W4A4_DYNAMIC"])
    assert four["weight"].tolist() == [[7, -4, 0], [0, 0, 0]]
    torch.testing.assert_close(four["weight_scale"][0], torch.tensor([1.27 / 7]))
    assert four["weight_offset"].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(("word", "scales"), [("int8", [[1.27]]), ("convrot", None)])
def test_scales_of_comfyui(word: str, scales: Any) -> None:
    scheme = comfyui_int8.SCHEMES[word]
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[1, 5] = -1.27, 0.5
    stored = comfyui_int8.quantize(weight, scheme)
    if scales is not None:
        assert stored["weight_scale"].shape == ()
        torch.testing.assert_close(stored["weight_scale"], torch.tensor(0.01))
        assert stored["weight"][0, 0] == -127
        assert stored["weight"][1, 5] == 50
    else:
        rows = torch.tensor([[1.27 / 8], [0.5 / 8]]) / 127
        torch.testing.assert_close(stored["weight_scale"], rows)
        assert stored["weight"].abs().eq(127).all()
    none = comfyui_int8.quantize(torch.zeros(2, 64), scheme)["weight_scale"]
    assert none.flatten()[0].item() == pytest.approx(1e-30)
