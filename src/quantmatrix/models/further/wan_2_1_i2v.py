"""Wan2.1-I2V-14B: picture to video; the first frame is given as latents and as CLIP states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import WAN_VAE, Part, StandIn

ID = "wan-2-1-i2v"
NAME = "Wan2.1-I2V-14B-480P"
REPO = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
PIPELINE = "WanImageToVideoPipeline"
TRANSFORMER = "WanTransformer3DModel"
PICTURES = 1
COMPONENTS = ("transformer",)
FULL: Mapping[str, Any] = {
    "in_channels": 36,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
STAND_IN = StandIn(
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "ffn_dim": 512,
        "num_layers": 1,
        "text_dim": 128,
        "freq_dim": 256,
        "in_channels": 36,
        "out_channels": 16,
        "rope_max_seq_len": 128,
        "image_dim": 128,
        "added_kv_proj_dim": 256,
    },
    vae=WAN_VAE,
    scheduler=Part(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    text_encoders={"text_encoder": "umt5", "image_encoder": "clip-vision"},
    options={},
)
