"""GLM-Image: text to picture; a language model writes a coarse picture as codes, which a transformer paints."""

from __future__ import annotations

from quantmatrix.models.stand_in import IMAGE_VAE, Part, StandIn

ID = "glm-image"
NAME = "GLM-Image"
REPO = "zai-org/GLM-Image"
PIPELINE = "GlmImagePipeline"
TRANSFORMER = "GlmImageTransformer2DModel"
BLOCKS = ("transformer_blocks",)
STAND_IN = StandIn(
    transformer={
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "text_embed_dim": 128,
        "time_embed_dim": 128,
        "condition_dim": 64,
        "prior_vq_quantizer_codebook_size": 64,
    },
    vae=Part(
        "AutoencoderKL",
        {
            **IMAGE_VAE,
            "latent_channels": 16,
            "latents_mean": [0.0] * 16,
            "latents_std": [1.0] * 16,
        },
    ),
    scheduler=Part(
        "FlowMatchEulerDiscreteScheduler",
        {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True},
    ),
    text_encoders={"text_encoder": "byt5", "vision_language_encoder": "glm-image"},
)
