"""LTX-Video: text to video with a VAE of 32 x 32 x 8 pixels a latent."""

from __future__ import annotations

from quantmatrix.models.stand_in import Part, StandIn

ID = "ltx-video"
NAME = "LTX-Video"
REPO = "Lightricks/LTX-Video"
PIPELINE = "LTXPipeline"
TRANSFORMER = "LTXVideoTransformer3DModel"
BLOCKS = ("transformer_blocks",)
STAND_IN = StandIn(
    transformer={
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "cross_attention_dim": 256,
        "num_layers": 2,
        "caption_channels": 128,
    },
    vae=Part(
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 32,
            "block_out_channels": (16, 16, 32, 32),
            "decoder_block_out_channels": (16, 16, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "patch_size": 2,
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    text_encoders={"text_encoder": "t5"},
)
