"""Tiny pipelines: one builder for the stand-ins of all models, which are data of the model modules.

Transformers, VAE, scheduler, text encoders and tokenizers are of the real classes at a small size,
their weights those of `quantmatrix.tiny.weights`: every build gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from quantmatrix import models
from quantmatrix.models.stand_in import Part, StandIn
from quantmatrix.tiny.encoders import COMPANIONS, KINDS, PROCESSORS
from quantmatrix.tiny.weights import fill


def write_pipeline(model: str, folder: Path) -> None:
    """Write the stand-in pipeline of a model id (BF16, structured weights) into a folder."""
    module = models.load(model)
    own = module.STAND_IN
    parts: dict[str, Any] = {"scheduler": make_part(own.scheduler)}
    for name in module.COMPONENTS:
        parts[name] = make_part(Part(module.TRANSFORMER, own.transformer))
        fill(parts[name], f"{model}.{name}", structured=module.BLOCKS)
    parts["vae"] = build_vae(model, own)
    parts |= {name: make_part(part) for name, part in own.parts.items()}
    for name, kind in own.text_encoders.items():
        other = COMPANIONS.get(name, name.replace("text_encoder", "tokenizer"))
        parts[name], parts[other] = KINDS[kind](f"{model}.{name}")
    parts |= dict.fromkeys(own.processors)
    save_pipeline(getattr(diffusers, module.PIPELINE)(**parts, **own.options), folder)
    for name, kind in own.processors.items():
        PROCESSORS[kind](parts["tokenizer"], folder, name)


def make_part(part: Part) -> Any:
    """An object of a part's class in diffusers, its weights as torch initialises them."""
    return getattr(diffusers, part.class_name)(**part.options)


def build_vae(model: str, own: StandIn) -> nn.Module:
    """The VAE of a stand-in, with its weights and buffers."""
    vae: nn.Module = make_part(own.vae)
    fill(vae, f"{model}.vae")
    for name, ramp in own.vae_buffers.items():
        buffer = vae.get_buffer(name)
        buffer.copy_(torch.linspace(0, 1, buffer.numel()) * ramp.rise + ramp.start)
    return vae


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline in BF16, every file the same on every build."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and path.name in ("config.json", "model_index.json"):
            content.pop("_name_or_path", None)
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            path.write_text(text, encoding="utf-8")
