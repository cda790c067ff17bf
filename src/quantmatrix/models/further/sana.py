"""Sana: linear attention over the latents of a VAE of 32 x 32 pixels; Gemma states are the text."""

from __future__ import annotations

from quantmatrix.models.stand_in import Part, StandIn

ID = "sana"
NAME = "Sana_1600M_1024px"
REPO = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
PIPELINE = "SanaPipeline"
TRANSFORMER = "SanaTransformer2DModel"
BLOCKS = ("transformer_blocks",)
STAND_IN = StandIn(
    transformer={
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 128,
        "cross_attention_dim": 256,
        "caption_channels": 128,
        "sample_size": 8,
    },
    vae=Part(
        "AutoencoderDC",
        {
            "latent_channels": 16,
            "encoder_block_out_channels": (16, 16, 32, 32),
            "decoder_block_out_channels": (16, 16, 32, 32),
            "encoder_layers_per_block": (1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "encoder_qkv_multiscales": ((), (), (), ()),
            "decoder_qkv_multiscales": ((), (), (), ()),
            "scaling_factor": 0.41407,
        },
    ),
    scheduler=Part(
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    text_encoders={"text_encoder": "gemma2"},
)
