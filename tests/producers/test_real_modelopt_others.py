"""Exports of the real ModelOpt beyond its two main presets: loaded exactly, or refused by name."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("modelopt")

import modelopt_exports as exports
from modelopt.torch import quantization as mtq
from modelopt.torch.export import export_hf_checkpoint

from quantmatrix import models
from quantmatrix.api import load_transformer, plan
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.errors import CheckpointError
from quantmatrix.families import modelopt_nvfp4
from quantmatrix.measure.fallback import Study, rank_modules
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.load import count_quantized
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub

BOTH = pytest.mark.parametrize(("backend", "limit"), [("decode", 1e-5), ("reference", 1e-3)])
WORDS = ("W4A16_NVFP4", "NVFP4_AWQ", "NVFP4_AWQ", "W4A16_NVFP4", "W4A16_NVFP4")
OTHERS = {
    "FP8_PER_CHANNEL_PER_TOKEN": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_pb_wo": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "MXFP8": mtq.MXFP8_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "W8A8_SQ_PER_CHANNEL": mtq.INT8_SMOOTHQUANT_CFG,
    "W8A16": mtq.INT8_WEIGHT_ONLY_CFG,
    "W4A8_NVFP4_FP8": mtq.W4A8_NVFP4_FP8_CFG,
}


def check_against_file(model: str, folder: Path, backend: str, limit: float) -> None:
    """The whole model, loaded by us, against the file's tensors in ModelOpt's arithmetic."""
    expected = exports.build_from_file(model, folder, coded=backend == "reference")
    found = load_transformer(str(folder), backend=backend, device="cpu", dtype=torch.float32)
    assert set(count_quantized(found).values()) == {backend}
    inputs = exports.make_inputs(model, 7)
    ours, theirs = exports.run_model(found, inputs), exports.run_model(expected, inputs)
    assert (ours - theirs).norm() / theirs.norm() < limit


@pytest.mark.parametrize(("model", "word"), zip(models.IDS, WORDS, strict=True))
def test_smoothed_and_weight_only_exports(tmp_path: Path, model: str, word: str) -> None:
    exports.export(model, word, tmp_path / "t", dtype=torch.bfloat16, shards=3)
    schemes = modelopt_nvfp4.schemes(open_component(str(tmp_path / "t"), Hub()))
    assert {scheme.name for scheme in schemes.values()} == {word}
    for backend, limit in (("decode", 1e-5), ("reference", 1e-3)):
        check_against_file(model, tmp_path / "t", backend, limit)


def add_to(base: dict[str, Any], where: str, preset: dict[str, Any]) -> dict[str, Any]:
    """A configuration with another preset's quantizers in the layers that `where` names."""
    config = deepcopy(base)
    own = [e for e in preset["quant_cfg"] if e["quantizer_name"].startswith(("*weight", "*input"))]
    moved = [{**e, "quantizer_name": f"*{where}{e['quantizer_name']}"} for e in own]
    config["quant_cfg"] = [*config["quant_cfg"], *moved]
    return config


@BOTH
def test_fp8_and_nvfp4_in_one_file(tmp_path: Path, backend: str, limit: float) -> None:
    config = add_to(mtq.NVFP4_DEFAULT_CFG, "img_mlp", mtq.FP8_DEFAULT_CFG)
    exports.export("qwen-image", "", tmp_path / "t", config=config)
    assert exports.read_config(tmp_path / "t")["quant_algo"] == "MIXED_PRECISION"
    schemes = modelopt_nvfp4.schemes(open_component(str(tmp_path / "t"), Hub()))
    assert Counter(s.name for s in schemes.values()) == {"NVFP4": 29, "FP8": 4}
    check_against_file("qwen-image", tmp_path / "t", backend, limit)


@BOTH
def test_layers_with_and_without_coded_inputs(tmp_path: Path, backend: str, limit: float) -> None:
    def prepare(module: torch.nn.Module) -> None:
        mtq.disable_quantizer(module, "*img_mlp*input_quantizer")

    exports.export("qwen-image", "NVFP4", tmp_path / "t", prepare=prepare)
    schemes = modelopt_nvfp4.schemes(open_component(str(tmp_path / "t"), Hub()))
    assert Counter(s.name for s in schemes.values()) == {"NVFP4": 29, "W4A16_NVFP4": 4}
    check_against_file("qwen-image", tmp_path / "t", backend, limit)


@pytest.mark.parametrize("word", OTHERS)
def test_other_algorithms_are_refused_by_name(tmp_path: Path, word: str) -> None:
    exports.export("qwen-image", "", tmp_path / "t", config=OTHERS[word], dtype=torch.bfloat16)
    assert exports.read_config(tmp_path / "t")["quant_algo"] == word
    with pytest.raises(CheckpointError, match=f"quant_method modelopt, quant_algo {word}, which"):
        load_transformer(str(tmp_path / "t"), device="cpu")


@pytest.mark.parametrize("preset", ["MXFP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"])
def test_other_algorithms_in_a_mixed_file_are_refused_by_name(tmp_path: Path, preset: str) -> None:
    config = add_to(mtq.NVFP4_DEFAULT_CFG, "img_mlp", getattr(mtq, preset))
    exports.export("qwen-image", "", tmp_path / "t", config=config)
    word = "MXFP8" if "MXFP8" in preset else "FP8_PER_CHANNEL_PER_TOKEN"
    with pytest.raises(CheckpointError, match=rf"img_mlp\.net\.0\.proj is {word}, as"):
        load_transformer(str(tmp_path / "t"), device="cpu")


def test_exports_for_single_file_runtimes(tmp_path: Path) -> None:
    """Headers alone change nothing; padded scales are refused; what may be tiled is told."""
    tags: dict[str, dict[str, Any]] = {
        "plain": {},
        "listed": {"enable_layerwise_quant_metadata": True},
        "rows": {"padding_strategy": "row"},
        "padded": {"padding_strategy": "row_col"},
        "tiled": {"enable_swizzle_layout": True},
    }
    for tag, options in tags.items():
        exports.export("flux-2", "NVFP4", tmp_path / tag, **options)
    plain = exports.read_export(tmp_path / "plain")
    for tag in ("listed", "rows"):
        with pytest.warns(UserWarning, match="enable_swizzle_layout"):
            load_transformer(str(tmp_path / tag), device="cpu")
        check_against_file("flux-2", tmp_path / tag, "decode", 1e-5)
        same = exports.read_export(tmp_path / tag)
        assert all(torch.equal(same[n].view(torch.uint8), t.view(torch.uint8)) for n, t in
                   plain.items() if n.endswith("weight_scale"))  # fmt: skip
    with pytest.raises(CheckpointError, match="These scales are padded"):
        load_transformer(str(tmp_path / "padded"), device="cpu")
    with pytest.warns(UserWarning, match="enable_swizzle_layout"):
        load_transformer(str(tmp_path / "tiled"), device="cpu")


def test_a_measured_fallback_set_beats_the_guides_for_flux_2(tmp_path: Path) -> None:
    """The guide keeps layers outside the blocks, which only ModelOpt itself quantizes."""
    exports.export("flux-2", "NVFP4", tmp_path / "t", dtype=torch.bfloat16)
    base = models.load("flux-2")
    request = Request(
        model_path=base.REPO, tiny=True, device="cpu", dtype="float32", backend="reference",
        component_paths={"transformer": str(tmp_path / "t")}, num_inference_steps=2,
    )  # fmt: skip
    study = Study(request)
    patterns = [re.compile(pattern) for pattern in base.FALLBACKS["flux2"]]
    hand = [n for n in study.forms if any(p.fullmatch(n.partition(".")[2]) for p in patterns)]
    shares = rank_modules(study)
    ours = [module for share in shares[: len(hand)] for module in share.modules]
    assert len(ours) == len(hand) == 10
    assert study.measure(ours).psnr_db > study.measure(hand).psnr_db


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, export of a whole FLUX.1 pipeline, export of its transformer alone)."""
    import diffusers

    folder = tmp_path_factory.mktemp("pipelines")
    reference = "black-forest-labs/FLUX.1-dev"
    hub.ensure(reference, hub.default_folder())
    shutil.copytree(hub.find_snapshot(reference, hub.default_folder()), folder / "base")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
    calls = [exports.make_inputs("flux-1", seed) for seed in (1, 2)]
    with exports.simulate_on_cpu(), torch.no_grad():
        mtq.quantize(
            pipeline.transformer,
            mtq.NVFP4_DEFAULT_CFG,
            lambda module: [exports.run_model(module, call) for call in calls],
        )
    shown = deepcopy(pipeline.transformer)
    export_hf_checkpoint(pipeline, export_dir=folder / "whole")
    pipeline.transformer = shown
    export_hf_checkpoint(pipeline, export_dir=folder / "alone", components=["transformer"])
    return folder / "base", folder / "whole", folder / "alone"


def test_exports_of_pipelines(pipelines: tuple[Path, Path, Path]) -> None:
    """A whole pipeline is a model; one that holds the transformer alone is an override."""
    base, whole, alone = map(str, pipelines)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_inference_steps": 2}
    options |= {"height": 64, "width": 64, "hub": Hub(offline=True)}
    latents = []
    for paths in (
        {"model_path": whole},
        {"model_path": base, "component_paths": {"transformer": alone}},
        {"model_path": base, "component_paths": {"transformer": f"{alone}/transformer"}},
        {"model_path": base, "weights_paths": {"transformer": alone}},
    ):
        planned = plan(Request(**options, **paths))
        assert isinstance(planned, Plan)
        assert planned.components["transformer"].family == "modelopt-nvfp4"
        latents.append(generate(planned.request, plan=planned).latents[-1])
    assert all(torch.equal(latents[0], other) for other in latents[1:])
