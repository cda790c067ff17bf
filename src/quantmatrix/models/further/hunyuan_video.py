"""HunyuanVideo: text to video; LLaMA states and a pooled CLIP vector are the text."""

from __future__ import annotations

from collections.abc import Mapping

from quantmatrix.models.stand_in import Part, StandIn

ID = "hunyuan-video"
NAME = "HunyuanVideo"
REPO = "hunyuanvideo-community/HunyuanVideo"
PIPELINE = "HunyuanVideoPipeline"
TRANSFORMER = "HunyuanVideoTransformer3DModel"
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "hunyuan-video": (
        r"context_embedder\..*",
        r"x_embedder\.proj",
        r"time_text_embed\..*",
        r"norm_out\.linear",
        r"proj_out",
        r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
        r"single_transformer_blocks\.\d+\.norm\.linear",
    ),
}
"""The set that SGLang's converter keeps in BF16 and validated: embedders, outputs and modulation."""
STAND_IN = StandIn(
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 128,
        "pooled_projection_dim": 128,
    },
    vae=Part(
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": (16, 16, 32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
    text_encoders={"text_encoder": "llama", "text_encoder_2": "clip"},
)
