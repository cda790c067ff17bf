"""Export faults: what ModelOpt writes and no family takes is named by its cause."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError
from quantmatrix.families.producers.modelopt_faults import check_export, list_doubts
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.runtime.plan.inspect import describe

Headers = Mapping[str, tuple[str, tuple[int, ...]]]

FP8: Headers = {"weight": ("F8_E4M3", (32, 64)), "weight_scale": ("F32", ())}
STATIC: Headers = {**FP8, "input_scale": ("F32", ())}
NVFP4: Headers = {
    "weight": ("U8", (32, 32)),
    "weight_scale": ("F8_E4M3", (32, 4)),
    "weight_scale_2": ("F32", ()),
    "input_scale": ("F32", ()),
}
PLAIN: Headers = {"weight": ("BF16", (32, 64))}


def make_checkpoint(stored: Mapping[str, Headers], /, **block: Any) -> Checkpoint:
    """A checkpoint of headers that ModelOpt declares."""
    tensors = {
        f"{layer}.{suffix}": TensorHeader(f"{layer}.{suffix}", dtype, shape, "f.safetensors")
        for layer, headers in stored.items()
        for suffix, (dtype, shape) in headers.items()
    }
    return Checkpoint(
        "here",
        ("f.safetensors",),
        tensors,
        quantization={"quant_method": "modelopt", **block},
        quantization_from="config.json: quantization_config",
    )


def make_mixed(words: Mapping[str, Mapping[str, Any]], **layers: Headers) -> Checkpoint:
    return make_checkpoint(layers, quant_algo="MIXED_PRECISION", quantized_layers=words)


@pytest.mark.parametrize("word", ["MXFP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "W8A16"])
def test_the_algorithm_of_a_layer_is_named(word: str) -> None:
    listed = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": word}}
    with pytest.raises(CheckpointError, match=rf"layer b is {word.upper()}, as config.json"):
        check_export(make_mixed(listed, a=NVFP4, b=FP8))
    check_export(make_mixed(listed, a=NVFP4, b=PLAIN))  # a builder put it back into BF16


@pytest.mark.parametrize("size", [8, 32])
def test_the_size_of_blocks_is_named(size: int) -> None:
    message = rf"layer a has one scale per {size} columns.*group_size {size}\): expected 16"
    layer = {**NVFP4, "weight_scale": ("F8_E4M3", (32, 64 // size))}
    listed = {"a": {"quant_algo": "NVFP4", "group_size": size}}
    with pytest.raises(CheckpointError, match=message):
        check_export(make_mixed(listed, a=layer))
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": size}}}
    with pytest.raises(CheckpointError, match=message):
        check_export(make_checkpoint({"a": layer}, quant_algo="NVFP4", config_groups=groups))


def test_fp8_without_input_scales_is_told_with_its_causes() -> None:
    check_export(make_checkpoint({"a": STATIC}, quant_algo="FP8"))
    with pytest.raises(CheckpointError, match=r"a\.input_scale is missing.*left alone, are scaled"):
        check_export(make_checkpoint({"a": FP8, "b": STATIC}, quant_algo="FP8"))


def read_doubts(checkpoint: Checkpoint) -> list[str]:
    check_export(checkpoint)
    return list_doubts(checkpoint, families.load("modelopt-nvfp4").schemes(checkpoint))


def test_inputs_that_a_mixed_file_leaves_open_are_a_warning() -> None:
    listed = {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}}
    assert read_doubts(make_mixed(listed, a=NVFP4, b=STATIC)) == []
    [note] = read_doubts(make_mixed(listed, a=NVFP4, b=FP8))
    assert "1 FP8 layers have no input_scale, b is the first" in note
    said = {"b": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}
    checkpoint = make_checkpoint(
        {"a": NVFP4, "b": FP8},
        quant_algo="MIXED_PRECISION",
        quantized_layers=listed,
        layers=said,
    )
    assert read_doubts(checkpoint) == []
    assert families.load("modelopt-nvfp4").schemes(checkpoint)["b"].activation == "none"


def test_scales_of_keys_and_values_that_no_file_holds_are_a_warning() -> None:
    checkpoint = make_checkpoint({"a": NVFP4}, quant_algo="NVFP4", kv_cache_scheme="FP8")
    [note] = read_doubts(checkpoint)
    assert "kv_cache_scheme is there" in note


def test_other_methods_are_none_of_its_business() -> None:
    block = {"quant_method": "fp8", "kv_cache_scheme": "FP8", "quantized_layers": {"a": {}}}
    checkpoint = Checkpoint("here", (), {}, quantization=block)
    check_export(checkpoint)
    assert list_doubts(checkpoint, {}) == []


def test_a_saved_simulation_is_no_model_in_full_precision(tmp_path: Path) -> None:
    from weight_files import write_json, write_weights

    from quantmatrix.api import plan
    from quantmatrix.runtime.plan.inspect import inspect

    layer = "transformer_blocks.0.attn.to_q"
    write_json(tmp_path / "config.json", {"_class_name": "FluxTransformer2DModel"})
    write_weights(
        tmp_path / "diffusion_pytorch_model.safetensors",
        {f"{layer}.weight": ("BF16", (32, 64)), f"{layer}.weight_quantizer._amax": ("F32", ())},
    )
    message = r"to_q\.weight_quantizer\._amax belongs to ModelOpt's simulation"
    with pytest.raises(CheckpointError, match=message):
        plan(model_path=str(tmp_path), device="cpu")
    shown = inspect(str(tmp_path))["components"]["transformer"]
    assert shown["unknown"]
    assert "export_hf_checkpoint" in shown["why"]
    declared = make_checkpoint({layer: {"weight_quantizer._amax": ("F32", ())}}, quant_algo="FP8")
    assert explain_unknown(declared) is None


def test_an_unknown_algorithm_is_named_before_its_sizes() -> None:
    """Its blocks are no concern of NVFP4: the checks are those of a family that takes the file."""
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}
    layer = {"weight": ("U8", (32, 32)), "weight_scale": ("F32", (32, 1))}
    checkpoint = make_checkpoint({"a": layer}, quant_algo="W4A16_AWQ", config_groups=groups)
    families.check(checkpoint)
    found = describe(checkpoint)
    assert found["unknown"]
    assert "W4A16_AWQ, which no quant family takes" in found["why"]
