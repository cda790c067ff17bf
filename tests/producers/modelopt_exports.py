"""Exports that the real ModelOpt writes of small transformers, and ModelOpt's own arithmetic.

On a CPU ModelOpt calibrates and exports NVFP4 unpatched; only its simulation wants CUDA. It is
routed to ModelOpt's own `NVFP4QTensor`, which gives the kernel's numbers bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from modelopt.torch import quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.nn.modules import quant_conv
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from quantmatrix import models
from quantmatrix.tiny.weights import fill

CONFIGS = {
    "FP8": mtq.FP8_DEFAULT_CFG,
    "NVFP4": mtq.NVFP4_DEFAULT_CFG,
    "NVFP4_SVD": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
    "NVFP4_AWQ": mtq.NVFP4_AWQ_LITE_CFG,
    "W4A16_NVFP4": mtq.W4A16_NVFP4_CFG,
}
"""Presets, by the quant_algo that their exports declare."""
BLOCK = 16


def make_transformer(model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny transformer of a base model."""
    module = models.load(model)
    made = getattr(diffusers, module.TRANSFORMER)(**module.TINY)
    fill(made, f"{module.ID}.transformer", structured=module.BLOCKS)
    return made.to(dtype).eval().requires_grad_(False)


def make_inputs(model: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a transformer's forward; times are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    config = models.load(model).TINY

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if model == "z-image":
        return {
            "x": [draw(16, 1, 8, 8)],
            "t": torch.tensor([0.5], dtype=dtype),
            "cap_feats": [draw(8, config["cap_feat_dim"])],
            "return_dict": False,
        }
    if model == "wan-2-2":
        return {
            "hidden_states": draw(1, config["in_channels"], 2, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": draw(1, 8, config["text_dim"]),
            "return_dict": False,
        }
    inputs = {
        "hidden_states": draw(1, 16, config["in_channels"]),
        "encoder_hidden_states": draw(1, 8, config["joint_attention_dim"]),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "return_dict": False,
    }
    if model == "qwen-image":
        return {**inputs, "img_shapes": [[(1, 4, 4)]]}
    axes = len(config["axes_dims_rope"])
    inputs |= {
        "img_ids": make_ids(4, 4, axes),
        "txt_ids": torch.zeros(8, axes),
        "guidance": torch.tensor([3.5], dtype=dtype),
    }
    if model == "flux-1":
        inputs["pooled_projections"] = draw(1, config["pooled_projection_dim"])
    return inputs


def make_ids(height: int, width: int, axes: int) -> torch.Tensor:
    """Positions of an image's tokens."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.view(-1, axes)


def run_model(module: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The output of a transformer as one float32 tensor."""
    with torch.no_grad():
        (out,) = module(**inputs)
    return (out[0] if isinstance(out, list) else out).float()


def round_blocks(x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """ModelOpt's NVFP4 quantization and back, with a given scale of the whole tensor."""
    flat = x.float().reshape(-1, x.shape[-1])
    coded, scales, whole = NVFP4QTensor.quantize(flat, BLOCK, weights_scaling_factor_2=whole)
    plain = coded.dequantize(
        dtype=torch.float32, scale=scales, double_scale=whole, block_sizes={-1: BLOCK}
    )
    return plain.view(x.shape).to(x.dtype)


@contextmanager
def simulate_on_cpu() -> Iterator[None]:
    """ModelOpt's simulation of NVFP4 by its own packing code; Conv3d, never exported, runs plain."""

    def quantize(inputs: torch.Tensor, block: int, amax: torch.Tensor, *_: int) -> torch.Tensor:
        return round_blocks(inputs, amax.float().amax() / (6 * 448))

    def convolve(self: nn.Conv3d, inputs: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(inputs, self.weight, self.bias)

    with (
        mock.patch.object(tensor_quant, "dynamic_block_quantize_op", quantize),
        mock.patch.object(quant_conv._QuantConv3d, "forward", convolve),
    ):
        yield


def export(
    model: str,
    word: str,
    folder: Path,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module], object] = id,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Quantize a tiny transformer with ModelOpt, export it; returns the simulated model.

    `prepare` may switch quantizers off before the export; `config` replaces the preset
    that `word` names; `options` are those of ModelOpt's export.
    """
    made = make_transformer(model, dtype)
    chosen = {**(config or CONFIGS[word])}

    def calibrate(module: nn.Module) -> None:
        for seed in (1, 2):
            run_model(module, make_inputs(model, seed, dtype))

    with simulate_on_cpu(), torch.no_grad():
        simulated = mtq.quantize(made, chosen, calibrate)
        prepare(simulated)
        total = sum(t.numel() * t.element_size() for t in make_transformer(model).parameters())
        limit = {} if shards == 1 else {"max_shard_size": math.ceil(0.14 * total / (shards - 0.5))}
        export_hf_checkpoint(simulated, export_dir=folder, **limit, **options)
    return simulated


def read_export(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


class FileLinear(nn.Module):
    """A layer of the file, computed by ModelOpt's functions alone (FP8: by the format's formula)."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], coded: bool) -> None:
        super().__init__()
        self.tensors, self.coded = dict(tensors), coded and "input_scale" in tensors
        self.fp8 = tensors["weight"].dtype == torch.float8_e4m3fn
        decoded = self.decode()
        self.weight = nn.Parameter(decoded, requires_grad=False)

    def decode(self) -> torch.Tensor:
        packed, scale = self.tensors["weight"], self.tensors["weight_scale"]
        if self.fp8:
            return packed.float() * scale
        shape = (packed.shape[0], 2 * packed.shape[1])
        return NVFP4QTensor(torch.Size(shape), torch.float32, packed).dequantize(
            dtype=torch.float32,
            scale=scale,
            double_scale=self.tensors["weight_scale_2"],
            block_sizes={-1: BLOCK},
        )

    def round_inputs(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.tensors["input_scale"]
        if not self.fp8:
            return round_blocks(x, scale)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = self.tensors
        if "pre_quant_scale" in tensors:
            x = x * tensors["pre_quant_scale"].float()
        y = functional.linear(self.round_inputs(x) if self.coded else x, self.weight)
        if "svdquant_lora_a" in tensors:
            low = functional.linear(x, tensors["svdquant_lora_a"].float())
            y = y + functional.linear(low, tensors["svdquant_lora_b"].float())
        return y if tensors.get("bias") is None else y + tensors["bias"].float()


def build_from_file(model: str, folder: Path, *, coded: bool) -> nn.Module:
    """A float32 diffusers model with the file's tensors; `coded`: inputs are quantized, too."""
    found = read_export(folder)
    made = make_transformer(model)
    layers = [name.removesuffix(".weight_scale") for name in found if name.endswith("weight_scale")]
    for layer in layers:
        prefix = f"{layer}."
        own = {n.removeprefix(prefix): found.pop(n) for n in list(found) if n.startswith(prefix)}
        made.set_submodule(layer, FileLinear(own, coded))
    missing = made.load_state_dict({n: t.float() for n, t in found.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all(name.removesuffix(".weight") in layers for name in missing.missing_keys)
    return made.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """quantization_config of an export."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])
