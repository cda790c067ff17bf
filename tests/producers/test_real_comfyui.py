"""Files of convert-to-quant, which writes for ComfyUI: found, decoded and run as they say."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("convert_to_quant")

import modelopt_exports as exports
from convert_to_quant.cli.main import main
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from quantmatrix import families, models
from quantmatrix.api import load_transformer
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.comfyui import MARKER
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.errors import CheckpointError
from quantmatrix.models import flux_2
from quantmatrix.request import Hub
from quantmatrix.runtime.load import count_quantized
from quantmatrix.tools.packing import pack_tensors

FORMS: Mapping[str, tuple[list[str], str, str]] = {
    "tensor": ([], "fp8", "fp8"),
    "weights only": (["--full_precision_matrix_mult"], "fp8", "fp8-weights"),
    "channel": (["--scaling_mode", "row"], "fp8", "fp8-channel"),
    "static": (["--input_scale"], "fp8", "fp8"),
    "listed": (["--save-quant-metadata"], "fp8", "fp8"),
    "nvfp4": (["--nvfp4"], "modelopt-nvfp4", "NVFP4"),
}
"""Options of the command, family and scheme of what it writes; `listed` has a list, too."""


def convert(model: str, folder: Path, *options: str, original: bool = False) -> Path:
    """A file that the real command writes of a tiny transformer, whose folder lies beside it.

    `original`: of one in the names of FLUX.2's first files.
    """
    base = folder / "base"
    transformer = exports.make_transformer(model, torch.bfloat16)
    transformer.save_pretrained(base)
    [source] = base.glob("*.safetensors")
    if original:
        source = folder / "original.safetensors"
        packed = pack_tensors(dict(transformer.state_dict()), flux_2.BFL)
        save_file({name: tensor.contiguous() for name, tensor in packed.items()}, source)
    made = folder / "made.safetensors"
    words = ["-i", str(source), "-o", str(made), "--comfy_quant", "--simple", "--device", "cpu"]
    words += ["--optimizer", "original", "--manual_seed", "0", "--verbose", "MINIMAL", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_to_quant", *words])
        patch.setattr(gc, "collect", lambda: 0)  # after each layer: slow where there are many tests
        main()
    return made


def read_strings(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def open_file(path: Path) -> Checkpoint:
    return open_weights(str(path), Hub(offline=True))


def decode(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    """A weight by ComfyUI's own decoder, or by the definition of its scaled FP8."""
    codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    if codes.dtype == torch.uint8:
        from comfy_kitchen.backends.eager import quantization as comfy

        whole = tensors[f"{layer}.weight_scale_2"]
        return comfy.dequantize_nvfp4(codes, whole, scale, torch.float32)
    return codes.float() * (scale.unsqueeze(-1) if scale.ndim else scale)


def decode_all(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file in float32, its codes decoded."""
    found = load_file(path)
    layers = [name.removesuffix(MARKER) for name in found if name.endswith(MARKER)]
    state = {n: t.float() for n, t in found.items() if n.rpartition(".")[0] not in layers}
    for layer in layers:
        state[f"{layer}.weight"] = decode(found, layer)
        if f"{layer}.bias" in found:
            state[f"{layer}.bias"] = found[f"{layer}.bias"].float()
    return state


def compare(model: str, found: nn.Module, expected: nn.Module) -> float:
    """Relative distance of two models' outputs."""
    inputs = exports.make_inputs(model, 7)
    ours, theirs = exports.run_model(found, inputs), exports.run_model(expected, inputs)
    return ((ours - theirs).norm() / theirs.norm()).item()


def load(base: Path, path: Path) -> nn.Module:
    return load_transformer(
        str(base), transformer_weights_path=str(path), backend="decode", dtype=torch.float32
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", models.IDS)
def test_every_form_of_every_model(tmp_path: Path, model: str, form: str) -> None:
    options, family, scheme = FORMS[form]
    path = convert(model, tmp_path, *options)
    marked = {n.removesuffix(MARKER) for n in load_file(path) if n.endswith(MARKER)}
    checkpoint = open_file(path)
    detected = families.detect(checkpoint)
    assert detected is not None
    assert detected[0] == family
    schemes = families.load(family).schemes(checkpoint)
    assert schemes.keys() >= marked > set()
    assert {schemes[layer].name for layer in marked} == {scheme}
    static = {schemes[layer].activation == "tensor-static" for layer in marked}
    assert static == {form == "static"}
    found = load(tmp_path / "base", path)
    assert set(count_quantized(found).values()) == {"decode"}
    expected = exports.make_transformer(model)
    expected.load_state_dict(decode_all(path))
    assert compare(model, found, expected.eval()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_flux_2_in_its_original_names(tmp_path: Path, form: str) -> None:
    """As ComfyUI has it: packed projections, halves that are swapped."""
    options, family, scheme = FORMS[form]
    path = convert("flux-2", tmp_path, "--flux2", *options, original=True)
    checkpoint = open_file(path)
    assert (families.detect(checkpoint) or [""])[0] == family
    schemes = families.load(family).schemes(checkpoint)
    assert "double_blocks.0.img_attn.qkv" in schemes
    assert {found.name for found in schemes.values()} == {scheme}
    plain = tmp_path / "plain.safetensors"
    save_file(decode_all(path), plain)
    found, expected = load(tmp_path / "base", path), load(tmp_path / "base", plain)
    assert count_quantized(found)
    assert not count_quantized(expected)
    assert compare("flux-2", found, expected) < 1e-5


def test_a_list_and_the_tensors_say_the_same(tmp_path: Path) -> None:
    """What the real writer puts into the header is what it puts beside each layer."""
    path = convert("flux-1", tmp_path, "--save-quant-metadata", "--full_precision_matrix_mult")
    assert "_quantization_metadata" in read_strings(path)
    listed = open_file(path)
    assert listed.quantization_from == f"{path}: _quantization_metadata"
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    marked = open_file(bare)
    assert marked.quantization_from == f"{bare}: tensors *{MARKER}"
    assert listed.quantization == marked.quantization


def test_inputs_of_nvfp4_layers_that_only_a_tensor_leaves_alone(tmp_path: Path) -> None:
    path = convert("flux-1", tmp_path, "--nvfp4")
    tensors = load_file(path)
    marked = [name for name in tensors if name.endswith(MARKER)]
    for name in marked[:2]:
        entry: dict[str, Any] = json.loads(bytes(tensors[name].tolist()))
        text = json.dumps({**entry, "full_precision_matrix_mult": True}).encode()
        tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    schemes = families.load("modelopt-nvfp4").schemes(open_file(bare))
    alone = {f"{layer}{MARKER}" for layer, s in schemes.items() if s.activation == "none"}
    assert alone == set(marked[:2])


def test_blocks_are_refused_by_name(tmp_path: Path) -> None:
    path = convert("flux-1", tmp_path, "--scaling_mode", "block", "--block_size", "32")
    with pytest.raises(CheckpointError, match=r"beside its format is .*group_size.: 32"):
        families.load("fp8").schemes(open_file(path))
