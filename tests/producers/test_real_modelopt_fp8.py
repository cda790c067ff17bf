"""FP8 exports of the real ModelOpt: every layer found, decoded and multiplied as the file says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("modelopt")

import modelopt_exports as exports
from torch import nn
from torch.nn import functional

from quantmatrix import models
from quantmatrix.api import load_transformer
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.families import detect, modelopt_fp8
from quantmatrix.request import Hub
from quantmatrix.runtime.load import count_quantized

SHARDS = {"flux-1": 3, "flux-2": 1, "wan-2-2": 3, "qwen-image": 1, "z-image": 3}
Written = tuple[str, Path]


@pytest.fixture(scope="module", params=models.IDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(model, folder) of an export."""
    folder = tmp_path_factory.mktemp("export") / "transformer"
    exports.export(request.param, "FP8", folder, shards=SHARDS[request.param])
    return request.param, folder


class FileLinear(nn.Module):
    """A layer of the file by the formulas of the format, in plain torch."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], coded: bool) -> None:
        super().__init__()
        self.coded, self.scale, self.offset = coded, tensors["input_scale"], tensors.get("bias")
        decoded = tensors["weight"].float() * tensors["weight_scale"]
        self.weight = nn.Parameter(decoded, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.coded:
            codes = (x / self.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            x = codes.float() * self.scale
        y = functional.linear(x, self.weight)
        return y if self.offset is None else y + self.offset.float()


def build_from_file(model: str, folder: Path, *, coded: bool) -> nn.Module:
    """A float32 diffusers model with the file's tensors; `coded`: inputs are quantized, too."""
    found = exports.read_export(folder)
    made = exports.make_transformer(model)
    layers = [n.removesuffix(".weight_scale") for n in found if n.endswith(".weight_scale")]
    for layer in layers:
        prefix = f"{layer}."
        own = {n.removeprefix(prefix): found.pop(n) for n in list(found) if n.startswith(prefix)}
        made.set_submodule(layer, FileLinear(own, coded))
    missing = made.load_state_dict({n: t.float() for n, t in found.items()}, strict=False)
    assert not missing.unexpected_keys
    return made.eval()


def measure(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_layers_are_those_of_the_file(written: Written) -> None:
    model, folder = written
    assert len(list(folder.glob("*.safetensors"))) >= SHARDS[model]
    checkpoint = open_component(str(folder), Hub())
    assert detect(checkpoint) is not None
    assert detect(checkpoint)[0] == "modelopt-fp8"
    scaled = {
        n.removesuffix(".weight_scale") for n in checkpoint.tensors if n.endswith(".weight_scale")
    }
    assert set(modelopt_fp8.schemes(checkpoint)) == scaled
    assert scaled


@pytest.mark.parametrize(("backend", "limit"), [("decode", 1e-5), ("reference", 1e-3)])
def test_whole_models(written: Written, backend: str, limit: float) -> None:
    model, folder = written
    expected = build_from_file(model, folder, coded=backend == "reference")
    found = load_transformer(str(folder), backend=backend, device="cpu", dtype=torch.float32)
    assert set(count_quantized(found).values()) == {backend}
    inputs = exports.make_inputs(model, 7)
    assert measure(exports.run_model(found, inputs), exports.run_model(expected, inputs)) < limit


def test_bf16_export_loads_with_the_same_layers(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    exports.export("flux-1", "FP8", folder, dtype=torch.bfloat16)
    loaded = load_transformer(str(folder), backend="decode", device="cpu", dtype=torch.float32)
    expected = build_from_file("flux-1", folder, coded=False)
    inputs = exports.make_inputs("flux-1", 7)
    assert measure(exports.run_model(loaded, inputs), exports.run_model(expected, inputs)) < 1e-5


def test_our_writer_gives_modelopts_codes(tmp_path: Path) -> None:
    """Codes of a BF16 export equal our `quantize` of the same BF16 weight."""
    folder = tmp_path / "transformer"
    exports.export("flux-1", "FP8", folder, dtype=torch.bfloat16)
    found = exports.read_export(folder)
    plain = dict(exports.make_transformer("flux-1", torch.bfloat16).named_parameters())
    from quantmatrix.families.protocol import Calibration

    layer = "transformer_blocks.0.attn.to_q"
    ones = torch.ones(plain[f"{layer}.weight"].shape[1])
    ours = modelopt_fp8.quantize(
        plain[f"{layer}.weight"], modelopt_fp8.FP8, calibration=Calibration(-ones, ones)
    )
    assert torch.equal(ours["weight_scale"], found[f"{layer}.weight_scale"].float().reshape(()))
    same = ours["weight"].view(torch.uint8) == found[f"{layer}.weight"].view(torch.uint8)
    assert same.all()


def test_wildcard_exclusions(tmp_path: Path) -> None:
    from modelopt.torch import quantization as mtq

    folder = tmp_path / "transformer"
    disabled = ("*norm_out*", "*time_text_embed*", "*transformer_blocks.0.*")
    exports.export(
        "flux-1",
        "FP8",
        folder,
        prepare=lambda m: [mtq.disable_quantizer(m, pattern) for pattern in disabled],
    )
    assert any(entry.endswith("*") for entry in exports.read_config(folder)["ignore"])
    schemes = modelopt_fp8.schemes(open_component(str(folder), Hub()))
    assert schemes
    assert not [name for name in schemes if "norm_out" in name or "blocks.0." in name]
    load_transformer(str(folder), device="cpu")
