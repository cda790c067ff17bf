"""FLUX.2-klein-4B: distilled, with hidden states 9, 18 and 27 of Qwen3 as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import FLUX_2_BUFFERS, FLUX_2_VAE, Part, StandIn

ID = "flux-2-klein-4b"
NAME = "FLUX.2-klein-4B"
REPO = "black-forest-labs/FLUX.2-klein-4B"
PIPELINE = "Flux2KleinPipeline"
TRANSFORMER = "Flux2Transformer2DModel"
FULL: Mapping[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
STAND_IN = StandIn(
    transformer={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "axes_dims_rope": (32, 32, 32, 32),
        "in_channels": 128,
        "joint_attention_dim": 384,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "guidance_embeds": False,
    },
    vae=FLUX_2_VAE,
    vae_buffers=FLUX_2_BUFFERS,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
    text_encoders={"text_encoder": "qwen3-deep"},
    options={"is_distilled": True},
)
