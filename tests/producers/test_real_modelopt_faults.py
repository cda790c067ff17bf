"""What the real ModelOpt writes and no family takes: refused, or told, by its cause."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("modelopt")

import modelopt_exports as exports
from modelopt.torch import quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from torch import nn

from quantmatrix import models
from quantmatrix.api import load_transformer, plan
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.errors import CheckpointError
from quantmatrix.families.producers.comfyui import WHOLE_INPUTS
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.load import count_quantized
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.inspect import inspect
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub
from quantmatrix.tools import build_modelopt_nvfp4_transformer as builder

E4M3 = {"num_bits": (4, 3)}


def change(base: dict[str, Any], *entries: tuple[str, dict[str, Any] | None]) -> dict[str, Any]:
    """A preset with more entries: quantizers by pattern, each with a format, or switched off."""
    config = deepcopy(base)
    added = [
        {"quantizer_name": name, "enable": False}
        if cfg is None
        else {"quantizer_name": name, "cfg": cfg, "enable": True}
        for name, cfg in entries
    ]
    config["quant_cfg"] = [*config["quant_cfg"], *added]
    return config


def check_against_file(model: str, folder: Path) -> None:
    """The whole model, inputs coded, against the file's tensors in ModelOpt's arithmetic."""
    expected = exports.build_from_file(model, folder, coded=True)
    found = load_transformer(str(folder), backend="reference", device="cpu", dtype=torch.float32)
    inputs = exports.make_inputs(model, 7)
    ours, theirs = exports.run_model(found, inputs), exports.run_model(expected, inputs)
    assert (ours - theirs).norm() / theirs.norm() < 1e-3


@pytest.mark.parametrize("compressed", [False, True])
def test_a_simulation_that_was_saved_is_no_model(tmp_path: Path, compressed: bool) -> None:
    """Its weights are in full precision, and so it was planned: to be refused while loading."""
    made = exports.make_transformer("flux-1", torch.bfloat16)
    calls = [exports.make_inputs("flux-1", seed, torch.bfloat16) for seed in (1, 2)]
    mtq.quantize(made, mtq.FP8_DEFAULT_CFG, lambda m: [exports.run_model(m, c) for c in calls])
    if compressed:
        mtq.compress(made)
    made.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to ModelOpt's simulation"):
        plan(model_path=str(tmp_path), device="cpu")
    assert "export_hf_checkpoint" in inspect(str(tmp_path))["components"]["transformer"]["why"]


@pytest.mark.parametrize("cfg", [None, {**E4M3, "type": "dynamic"}])
def test_fp8_with_other_inputs_is_refused_with_its_causes(
    tmp_path: Path, cfg: dict[str, Any] | None
) -> None:
    config = change(mtq.FP8_DEFAULT_CFG, ("*img_mlp*input_quantizer", cfg))
    exports.export("qwen-image", "", tmp_path / "t", config=config)
    with pytest.raises(CheckpointError, match="inputs are left alone, are scaled per call, or"):
        load_transformer(str(tmp_path / "t"), device="cpu")


def test_inputs_that_are_left_alone_in_a_mixed_file(tmp_path: Path) -> None:
    """The file does not say so; what the warning proposes makes the model ModelOpt's own."""
    places = ("*img_mlp*weight_quantizer", E4M3), ("*img_mlp*input_quantizer", None)
    folder = tmp_path / "t"
    exports.export("qwen-image", "", folder, config=change(mtq.NVFP4_DEFAULT_CFG, *places))
    with pytest.warns(UserWarning, match=f'4 FP8 layers have no input_scale.*"{WHOLE_INPUTS}"'):
        load_transformer(str(folder), device="cpu")
    config = json.loads((folder / "config.json").read_text())
    listed = config["quantization_config"]["quantized_layers"]
    config["quantization_config"]["layers"] = {
        layer: {"format": "float8_e4m3fn", WHOLE_INPUTS: True}
        for layer, entry in listed.items()
        if entry["quant_algo"] == "FP8"
    }
    (folder / "config.json").write_text(json.dumps(config))
    check_against_file("qwen-image", folder)


def test_other_algorithms_of_a_layer_are_named(tmp_path: Path) -> None:
    """W4A8 has NVFP4's tensors; of the others a shape alone says less than the declaration."""
    config = change(mtq.NVFP4_DEFAULT_CFG, ("*img_mlp*input_quantizer", E4M3))
    exports.export("qwen-image", "", tmp_path / "t", config=config)
    with pytest.raises(CheckpointError, match=r"img_mlp\.net\.0\.proj is W4A8_NVFP4_FP8, as"):
        load_transformer(str(tmp_path / "t"), device="cpu")


@pytest.mark.parametrize("size", [8, 32])
def test_blocks_of_another_size_are_named(tmp_path: Path, size: int) -> None:
    blocks = {
        "num_bits": (2, 1),
        "block_sizes": {-1: size, "type": "dynamic", "scale_bits": (4, 3)},
    }
    config = change(
        mtq.NVFP4_DEFAULT_CFG, ("*weight_quantizer", blocks), ("*input_quantizer", None)
    )
    exports.export("qwen-image", "", tmp_path / "t", config=config)
    with pytest.raises(CheckpointError, match=rf"one scale per {size} columns.*expected 16"):
        load_transformer(str(tmp_path / "t"), device="cpu")


def test_quantized_outputs_are_told(tmp_path: Path) -> None:
    config = change(mtq.FP8_DEFAULT_CFG, ("*attn*output_quantizer", E4M3))
    exports.export("flux-1", "", tmp_path / "t", config=config)
    with pytest.warns(UserWarning, match="kv_cache_scheme is there"):
        load_transformer(str(tmp_path / "t"), device="cpu")


@pytest.mark.parametrize("word", ["FP8", "NVFP4"])
def test_weights_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """ModelOpt divides them by their scale, which is zero, too."""
    original = exports.make_transformer

    def make(model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        made = original(model, dtype)
        made.transformer_blocks[0].img_mlp.net[0].proj.weight.zero_()
        return made

    monkeypatch.setattr(exports, "make_transformer", make)
    exports.export("qwen-image", word, tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"img_mlp\.net\.0\.proj.*weights are all zero"):
        load_transformer(str(tmp_path / "t"), device="cpu")


def test_an_export_over_shards_leaves_their_index(tmp_path: Path) -> None:
    """diffusers removes the old shards, and not the index that lists them."""
    base = exports.make_transformer("flux-1")
    base.save_pretrained(tmp_path / "t", max_shard_size="4MB")
    exports.export("flux-1", "FP8", tmp_path / "t")
    with pytest.raises(CheckpointError, match="left behind by an earlier export"):
        load_transformer(str(tmp_path / "t"), device="cpu")
    (tmp_path / "t" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    check_against_file("flux-1", tmp_path / "t")


@pytest.mark.parametrize("word", ["NVFP4_AWQ", "NVFP4_SVD"])
def test_mixed_transformer_of_wan(tmp_path: Path, word: str) -> None:
    """ModelOpt counts the patch embedding apart, so that the export is MIXED_PRECISION."""
    base, export, built = (tmp_path / name for name in ("base", "export", "built"))
    exports.make_transformer("wan-2-2").save_pretrained(base)
    exports.export("wan-2-2", word, export)
    assert exports.read_config(export)["quant_algo"] == "MIXED_PRECISION"
    statistics = builder.build(base, export, built, keep_bf16_patterns=["blocks.0.*"])
    assert statistics["removed_aux_tensors"] > 0
    listed = exports.read_config(built)["quantized_layers"]
    assert listed
    assert not [name for name in listed if name.startswith("blocks.0.")]
    check_against_file("wan-2-2", built)


def open_tiny(model: str, folder: Path) -> Any:
    """(folder of the base, its diffusers pipeline) of a tiny model."""
    import diffusers

    reference = models.load(model).REPO
    hub.ensure(reference, hub.default_folder())
    shutil.copytree(hub.find_snapshot(reference, hub.default_folder()), folder)
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def test_both_experts_of_wan_in_one_folder(tmp_path: Path) -> None:
    """Each flag takes its own expert of the folder, and the export alone is no whole model."""
    pipeline = open_tiny("wan-2-2", tmp_path / "base")
    parts = ("transformer", "transformer_2")
    for name, word in zip(parts, ("FP8", "NVFP4"), strict=True):
        calls = [exports.make_inputs("wan-2-2", seed) for seed in (1, 2)]
        with exports.simulate_on_cpu(), torch.no_grad():
            mtq.quantize(
                getattr(pipeline, name).float(),
                exports.CONFIGS[word],
                lambda module, calls=calls: [exports.run_model(module, call) for call in calls],
            )
    out = tmp_path / "out"
    export_hf_checkpoint(pipeline, export_dir=out, components=list(parts))
    planned = plan(
        Request(
            model_path=str(tmp_path / "base"),
            component_paths=dict.fromkeys(parts, str(out)),
            device="cpu",
        )
    )
    assert isinstance(planned, Plan)
    assert [part.family for part in planned.components.values()] == [
        "modelopt-fp8",
        "modelopt-nvfp4",
    ]
    for name in parts:
        assert (
            planned.components[name].checkpoint.files == open_component(str(out), Hub(), name).files
        )
    alone = plan(Request(model_path=str(out), device="cpu"))
    assert isinstance(alone, Plan)
    with pytest.raises(CheckpointError, match="a part of a model, without scheduler"):
        build_pipeline(alone)
    loaded = load_transformer(str(out), component="transformer_2", device="cpu")
    assert count_quantized(loaded)


def test_a_quantized_text_encoder_is_read_as_modelopt_wrote_it(tmp_path: Path) -> None:
    """transformers loads such codes silently as numbers: the prompt became another one.

    The export gives projections of one input a common scale, so that its codes are not those which were
    simulated; they are decoded here by their scales instead.
    """
    pipeline = open_tiny("flux-1", tmp_path / "base")
    words = torch.arange(1, 9)[None]
    with torch.no_grad():
        plain = pipeline.text_encoder(input_ids=words).last_hidden_state
        mtq.quantize(pipeline.text_encoder, mtq.FP8_DEFAULT_CFG, lambda m: m(input_ids=words))
        simulated = pipeline.text_encoder(input_ids=words).last_hidden_state
    export_hf_checkpoint(pipeline, export_dir=tmp_path / "out")
    stored = exports.read_export(tmp_path / "out" / "text_encoder")
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    planned = plan(
        Request(model_path=str(tmp_path / "out"), device="cpu", backend="decode", dtype="float32")
    )
    assert isinstance(planned, Plan)
    assert planned.encoders["text_encoder"].family == "modelopt-fp8"
    decoded = {
        name: tensor.float() * stored[f"{name}_scale"].float()
        if tensor.dtype == torch.float8_e4m3fn
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale")
    }
    expected = open_tiny("flux-1", tmp_path / "again").text_encoder.float()
    assert expected.load_state_dict(decoded, strict=False).missing_keys == []
    with torch.no_grad():
        exact = expected(input_ids=words).last_hidden_state
        built = build_pipeline(planned).text_encoder(input_ids=words).last_hidden_state
    assert (built - exact).norm() < 1e-3 * exact.norm()
    assert 0.2 < (built - plain).norm() / (simulated - plain).norm() < 2.0
