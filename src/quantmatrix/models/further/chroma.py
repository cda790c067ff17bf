"""Chroma: FLUX.1 without modulation layers of its own; one network gives all modulations."""

from __future__ import annotations

from quantmatrix.models.stand_in import FLUX_VAE, Part, StandIn

ID = "chroma"
NAME = "Chroma1-HD"
REPO = "lodestones/Chroma1-HD"
PIPELINE = "ChromaPipeline"
TRANSFORMER = "ChromaTransformer2DModel"
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
STAND_IN = StandIn(
    transformer={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "joint_attention_dim": 128,
        "approximator_hidden_dim": 128,
        "approximator_layers": 1,
    },
    vae=FLUX_VAE,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    text_encoders={"text_encoder": "t5"},
)
