"""Wan2.2-T2V-A14B: text to video with two experts, one for high noise and one for low noise.

`transformer` takes the noisy steps, `transformer_2` the rest. Dialects: diffusers' own names, and
`wan-original`, the names of the first release, which msmodelslim writes before repacking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.models import Defaults
from quantmatrix.models.dialect import DIFFUSERS, Dialect, Rule, Target
from quantmatrix.models.forward import Step
from quantmatrix.models.stand_in import VIDEO_VAE, Part, StandIn

if TYPE_CHECKING:
    from quantmatrix.models.forward import Draw
    from quantmatrix.request import Request

ID = "wan-2-2"
NAME = "Wan2.2-T2V-A14B"
REPO = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
PIPELINE = "WanPipeline"
TRANSFORMER = "WanTransformer3DModel"
COMPONENTS = ("transformer", "transformer_2")
BLOCKS = ("blocks",)
NEGATIVE = "blurry, static, low quality, watermark"
DEFAULTS = Defaults(480, 832, 40, 4.0, frames=81, negative_prompt=NEGATIVE, fps=16)
TINY_DEFAULTS = Defaults(32, 32, 4, 4.0, frames=5, negative_prompt=NEGATIVE, fps=16)

_BLOCK = "blocks.{i}"


def _rename(source: str, module: str) -> Rule:
    return Rule(source, (Target(module),))


_TEXT, _TIME = "condition_embedder.text_embedder", "condition_embedder.time_embedder"
_IMAGE = "condition_embedder.image_embedder"
ORIGINAL = Dialect(
    name="wan-original",
    marker=r"\.(self_attn|cross_attn)\.",
    layers=(
        _rename("text_embedding.0", f"{_TEXT}.linear_1"),
        _rename("text_embedding.2", f"{_TEXT}.linear_2"),
        _rename("time_embedding.0", f"{_TIME}.linear_1"),
        _rename("time_embedding.2", f"{_TIME}.linear_2"),
        _rename("time_projection.1", "condition_embedder.time_proj"),
        _rename("head.head", "proj_out"),
        *(
            _rename(f"{_BLOCK}.{old}_attn.{x}", f"{_BLOCK}.{new}.{y}")
            for old, new in (("self", "attn1"), ("cross", "attn2"))
            for x, y in (
                ("q", "to_q"),
                ("k", "to_k"),
                ("v", "to_v"),
                ("o", "to_out.0"),
                ("norm_q", "norm_q"),
                ("norm_k", "norm_k"),
            )
        ),
        _rename(f"{_BLOCK}.cross_attn.k_img", f"{_BLOCK}.attn2.add_k_proj"),
        _rename(f"{_BLOCK}.cross_attn.v_img", f"{_BLOCK}.attn2.add_v_proj"),
        _rename(f"{_BLOCK}.cross_attn.norm_k_img", f"{_BLOCK}.attn2.norm_added_k"),
        _rename(f"{_BLOCK}.norm3", f"{_BLOCK}.norm2"),
        _rename(f"{_BLOCK}.ffn.0", f"{_BLOCK}.ffn.net.0.proj"),
        _rename(f"{_BLOCK}.ffn.2", f"{_BLOCK}.ffn.net.2"),
        _rename("img_emb.proj.0", f"{_IMAGE}.norm1"),
        _rename("img_emb.proj.1", f"{_IMAGE}.ff.net.0.proj"),
        _rename("img_emb.proj.3", f"{_IMAGE}.ff.net.2"),
        _rename("img_emb.proj.4", f"{_IMAGE}.norm2"),
    ),
    tensors=(
        _rename(f"{_BLOCK}.modulation", f"{_BLOCK}.scale_shift_table"),
        _rename("head.modulation", "scale_shift_table"),
        _rename("img_emb.emb_pos", f"{_IMAGE}.pos_embed"),
        *(
            _rename(f"{_BLOCK}.{old}_attn.{x}_rot", f"{_BLOCK}.{new}.to_{x}_rot")
            for old, new in (("self", "attn1"), ("cross", "attn2"))
            for x in "qk"
        ),
    ),
)
DIALECTS = (DIFFUSERS, ORIGINAL)

FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "wan-modelopt": (r"patch_embedding", r"condition_embedder\..*", r"proj_out"),
}

TINY: Mapping[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_dim": 512,
    "num_layers": 2,
    "text_dim": 128,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "rope_max_seq_len": 128,
}
FULL: Mapping[str, Any] = {}
ONE_BLOCK: Mapping[str, Any] = {"num_layers": 1}
STEP = Step(per=1)
STAND_IN = StandIn(
    transformer=TINY,
    vae=Part("AutoencoderKLWan", VIDEO_VAE),
    scheduler=Part(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 12.0},
    ),
    text_encoders={"text_encoder": "umt5"},
    options={"boundary_ratio": 0.875},
)


def call_arguments(request: Request) -> dict[str, Any]:
    """Keyword arguments of the pipeline call."""
    defaults = TINY_DEFAULTS if request.tiny else DEFAULTS
    guidance = defaults.guidance if request.guidance_scale is None else request.guidance_scale
    negative = request.negative_prompt
    arguments: dict[str, Any] = {
        "height": request.height or defaults.height,
        "width": request.width or defaults.width,
        "num_frames": request.num_frames or defaults.frames,
        "num_inference_steps": request.num_inference_steps or defaults.steps,
        "guidance_scale": guidance,
        "negative_prompt": defaults.negative_prompt if negative is None else negative,
    }
    if request.tiny:
        arguments["max_sequence_length"] = 32
    return arguments


def forward_inputs(config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
    """Arguments of one forward, shapes as `draw` documents them: 480p, 81 frames and 512 words."""
    frames, height, width = (2, 4, 4) if tiny else (21, 60, 104)
    return {
        "hidden_states": draw.normal(1, config.in_channels, frames, height, width),
        "timestep": draw.whole_number(500),
        "encoder_hidden_states": draw.normal(1, draw.text(tiny=tiny), config.text_dim),
        "return_dict": False,
    }
