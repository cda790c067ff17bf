"""Files of quantized weights in the shapes of the five models' stand-ins, drawn and written for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.request import Request
from quantmatrix.runtime.plan.types import ComponentPlan
from quantmatrix.tiny import hub
from quantmatrix.tools.dequantize import list_tensors, plan_decode

MODELS = {
    "flux-1": "black-forest-labs/FLUX.1-dev",
    "flux-2": "black-forest-labs/FLUX.2-dev",
    "wan-2-2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
}
Tensors = dict[str, torch.Tensor]


@dataclass
class Made:
    """A file: its tensors, what they stand for, and what is said of it."""

    tensors: Tensors
    expected: Tensors
    header: dict[str, str] = field(default_factory=dict)
    block: dict[str, Any] | None = None


@cache
def find_base(model: str) -> Path:
    hub.ensure(MODELS[model], hub.default_folder())
    return hub.find_snapshot(MODELS[model], hub.default_folder())


def draw(model: str) -> Tensors:
    """A state of the stand-in's shapes, BF16."""
    generator = torch.Generator().manual_seed(1)
    with safe_open(next((find_base(model) / "transformer").glob("*.safetensors")), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {n: (torch.randn(s, generator=generator) / 8).bfloat16() for n, s in shapes.items()}


def list_linears(state: Tensors) -> list[str]:
    """Weights of the linear layers inside the blocks."""
    inside = ("blocks.", "layers.", "refiner.")
    matrices = [n for n, t in state.items() if n.endswith(".weight") and t.ndim == 2]
    return [name for name in matrices if any(part in name for part in inside)]


def mark(made: Made, form: str, **more: Any) -> Made:
    """ComfyUI's entry beside each layer in codes."""
    entry = torch.tensor(list(json.dumps({"format": form, **more}).encode()), dtype=torch.uint8)
    coded = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
    for name in [n for n, t in made.tensors.items() if t.dtype in coded]:
        made.tensors[f"{name.removesuffix('weight')}comfy_quant"] = entry.clone()
    return made


def write(folder: Path, made: Made, model: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
    save_file(tensors, path, {"format": "pt", **made.header})
    config = json.loads((find_base(model) / "transformer/config.json").read_text())
    config |= {"quantization_config": made.block} if made.block else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan_folder(folder: Path, model: str) -> ComponentPlan:
    paths = {"transformer": str(folder)}
    return plan_decode(Request(str(find_base(model)), component_paths=paths), "transformer")


def decode(planned: ComponentPlan) -> Tensors:
    with TensorReader(planned.checkpoint, "cpu") as reader:
        return {name: make(reader).float() for name, make, _ in list_tensors(planned)}


def compare(got: Tensors, expected: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]
    assert not wrong
