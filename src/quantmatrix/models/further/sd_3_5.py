"""Stable Diffusion 3.5: two CLIP encoders and T5; the first blocks attend twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import FLUX_VAE, Part, StandIn

ID = "sd-3-5"
NAME = "stable-diffusion-3.5-medium"
REPO = "stabilityai/stable-diffusion-3.5-medium"
PIPELINE = "StableDiffusion3Pipeline"
TRANSFORMER = "SD3Transformer2DModel"
BLOCKS = ("transformer_blocks",)
FULL: Mapping[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
    "qk_norm": "rms_norm",
}
STAND_IN = StandIn(
    transformer={
        "sample_size": 16,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "joint_attention_dim": 256,
        "caption_projection_dim": 256,
        "pooled_projection_dim": 256,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    vae=FLUX_VAE,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    text_encoders={
        "text_encoder": "clip-projection",
        "text_encoder_2": "clip-projection",
        "text_encoder_3": "t5-wide",
    },
)
