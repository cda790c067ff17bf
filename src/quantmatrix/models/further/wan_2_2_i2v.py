"""Wan2.2-I2V-A14B: picture to video with two experts; the first frame is given as latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import WAN_VAE, Part, StandIn

ID = "wan-2-2-i2v"
NAME = "Wan2.2-I2V-A14B"
REPO = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
PIPELINE = "WanImageToVideoPipeline"
TRANSFORMER = "WanTransformer3DModel"
PICTURES = 1
COMPONENTS = ("transformer", "transformer_2")
FULL: Mapping[str, Any] = {
    "in_channels": 36,
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
    },
    vae=WAN_VAE,
    scheduler=Part(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 12.0},
    ),
    text_encoders={"text_encoder": "umt5"},
    options={"boundary_ratio": 0.9},
)
