"""Tiny weights: numbers for stand-in models in which quantization error shows.

With torch's default initialisation the residual blocks barely matter, and a broken layer would pass
unnoticed. So linear and convolution weights are normal with standard deviation 1/sqrt(fan in), norms
1 +- 0.1, biases 0.02, embeddings 1. Linear weights inside blocks are *structured* besides: a rank-8
component of the same energy is added, and one input channel of 64 is six times as large, which is
what low-rank branches and smoothing are for. The first layer of a timestep embedder damps high
frequencies, or rounding a timestep to BF16 would move the picture more than any quantizer.

What this buys, final latents, FP32, four steps, lowest of the five models: the cosine to a run
without any block is below 0.95 (a broken layer shows), 4-bit integers lose 15 dB or more against
FP8, and a rank-32 branch wins back 10 dB or more of them.

Every number comes from numpy's Philox generator, keyed by the parameter's name, and only elementwise
float64 arithmetic follows: the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import nn

RANK = 8
OUTLIERS = 64
OUTLIER_GAIN = 6.0
TIME_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": 1,
    "guidance_embedder.linear_1.weight": 1,
    "time_embedder.linear_1.weight": 1,
    "t_embedder.mlp.0.weight": 1,
    "distilled_guidance_layer.in_proj.weight": 4,
}
"""Endings of the weights that take sines and cosines of a timestep: in the first of so many parts of the columns.

The other columns of Chroma's take guidance and the number of a modulation.
"""


def make_generator(name: str) -> np.random.Generator:
    """A generator that depends on a name alone."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def draw_weight(name: str, shape: tuple[int, ...], *, structured: bool = False) -> torch.Tensor:
    """A weight [out, in, ...] of gain 1, float32."""
    generator = make_generator(name)
    fan_in = math.prod(shape[1:])
    white = generator.standard_normal(shape)
    if structured and len(shape) == 2:
        white = add_structure(white, generator)
    return torch.from_numpy((white / math.sqrt(fan_in)).astype(np.float32))


def add_structure(
    white: np.ndarray[Any, Any], generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """White numbers [out, in] plus a rank-8 component of the same energy, with outlier channels."""
    rows, columns = white.shape
    left = generator.standard_normal((rows, RANK))
    right = generator.standard_normal((RANK, columns))
    low = np.zeros_like(white)
    for index in range(RANK):
        low += left[:, index, None] * right[index, None, :]
    mixed = white + low / math.sqrt(RANK)
    count = max(1, columns // OUTLIERS)
    chosen = generator.permutation(columns)[:count]
    mixed[:, chosen] *= OUTLIER_GAIN
    energy = 1 + (OUTLIER_GAIN**2 - 1) * count / columns
    return np.asarray(mixed / math.sqrt(energy))


def fill(model: nn.Module, prefix: str, *, structured: tuple[str, ...] = ()) -> None:
    """Draw every parameter of a model; linear weights under `structured` names get structure."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            inside = name.startswith(tuple(f"{block}." for block in structured))
            drawn = draw_parameter(f"{prefix}.{name}", owner, parameter, inside)
            parts = next((n for end, n in TIME_EMBEDDERS.items() if name.endswith(end)), 0)
            if parts:
                columns = drawn.shape[1] // parts
                drawn[:, :columns] = damp_frequencies(drawn[:, :columns])
            parameter.copy_(drawn)


def draw_parameter(
    name: str, owner: nn.Module, parameter: nn.Parameter, structured: bool
) -> torch.Tensor:
    """One parameter, by the kind of module that owns it: float32, in the parameter's shape.

    `structured` adds the low-rank component and the large input channels.
    """
    shape = tuple(parameter.shape)
    if isinstance(owner, nn.Embedding):
        return torch.from_numpy(make_generator(name).standard_normal(shape).astype(np.float32))
    if len(shape) >= 2 and name.endswith("weight"):
        return draw_weight(name, shape, structured=structured and isinstance(owner, nn.Linear))
    numbers = make_generator(name).standard_normal(shape).astype(np.float32)
    if name.endswith(("bias", "pad_token")):
        return torch.from_numpy(numbers) * 0.02
    if name.endswith("scale_shift_table"):
        return torch.from_numpy(numbers / np.float32(math.sqrt(shape[-1])))
    return 1 + torch.from_numpy(numbers) * 0.1


def damp_frequencies(weight: torch.Tensor) -> torch.Tensor:
    """A timestep embedder's first weight with column of frequency f divided by sqrt(1 + (8f)^2).

    The weight is float32 [out, in]; columns are cosines then sines of frequencies 10000^(-i /
    half), in either order.
    """
    half = weight.shape[1] // 2
    frequency = np.exp(-math.log(10000.0) * np.arange(half) / half)
    damping = np.tile(1 / np.sqrt(1 + (8 * frequency) ** 2), 2)
    damping = damping / math.sqrt(float((damping**2).mean()))
    return weight * torch.from_numpy(damping.astype(np.float32))
