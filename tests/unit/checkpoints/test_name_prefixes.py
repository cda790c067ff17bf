"""Prefixes of tensor names: taken off where every name has one, in every family, or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix.api import load_transformer, plan
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.name_prefixes import (
    PREFIXES,
    find_prefix,
    strip_block,
    strip_prefix,
    strip_tensors,
)
from quantmatrix.cli.main import main
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Request
from quantmatrix.runtime.plan.inspect import inspect
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub

FLUX, FLUX_2, WAN = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-dev",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
)
QWEN, Z_IMAGE = "Qwen/Qwen-Image", "Tongyi-MAI/Z-Image-Turbo"
FORMS = {
    "full precision": (FLUX, FLUX),
    "fp8, header": (FLUX, "quantmatrix/flux-1-fp8-single-file/flux-1-fp8.safetensors"),
    "fp8, markers": (QWEN, "quantmatrix/qwen-image-fp8-comfyui/qwen-image-fp8.safetensors"),
    "fp8, folder": (Z_IMAGE, "quantmatrix/z-image-fp8-tensor-static"),
    "modelopt-fp8": (FLUX, "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"),
    "modelopt-nvfp4": (FLUX, "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"),
    "raw nvfp4": (FLUX_2, "black-forest-labs/FLUX.2-dev-NVFP4/flux2-dev-nvfp4.safetensors"),
    "svdquant": (
        QWEN,
        "nunchaku-tech/nunchaku-qwen-image/svdq-int4_r128-qwen-image.safetensors",
    ),
    "msmodelslim": (WAN, "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"),
}
"""(base model, checkpoint) of every way in which a file says how its layers are stored."""
Rename = Callable[[str], str]


def find(reference: str) -> Path:
    folder = hub.default_folder()
    hub.ensure(reference, folder)
    snapshot = hub.find_snapshot(hub.repository_of(reference), folder)
    if reference.endswith(".safetensors"):
        return snapshot / reference.rpartition("/")[2]
    inner = snapshot / "transformer"
    return next(iter(sorted((inner if inner.is_dir() else snapshot).glob("*.safetensors"))))


def copy(source: Path, target: Path, rename: Rename, extra: dict[str, Any] | None = None) -> str:
    """A copy of weights, and of the JSON files beside them, under other names; its path."""
    for beside in source.parent.glob("*.json"):
        (target / beside.name).write_text(beside.read_text())
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = {rename(name): tensor for name, tensor in load_file(source).items()}
    save_file({**tensors, **(extra or {})}, target / source.name, metadata=metadata)
    return str(target / source.name)


def load(base: str, path: str) -> dict[str, torch.Tensor]:
    folder = str(find(base).parent.parent)
    model = load_transformer(folder, transformer_weights_path=path, backend="reference")
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit by bit, since codes have no comparison of their own."""
    one, two = (t.reshape(-1).contiguous().view(torch.uint8) for t in (one, two))
    return torch.equal(one, two)


def decide(base: str, path: str) -> Plan:
    folder = str(find(base).parent.parent)
    planned = plan(Request(model_path=folder, weights_paths={"transformer": path}, device="cpu"))
    assert isinstance(planned, Plan)
    return planned


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_the_same_without_the_prefix(form: str, tmp_path: Path) -> None:
    base, reference = FORMS[form]
    expected = load(base, str(find(reference)))
    path = copy(find(reference), tmp_path, lambda name: f"model.diffusion_model.{name}")
    got = load(base, path)
    assert got.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not equal(got[name], tensor)] == []
    described = inspect(path)["components"]["transformer"]
    assert (
        described["family"] == inspect(str(find(reference)))["components"]["transformer"]["family"]
    )


@pytest.mark.parametrize(
    "prefix", [*PREFIXES, "module._orig_mod.", "base_model.model.transformer."]
)
def test_every_prefix(prefix: str, tmp_path: Path) -> None:
    base, reference = FORMS["fp8, header"]
    path = copy(find(reference), tmp_path, lambda name: prefix + name)
    part = decide(base, path).components["transformer"]
    assert part.checkpoint.prefix == prefix
    assert len(part.layers) == len(
        decide(base, str(find(reference))).components["transformer"].layers
    )


@pytest.mark.parametrize("prefixed", [False, True])
def test_lists_may_have_the_prefix_or_not(prefixed: bool, tmp_path: Path) -> None:
    """A header's list of layers with the prefix of the tensors, or the other way round."""
    base, reference = FORMS["fp8, markers"]
    source = find(reference)
    tensors = load_file(source)
    layers = [n.removesuffix(".comfy_quant") for n in tensors if n.endswith(".comfy_quant")]
    before = "" if prefixed else "model.diffusion_model."
    after = "model.diffusion_model." if prefixed else ""
    listed = {f"{before}{layer}": {"format": "float8_e4m3fn"} for layer in layers}
    text = json.dumps({"format_version": "1.0", "layers": listed})
    kept = {f"{after}{n}": t for n, t in tensors.items() if not n.endswith(".comfy_quant")}
    path = tmp_path / "w.safetensors"
    save_file(kept, path, metadata={"_quantization_metadata": text})
    expected = decide(base, str(source)).components["transformer"].layers
    assert decide(base, str(path)).components["transformer"].layers == expected


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_whole_checkpoint_is_told_from_its_other_parts(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, reference = FORMS["fp8, markers"]
    other = {
        "first_stage_model.decoder.conv_in.weight": torch.zeros(2, 2),
        "text_encoders.t5.encoder.weight": torch.zeros(3),
        "text_encoders.t5.encoder.bias": torch.zeros(3),
    }
    path = copy(find(reference), tmp_path, lambda n: prefix + n, other)
    [note] = decide(base, path).warnings
    assert f"transformer{f' ({prefix}*)' if prefix else ''} are used" in note
    assert "1 of first_stage_model.*, 2 of text_encoders.* are left aside" in note
    assert main(["inspect", path]) == 0
    shown = capsys.readouterr().out
    assert "left aside   2 tensors text_encoders.*" in shown
    assert (f"diffusers after the prefix {prefix}\n" in shown) is bool(prefix)
    assert load(base, path)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda n: n if n.startswith("proj_out") else f"transformer.{n}",
            r"names begin with 'transformer\.', .*every tensor",
        ),
        (lambda n: f"net.inner.{n}", r"names begin with 'net\.inner\.', .*a known one"),
    ],
)
def test_what_is_not_taken_off_is_named(rename: Rename, message: str, tmp_path: Path) -> None:
    path = copy(find(FLUX), tmp_path, rename)
    with pytest.raises(CheckpointError, match=message):
        decide(FLUX, path)


def header(name: str) -> TensorHeader:
    return TensorHeader(name, "BF16", (2,), "w.safetensors")


def strip(*names: str) -> tuple[list[str], str, dict[str, int]]:
    tensors, prefix, aside = strip_tensors({name: header(name) for name in names})
    assert all(tensors[name].name == name for name in tensors)
    return sorted(tensors), prefix, aside


def test_markers_may_lack_the_prefix() -> None:
    names = ("model.diffusion_model.a.weight", "scaled_fp8")
    assert strip(*names) == (["a.weight", "scaled_fp8"], "model.diffusion_model.", {})
    assert strip("a.weight", "scaled_fp8") == (["a.weight", "scaled_fp8"], "", {})
    assert strip("model.a.weight", "other") == (["model.a.weight", "other"], "", {})


def test_a_file_of_other_parts_alone_stays() -> None:
    names = ("text_encoder.a.weight", "vae.b.weight")
    assert strip(*names) == (list(names), "", {})
    assert strip(*names, "a.weight") == (["a.weight"], "", {"text_encoder.": 1, "vae.": 1})


def test_prefixes_of_names() -> None:
    assert find_prefix([]) == ""
    assert find_prefix(["model.a.weight", "b.weight"]) == ""
    assert find_prefix(["module.model.a", "module.model.b"]) == "module.model."
    assert strip_prefix("model.diffusion_model.blocks.0") == "blocks.0"
    assert strip_prefix("transformer_blocks.0") == "transformer_blocks.0"
    block = {"quantization": {"ignore": ["model.x", "*y", 3]}, "layers": {"model.a": 1, "a": 2}}
    assert strip_block(block) == {
        "quantization": {"ignore": ["x", "*y", 3]},
        "layers": {"model.a": 1, "a": 2},  # two names of one layer: neither is the right one
    }
    assert strip_block(None) is None
