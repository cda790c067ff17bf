"""Tiny LoRAs: an adapter for each model's stand-in, as `/path/to/<model>-lora.safetensors`.

Factors of rank 4 for every query, key and value of the blocks, in diffusers' names. They add about a third
of what the layer itself gives, so that a run without them is another one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from quantmatrix import models
from quantmatrix.runtime.empty_model import build_plain
from quantmatrix.tiny.weights import draw_weight
from quantmatrix.tools.recipe import save

RANK, STRENGTH = 4, 0.3
TARGETS = ("to_q", "to_k", "to_v", "to_qkv_mlp_proj")
"""Last names of the layers that have factors; FLUX.2's single blocks have one projection."""


def write_lora(model: str, name: str, folder: Path) -> None:
    """Write the adapter of a model id as the file `name` in a folder: BF16 factors [4, in], [out, 4]."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, module in build_plain(model, "tiny").named_modules():
        inside = layer.split(".")[0] in models.load(model).BLOCKS
        if not inside or layer.rpartition(".")[2] not in TARGETS:
            continue
        assert isinstance(module, torch.nn.Linear)
        down = draw_weight(f"{model}.lora.{layer}.down", (RANK, module.in_features))
        up = draw_weight(f"{model}.lora.{layer}.up", (module.out_features, RANK)) * STRENGTH
        tensors[f"transformer.{layer}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"transformer.{layer}.lora_B.weight"] = up.to(torch.bfloat16)
    save(tensors, sorted(tensors), folder / name, {"format": "pt"})
