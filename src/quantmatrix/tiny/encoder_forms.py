"""Quantized text encoders in the forms that people have, made of the stand-ins' own encoders.

| path of a request | what it is |
| ----------------- | ---------- |
| `/path/to/t5xxl_fp8_e4m3fn.safetensors` | a plain cast of everything, embeddings and norms, too |
| `/path/to/t5xxl_fp8_e4m3fn_scaled.safetensors` | ComfyUI's `scaled_fp8`; the rest F16 |
| `/path/to/umt5_xxl_fp8_e4m3fn_scaled.safetensors` | the same with the vocabulary beside it |
| `/path/to/qwen_2.5_vl_7b_fp8_scaled.safetensors` | `comfy_quant` beside each layer |
| `/path/to/mistral_3_small_flux2_fp8.safetensors` | the same |
| `/path/to/<kind>-modelopt-fp8`, `-modelopt-nvfp4` | ModelOpt's export, a folder with its config.json |
| `/path/to/<kind>-int8.safetensors` | ComfyUI's `int8_tensorwise` |

Layers inside of blocks are quantized, as far as their widths fit; embeddings and heads stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantmatrix import families
from quantmatrix.checkpoints.comfyui import MARKER
from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.families.protocol import Declaration
from quantmatrix.request import Hub
from quantmatrix.runtime.empty_model import find_model_class
from quantmatrix.runtime.plan.encoder_names import learn_names
from quantmatrix.scheme import explain_width
from quantmatrix.tiny import fp8_forms
from quantmatrix.tools.packing import Tensors
from quantmatrix.tools.recipe import quantize_layers, round_up, save, watch_inputs, write_json

WEIGHTS = "model.safetensors"
TOKENS = 24
"""Tokens that the inputs of layers are calibrated with."""
LAYER = re.compile(r"\.\d+\..*(?<!relative_attention_bias)\.weight$")
"""Weights of blocks, those of tables of positions left out."""


@dataclass(frozen=True)
class Form:
    """What a path stands for."""

    model: str
    component: str
    write: Callable[[Path, str], tuple[Tensors, Declaration]]
    """Gives the tensors and declaration of an encoder's folder and its class."""
    folder: bool = False


def load_plain(base: Path) -> Tensors:
    """The tensors of an encoder's folder: any shape, bfloat16."""
    tensors: Tensors = load_file(base / WEIGHTS)
    return tensors


def list_layers(tensors: Tensors) -> list[str]:
    """Names of the linear layers inside blocks; tensors have any shape and dtype."""
    return sorted(
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and LAYER.search(name)
    )


def cast(base: Path, class_name: str) -> tuple[Tensors, Declaration]:
    """Every tensor as float8_e4m3fn codes: weights [out, in], the others in the shape that they have."""
    return {n: t.to(torch.float8_e4m3fn) for n, t in load_plain(base).items()}, Declaration()


def scale(base: Path, class_name: str) -> tuple[Tensors, Declaration]:
    """Layers as float8_e4m3fn codes [out, in] with a float32 `scale_weight` [], the rest float16."""
    plain = {name: tensor.half() for name, tensor in load_plain(base).items()}
    tensors, declaration = fp8_forms.write("scaled-fp8", plain, list_layers(plain))
    if class_name.startswith("UMT5"):
        tensors["spiece_model"] = torch.arange(256).to(torch.uint8)
    return tensors, declaration


def mark(base: Path, class_name: str) -> tuple[Tensors, Declaration]:
    """Layers as float8_e4m3fn codes [out, in] with a `weight_scale` [] and a marker uint8 [bytes]."""
    tensors = load_plain(base)
    entry = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for layer in list_layers(tensors):
        stored = fp8_forms.scale_tensor(tensors[f"{layer}.weight"])
        tensors[f"{layer}.weight_scale"] = stored.pop("scale_weight")
        tensors |= {f"{layer}.weight": stored["weight"], f"{layer}{MARKER}": entry.clone()}
    return tensors, Declaration()


def quantize(family: str, scheme: str) -> Callable[[Path, str], tuple[Tensors, Declaration]]:
    """A writer by a family's own `quantize` and `declare`, with inputs as a real pass has them.

    Its tensors have the shapes and dtypes of the family's table: codes [out, in], or packed.
    """

    def write(base: Path, class_name: str) -> tuple[Tensors, Declaration]:
        module, tensors = families.load(family), load_plain(base)
        kind = module.SCHEMES[scheme]
        chosen = {
            layer: kind
            for layer in list_layers(tensors)
            if not explain_width(kind, tensors[f"{layer}.weight"].shape[1])
        }
        model: Any = find_model_class(class_name)
        built = model.from_pretrained(base, dtype=torch.float32)
        ranges = watch_inputs(built)
        with torch.inference_mode():
            built(input_ids=torch.arange(TOKENS)[None])
        names = learn_names(
            open_component(str(base), Hub()), class_name, read_json(base / "config.json"), str(base)
        )
        rounded = {name: round_up(seen) for name, seen in ranges.items()}
        chosen = {
            layer: kind for layer in chosen if names.layer_targets(layer)[0].module in rounded
        }
        return quantize_layers(module, names, tensors, chosen, rounded)

    return write


KINDS: Mapping[str, tuple[str, str]] = {
    "clip": ("flux-1", "text_encoder"),
    "t5": ("flux-1", "text_encoder_2"),
    "umt5": ("wan-2-2", "text_encoder"),
    "qwen2.5-vl": ("qwen-image", "text_encoder"),
    "mistral": ("flux-2", "text_encoder"),
}
"""Model and component of the encoders that are written, by kind."""
PUBLISHED: Mapping[str, tuple[str, Callable[[Path, str], tuple[Tensors, Declaration]]]] = {
    "t5xxl_fp8_e4m3fn.safetensors": ("t5", cast),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": ("t5", scale),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": ("umt5", scale),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": ("qwen2.5-vl", mark),
    "mistral_3_small_flux2_fp8.safetensors": ("mistral", mark),
}
"""Kind and writer of files that are known by these names."""
WRITTEN: Mapping[str, tuple[str, str]] = {
    "modelopt-fp8": ("modelopt-fp8", "FP8"),
    "modelopt-nvfp4": ("modelopt-nvfp4", "NVFP4"),
    "int8.safetensors": ("comfyui-int8", "int8"),
}
"""Family and scheme of what is made of every kind, by the end of its name."""
FORMS: Mapping[str, Form] = {
    **{name: Form(*KINDS[kind], writer) for name, (kind, writer) in PUBLISHED.items()},
    **{
        f"{kind}-{end}": Form(
            *KINDS[kind], quantize(*written), folder=not end.endswith("safetensors")
        )
        for kind in KINDS
        for end, written in WRITTEN.items()
    },
}
"""Every form by the name of its path."""


def write_encoder(name: str, base: Path, folder: Path) -> None:
    """Write the form of this name into a folder, made of the stand-in pipeline `base`."""
    form = FORMS[name]
    class_name = read_json(base / "model_index.json")[form.component][1]
    tensors, declaration = form.write(base / form.component, class_name)
    metadata = {"format": "pt", **declaration.metadata}
    if form.folder:
        config = read_json(base / form.component / "config.json")
        write_json(folder / "config.json", {**config, "quantization_config": declaration.config})
        save(tensors, sorted(tensors), folder / WEIGHTS, metadata)
        return
    if declaration.config is not None:
        metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
    save(tensors, sorted(tensors), folder / name, metadata)
