"""Z-Image: the model that Z-Image-Turbo was distilled from, with guidance."""

from __future__ import annotations

from quantmatrix.models.stand_in import FLUX_VAE, Part, StandIn

ID = "z-image-base"
NAME = "Z-Image"
REPO = "Tongyi-MAI/Z-Image"
PIPELINE = "ZImagePipeline"
TRANSFORMER = "ZImageTransformer2DModel"
STAND_IN = StandIn(
    transformer={
        "dim": 384,
        "n_heads": 3,
        "n_kv_heads": 3,
        "axes_dims": [32, 48, 48],
        "n_layers": 1,
        "n_refiner_layers": 1,
        "cap_feat_dim": 128,
    },
    vae=FLUX_VAE,
    scheduler=Part(
        "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": False, "shift": 6.0}
    ),
    text_encoders={"text_encoder": "qwen3"},
)
