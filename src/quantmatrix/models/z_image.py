"""Z-Image: single-stream blocks after small refiners for noise and caption; SwiGLU feed-forward.

Dialects: diffusers' own names, and `nunchaku`, whose files fuse q, k and v, and put the feed-forward's
`w3` over `w1` in one layer. Files made with `skip_refiners` keep the refiners in full precision,
under their ordinary attention names but with the fused feed-forward names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.models import Defaults, refuse_flags
from quantmatrix.models.dialect import DIFFUSERS, Dialect, Rule, Target, cut_rows
from quantmatrix.models.forward import Step
from quantmatrix.models.stand_in import IMAGE_VAE, Part, StandIn

if TYPE_CHECKING:
    from quantmatrix.models.forward import Draw
    from quantmatrix.request import Request

ID = "z-image"
NAME = "Z-Image-Turbo"
REPO = "Tongyi-MAI/Z-Image-Turbo"
PIPELINE = "ZImagePipeline"
TRANSFORMER = "ZImageTransformer2DModel"
COMPONENTS = ("transformer",)
BLOCKS = ("noise_refiner", "context_refiner", "layers")
DEFAULTS = Defaults(height=1024, width=1024, steps=9, guidance=0.0)
TINY_DEFAULTS = Defaults(height=64, width=64, steps=4, guidance=4.0)


def _fused(block: str) -> tuple[Rule, ...]:
    stem = f"{block}.{{i}}"
    qkv = cut_rows(*(f"{stem}.attention.to_{x}" for x in "qkv"))
    gate = cut_rows(f"{stem}.feed_forward.w3", f"{stem}.feed_forward.w1")
    return (
        Rule(f"{stem}.attention.to_qkv", qkv, quantized_only=True),
        Rule(f"{stem}.feed_forward.net.0.proj", gate),
        Rule(f"{stem}.feed_forward.net.2", (Target(f"{stem}.feed_forward.w2"),)),
    )


NUNCHAKU = Dialect(
    name="nunchaku",
    marker=r"^layers\.\d+\.attention\.to_qkv\.(qweight|wscales)$",
    layers=tuple(rule for block in BLOCKS for rule in _fused(block)),
)
DIALECTS = (DIFFUSERS, NUNCHAKU)
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "z-image-refiners": (r"noise_refiner\..*", r"context_refiner\..*"),
}
"""The refiners, for files made with skip_refiners."""

TINY: Mapping[str, Any] = {
    "dim": 384,
    "n_heads": 3,
    "n_kv_heads": 3,
    "axes_dims": [32, 48, 48],
    "n_layers": 2,
    "n_refiner_layers": 1,
    "cap_feat_dim": 128,
}
FULL: Mapping[str, Any] = {}
ONE_BLOCK: Mapping[str, Any] = {"n_layers": 1, "n_refiner_layers": 1}
STEP = Step(time="t", left=True, latents="x", listed=True, sign=-1)
STAND_IN = StandIn(
    transformer=TINY,
    vae=Part(
        "AutoencoderKL",
        {**IMAGE_VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    scheduler=Part(
        "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": False, "shift": 6.0}
    ),
    text_encoders={"text_encoder": "qwen3"},
)


def call_arguments(request: Request) -> dict[str, Any]:
    """Keyword arguments of the pipeline call."""
    refuse_flags(request, NAME, "num_frames")
    defaults = TINY_DEFAULTS if request.tiny else DEFAULTS
    guidance = defaults.guidance if request.guidance_scale is None else request.guidance_scale
    arguments: dict[str, Any] = {
        "height": request.height or defaults.height,
        "width": request.width or defaults.width,
        "num_inference_steps": request.num_inference_steps or defaults.steps,
        "guidance_scale": guidance,
    }
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    if request.tiny:
        arguments["max_sequence_length"] = 32
    return arguments


def forward_inputs(config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
    """Arguments of one forward, shapes as `draw` documents them: 1024 pixels and 128 words."""
    side = 2 * draw.side(tiny=tiny)
    return {
        "x": [draw.normal(16, 1, side, side)],
        "t": draw.number(0.5),
        "cap_feats": [draw.normal(16 if tiny else 128, config.cap_feat_dim)],
        "return_dict": False,
    }
