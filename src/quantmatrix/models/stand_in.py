"""Stand-in: what a model's tiny pipeline is made of, as plain data.

`quantmatrix.tiny.pipelines` builds it. Classes are those of diffusers by name, so that describing a
model imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

IMAGE_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
"""Options of a small VAE for pictures; the latent channels are the model's own."""
VIDEO_VAE: Mapping[str, Any] = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
}
"""The same for clips."""


class Part(NamedTuple):
    """A part of a pipeline: a class of diffusers, and the options that it is made with."""

    class_name: str
    options: Mapping[str, Any]


class Ramp(NamedTuple):
    """Numbers that rise evenly from `start` by `rise`."""

    start: float
    rise: float


@dataclass(frozen=True)
class StandIn:
    """The parts of a tiny pipeline."""

    transformer: Mapping[str, Any]
    """Options of each of the model's transformers."""
    vae: Part
    scheduler: Part
    text_encoders: Mapping[str, str]
    """Kind of each text encoder (see `quantmatrix.tiny.text_encoders.KINDS`), by its component."""
    vae_buffers: Mapping[str, Ramp] = field(default_factory=dict)
    """Buffers of the VAE that training would have filled, by name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the pipeline takes besides its parts."""
