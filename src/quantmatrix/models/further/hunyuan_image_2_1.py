"""HunyuanImage-2.1: text to picture with a VAE of 32 x 32 pixels a latent, and a guider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import Part, StandIn

ID = "hunyuan-image-2-1"
NAME = "HunyuanImage-2.1"
REPO = "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"
PIPELINE = "HunyuanImagePipeline"
TRANSFORMER = "HunyuanImageTransformer2DModel"
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
FULL: Mapping[str, Any] = {
    "text_embed_2_dim": 1472,
}
STAND_IN = StandIn(
    transformer={
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 128,
        "text_embed_2_dim": 128,
        "rope_axes_dim": (32, 32),
    },
    vae=Part(
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "block_out_channels": (32, 32, 64, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 8,
            "sample_size": 64,
            "scaling_factor": 0.75289,
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
    text_encoders={"text_encoder": "qwen2.5-vl-deep", "text_encoder_2": "byt5"},
    parts={"guider": Part("AdaptiveProjectedMixGuidance", {"guidance_scale": 4.0})},
)
