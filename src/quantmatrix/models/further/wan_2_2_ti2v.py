"""Wan2.2-TI2V-5B: text or picture to video with a coarse VAE and a time for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmatrix.models.stand_in import WAN_5B_VAE, Part, StandIn

ID = "wan-2-2-ti2v"
NAME = "Wan2.2-TI2V-5B"
REPO = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
PIPELINE = "WanPipeline"
TRANSFORMER = "WanTransformer3DModel"
COMPONENTS = ("transformer",)
FULL: Mapping[str, Any] = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
STAND_IN = StandIn(
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "ffn_dim": 512,
        "num_layers": 1,
        "text_dim": 128,
        "freq_dim": 256,
        "in_channels": 16,
        "out_channels": 16,
        "rope_max_seq_len": 128,
    },
    vae=WAN_5B_VAE,
    scheduler=Part(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0},
    ),
    text_encoders={"text_encoder": "umt5"},
    options={"expand_timesteps": True},
)
