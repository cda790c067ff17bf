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


FLUX_VAE = Part(
    "AutoencoderKL",
    {**IMAGE_VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
)
"""The VAE of FLUX.1, and of models that took it over."""
FLUX_2_VAE = Part("AutoencoderKLFlux2", {**IMAGE_VAE, "latent_channels": 32})
FLUX_2_BUFFERS: Mapping[str, Ramp] = {
    "bn.running_mean": Ramp(-0.1, 0.2),
    "bn.running_var": Ramp(0.75, 0.5),
}
QWEN_VAE = Part("AutoencoderKLQwenImage", VIDEO_VAE)
COARSE_QWEN_VAE = Part(
    "AutoencoderKLQwenImage",
    {
        **VIDEO_VAE,
        "base_dim": 2,
        "dim_mult": [1, 1, 1, 1, 2, 4],
        "temperal_downsample": [False, False, False, True, True],
    },
)
"""32 pixels a side for a latent: a pipeline of edits enlarges every picture to a million pixels."""
WAN_VAE = Part("AutoencoderKLWan", VIDEO_VAE)
WAN_5B_VAE = Part(
    "AutoencoderKLWan",
    {
        **VIDEO_VAE,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
)
"""16 pixels a side for a latent, as the VAE of Wan2.2-TI2V-5B; that has 48 channels, this 16."""


@dataclass(frozen=True)
class StandIn:
    """The parts of a tiny pipeline."""

    transformer: Mapping[str, Any]
    """Options of each of the model's transformers."""
    vae: Part
    scheduler: Part
    text_encoders: Mapping[str, str]
    """Kind of each text or image encoder (see `quantmatrix.tiny.text_encoders.KINDS`), by its component."""
    vae_buffers: Mapping[str, Ramp] = field(default_factory=dict)
    """Buffers of the VAE that training would have filled, by name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the pipeline takes besides its parts."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Further parts of diffusers' classes, by component."""
    processors: Mapping[str, str] = field(default_factory=dict)
    """Kind of each processor that is made of a tokenizer, by its component."""
