"""Peers: what other programs make of the same transformer, to be timed beside ours in one process.

| program | form | what its layers do |
| ------- | ---- | ------------------ |
| `diffusers` | `nvfp4`, `fp8r` | its `bfl` layers with random codes |
| `torchao` | `float8-row`, `float8-tensor` | dynamic fp8, a scale per row or per tensor of weight and input |
| `torchao` | `int8` | dynamic int8, which runs on a CPU, too |

A program that is not installed is left out by who asks (`is_installed`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from quantmatrix import models
from quantmatrix.measure.bench import synthetic

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine

MULTIPLE = 16
"""torchao leaves layers alone whose sizes are no multiple of this, as its fp8 matmul needs."""


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def synthesize(machine: Machine, model: str, program: str, form: str, size: str) -> torch.nn.Module:
    """A transformer of random weights whose blocks have another program's layers."""
    made = synthetic.synthesize(model, machine, size=size)
    WRITERS[program](made, models.load(model).BLOCKS, form, machine.device)
    return made


def put_bfl(made: torch.nn.Module, blocks: tuple[str, ...], form: str, device: str) -> None:
    """Put diffusers' own quantized layers into the blocks of a transformer."""
    for name, module in list(made.named_modules()):
        if is_inside(name, module, blocks):
            layer = make_bfl(module, form, device)
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.bfloat16()
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, layer)


def put_torchao(made: torch.nn.Module, blocks: tuple[str, ...], form: str, device: str) -> None:
    """Let torchao quantize the linear layers of the blocks of a transformer."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    config = {
        "float8-row": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        "float8-tensor": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()),
        "int8": Int8DynamicActivationInt8WeightConfig,
    }[form]()

    def takes(module: torch.nn.Module, name: str) -> bool:
        sizes = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        return is_inside(name, module, blocks) and not any(size % MULTIPLE for size in sizes)

    quantize_(made, config, filter_fn=takes)


def is_inside(name: str, module: torch.nn.Module, blocks: tuple[str, ...]) -> bool:
    """Whether a module is a linear layer of the blocks, as it is for our own synthetic models."""
    return isinstance(module, torch.nn.Linear) and name.split(".")[0] in blocks


WRITERS = {"diffusers": put_bfl, "torchao": put_torchao}


def make_bfl(linear: torch.nn.Linear, kind: str, device: str) -> torch.nn.Module:
    """diffusers' own quantized layer of a linear layer's shape, with random codes."""
    from diffusers.quantizers.bfl.utils import QUANTIZED_LINEARS

    made: torch.nn.Module = QUANTIZED_LINEARS[kind](
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        device=device,
    )
    for name, tensor in made.state_dict().items():
        if name == "bias":
            tensor.zero_()
        elif name == "weight" and kind == "nvfp4":
            tensor.random_(0, 256)
        elif name == "weight":
            tensor.copy_(torch.randn(tensor.shape, device=device))
        else:
            tensor.fill_(1 / 64)
    return made
