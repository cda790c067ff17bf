"""fp8 layers: which tensors each scheme has, what shapes mean, and which rows lie where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError
from quantmatrix.families import fp8
from quantmatrix.families.fp8.casts import describe_cast, find_saturated, is_plain_cast, list_coded
from quantmatrix.families.fp8.layers import (
    BLOCK,
    CAST,
    CAST_E5M2,
    CHANNEL,
    MXFP8,
    STATIC,
    TENSOR,
    canonical,
    count_blocks,
    cut_rows,
    find_scale_name,
    fit_granularity,
    list_squeezed,
    name_tensors,
    shape_scale,
    tensors,
)
from quantmatrix.kernels.scale_layouts import tile_scales
from quantmatrix.scheme import Scheme

FLOATS = ("F32", "BF16", "F16")
ONE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
ROWS = ((300,), (300, 1))
GROUPED = replace(BLOCK, scale="group")
Shape = tuple[int, ...]


@pytest.mark.parametrize(
    ("scheme", "found"),
    [
        (TENSOR, {"weight_scale": ONE}),
        (STATIC["tensor"], {"weight_scale": ONE, "input_scale": ONE}),
        (CHANNEL, {"weight_scale": ROWS}),
        (STATIC["channel"], {"weight_scale": ROWS, "input_scale": ONE}),
        (BLOCK, {"weight_scale_inv": ((3, 2),)}),
        (replace(BLOCK, block=(300, 128)), {"weight_scale_inv": ((1, 2), (2,))}),
        (replace(BLOCK, block=(128, 200)), {"weight_scale_inv": ((3, 1), (3,))}),
        (replace(BLOCK, block=(512, 512)), {"weight_scale_inv": ((1, 1), (), (1,))}),
        (CAST, {}),
        (replace(BLOCK, scale="any"), {"weight_scale": ONE}),
    ],
    ids=range(10),
)
def test_tensors_of_a_layer(scheme: Scheme, found: Mapping[str, tuple[Shape, ...]]) -> None:
    """A layer of 300 x 200; a granularity that sorts before `block` is none."""
    specs = tensors(scheme, 300, 200)
    assert (specs["weight"].dtypes, specs["weight"].shapes) == (("F8_E4M3",), ((300, 200),))
    del specs["weight"]
    assert {suffix: set(spec.shapes) for suffix, spec in specs.items()} == {
        suffix: set(shapes) for suffix, shapes in found.items()
    }
    assert {spec.dtypes for spec in specs.values()} <= {FLOATS}
    assert not any(spec.optional for spec in specs.values())


def test_tensors_of_other_codes() -> None:
    assert tensors(CAST_E5M2, 3, 5)["weight"].dtypes == ("F8_E5M2",)
    [spec] = [spec for name, spec in tensors(MXFP8, 300, 160).items() if name != "weight"]
    assert (spec.dtypes, spec.shapes) == (("F8_E8M0", "U8"), ((384, 8),))
    assert list(tensors(MXFP8, 300, 160)) == ["weight", "weight_scale"]


@pytest.mark.parametrize(
    ("shape", "found"),
    [((300, 200), (3, 2)), ((256, 256), (2, 2)), ((257, 128), (3, 1)), ((1, 1), (1, 1)),
     ((128, 129), (1, 2))],
)  # fmt: skip
def test_blocks_are_counted(shape: tuple[int, int], found: tuple[int, int]) -> None:
    assert count_blocks(BLOCK, shape) == found


def test_blocks_of_unequal_sides_are_counted() -> None:
    assert count_blocks(replace(BLOCK, block=(32, 7)), (65, 21)) == (3, 3)


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ((3, 2), ((3, 2),)),
        ((1, 2), ((1, 2), (2,))),
        ((3, 1), ((3, 1), (3,))),
        ((1, 1), ((1, 1), (), (1,))),
        ((0, 2), ((0, 2),)),
    ],
)
def test_sides_of_one_may_be_left_out(blocks: tuple[int, int], found: tuple[Shape, ...]) -> None:
    assert list_squeezed(blocks) == found


@pytest.mark.parametrize(
    ("scheme", "suffixes", "found"),
    [
        (BLOCK, {"weight_scale"}, "weight_scale"),
        (BLOCK, {"weight_scale_inv"}, "weight_scale_inv"),
        (BLOCK, {"weight_scale", "weight_scale_inv"}, "weight_scale_inv"),
        (BLOCK, set(), "weight_scale_inv"),
        (CHANNEL, {"weight_scale_inv"}, "weight_scale"),
        (TENSOR, {"weight_scale_inv"}, "weight_scale"),
        (MXFP8, {"weight_scale_inv"}, "weight_scale"),
        (replace(BLOCK, scale="any"), {"weight_scale_inv"}, "weight_scale"),
        (GROUPED, {"weight_scale_inv"}, "weight_scale"),
    ],
)
def test_the_name_of_the_scales(scheme: Scheme, suffixes: set[str], found: str) -> None:
    assert find_scale_name(scheme, suffixes) == found
    if scheme in (BLOCK, CHANNEL, TENSOR, MXFP8):
        assert list(name_tensors(scheme, (300, 160), suffixes)) == ["weight", found]


@pytest.mark.parametrize(
    ("shape", "weight", "found"),
    [
        ((300,), (300, 200), "channel"),
        ((300, 1), (300, 200), "channel"),
        ((299,), (300, 200), "tensor"),
        ((301, 1), (300, 200), "tensor"),
        ((1, 300), (300, 200), "tensor"),
        ((3, 2), (300, 200), "block"),
        ((2, 3), (300, 200), "tensor"),
        ((3, 3), (300, 200), "tensor"),
        ((2, 2), (300, 200), "tensor"),
        ((), (300, 200), "tensor"),
        ((1,), (300, 200), "tensor"),
        ((1, 1), (300, 200), "tensor"),
        ((1, 1), (100, 100), "tensor"),
        ((1,), (1, 200), "tensor"),
        ((1, 1), (1, 200), "tensor"),
        ((1, 2), (100, 200), "block"),
        ((2, 1), (2, 100), "channel"),
    ],
)
def test_what_the_shape_of_scales_says(shape: Shape, weight: Shape, found: str) -> None:
    assert fit_granularity(shape, weight) == found


def make_codes(rows: int, columns: int) -> torch.Tensor:
    numbers = torch.arange(rows * columns).reshape(rows, columns) % 120
    return numbers.to(torch.uint8).view(torch.float8_e4m3fn)


def test_rows_of_every_granularity() -> None:
    """Rows 128 to 300 of 300: of scales in blocks those of the second and third row of blocks."""
    weight, bias = make_codes(300, 200), torch.arange(300.0)
    table = torch.arange(6.0).reshape(3, 2)
    stored = {"weight": weight, "bias": bias}
    cut = cut_rows({**stored, "weight_scale": torch.tensor(2.0)}, TENSOR, 128, 300)
    assert (cut["weight"].shape, cut["bias"][0], cut["weight_scale"].shape) == ((172, 200), 128, ())
    cut = cut_rows({**stored, "weight_scale": torch.arange(300.0)}, CHANNEL, 128, 256)
    assert cut["weight_scale"].tolist() == cut["bias"].tolist() == list(range(128, 256))
    for name in ("weight_scale", "weight_scale_inv"):
        cut = cut_rows({**stored, name: table}, BLOCK, 128, 300)
        assert cut[name].tolist() == [[2.0, 3.0], [4.0, 5.0]]
        assert cut_rows({**stored, name: table}, BLOCK, 128, 256)[name].tolist() == [[2.0, 3.0]]
        assert cut_rows({**stored, name: table}, BLOCK, 0, 128)[name].tolist() == [[0.0, 1.0]]
    lone = cut_rows({**stored, "weight_scale": torch.ones(1)}, replace(TENSOR, scale="any"), 0, 128)
    assert lone["weight_scale"].shape == (1,)
    assert list(cut_rows({"weight": weight, "weight_scale": bias}, CHANNEL, 0, 128)) == [
        "weight",
        "weight_scale",
    ]


def test_rows_of_tiles() -> None:
    """Whole tiles of 128 rows lie together; the last one is padded."""
    exponents = (torch.arange(300 * 5) % 250).to(torch.uint8).reshape(300, 5)
    stored = {"weight": make_codes(300, 160), "weight_scale": tile_scales(exponents)}
    cut = cut_rows(stored, MXFP8, 128, 300)
    assert (cut["weight"].shape, cut["weight_scale"].shape) == ((172, 160), (256, 8))
    found = shape_scale(cut, MXFP8)
    assert found.equal(torch.exp2(exponents[128:].double() - 127).float())
    assert cut_rows(stored, MXFP8, 128, 256)["weight_scale"].shape == (128, 8)


def test_scales_as_kernels_take_them() -> None:
    weight = make_codes(4, 6)
    one = {"weight": weight, "weight_scale": torch.tensor([[3.0]], dtype=torch.bfloat16)}
    assert shape_scale(one, TENSOR).equal(torch.tensor(3.0))
    row = {"weight": weight, "weight_scale": torch.arange(4.0).half()}
    assert shape_scale(row, CHANNEL).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert shape_scale({"weight": weight}, CAST).equal(torch.ones(()))
    flat = {"weight": weight, "weight_scale": torch.arange(3.0)}
    assert shape_scale(flat, replace(BLOCK, block=(4, 2))).tolist() == [[0.0, 1.0, 2.0]]
    static = canonical({**one, "input_scale": torch.tensor([[5.0]])}, STATIC["tensor"])
    assert static["input_scale"].equal(torch.tensor(5.0))
    spare = canonical({**one, "input_scale": torch.tensor([[5.0]])}, TENSOR)
    assert list(spare) == ["weight", "weight_scale"]


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(torch.float8_e4m3fn, torch.float32), (torch.bfloat16, torch.bfloat16),
     (torch.float32, torch.float32), (torch.float64, torch.float64)],
)  # fmt: skip
def test_a_bias_of_one_byte_is_decoded(dtype: torch.dtype, found: torch.dtype) -> None:
    bias = torch.tensor([0.5, -2.0]).to(dtype)
    got = canonical({"weight": make_codes(2, 3), "bias": bias}, CAST)["bias"]
    assert got.dtype == found
    assert got.tolist() == [0.5, -2.0]


# --- plain casts -----------------------------------------------------------------------------


def make(stored: Mapping[str, tuple[str, Shape]], **more: Any) -> Checkpoint:
    headers = {n: TensorHeader(n, dtype, shape, "f.st") for n, (dtype, shape) in stored.items()}
    return Checkpoint("here", ("f.st",), headers, **more)


CODED = {
    "a.weight": ("F8_E4M3", (4, 6)),
    "a.bias": ("F8_E4M3", (4,)),
    "n.weight": ("F8_E4M3", (4,)),
}


@pytest.mark.parametrize(
    ("tensors_", "more", "plain"),
    [
        ({}, {}, True),
        ({"scale_shift_table": ("BF16", (6, 4))}, {}, True),
        ({"b.weight": ("F8_E5M2", (4, 6))}, {}, True),
        ({"a.extra": ("F32", ())}, {}, False),
        ({"n.extra": ("F32", ())}, {}, True),
        ({"x.weight_scale": ("F32", ())}, {}, False),
        ({"x.input_scale": ("F32", ())}, {}, False),
        ({"x.scale_weight": ("F32", ())}, {}, False),
        ({"x.scale_input": ("F32", ())}, {}, False),
        ({"x.scale_inv": ("F32", ())}, {}, True),
        ({"x.any_scale_inv": ("F32", ())}, {}, False),
        ({}, {"quantization": {"layers": {}}}, False),
        ({}, {"quantization": {}}, True),
        ({}, {"description": {"a": 1}}, False),
        ({}, {"metadata": {"quantization": "x"}}, False),
        ({}, {"metadata": {"quantization": ""}}, True),
        ({}, {"metadata": {"format": "pt"}}, True),
    ],
)
def test_what_is_a_plain_cast(tensors_: Any, more: Any, plain: bool) -> None:
    assert is_plain_cast(make({**CODED, **tensors_}, **more)) is plain


def test_a_plain_cast_in_words() -> None:
    more = {"b.weight": ("F8_E5M2", (4, 6)), "c.table": ("F8_E4M3", (4, 6))}
    checkpoint = make({"z.weight": ("BF16", (2, 2)), **more, **CODED})
    assert list_coded(checkpoint) == ["b", "a"]
    assert describe_cast(checkpoint) == (
        "a plain cast to F8_E4M3 and F8_E5M2 (no tensor of f.st is a scale, nothing declares one): "
        "codes are the numbers, scale 1, weights only"
    )
    assert {layer: s.name for layer, s in fp8.schemes(checkpoint).items()} == {
        "b": "fp8-cast-e5m2",
        "a": "fp8-cast",
    }
    assert not is_plain_cast(make({"n.weight": ("F8_E4M3", (4,))}))


@pytest.mark.parametrize(
    ("scheme", "dtype", "largest"),
    [(CAST, torch.float8_e4m3fn, 0x7E), (CAST_E5M2, torch.float8_e5m2, 0x7B)],
)
def test_the_largest_code_is_no_weight(scheme: Scheme, dtype: torch.dtype, largest: int) -> None:
    for code, told in (
        (largest, True), (largest | 0x80, True), (largest - 1, False), (largest - 1 | 0x80, False),
        (0x80, False),
    ):  # fmt: skip
        codes = torch.tensor([[3, code, 9]], dtype=torch.uint8).view(dtype)
        found = find_saturated({"weight": codes}, scheme)
        assert (found is not None) is told
        assert find_saturated({"weight": codes}, TENSOR) is None
    assert find_saturated({"weight": torch.tensor([[largest]], dtype=torch.uint8)}, scheme) == (
        "weight",
        f"holds the largest number of {scheme.weight}, as codes do that need a scale, and the file has "
        "none: expected a plain cast, whose numbers are weights, or a weight_scale beside it",
    )


@pytest.mark.parametrize(("exponent", "told"), [(0, False), (254, False), (255, True)])
def test_exponents_of_tiles(exponent: int, told: bool) -> None:
    scales = torch.full((128, 4), 127, dtype=torch.uint8)
    scales[5, 3] = exponent
    found = fp8.find_fault({"weight": make_codes(2, 32), "weight_scale": scales}, MXFP8)
    text = "holds exponents of 255, which mean NaN: expected 0 to 254"
    assert found == (("weight_scale", text) if told else None)


# --- what headers show -----------------------------------------------------------------------

BLOCK_OF = {"quantization": {"quant_method": "fp8"}, "quantization_from": "config.json: q"}
LAYER = {"b.1.q.weight": ("F8_E4M3", (300, 200)), "b.1.q.weight_scale": ("F32", ())}


def test_forgotten_layers_are_counted() -> None:
    """Like those in codes, but for the number of their block; and left alone by nothing."""
    plain = {
        "b.2.q.weight": ("BF16", (300, 200)),
        "b.13.q.weight": ("F16", (300, 200)),
        "b.2.k.weight": ("BF16", (300, 200)),
        "b.3.q.bias": ("BF16", (300,)),
    }
    checkpoint = make({**LAYER, **plain}, **BLOCK_OF)
    found = fp8.schemes(checkpoint)
    assert list(found) == ["b.1.q"]
    assert fp8.doubts(checkpoint, found) == [
        "f.st: b.2.q.weight is BF16, while its like in other blocks is quantized and config.json: q does "
        "not leave it alone; 2 such layers are computed in full precision"
    ]
    block = {"quant_method": "fp8", "ignored_layers": ["b.2.q", "b.13"]}
    checkpoint = make({**LAYER, **plain}, quantization=block, quantization_from="config.json: q")
    assert fp8.doubts(checkpoint, found) == []


@pytest.mark.parametrize(
    ("tensors_", "text"),
    [
        (
            {"b.1.q.zero": ("F32", ())},
            "f.st: tensor b.1.q.zero (F32 []) stands beside the codes of b.1.q, expected no more than "
            "weight, weight_scale, bias, comfy_quant: leaving it out would give other numbers without "
            "an error. Quantize with a scheme that is known",
        ),
        (
            {"b.1.q.lora.down": ("F32", (2, 3))},
            "f.st: tensor b.1.q.lora.down (F32 [2, 3]) stands beside the codes of b.1.q, expected no "
            "more than weight, bias, weight_scale_inv, weight_scale: leaving it out would give other "
            "numbers without an error. Quantize with a scheme that is known",
        ),
        (
            {"b.1.q.input_scale": ("F32", ())},
            "f.st: tensor b.1.q.input_scale is a static activation scale, but config.json: q declares "
            "dynamic activations: declare activation_scheme static, or leave the scales out",
        ),
        (
            {"b.1.q.weight_scale": ("F32", (2,))},
            "f.st: tensor b.1.q.weight_scale is F32 [2], expected F32 or BF16 or F16 [] or [1] or [1, 1]. "
            "Correct the file with what wrote it, or quantize again",
        ),
        (
            {"b.1.q.weight_scale": ("I32", ())},
            "f.st: tensor b.1.q.weight_scale is I32 [], expected F32 or BF16 or F16 [] or [1] or [1, 1]. "
            "Correct the file with what wrote it, or quantize again",
        ),
        (
            {"c.weight": ("F8_E4M3", (300, 200))},
            "f.st: tensor c.weight_scale is missing beside c.weight (F8_E4M3): expected F32 or BF16 or "
            "F16 [] or [1] or [1, 1]; a missing scale is never assumed to be 1. Correct the file with "
            "what wrote it, or quantize again",
        ),
        (
            {"c.weight": ("BF16", (300, 200)), "c.weight_scale": ("F32", ())},
            "f.st: tensor c.weight_scale is a scale, but c.weight is BF16: expected F8_E4M3 or F8_E5M2. "
            "Correct the file with what wrote it, or quantize again",
        ),
        (
            {"c.input_scale": ("F32", ())},
            "f.st: tensor c.input_scale is a scale, but c.weight is missing: expected F8_E4M3 or "
            "F8_E5M2. Correct the file with what wrote it, or quantize again",
        ),
        (
            {"c.weight": ("F8_E4M3", (2, 3, 4)), "c.weight_scale": ("F32", ())},
            "f.st: tensor c.weight is [2, 3, 4], not 2-D: expected codes of a linear layer; leave other "
            "layers in full precision",
        ),
        (
            {"c.weight": ("F8_E4M3", (200,)), "c.weight_scale": ("F32", ())},
            "f.st: tensor c.weight is [200], not 2-D: expected codes of a linear layer; leave other "
            "layers in full precision",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tensors_: Any, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        fp8.schemes(make({**LAYER, **tensors_}, **BLOCK_OF))
    assert str(caught.value) == text
