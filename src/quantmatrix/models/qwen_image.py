"""Qwen-Image: joint text and image blocks; guidance by a second pass with a negative prompt.

Dialects: diffusers' own names, and `nunchaku`, whose files fuse q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.models import Defaults, refuse_flags
from quantmatrix.models.dialect import DIFFUSERS, Dialect, Rule, Target, cut_rows
from quantmatrix.models.forward import Step
from quantmatrix.models.stand_in import VIDEO_VAE, Part, StandIn

if TYPE_CHECKING:
    from quantmatrix.models.forward import Draw
    from quantmatrix.request import Request

ID = "qwen-image"
NAME = "Qwen-Image"
REPO = "Qwen/Qwen-Image"
PIPELINE = "QwenImagePipeline"
TRANSFORMER = "QwenImageTransformer2DModel"
COMPONENTS = ("transformer",)
BLOCKS = ("transformer_blocks",)
DEFAULTS = Defaults(height=1328, width=1328, steps=50, guidance=4.0, negative_prompt=" ")
TINY_DEFAULTS = Defaults(height=64, width=64, steps=4, guidance=4.0, negative_prompt=" ")

_BLOCK = "transformer_blocks.{i}"


NUNCHAKU = Dialect(
    name="nunchaku",
    marker=r"\.attn\.to_qkv\.(qweight|wscales)$",
    layers=(
        Rule(f"{_BLOCK}.attn.to_qkv", cut_rows(*(f"{_BLOCK}.attn.to_{x}" for x in "qkv"))),
        Rule(
            f"{_BLOCK}.attn.add_qkv_proj", cut_rows(*(f"{_BLOCK}.attn.add_{x}_proj" for x in "qkv"))
        ),
        *(
            Rule(
                f"{_BLOCK}.{side}_mlp.net.2", (Target(f"{_BLOCK}.{side}_mlp.net.2", unsigned=True),)
            )
            for side in ("img", "txt")
        ),
        *(
            Rule(
                f"{_BLOCK}.{side}_mod.1",
                (Target(f"{_BLOCK}.{side}_mod.1", interleave=6, plus_one=(1, 4)),),
            )
            for side in ("img", "txt")
        ),
    ),
)
DIALECTS = (DIFFUSERS, NUNCHAKU)

FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "qwen-image": (
        r"img_in",
        r"txt_in",
        r"time_text_embed\.timestep_embedder\.linear_[12]",
        r"norm_out\.linear",
        r"proj_out",
        r"transformer_blocks\.\d+\.img_mlp\.net\.2",
        r"transformer_blocks\.\d+\.(img_mod|txt_mod)(\.1)?",
    ),
}

TINY: Mapping[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "in_channels": 64,
    "out_channels": 16,
    "joint_attention_dim": 128,
}
FULL: Mapping[str, Any] = {}
ONE_BLOCK: Mapping[str, Any] = {"num_layers": 1}
STEP = Step()
STAND_IN = StandIn(
    transformer=TINY,
    vae=Part("AutoencoderKLQwenImage", VIDEO_VAE),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 1.0}),
    text_encoders={"text_encoder": "qwen2.5-vl"},
)


def call_arguments(request: Request) -> dict[str, Any]:
    """Keyword arguments of the pipeline call."""
    refuse_flags(request, NAME, "num_frames")
    defaults = TINY_DEFAULTS if request.tiny else DEFAULTS
    guidance = defaults.guidance if request.guidance_scale is None else request.guidance_scale
    negative = request.negative_prompt
    arguments: dict[str, Any] = {
        "height": request.height or defaults.height,
        "width": request.width or defaults.width,
        "num_inference_steps": request.num_inference_steps or defaults.steps,
        "true_cfg_scale": guidance,
        "negative_prompt": defaults.negative_prompt if negative is None else negative,
    }
    if request.tiny:
        arguments["max_sequence_length"] = 32
    return arguments


def forward_inputs(config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
    """Arguments of one forward, shapes as `draw` documents them: 1024 pixels and 512 words."""
    side = draw.side(tiny=tiny)
    return {**draw.packed(config, tiny=tiny), "img_shapes": [[(1, side, side)]]}
