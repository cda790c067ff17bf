"""Producers: what blocks may say and tensors must be, each edge from both sides, texts as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import (
    gguf,
    modelopt_fp8,
    modelopt_nvfp4,
    msmodelslim,
    unknown_quantization,
)
from quantmatrix.families.layouts import Layout, describe_reading, explain_open
from quantmatrix.families.modelopt_nvfp4 import layouts
from quantmatrix.families.msmodelslim import mx_blocks
from quantmatrix.families.producers import comfyui, compressed_tensors, modelopt, modelopt_faults
from quantmatrix.families.protocol import Calibration
from quantmatrix.scheme import Scheme

Shape = tuple[int, ...]
Headers = Mapping[str, tuple[str, Shape]]
NVFP4, FP8 = modelopt_nvfp4.NVFP4, modelopt_fp8.FP8


def make(stored: Headers, block: Any = None, **more: Any) -> Checkpoint:
    tensors = {n: TensorHeader(n, dtype, shape, "f.st") for n, (dtype, shape) in stored.items()}
    files = more.pop("files", ("f.st",))
    return Checkpoint("here", files, tensors, quantization=block, quantization_from="q", **more)


def refusal(act: Any, *given: Any, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        act(*given)
    return str(caught.value)


# --- compressed-tensors ----------------------------------------------------------------------

AGAIN = ". Correct the declaration, or quantize with a scheme that is known"
NUMBER = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("inputs", "block", "found"),
    [
        (None, (0, 0), "none"), ({"strategy": "tensor", "dynamic": False}, (0, 0), "tensor-static"),
        ({"strategy": "tensor", "dynamic": True}, (0, 0), "tensor-dynamic"),
        ({"strategy": "token", "dynamic": True}, (0, 0), "token-dynamic"),
        ({"strategy": "group", "dynamic": True, "group_size": 64}, (128, 64), "group-dynamic"),
        ({"strategy": "group", "dynamic": True, "group_size": 128}, (128, 64), ""),
        ({"strategy": "group", "dynamic": True, "group_size": 32}, (128, 64), ""),
        ({"strategy": "token", "dynamic": False}, (0, 0), ""),
        ({"strategy": "tensor", "dynamic": "local"}, (0, 0), ""),
        ({"strategy": "tensor", "dynamic": 1}, (0, 0), ""), ({"strategy": "channel", "dynamic": True}, (0, 0), ""),
    ],
)  # fmt: skip
def test_activations_of_groups(inputs: Any, block: tuple[int, int], found: str) -> None:
    given = inputs if inputs is None else {"num_bits": 8, "type": "float", **inputs}
    if found:
        assert compressed_tensors.read_activation(given, block, "s") == found
        return
    assert refusal(compressed_tensors.read_activation, given, block, "s") == (
        f"s: input_activations is {json.dumps(given)}: expected tensor, or dynamic token, or a dynamic "
        f"group of as many columns as a block has{AGAIN}"
    )


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True), ({"symmetric": None}, True), ({"symmetric": False}, False), ({"num_bits": 4}, False),
        ({"num_bits": 9}, False), ({"type": "int"}, False), ({"type": "a"}, False), ({"dynamic": True}, False),
        ({"strategy": "group"}, False), ({"strategy": "channel"}, True), ({"strategy": None}, False),
    ],
)  # fmt: skip
def test_weights_of_groups(change: Any, good: bool) -> None:
    weights = {**NUMBER, **change}
    group = {"targets": ["Linear"], "weights": weights}
    if good:
        found = compressed_tensors.read_group(group, "s")
        assert (found.scale, found.block, found.activation) == (weights["strategy"], (0, 0), "none")
        return
    of = (
        "the strategy tensor, channel or block, not dynamic"
        if set(change) & {"dynamic", "strategy"}
        else ("symmetric floats of 8 bits")
    )
    assert refusal(compressed_tensors.read_group, group, "s").startswith("s: weights is {")
    assert refusal(compressed_tensors.read_group, group, "s").endswith(f": expected {of}{AGAIN}")


@pytest.mark.parametrize(
    ("entry", "layer", "holds"),
    [
        ("Linear", "anything", True), ("a.b", "a.b", True), ("a.b", "a.bc", False), ("a.b", "aXb", False),
        ("re:a.*c", "abbc", True), ("re:a.*c", "xabbc", False), ("re:b", "bcd", True), ("", "a", False),
    ],
)  # fmt: skip
def test_targets_of_groups(entry: str, layer: str, holds: bool) -> None:
    patterns = compressed_tensors.read_patterns(["zzz", entry], "s", "targets")
    group = compressed_tensors.Group(tuple(patterns), "tensor", (0, 0), "none")
    assert group.holds(layer) is holds


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (f"re:{'x' * 199}", ""), (f"re:{'x' * 200}", "a short expression without nested repeats"),
        ("re:(a+)+", "a short expression without nested repeats"),
        ("re:(a*){3}", "a short expression without nested repeats"), ("re:(a+)b", ""),
    ],
)  # fmt: skip
def test_expressions_that_never_end(entry: str, expected: str) -> None:
    if not expected:
        assert len(compressed_tensors.read_patterns([entry], "s", "ignore")) == 1
        return
    text = refusal(compressed_tensors.read_patterns, [entry], "s", "ignore")
    assert text.endswith(f": expected {expected}{AGAIN}")


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        ("kv_cache_scheme", None, True), ("kv_cache_scheme", {"num_bits": 8}, False),
        ("sparsity_config", {"format": "dense"}, True), ("sparsity_config", {"format": "dense", "x": None}, True),
        ("sparsity_config", {"format": "sparse"}, False), ("transform_config", {}, True),
        ("output_activations", "dense", False), ("quantization_status", "compressed", True),
        ("quantization_status", None, True), ("quantization_status", "frozen", False),
        ("quantization_status", "a", False),
    ],
)  # fmt: skip
def test_keys_that_ask_for_more(key: str, value: Any, good: bool) -> None:
    block = {"config_groups": {"g": {"targets": ["Linear"], "weights": NUMBER}}, key: value}
    if good:
        assert len(compressed_tensors.read_groups(block, "s")) == 1
        return
    expected = "compressed" if key == "quantization_status" else f"no {key}"
    assert refusal(compressed_tensors.read_groups, block, "s") == (
        f"s: {key} is {json.dumps(value)}: expected {expected}{AGAIN}"
    )


@pytest.mark.parametrize(
    ("block", "ours"),
    [
        ({"format": "float-quantized"}, True), ({"format": "int-quantized"}, False), ({}, False),
        ({"config_groups": {"a": {"format": "float-quantized"}}}, True),
        ({"config_groups": {"a": {"format": "float-quantized"}, "b": {"format": "x"}}}, False),
        ({"format": "float-quantized", "config_groups": {"a": {}, "b": {"format": "x"}}}, False),
        ({"format": "float-quantized", "config_groups": {"a": {}}}, True),
        ({"format": "float-quantized", "quant_method": "a"}, False),
        ({"format": "float-quantized", "quant_method": "z"}, False),
        ({"format": "float-quantized", "quant_method": "Compressed-Tensors"}, True),
    ],
)  # fmt: skip
def test_blocks_of_this_format(block: Any, ours: bool) -> None:
    assert (
        compressed_tensors.is_float_quantized({"quant_method": "compressed-tensors", **block})
        is ours
    )


# --- ComfyUI's and fp8 declarations ----------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "entry", "text"),
    [
        ("float8_e4m3fn", {"format": "float8_e4m3fn"}, ""), ("bf16", {"format": "bf16", "x": 1}, ""),
        ("mxfp8", {"format": "mxfp8", "group_size": 32}, ""),
        ("mxfp8", {"format": "mxfp8", "group_size": 16}, 'beside its format is {"group_size": 16}: expected nothing'),
        ("mxfp8", {"format": "mxfp8", "group_size": 33}, 'beside its format is {"group_size": 33}: expected nothing'),
        ("float8_e4m3fn", {"group_size": 32}, 'beside its format is {"group_size": 32}: expected nothing'),
        ("float8_e4m3fn", {"x": 0, "y": None}, ""),
        ("float8_e4m3fn", {"full_precision_matrix_mult": True}, ""),
        ("float8_e4m3fn", {"full_precision_matrix_mult": 1},
         'beside its format is {"full_precision_matrix_mult": 1}: expected nothing'),
        ("float8_e4m3fnuz", {}, "is \"float8_e4m3fnuz\": expected float8_e4m3fn, float8_e5m2 or bf16"),
        ("a", "a", "is \"a\": expected float8_e4m3fn, float8_e5m2 or bf16"), ("float8_e5m2", "float8_e5m2", ""),
    ],
)  # fmt: skip
def test_formats_of_layers(form: str, entry: Any, text: str) -> None:
    if not text:
        comfyui.check_format("s", "a", form, entry)
        return
    what = "what a has " if text.startswith("beside") else "the format of a "
    assert refusal(comfyui.check_format, "s", "a", form, entry) == f"s: {what}{text}{AGAIN}"


@pytest.mark.parametrize(
    ("size", "static", "found"),
    [
        (None, False, None), ([128, 64], False, (128, 64)), ([1, 1], False, (1, 1)), ([0, 1], False, "x"),
        ([1, 0], False, "x"), ([128], False, "x"), ([1, 2, 3], False, "x"), ([True, 1], False, "x"),
        ("128x128", False, "x"), ([1.0, 2], False, "x"), ([128, 64], True, "static"),
    ],
)  # fmt: skip
def test_sizes_of_blocks(size: Any, static: bool, found: Any) -> None:
    block = {"weight_block_size": size, "activation_scheme": "static" if static else "dynamic"}
    texts = {
        "x": f"s: weight_block_size is {json.dumps(size)}: expected rows and columns of a block, as [128, "
        f"128]{AGAIN}",
        "static": "s: weight_block_size with static activations: expected activation_scheme dynamic",
    }
    if found in texts:
        assert refusal(comfyui.read_block_size, block, "s") == texts[found]
    else:
        assert comfyui.read_block_size(block, "s") == found


@pytest.mark.parametrize(
    ("entry", "layer", "alone"),
    [
        ("a.b", "a.b", True), ("a.b", "a.b.c", True), ("a.b", "a.bc", False), ("a.*.q", "a.0.x.q", True),
        ("a.to_qkv", "a.to_k", True), ("a.to_qkv", "a.to_out", False), ("w13", "w3", True), ("w13", "w2", False),
        ("a.to_added_qkv", "a.add_v_proj", True), ("b", "a.b", False),
    ],
)  # fmt: skip
def test_layers_that_are_left_alone(entry: str, layer: str, alone: bool) -> None:
    for key in ("ignored_layers", "modules_to_not_convert"):
        block = {"quant_method": "fp8", key: ["zzz", entry]}
        declared = comfyui.read_declaration(make({}, block))
        assert declared.is_left_alone(layer) is alone


def test_who_is_left_alone_by_a_list() -> None:
    layers = {"a": "float8_e4m3fn", "b": "bf16", "c": {"format": "mxfp8"}}
    listed = comfyui.read_declaration(make({}, {"layers": layers}))
    assert [listed.is_left_alone(layer) for layer in "abcd"] == [False, True, False, True]
    named = comfyui.read_declaration(make({}, {"layers": layers, "quant_method": "fp8"}))
    assert [named.is_left_alone(layer) for layer in "abcd"] == [False, True, False, False]
    assert (named.name_codes("a"), named.name_codes("d"), named.codes) == (
        "float8_e4m3fn",
        "",
        None,
    )
    assert comfyui.read_declaration(make({}, {"fmt": "e5m2"})).name_codes("d") == "e5m2"


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"activation_scheme": "a"}, "activation_scheme is \"a\": expected dynamic or static, or no activation_scheme"),
        ({"quant_algo": "X"}, "quant_algo is \"X\": expected FP8, or no quant_algo"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt is \"ue8m0\": expected float or float32, or no scale_fmt"),
    ],
)  # fmt: skip
def test_values_of_an_fp8_block(block: Any, text: str) -> None:
    assert refusal(comfyui.read_declaration, make({}, block)) == f"q: {text}{AGAIN}"


@pytest.mark.parametrize("version", ["1.0", "1.1", 1.0, None, "1", "1.2", "0.9"], ids=repr)
def test_versions_of_lists(version: Any) -> None:
    if str(version) in ("1.0", "1.1", "None"):
        comfyui.read_declaration(make({}, {"format_version": version}))
        return
    assert refusal(comfyui.read_declaration, make({}, {"format_version": version})) == (
        f"q: format_version {version} is unknown; known: 1.0, 1.1"
    )


@pytest.mark.parametrize(
    ("recipe", "good"), [("rowwise", True), ("a", False), ("tensorwise", False), (None, False)]
)
def test_recipes_of_scales(recipe: Any, good: bool) -> None:
    layers = {"a": "float8_e4m3fn", "b": "rowwise_float8"}
    for stated in ({"scale_recipe": recipe}, recipe):
        block = {"layers": layers, "quant_configs": {"float8_e4m3fn": stated, "other": "x"}}
        if good:
            assert comfyui.read_declaration(make({}, block)).rowwise == {"a", "b"}
        else:
            assert refusal(comfyui.read_declaration, make({}, block)) == (
                f"q: scale_recipe {recipe} of float8_e4m3fn is unknown; known: rowwise"
            )
    assert comfyui.read_declaration(make({}, {"layers": layers})).rowwise == {"b"}


# --- ModelOpt --------------------------------------------------------------------------------

CODES: Headers = {
    "a.weight": ("U8", (32, 40)), "a.weight_scale": ("F8_E4M3", (32, 5)), "a.weight_scale_2": ("F32", ()),
    "a.input_scale": ("F32", ()),
}  # fmt: skip


def judge(changes: Any, algorithm: str = "", layout: Scheme = NVFP4) -> Any:
    stored = {n: spec for n, spec in {**CODES, **changes}.items() if spec is not None}
    checkpoint = make(stored)
    layer = modelopt.StoredLayer(checkpoint, "a", checkpoint.layers()["a"])
    return modelopt.judge_layer(layer, layout, algorithm)


PADDED = ". These scales are padded: export again without padding_strategy and without enable_swizzle_layout"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"a.weight": ("U8", (32, 41))}, "has weight U8 [32, 41]: expected U8 [N, K/2], K a multiple of 16"),
        ({"a.weight": ("U8", (32, 40, 1))}, "has weight U8 [32, 40, 1]: expected U8 [N, K/2], K a multiple of 16"),
        ({"a.weight_scale": ("F8_E4M3", (128, 8))},
         f"has weight_scale F8_E4M3 [128, 8]: expected F8_E4M3 [32, 5]{PADDED}"),
        ({"a.weight_scale": ("F8_E4M3", (32, 6))},
         f"has weight_scale F8_E4M3 [32, 6]: expected F8_E4M3 [32, 5]{PADDED}"),
        ({"a.weight_scale": ("F8_E4M3", (33, 5))},
         f"has weight_scale F8_E4M3 [33, 5]: expected F8_E4M3 [32, 5]{PADDED}"),
        ({"a.weight_scale": ("F8_E4M3", (32, 4))}, "has weight_scale F8_E4M3 [32, 4]: expected F8_E4M3 [32, 5]"),
        ({"a.weight_scale": ("F8_E4M3", (320,))}, "has weight_scale F8_E4M3 [320]: expected F8_E4M3 [32, 5]"),
        ({"a.weight_scale": ("BF16", (128, 8))}, "has weight_scale BF16 [128, 8]: expected F8_E4M3 [32, 5]"),
        ({"a.weight_scale_2": ("F32", (2,))}, "has weight_scale_2 F32 [2]: expected F32 [] or [1]"),
        ({"a.weight_scale_2": None}, "has no weight_scale_2: the checkpoint is incomplete"),
        ({"a.input_scale": None},
         "has no input_scale, which every layer of an NVFP4 export has. If inputs are meant to stay in full "
         'precision, declare "quant_algo": "W4A16_NVFP4"; otherwise calibrate and export again'),
        ({"a.extra": ("F32", ())},
         "has extra beside input_scale, weight, weight_scale, weight_scale_2: no such layer is known, and "
         "leaving a tensor out would give other numbers without an error"),
        ({"a.weight": ("BF16", (32, 80))},
         "has weight_scale, weight_scale_2 but a BF16 weight: expected U8 (NVFP4) or F8_E4M3 (FP8) codes "
         "beside them"),
        ({"a.weight": None},
         "has weight_scale, weight_scale_2 but no weight: expected U8 (NVFP4) or F8_E4M3 (FP8) codes beside "
         "them"),
        ({"a.weight": ("F8_E4M3", (32, 80)), "a.weight_scale": ("U8", (32, 5))},
         "is MXFP8: F8_E4M3 with weight_scale U8 [32, 5]; expected one F32 scale for the layer. Quantize it "
         "with FP8 per tensor, or leave it in BF16"),
        ({"a.weight": ("F8_E4M3", (32, 80)), "a.weight_scale": ("F32", (32,))},
         "is per-channel FP8: F8_E4M3 with weight_scale F32 [32]; expected one F32 scale for the layer. "
         "Quantize it with FP8 per tensor, or leave it in BF16"),
        ({"a.weight": ("F8_E4M3", (32, 80)), "a.weight_scale": None},
         "is F8_E4M3 with weight_scale missing; expected one F32 scale for the layer. Quantize it with FP8 "
         "per tensor, or leave it in BF16"),
    ],
)  # fmt: skip
def test_layers_that_do_not_add_up(changes: Any, text: str) -> None:
    assert refusal(judge, changes) == f"f.st: layer a {text}"


@pytest.mark.parametrize(
    ("changes", "algorithm", "name", "rank", "smoothed"),
    [
        ({}, "", "NVFP4", 0, False), ({"a.bias": ("BF16", (32,))}, "NVFP4", "NVFP4", 0, False),
        ({"a.pre_quant_scale": ("BF16", (80,))}, "", "NVFP4_AWQ", 0, True),
        ({"a.pre_quant_scale": ("BF16", (80,)), "a.svdquant_lora_a": ("BF16", (7, 80)),
          "a.svdquant_lora_b": ("BF16", (32, 7))}, "", "NVFP4_SVD", 7, True),
        ({"a.input_scale": None}, "W4A16_NVFP4", "W4A16_NVFP4", 0, False),
    ],
)  # fmt: skip
def test_layers_by_their_tensors(
    changes: Any, algorithm: str, name: str, rank: int, smoothed: bool
) -> None:
    found = judge(changes, algorithm)
    assert (found.name, found.rank, found.smoothed) == (name, rank, smoothed)
    assert found.activation == ("none" if algorithm == "W4A16_NVFP4" else "group-dynamic")


def test_layers_that_may_lack_a_scale() -> None:
    raw = replace(NVFP4, swap_nibbles=True, tiled_scales=True)
    tiled = {"a.weight_scale": ("F8_E4M3", (128, 8)), "a.input_scale": None}
    assert judge(tiled, "", raw) == raw
    plain = {"a.weight": ("BF16", (2, 2)), "a.weight_scale": None, "a.weight_scale_2": None}
    assert judge(plain) is None
    eight = {
        "a.weight": ("F8_E4M3", (2, 2)),
        "a.weight_scale": ("F32", (1,)),
        "a.weight_scale_2": None,
    }
    assert judge(eight) == FP8
    assert judge({**eight, "a.input_scale": None}).activation == "tensor-dynamic"
    assert refusal(judge, {}, "W4A16_NVFP4") == (
        "f.st: layer a has an input_scale, but its quant_algo is W4A16_NVFP4"
    )


@pytest.mark.parametrize(
    ("size", "refused"), [(16, False), (0, False), (8, True), (17, True), (15, True), ("8", False)]
)
def test_sizes_of_groups(size: Any, refused: bool) -> None:
    block = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
             "quantized_layers": {"a": {"quant_algo": "nvfp4", "group_size": size}}}  # fmt: skip
    if not refused:
        modelopt_faults.check_export(make(CODES, block))
        return
    assert refusal(modelopt_faults.check_export, make(CODES, block)) == (
        f"f.st: layer a has one scale per {size} columns, as q declares (group_size {size}): expected 16, "
        "which the kernels of NVFP4 take. Quantize it with block_sizes {-1: 16}"
    )


def test_doubts_about_an_export_in_words() -> None:
    block = {
        "quant_method": "modelopt", "kv_cache_quant_algo": "FP8",
        "quantized_layers": {name: {"quant_algo": "FP8"} for name in ("a", "b", "c")},
    }  # fmt: skip
    dynamic = replace(FP8, activation="tensor-dynamic")
    found = modelopt_faults.list_doubts(
        make({}, block), {"z": dynamic, "b": dynamic, "a": FP8, "c": dynamic}
    )
    assert found == [
        "q: 2 FP8 layers have no input_scale, b is the first. ModelOpt writes none for inputs that it leaves "
        "alone, nor for those that it scales per call; they are taken as scaled per call, save by --backend "
        "decode, which leaves all inputs alone. If they were left alone, add each layer to the block: "
        '"layers": {"b": {"format": "float8_e4m3fn", "full_precision_matrix_mult": true}}',
        "q: kv_cache_quant_algo is there, but such files hold no scale of keys, values or outputs: these are "
        "left in full precision",
    ]


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ({"a": {"weights": {"group_size": 32}}}, 32), ({"a": {}}, None), ({}, None), (None, None), ({"a": 3}, None),
        ({"a": {"weights": 3}}, None), ({"a": {"weights": {"group_size": 32}}, "b": {}}, None),
    ],
)  # fmt: skip
def test_the_size_of_the_only_group(groups: Any, found: Any) -> None:
    assert modelopt_faults.find_group_size({"config_groups": groups}) == found


FP8_LAYER: Headers = {
    "a.weight": ("F8_E4M3", (32, 64)), "a.weight_scale": ("F32", ()), "a.input_scale": ("F32", (1,)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "block", "text"),
    [
        ({}, {}, ""), ({}, {"ignore": ["b"]}, ""),
        ({}, {"ignore": ["a*"]}, "q: `ignore` lists a, but f.st stores it as FP8"),
        ({}, {"ignore": "a"}, 'q: `ignore` is "a": expected a list of layer names'),
        ({"a.weight": ("F8_E4M3", (32,))}, {},
         "f.st: layer a has input_scale, weight, weight_scale, and its weight is [32]: expected F8_E4M3 [N, "
         "K]; export the checkpoint again"),
        ({"a.weight": None}, {},
         "f.st: layer a has input_scale, weight_scale, and its weight is missing: expected F8_E4M3 [N, K]; "
         "export the checkpoint again"),
        ({"a.weight_scale": None}, {},
         "f.st: tensor a.weight_scale is missing beside a.weight (F8_E4M3): expected F32 []; a missing scale "
         "is never assumed to be 1: export the checkpoint again"),
        ({"a.weight_scale": ("F32", (2,))}, {},
         "f.st: tensor a.weight_scale is F32 [2], expected F32 [] or [1]; export the checkpoint again"),
        ({"a.weight": ("BF16", (32, 64))}, {},
         "f.st: tensor a.weight is BF16 [32, 64], expected F8_E4M3 [32, 64]; export the checkpoint again"),
        ({"b._quantizer.weight": ("F8_E4M3", (3,))}, {}, ""), ({"b.weight": ("BF16", (3,))}, {}, ""),
    ],
)  # fmt: skip
def test_fp8_layers_of_modelopt(changes: Any, block: Any, text: str) -> None:
    stored = {n: spec for n, spec in {**FP8_LAYER, **changes}.items() if spec is not None}
    checkpoint = make(stored, {"quant_method": "modelopt", "quant_algo": "FP8", **block})
    if text:
        assert refusal(modelopt_fp8.schemes, checkpoint) == text
    else:
        assert modelopt_fp8.schemes(checkpoint) == {"a": FP8}


@pytest.mark.parametrize("part", ["weights", "input_activations"])
@pytest.mark.parametrize(
    ("change", "good"),
    [({}, True), ({"num_bits": 4}, False), ({"num_bits": 9}, False), ({"dynamic": True}, False),
     ({"type": "int"}, False), ({"other": 1}, True)],
)  # fmt: skip
def test_groups_of_modelopt(part: str, change: Any, good: bool) -> None:
    stated = {"num_bits": 8, **change}
    block = {"config_groups": {"g": {part: stated}}}
    if good:
        modelopt_fp8.check_groups(block, "q")
        return
    assert refusal(modelopt_fp8.check_groups, block, "q") == (
        f"q: config_groups.g.{part} is {json.dumps(stated)}, while quant_algo is FP8: expected "
        '{"dynamic": false, "num_bits": 8, "type": "float"}. Correct the declaration, or export again'
    )


def test_calibrations_are_needed() -> None:
    weight = torch.ones(2, 32)
    for family, scheme, text in (
        ("modelopt-fp8", FP8, "modelopt-fp8 has static activation scales: a calibration is needed"),
        ("modelopt-nvfp4", NVFP4, "a NVFP4 layer has coded inputs: give quantize a calibration"),
        ("fp8", families.load("fp8").SCHEMES["tensor-static"], "static activation scales need a calibration"),
        ("msmodelslim", msmodelslim.SCHEMES["W8A8"],
         "W8A8 needs the range of each layer's input: quantize with calibration data, or use W8A8_DYNAMIC, "
         "which needs none"),
    ):  # fmt: skip
        assert refusal(families.load(family).quantize, weight, scheme, error=UsageError) == text
    limits = Calibration(torch.tensor([-3.0, 1.0]), torch.tensor([2.0, 4.0]))
    assert limits.amax.tolist() == [3.0, 4.0]


# --- layouts of NVFP4 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nibbles", "scales", "count"),
    [("low", "rows", 1), (None, "rows", 2), ("high", None, 2), (None, None, 4)],
)
def test_readings_of_a_layout(nibbles: str | None, scales: str | None, count: int) -> None:
    layout = Layout(nibbles, scales, "why")
    assert layout.known is (count == 1)
    assert len(layout.readings) == count
    assert {r["nibble_order"] for r in layout.readings} == (
        {nibbles} if nibbles else {"low", "high"}
    )
    assert layout.readings[0]["nvfp4_layout"] == (scales or "rows")


def test_open_readings_in_words() -> None:
    assert describe_reading("low", "a") == "even column in the low nibble, block scales in rows"
    assert describe_reading("high", "zz") == "even column in the high nibble, block scales in rows"
    for why, end in (
        ("", "The base model's own weights decide when they are at hand"),
        ("So", "So"),
    ):
        assert explain_open(make({}), Layout("high", None, "nothing says"), why) == (
            "here: the layout of its NVFP4 codes is unknown: nothing says, and the wrong nibble order or "
            "scale layout gives noise without an error. Open readings: even column in the high nibble, block "
            "scales in rows (--nibble-order high --nvfp4-layout rows); even column in the high nibble, block "
            "scales in 128 x 4 tiles (--nibble-order high --nvfp4-layout tiles). "
            f"{end}; or choose with these flags"
        )


@pytest.mark.parametrize(
    ("block", "metadata", "names", "found"),
    [
        ({"quant_method": "modelopt"}, {}, ["x.weight"], ("low", "rows", "quant_method modelopt in q")),
        ({}, {"quantization": "NVFP4"}, ["x.weight"], ("low", "rows", "quantization: nvfp4 in the header of f.st")),
        ({"layers": {"a": "nvfp4"}}, {}, ["x.weight"], ("high", "tiles", "layers of format nvfp4 in q")),
        ({"layers": {"a": {"format": "nvfp4"}}}, {}, ["x"], ("high", "tiles", "layers of format nvfp4 in q")),
        ({"layers": {"a": "a", "b": "z"}}, {}, ["x"], (None, None, "nothing in f.st declares it")),
        ({}, {}, ["a.comfy_quant"], ("high", "tiles", "layers of format nvfp4 in q")),
        ({"layers": {"a": "nvfp4"}}, {"quantization": "nvfp4"}, ["x"],
         (None, None, "layers of format nvfp4 in q and quantization: nvfp4 in the header of f.st contradict "
          "each other")),
        ({"quant_method": "modelopt", "layers": {"a": "nvfp4"}}, {}, ["x"],
         ("low", "rows", "quant_method modelopt in q")),
        ({"swap_weight_nibbles": True}, {}, ["x"],
         ("high", None, "swap_weight_nibbles in q; nothing in f.st declares it")),
        ({"swap_weight_nibbles": False, "checkpoint_weight_scale_layout": "swizzled"}, {}, ["x"],
         ("low", "tiles", "swap_weight_nibbles, checkpoint_weight_scale_layout in q")),
        ({"checkpoint_uses_packed_qkv": True}, {}, ["x"], ("high", "tiles", "checkpoint_uses_packed_qkv in q")),
        ({"quant_method": "modelopt"}, {}, ["double_blocks.0.img_attn.qkv.weight"],
         (None, None, "nothing in f.st declares it")),
    ],
)  # fmt: skip
def test_what_declares_a_layout(block: Any, metadata: Any, names: list[str], found: Any) -> None:
    checkpoint = make(dict.fromkeys(names, ("U8", (2, 2))), block, metadata=metadata)
    assert layouts.find_declared(checkpoint) == Layout(*found)
    chosen = replace(checkpoint, chosen={"nibble_order": "high"})
    assert layouts.find_layout(chosen) == Layout("high", found[1], "chosen")


# --- other families --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (448.0, 0),
        (256.0, 0),
        (255.0, -1),
        (511.0, 0),
        (512.0, 1),
        (1.0, -8),
        (0.0, -127),
        (2.0**-140, -127),
    ],
)
def test_exponents_of_blocks(largest: float, exponent: int) -> None:
    assert mx_blocks.find_exponents(torch.tensor([largest])).tolist() == [exponent]


def test_codes_of_mx_blocks() -> None:
    """Ties go away from zero; steps below 2**-6 are 2**-9; above 448 is 448."""
    numbers = [256.0, 500.0, 17.0, -17.0, 19.0, 2.0**-7, 1.5 * 2.0**-9, 2.0**-10, 0.0, 304.0]
    weight = torch.tensor([numbers + [0.0] * 22])
    codes, exponents = mx_blocks.encode_blocks(weight)
    assert exponents.tolist() == [[127]]
    assert codes.float()[0, :10].tolist() == [
        256.0, 448.0, 18.0, -18.0, 20.0, 2.0**-7, 2.0 * 2.0**-9, 2.0**-9, 0.0, 320.0,
    ]  # fmt: skip
    assert mx_blocks.decode_exponents(
        torch.tensor([[127, 128, 120]], dtype=torch.uint8)
    ).tolist() == [[1.0, 2.0, 2.0**-7]]


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ("7", "; file type Q8_0"),
        ("015", "; file type Q4_K_M"),
        ("0015", ""),
        ("x", ""),
        ("", ""),
        ("999", ""),
    ],
)
def test_gguf_files_in_words(stated: str, shown: str) -> None:
    stored: Headers = {
        "a": ("Q8_0", (2, 32)), "b": ("Q4_K", (2, 256)), "c": ("Q4_K", (2, 256)), "d": ("F32", (2,)),
    }  # fmt: skip
    metadata = {"general.architecture": "flux", "general.file_type": stated}
    assert (
        gguf.detect(make(stored, metadata=metadata)) == f"a GGUF file (flux{shown}; 2 Q4_K, 1 Q8_0)"
    )
    assert gguf.detect(make({"d": ("F32", (2,))}, metadata=metadata)) is None


@pytest.mark.parametrize(
    ("dtype", "shape", "linear"),
    [("Q8_0", (2, 64), True), ("Q8_0", (2, 48), False), ("Q8_0", (64,), False), ("Q8_0", (2, 32, 1), False),
     ("F32", (2, 64), False), ("Q4_K", (2, 256), True), ("Q4_K", (2, 128), False)],
)  # fmt: skip
def test_linear_layers_of_blocks(dtype: str, shape: Shape, linear: bool) -> None:
    assert gguf.is_linear(TensorHeader("a.weight", dtype, shape, "f")) is linear


@pytest.mark.parametrize(
    ("columns", "name"), [(256, "Q4_K"), (512, "Q4_K"), (96, "Q5_0"), (128, "Q5_0"), (48, None)]
)
def test_blocks_that_fit_rows(columns: int, name: str | None) -> None:
    given: dict[str, Any] = {"raw": False, "gelu": False, "interleaved": False, "columns": columns}
    found = gguf.scheme_of("a", gguf.SCHEMES["Q4_K"], **given)
    assert (found and found.name) == name
    assert gguf.tensors(gguf.SCHEMES["Q4_K"], 5, 768)["weight"].shapes == ((5, 432),)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("a.weight", "F8_E4M3", True), ("a.weight", "BF16", False), ("a.weight", "I64", False),
        ("a.weight._data", "I8", True), ("a.table", "U8", False), ("a.weight_scale", "F32", True),
        ("a.qweight", "F32", True), ("a.input_scale", "BF16", True), ("a.weight", "A", True),
        ("a.weights.x", "U8", False),
    ],
)  # fmt: skip
def test_codes_that_nothing_declares(name: str, dtype: str, said: bool) -> None:
    text = (
        f"f.st: tensor {name} ({dtype} [3, 5]) is quantized, but nothing declares how: expected a "
        "quantization_config in config.json or in the file's header, or a quant_model_description.json"
    )
    found = unknown_quantization.explain_codes(
        make({"z.bias": ("F32", (2,)), name: (dtype, (3, 5))})
    )
    assert found == (text if said else None)


def test_declarations_that_say_too_little() -> None:
    explain = unknown_quantization.explain_declaration
    assert explain(make({}, {"bits": 4, "group": 32})) == (
        "q describes a quantization by bits, group, but says nowhere which: expected a quant_method. Add "
        "it, or remove the description"
    )
    assert explain(make({}, {"format_version": "1.0", "layers": {}})) is None
    described = unknown_quantization.describe_block
    assert described({"quant_method": "x", "format": "f", "method": "m"}) == (
        "quant_method x, method m, format f"
    )
    assert described({"quant_algo": "x", "format": "f"}) == "quant_algo x"
    layers = {"a": "nvfp4", "b": {"format": "int7"}}
    assert explain(make({}, {"layers": layers})) == (
        "q: b has the format int7, which no quant family takes: known are float8_e4m3fn, "
        "float8_e4m3fn_rowwise, float8_e5m2, int8_tensorwise, mxfp8, nvfp4. Quantize with one of these"
    )


@pytest.mark.parametrize("size", [32, 16384, 1, "64"])
def test_sizes_of_rotations(size: Any) -> None:
    entry = {"convrot": True, "convrot_groupsize": size}
    assert refusal(families.load("comfyui-int8").read_scheme, "w", entry) == (  # type: ignore[attr-defined]
        f"w has convrot_groupsize {json.dumps(size)}: expected a power of 4 up to 4096, as 256. Correct the "
        "file with what wrote it, or quantize again"
    )
