"""FLUX.1-dev: joint text and image blocks, then single-stream blocks; guidance is an input.

Dialects: diffusers' own names, and `nunchaku`, whose files fuse q, k and v, rename the MLPs, and
split each single block's `proj_out` by input columns into `out_proj` (attention) and `mlp_fc2`.
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

ID = "flux-1"
NAME = "FLUX.1-dev"
REPO = "black-forest-labs/FLUX.1-dev"
PIPELINE = "FluxPipeline"
TRANSFORMER = "FluxTransformer2DModel"
COMPONENTS = ("transformer",)
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
DEFAULTS = Defaults(height=1024, width=1024, steps=50, guidance=3.5)
TINY_DEFAULTS = Defaults(height=64, width=64, steps=4, guidance=4.0)

_DOUBLE = "transformer_blocks.{i}"
_SINGLE = "single_transformer_blocks.{i}"


def _modulation(module: str, chunks: int) -> tuple[Target, ...]:
    plus_one = (1, 4) if chunks == 6 else (1,)
    return (Target(module, interleave=chunks, plus_one=plus_one),)


NUNCHAKU = Dialect(
    name="nunchaku",
    marker=r"\.(qkv_proj|mlp_fc1)\.(qweight|wscales)$",
    layers=(
        Rule(f"{_DOUBLE}.qkv_proj", cut_rows(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"))),
        Rule(
            f"{_DOUBLE}.qkv_proj_context",
            cut_rows(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
        ),
        Rule(f"{_DOUBLE}.out_proj", (Target(f"{_DOUBLE}.attn.to_out.0"),)),
        Rule(f"{_DOUBLE}.out_proj_context", (Target(f"{_DOUBLE}.attn.to_add_out"),)),
        Rule(f"{_DOUBLE}.mlp_fc1", (Target(f"{_DOUBLE}.ff.net.0.proj"),)),
        Rule(f"{_DOUBLE}.mlp_fc2", (Target(f"{_DOUBLE}.ff.net.2", unsigned=True),)),
        Rule(f"{_DOUBLE}.mlp_context_fc1", (Target(f"{_DOUBLE}.ff_context.net.0.proj"),)),
        Rule(f"{_DOUBLE}.mlp_context_fc2", (Target(f"{_DOUBLE}.ff_context.net.2", unsigned=True),)),
        Rule(f"{_DOUBLE}.norm1.linear", _modulation(f"{_DOUBLE}.norm1.linear", 6)),
        Rule(f"{_DOUBLE}.norm1_context.linear", _modulation(f"{_DOUBLE}.norm1_context.linear", 6)),
        *(
            Rule(f"{_DOUBLE}.{norm}", (Target(f"{_DOUBLE}.attn.{norm}"),))
            for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        ),
        Rule(f"{_SINGLE}.qkv_proj", cut_rows(*(f"{_SINGLE}.attn.to_{x}" for x in "qkv"))),
        Rule(f"{_SINGLE}.mlp_fc1", (Target(f"{_SINGLE}.proj_mlp"),)),
        Rule(f"{_SINGLE}.out_proj", (Target(f"{_SINGLE}.proj_out", columns=(0, 1, 5)),)),
        Rule(
            f"{_SINGLE}.mlp_fc2",
            (Target(f"{_SINGLE}.proj_out", columns=(1, 5, 5), unsigned=True),),
        ),
        Rule(f"{_SINGLE}.norm.linear", _modulation(f"{_SINGLE}.norm.linear", 3)),
        Rule(f"{_SINGLE}.norm_q", (Target(f"{_SINGLE}.attn.norm_q"),)),
        Rule(f"{_SINGLE}.norm_k", (Target(f"{_SINGLE}.attn.norm_k"),)),
    ),
)
DIALECTS = (DIFFUSERS, NUNCHAKU)

_FLUX1 = (
    r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
    r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
    r"single_transformer_blocks\.\d+\.norm\.linear",
)
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "flux1": _FLUX1,
    "flux1-nvfp4": (*_FLUX1, r"single_transformer_blocks\.\d+\.proj_mlp"),
}
"""The validated sets that FLUX.1 keeps in BF16."""

TINY: Mapping[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "in_channels": 64,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": True,
}
FULL: Mapping[str, Any] = {"guidance_embeds": True}
ONE_BLOCK: Mapping[str, Any] = {"num_layers": 1, "num_single_layers": 1}
STEP = Step()
STAND_IN = StandIn(
    transformer=TINY,
    vae=Part(
        "AutoencoderKL",
        {**IMAGE_VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
    text_encoders={"text_encoder": "clip", "text_encoder_2": "t5"},
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
        arguments |= {"negative_prompt": request.negative_prompt, "true_cfg_scale": guidance}
    if request.tiny:
        arguments["max_sequence_length"] = 32
    return arguments


def forward_inputs(config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
    """Arguments of one forward, shapes as `draw` documents them: 1024 pixels and 512 words."""
    return {
        **draw.packed(config, tiny=tiny),
        **draw.positions(config, tiny=tiny),
        "guidance": draw.number(4.0),
        "pooled_projections": draw.normal(1, config.pooled_projection_dim),
    }
