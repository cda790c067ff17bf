"""CogView4: text to picture; GLM states are the text."""

from __future__ import annotations

from quantmatrix.models.stand_in import FLUX_VAE, Part, StandIn

ID = "cogview-4"
NAME = "CogView4-6B"
REPO = "THUDM/CogView4-6B"
PIPELINE = "CogView4Pipeline"
TRANSFORMER = "CogView4Transformer2DModel"
BLOCKS = ("transformer_blocks",)
STAND_IN = StandIn(
    transformer={
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "text_embed_dim": 128,
        "time_embed_dim": 128,
        "condition_dim": 64,
        "sample_size": 16,
        "rope_axes_dim": (32, 32),
    },
    vae=FLUX_VAE,
    scheduler=Part(
        "FlowMatchEulerDiscreteScheduler",
        {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True},
    ),
    text_encoders={"text_encoder": "glm"},
)
