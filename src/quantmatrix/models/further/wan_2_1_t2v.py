"""Wan2.1-T2V-14B: text to video with one transformer for all steps."""

from __future__ import annotations

from quantmatrix.models.stand_in import WAN_VAE, Part, StandIn

ID = "wan-2-1-t2v"
NAME = "Wan2.1-T2V-14B"
REPO = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
PIPELINE = "WanPipeline"
TRANSFORMER = "WanTransformer3DModel"
COMPONENTS = ("transformer",)
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
    vae=WAN_VAE,
    scheduler=Part(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    text_encoders={"text_encoder": "umt5"},
    options={},
)
