"""Files of eight-bit floats in the forms that other writers give them, made by plain arithmetic.

| form of the row | codes and scales | said by |
| --------------- | ---------------- | ------- |
| `scaled-fp8` | E4M3, one `scale_weight` per layer | a tensor `scaled_fp8`: ComfyUI's first form |
| `fp8r` | E4M3, `weight_scale` [N, 1] | the header, `quantization: fp8r`: diffusers' conversion script |
| `compressed-tensors` | E4M3, `weight_scale` [N, 1] | `quantization_config`: groups of layers, and what is ignored |
| `e5m2` | E5M2, the code is the number; tensors beside the layers stay | nothing |
| `mxfp8` | E4M3, exponents of 32 columns in tiles of 128 x 4 | a `comfy_quant` tensor beside each layer |

No family writes these, so a file is not read back by the code that made it. The families `fp8` and
`comfyui` name the sources.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping

import torch

from quantmatrix.checkpoints.comfyui import MARKER
from quantmatrix.checkpoints.scaled_fp8 import MARK
from quantmatrix.families.protocol import Declaration
from quantmatrix.kernels.scale_layouts import tile_scales
from quantmatrix.tools.packing import Tensors

E4M3, E5M2, LARGEST = torch.float8_e4m3fn, torch.float8_e5m2, 448.0
COLUMNS, BIAS = 32, 127
"""Columns that share an exponent, and what is added to it."""
Layer = dict[str, torch.Tensor]
"""Tensors of one layer by suffix."""


def scale_tensor(weight: torch.Tensor) -> Layer:
    """Codes [N, K] and one float32 `scale_weight` [] of a weight [N, K] of any float dtype."""
    scale = weight.float().abs().amax() / LARGEST
    return {"weight": (weight.float() / scale).to(E4M3), "scale_weight": scale}


def scale_rows(weight: torch.Tensor) -> Layer:
    """Codes [N, K] and a float32 `weight_scale` [N, 1] of a weight [N, K] of any float dtype."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / LARGEST
    return {"weight": (weight.float() / scale).to(E4M3), "weight_scale": scale}


def cast(weight: torch.Tensor) -> Layer:
    """Codes [N, K] that are the numbers of a weight [N, K] of any float dtype."""
    return {"weight": weight.to(E5M2)}


def scale_blocks(weight: torch.Tensor) -> Layer:
    """Codes [N, K] and tiled exponents uint8 of a weight [N, K], K a multiple of 32.

    The least power of two at which no code exceeds 448, as ComfyUI's writer has it.
    """
    blocks = weight.float().unflatten(1, (-1, COLUMNS))
    mantissas, exponents = torch.frexp(blocks.abs().amax(dim=-1) / LARGEST)
    exponents = torch.where(mantissas == 0.5, exponents - 1, exponents)
    codes = torch.ldexp(blocks, -exponents[..., None]).flatten(1).to(E4M3)
    return {"weight": codes, "weight_scale": tile_scales((exponents + BIAS).to(torch.uint8))}


def compress(kept: Collection[str]) -> Declaration:
    """What llm-compressor writes of weights with a scale per channel and inputs scaled per token."""
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(kept),
    }
    return Declaration(config=config)


WRITERS: Mapping[str, Callable[[torch.Tensor], Layer]] = {
    "scaled-fp8": scale_tensor,
    "fp8r": scale_rows,
    "compressed-tensors": scale_rows,
    "e5m2": cast,
    "mxfp8": scale_blocks,
}
"""What becomes of a layer, by the form of the row."""


def write(form: str, packed: Tensors, layers: Collection[str]) -> tuple[Tensors, Declaration]:
    """(tensors on disk, declaration) of a component in one of the forms.

    `packed` has the model's tensors, weights [N, K] of any float dtype; those of `layers` become
    codes, and everything else stays as it is.
    """
    tensors = dict(packed)
    for layer in layers:
        stored = WRITERS[form](packed[f"{layer}.weight"])
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in stored.items()}
        if form == "mxfp8":
            entry = json.dumps({"format": form, "group_size": COLUMNS}).encode()
            tensors[f"{layer}{MARKER}"] = torch.tensor(list(entry), dtype=torch.uint8)
    if form == "scaled-fp8":
        tensors[MARK] = torch.zeros(0, dtype=E4M3)
    if form == "compressed-tensors":
        plain = [
            name.removesuffix(".weight") for name, tensor in packed.items() if tensor.ndim == 2
        ]
        return tensors, compress(set(plain) - set(layers))
    return tensors, Declaration(metadata={"quantization": form} if form == "fp8r" else {})
