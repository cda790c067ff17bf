"""FLUX.1-Fill-dev: the masked part of a picture is painted; latents, picture and mask are 384 channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import FLUX_VAE, Part, StandIn

ID = "flux-1-fill"
NAME = "FLUX.1-Fill-dev"
REPO = "black-forest-labs/FLUX.1-Fill-dev"
PIPELINE = "FluxFillPipeline"
TRANSFORMER = "FluxTransformer2DModel"
PICTURES = 1
FULL: Mapping[str, Any] = {
    "in_channels": 384,
    "out_channels": 64,
    "guidance_embeds": True,
}
STAND_IN = StandIn(
    transformer={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "in_channels": 384,
        "out_channels": 64,
        "joint_attention_dim": 128,
        "pooled_projection_dim": 128,
        "guidance_embeds": True,
    },
    vae=FLUX_VAE,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
    text_encoders={"text_encoder": "clip", "text_encoder_2": "t5"},
)
