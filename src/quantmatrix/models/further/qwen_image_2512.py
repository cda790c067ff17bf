"""Qwen-Image-2512: Qwen-Image with later weights."""

from __future__ import annotations

from quantmatrix.models.stand_in import QWEN_VAE, Part, StandIn

ID = "qwen-image-2512"
NAME = "Qwen-Image-2512"
REPO = "Qwen/Qwen-Image-2512"
PIPELINE = "QwenImagePipeline"
TRANSFORMER = "QwenImageTransformer2DModel"
STAND_IN = StandIn(
    transformer={
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "in_channels": 64,
        "out_channels": 16,
        "joint_attention_dim": 128,
    },
    vae=QWEN_VAE,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 1.0}),
    text_encoders={"text_encoder": "qwen2.5-vl"},
)
