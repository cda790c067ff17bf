"""Qwen-Image-Edit: a picture is changed as the prompt says; the text encoder sees it, too."""

from __future__ import annotations

from quantmatrix.models.stand_in import COARSE_QWEN_VAE, Part, StandIn

ID = "qwen-image-edit"
NAME = "Qwen-Image-Edit"
REPO = "Qwen/Qwen-Image-Edit"
PIPELINE = "QwenImageEditPipeline"
TRANSFORMER = "QwenImageTransformer2DModel"
PICTURES = 1
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
