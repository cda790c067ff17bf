"""Stand-ins in their original names, and what a plan reads of a file of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from original_states import SPACES
from safetensors.torch import load_file

from quantmatrix import models
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.request import Request
from quantmatrix.runtime.plan.learned_names import LearnedDialect, find_converter, learn
from quantmatrix.tiny import hub
from quantmatrix.tools.dequantize import decode_tensors, plan_decode

SIZES = {
    "flux-1": {"D": 256},
    "flux-2": {"D": 256},
    "wan-2-2": {"D": 256, "F": 512},
    "z-image": {"D": 384, "F": 1024},
}
"""Widths of the stand-ins."""
Tensors = dict[str, torch.Tensor]


def find_base(model: str) -> Path:
    folder = hub.default_folder()
    hub.ensure(models.load(model).REPO, folder)
    return hub.find_snapshot(models.load(model).REPO, folder)


def read_base(model: str) -> Tensors:
    [file] = (find_base(model) / "transformer").glob("*.safetensors")
    return load_file(file)


def learn_names(model: str, plain: Mapping[str, torch.Tensor]) -> LearnedDialect:
    """The dialect of a stand-in's original names, which `test_learned_names` proves."""
    class_name = models.load(model).TRANSFORMER
    names = SPACES[class_name].resize(**SIZES[model]).shapes_by_name()
    found = learn(class_name, {}, names, {n: tuple(t.shape) for n, t in plain.items()})
    assert found is not None
    return found


def pack(dialect: LearnedDialect, plain: Mapping[str, torch.Tensor]) -> Tensors:
    """A stand-in's tensors under its original names."""
    packed: Tensors = {}
    for name, targets in dialect.table.items():
        parts = [plain[target.module] for target in targets if target.module in plain]
        if parts and targets[0].swap_halves:
            parts = list(parts[0].chunk(2))[::-1]
        if parts:
            packed[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return packed


def convert(model: str, state: Tensors) -> Tensors:
    """What diffusers' converter makes of a state dict, whose rows alone it looks at.

    FLUX.1's names the published width in its code, and is run with the stand-in's.
    """
    converter: Any = find_converter(models.load(model).TRANSFORMER)
    if model == "flux-1":
        code = converter.__code__
        assert 3072 in code.co_consts
        width = SIZES[model]["D"]
        own = tuple(width if value == 3072 else value for value in code.co_consts)
        converter = FunctionType(code.replace(co_consts=own), converter.__globals__)
    return converter(checkpoint=dict(state), config={}) if converter else dict(state)


def ask(model: str, path: str) -> Request:
    return Request(
        model_path=str(find_base(model)), weights_paths={"transformer": path}, device="cpu"
    )


def read_numbers(request: Request) -> Tensors:
    """Every tensor of the model in plain numbers, as a plan reads them."""
    component = plan_decode(request, "transformer")
    with TensorReader(component.checkpoint, "cpu") as reader:
        names = {name for name, _ in decode_tensors(component, set())}
        biases = {f"{name.removesuffix('.weight')}.bias" for name in names}
        return {name: make(reader) for name, make in decode_tensors(component, names | biases)}
