"""FLUX.1-Krea-dev: FLUX.1-dev with other weights."""

from __future__ import annotations

from quantmatrix.models.stand_in import FLUX_VAE, Part, StandIn

ID = "flux-1-krea"
NAME = "FLUX.1-Krea-dev"
REPO = "black-forest-labs/FLUX.1-Krea-dev"
PIPELINE = "FluxPipeline"
TRANSFORMER = "FluxTransformer2DModel"
STAND_IN = StandIn(
    transformer={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "in_channels": 64,
        "joint_attention_dim": 128,
        "pooled_projection_dim": 128,
        "guidance_embeds": True,
    },
    vae=FLUX_VAE,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
    text_encoders={"text_encoder": "clip", "text_encoder_2": "t5"},
)
