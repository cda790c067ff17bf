"""HunyuanVideo-1.5: text to video; a guider guides, and quoted text goes through ByT5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import Part, StandIn

ID = "hunyuan-video-1-5"
NAME = "HunyuanVideo-1.5-480p-T2V"
REPO = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"
PIPELINE = "HunyuanVideo15Pipeline"
TRANSFORMER = "HunyuanVideo15Transformer3DModel"
BLOCKS = ("transformer_blocks",)
FULL: Mapping[str, Any] = {
    "task_type": "t2v",
}
STAND_IN = StandIn(
    transformer={
        "in_channels": 17,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 128,
        "text_embed_2_dim": 128,
        "image_embed_dim": 128,
        "rope_axes_dim": (16, 24, 24),
        "task_type": "t2v",
    },
    vae=Part(
        "AutoencoderKLHunyuanVideo15",
        {
            "latent_channels": 8,
            "block_out_channels": (16, 16, 32, 32, 32),
            "layers_per_block": 1,
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
    text_encoders={"text_encoder": "qwen2.5-text", "text_encoder_2": "byt5"},
    parts={"guider": Part("ClassifierFreeGuidance", {"guidance_scale": 4.0})},
)
