"""NVFP4 exports of the real ModelOpt: decoded weights exact, whole models as the file says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("modelopt")

import modelopt_exports as exports
from modelopt.torch import opt as mto
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from quantmatrix import models
from quantmatrix.api import load_transformer
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.families import detect, modelopt_nvfp4
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import nvfp4_arithmetic
from quantmatrix.request import Hub
from quantmatrix.runtime.load import count_quantized
from quantmatrix.tools import build_modelopt_nvfp4_transformer as builder

Written = tuple[str, str, Path]

MODELS = list(models.IDS)
EACH = pytest.mark.parametrize("written", MODELS, indirect=True)
SHARDS = {"NVFP4": 3, "NVFP4_SVD": 1}


@pytest.fixture(scope="module", params=["NVFP4", "NVFP4_SVD"])
def word(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(
    request: pytest.FixtureRequest, word: str, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    """(model, algorithm, folder) of an export: three shards without, one with the branch."""
    folder = tmp_path_factory.mktemp("export") / "transformer"
    exports.export(request.param, word, folder, shards=SHARDS[word])
    return request.param, word, folder


def measure(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@EACH
def test_schemes_are_what_was_exported(written: Written) -> None:
    _, word, folder = written
    assert len(list(folder.glob("*.safetensors"))) >= SHARDS[word]
    checkpoint = open_component(str(folder), Hub())
    family = detect(checkpoint)
    assert family is not None
    assert family[0] == "modelopt-nvfp4"
    schemes = modelopt_nvfp4.schemes(checkpoint)
    scaled = {n.removesuffix(".weight_scale") for n in checkpoint.tensors if "weight_scale" in n}
    assert set(schemes) == {n.removesuffix(".weight_scale_2") for n in scaled}
    assert {scheme.name for scheme in schemes.values()} == {word}
    assert {scheme.rank for scheme in schemes.values()} == {32 if word == "NVFP4_SVD" else 0}


@EACH
def test_decoded_weights_are_exact(written: Written) -> None:
    _, _, folder = written
    tensors = exports.read_export(folder)
    schemes = modelopt_nvfp4.schemes(open_component(str(folder), Hub()))
    for layer, scheme in schemes.items():
        prefix = f"{layer}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        theirs = exports.FileLinear(own, coded=False).weight
        canonical = modelopt_nvfp4.canonical(own, scheme)
        ours = nvfp4_arithmetic.decode_residual(canonical, torch.float32)
        assert torch.equal(ours, theirs), layer


@EACH
@pytest.mark.parametrize(("backend", "limit"), [("decode", 1e-5), ("reference", 1e-3)])
def test_whole_models(written: Written, backend: str, limit: float) -> None:
    model, _, folder = written
    expected = exports.build_from_file(model, folder, coded=backend == "reference")
    found = load_transformer(str(folder), backend=backend, device="cpu", dtype=torch.float32)
    assert set(count_quantized(found).values()) == {backend}
    inputs = exports.make_inputs(model, 7)
    assert measure(exports.run_model(found, inputs), exports.run_model(expected, inputs)) < limit


def test_wildcard_exclusions(tmp_path: Path) -> None:
    from modelopt.torch import quantization as mtq

    folder = tmp_path / "transformer"
    disabled = ("*norm_out*", "*time_text_embed*", "*transformer_blocks.0.*")
    exports.export(
        "flux-1",
        "NVFP4",
        folder,
        prepare=lambda m: [mtq.disable_quantizer(m, pattern) for pattern in disabled],
    )
    ignore = exports.read_config(folder)["ignore"]
    assert any(entry.endswith("*") for entry in ignore)
    schemes = modelopt_nvfp4.schemes(open_component(str(folder), Hub()))
    assert not [name for name in schemes if "norm_out" in name or "blocks.0." in name]
    found = load_transformer(str(folder), backend="reference", device="cpu", dtype=torch.float32)
    expected = exports.build_from_file("flux-1", folder, coded=True)
    inputs = exports.make_inputs("flux-1", 7)
    assert measure(exports.run_model(found, inputs), exports.run_model(expected, inputs)) < 1e-3


def test_our_writer_gives_modelopts_bytes() -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    weight[:, :16] = 0
    for dtype in (torch.float32, torch.bfloat16):
        stored = weight.to(dtype)
        coded, scales, whole = NVFP4QTensor.quantize(stored.clone(), 16)
        limits = Calibration(torch.full((160,), -1.0), torch.ones(160))
        ours = modelopt_nvfp4.quantize(stored, modelopt_nvfp4.NVFP4, calibration=limits)
        assert torch.equal(ours["weight"], coded._quantized_data)
        assert torch.equal(ours["weight_scale"].float(), scales.float())
        assert torch.equal(ours["weight_scale_2"], whole)


def test_inputs_are_rounded_as_modelopt_rounds_them() -> None:
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)) * 3
    x[5] = 0
    for scale in (x.abs().amax() / 2688, torch.tensor(0.0015)):
        ours = nvfp4_arithmetic.round_inputs(x, scale)
        assert torch.equal(ours, exports.round_blocks(x, scale))


def test_mixed_transformer_from_an_export(tmp_path: Path) -> None:
    folder, base, built = tmp_path / "export", tmp_path / "base", tmp_path / "built"
    exports.export("flux-1", "NVFP4", folder)
    exports.make_transformer("flux-1").save_pretrained(base)
    statistics = builder.build(base, folder, built, pattern_preset="flux1-nvfp4")
    assert statistics["fallback_modules"] == statistics["replaced_tensors"] / 2 > 0
    loaded = [
        load_transformer(str(path), device="cpu", dtype=torch.float32)
        for path in (base, folder, built)
    ]
    inputs = exports.make_inputs("flux-1", 7)
    target, before, after = (exports.run_model(module, inputs) for module in loaded)
    assert measure(after, target) < measure(before, target) < 0.5


def test_modelopts_saved_model_is_read(tmp_path: Path) -> None:
    """The FP8 builder reads what ModelOpt saves without running any code of it."""
    from modelopt.torch import quantization as mtq

    from quantmatrix.tools import build_modelopt_fp8_transformer as fp8

    folder, base, built = tmp_path / "export", tmp_path / "base", tmp_path / "built"
    original = exports.make_transformer("flux-1")
    original.save_pretrained(base)
    calls = [exports.make_inputs("flux-1", seed) for seed in (1, 2)]
    made = mtq.quantize(
        original, mtq.FP8_DEFAULT_CFG, lambda m: [exports.run_model(m, call) for call in calls]
    )
    mto.save(made, tmp_path / "backbone.pt")
    exports.export_hf_checkpoint(made, export_dir=folder)
    statistics = fp8.build(folder, tmp_path / "backbone.pt", built, base_transformer_dir=base)
    assert statistics["quantized_weights"] > 0
    loaded = [
        load_transformer(str(path), device="cpu", dtype=torch.float32)
        for path in (base, folder, built)
    ]
    inputs = exports.make_inputs("flux-1", 7)
    target, before, after = (exports.run_model(module, inputs) for module in loaded)
    assert measure(after, target) < measure(before, target) < 0.2
