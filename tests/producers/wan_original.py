"""A small Wan transformer under its original names, and the adapter that msmodelslim asks for.

The modules are diffusers' own, registered under the names of the first release: the real quantizers
replace them and the real savers write those names, while the arithmetic around them is the one that
our loader is compared with. msmodelslim's shipped adapters want Ascend's fork of the Wan repository
and an NPU; this one needs neither.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from msmodelslim.core.base.protocol import ProcessRequest
from msmodelslim.core.const import DeviceType
from msmodelslim.core.runner.layer_wise_runner import LayerWiseRunner
from msmodelslim.core.runner.pipeline_interface import PipelineInterface
from msmodelslim.model.base import BaseModelAdapter
from msmodelslim.utils.cache.memory import clear_cache
from torch import nn

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "text_dim": 32,
    "freq_dim": 16,
    "rope_max_seq_len": 32,
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "norm_q": "norm_q", "norm_k": "norm_k"}


class Holder(nn.Module):
    """Modules and parameters under names of our choice."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def hold_list(**parts: nn.Module) -> nn.Module:
    """Modules whose names are numbers: `_0=...` becomes `0`."""
    return nn.ModuleDict({name.lstrip("_"): part for name, part in parts.items()})


class WanAttentionBlock(nn.Module):
    """A transformer block with original names; msmodelslim finds blocks by this class name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._inner = [inner]  # in a list: not a submodule
        self.modulation = inner.scale_shift_table
        self.norm3 = inner.norm2
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            attention = getattr(inner, new)
            parts = {name: getattr(attention, place) for name, place in ATTENTION.items()}
            setattr(self, old, Holder(**parts, o=attention.to_out[0]))
        self.ffn = hold_list(_0=inner.ffn.net[0].proj, _2=inner.ffn.net[2])

    def forward(self, *args: Any) -> torch.Tensor:
        inner = self._inner[0]
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            attention, found = getattr(inner, new), getattr(self, old)
            for name, place in ATTENTION.items():
                setattr(attention, place, getattr(found, name))
            attention.to_out[0] = found.o
        inner.ffn.net[0].proj, inner.ffn.net[2] = self.ffn["0"], self.ffn["2"]
        return inner(*args)


class OriginalWan(nn.Module):
    """The whole transformer; `forward` is that of diffusers' WanTransformer3DModel."""

    def __init__(self, inner: WanTransformer3DModel) -> None:
        super().__init__()
        embedder = inner.condition_embedder
        text, time = embedder.text_embedder, embedder.time_embedder
        self.patch_embedding = inner.patch_embedding
        self.text_embedding = hold_list(_0=text.linear_1, _2=text.linear_2)
        self.time_embedding = hold_list(_0=time.linear_1, _2=time.linear_2)
        self.time_projection = hold_list(_1=embedder.time_proj)
        self.blocks = nn.ModuleList([WanAttentionBlock(block) for block in inner.blocks])
        self.head = Holder(head=inner.proj_out, modulation=inner.scale_shift_table)
        inner.blocks = self.blocks
        self._inner = [inner]

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self._inner[0](**inputs, return_dict=False)[0]


class Stop(Exception):
    """The first block was reached."""


class Adapter(BaseModelAdapter, PipelineInterface):
    """The ten lines that msmodelslim's runner asks for."""

    def handle_dataset(self, dataset: Any, device: DeviceType = DeviceType.CPU) -> list[Any]:
        return list(dataset or [])

    def init_model(self, device: DeviceType = DeviceType.CPU) -> nn.Module:
        raise NotImplementedError

    def enable_kv_cache(self, model: nn.Module, need_kv_cache: bool) -> None:
        pass

    def generate_model_visit(self, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
        for i, block in enumerate(model.blocks):
            yield ProcessRequest(f"blocks.{i}", block, (), {})

    def generate_model_forward(
        self, model: nn.Module, inputs: Any
    ) -> Generator[ProcessRequest, Any, None]:
        caught: list[tuple[Any, ...]] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args)
            raise Stop

        handle = model.blocks[0].register_forward_pre_hook(stop)
        try:
            model(**inputs)
        except Stop:
            pass
        finally:
            handle.remove()
        args = caught[0]
        for i, block in enumerate(model.blocks):
            hidden = yield ProcessRequest(f"blocks.{i}", block, args, {})
            args = (hidden, *args[1:])


def make_model(seed: int, dtype: torch.dtype = torch.float32) -> OriginalWan:
    """A transformer with random weights, its norms and modulations included."""
    torch.manual_seed(seed)
    inner = WanTransformer3DModel(**CONFIG).eval().requires_grad_(False)
    for name, parameter in inner.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return OriginalWan(inner.to(dtype))


def make_inputs(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One forward's inputs: 2 x 8 x 8 latents (32 tokens) and 6 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 2, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([100 * (seed % 10) + 37]),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator).to(dtype),
    }


def run_engine(
    model: nn.Module, folder: Path, processors: list[Any], calibration: list[Any] | None
) -> nn.Module:
    """Run msmodelslim's layer-wise runner with these processors; returns the quantized model."""
    gc.freeze()  # the engine collects garbage at every step, which need not look at the libraries
    clear_cache()  # the engine would calibrate every model with the data of the first one
    runner = LayerWiseRunner(Adapter("wan", folder), offload_device="cpu")
    for processor in processors:
        runner.add_processor(processor)
    runner.run(model=model, calib_data=calibration, device=DeviceType.CPU)
    return model
