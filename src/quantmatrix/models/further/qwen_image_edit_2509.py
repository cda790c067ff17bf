"""Qwen-Image-Edit-2509: several pictures beside the prompt."""

from __future__ import annotations

from quantmatrix.models.stand_in import COARSE_QWEN_VAE, Part, StandIn

ID = "qwen-image-edit-2509"
NAME = "Qwen-Image-Edit-2509"
REPO = "Qwen/Qwen-Image-Edit-2509"
PIPELINE = "QwenImageEditPlusPipeline"
TRANSFORMER = "QwenImageTransformer2DModel"
PICTURES = 2
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
    vae=COARSE_QWEN_VAE,
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 1.0}),
    text_encoders={"text_encoder": "qwen2.5-vl-edit"},
    processors={"processor": "qwen2-vl"},
)
