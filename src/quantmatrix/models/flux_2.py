"""FLUX.2-dev: joint blocks with shared modulation, then single-stream blocks with fused projections.

Dialects: diffusers' own names, and `bfl`, the names of the official raw files, in which q, k and v
of the joint blocks are packed into one layer and the final modulation stores scale before shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.models import Defaults, refuse_flags
from quantmatrix.models.dialect import DIFFUSERS, Dialect, Rule, Target, cut_rows
from quantmatrix.models.forward import Step
from quantmatrix.models.stand_in import IMAGE_VAE, Part, Ramp, StandIn

if TYPE_CHECKING:
    from quantmatrix.models.forward import Draw
    from quantmatrix.request import Request

ID = "flux-2"
NAME = "FLUX.2-dev"
REPO = "black-forest-labs/FLUX.2-dev"
PIPELINE = "Flux2Pipeline"
TRANSFORMER = "Flux2Transformer2DModel"
COMPONENTS = ("transformer",)
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
DEFAULTS = Defaults(height=1024, width=1024, steps=50, guidance=4.0)
TINY_DEFAULTS = Defaults(height=64, width=64, steps=4, guidance=4.0)

_OLD, _NEW = "double_blocks.{i}", "transformer_blocks.{i}"
_OLD_SINGLE, _NEW_SINGLE = "single_blocks.{i}", "single_transformer_blocks.{i}"


def _rename(source: str, module: str) -> Rule:
    return Rule(source, (Target(module),))


def _packed(source: str, *modules: str) -> Rule:
    return Rule(source, cut_rows(*modules))


_EMBEDDERS = "time_guidance_embed"
BFL = Dialect(
    name="bfl",
    marker=r"^(double_blocks|single_blocks)\.\d+\.",
    layers=(
        _rename("img_in", "x_embedder"),
        _rename("txt_in", "context_embedder"),
        _rename("time_in.in_layer", f"{_EMBEDDERS}.timestep_embedder.linear_1"),
        _rename("time_in.out_layer", f"{_EMBEDDERS}.timestep_embedder.linear_2"),
        _rename("guidance_in.in_layer", f"{_EMBEDDERS}.guidance_embedder.linear_1"),
        _rename("guidance_in.out_layer", f"{_EMBEDDERS}.guidance_embedder.linear_2"),
        *(
            _rename(f"{name}.lin", f"{name}.linear")
            for name in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        ),
        _packed(f"{_OLD}.img_attn.qkv", *(f"{_NEW}.attn.to_{x}" for x in "qkv")),
        _packed(f"{_OLD}.txt_attn.qkv", *(f"{_NEW}.attn.add_{x}_proj" for x in "qkv")),
        _rename(f"{_OLD}.img_attn.proj", f"{_NEW}.attn.to_out.0"),
        _rename(f"{_OLD}.txt_attn.proj", f"{_NEW}.attn.to_add_out"),
        _rename(f"{_OLD}.img_mlp.0", f"{_NEW}.ff.linear_in"),
        _rename(f"{_OLD}.img_mlp.2", f"{_NEW}.ff.linear_out"),
        _rename(f"{_OLD}.txt_mlp.0", f"{_NEW}.ff_context.linear_in"),
        _rename(f"{_OLD}.txt_mlp.2", f"{_NEW}.ff_context.linear_out"),
        _rename(f"{_OLD_SINGLE}.linear1", f"{_NEW_SINGLE}.attn.to_qkv_mlp_proj"),
        _rename(f"{_OLD_SINGLE}.linear2", f"{_NEW_SINGLE}.attn.to_out"),
        Rule("final_layer.adaLN_modulation.1", (Target("norm_out.linear", swap_halves=True),)),
        _rename("final_layer.linear", "proj_out"),
    ),
    tensors=(
        *(
            _rename(f"{_OLD}.{side}_attn.norm.{long}_norm.scale", f"{_NEW}.attn.{short}.weight")
            for side, long, short in (
                ("img", "query", "norm_q"),
                ("img", "key", "norm_k"),
                ("txt", "query", "norm_added_q"),
                ("txt", "key", "norm_added_k"),
            )
        ),
        _rename(f"{_OLD_SINGLE}.norm.query_norm.scale", f"{_NEW_SINGLE}.attn.norm_q.weight"),
        _rename(f"{_OLD_SINGLE}.norm.key_norm.scale", f"{_NEW_SINGLE}.attn.norm_k.weight"),
    ),
)
DIALECTS = (DIFFUSERS, BFL)

_FLUX2 = (
    r"time_guidance_embed\.(timestep_embedder|guidance_embedder)\.linear_[12]",
    r"double_stream_modulation_(img|txt)\.linear",
    r"single_stream_modulation\.linear",
    r"x_embedder",
    r"context_embedder",
    r"norm_out\.linear",
)
_TEXT_QKV = r"transformer_blocks\.\d+\.attn\.add_[qkv]_proj"
_TEXT_REST = r"transformer_blocks\.\d+\.(attn\.to_add_out|ff_context\.linear_(in|out))"
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "flux2": _FLUX2,
    "flux2-raw": (*_FLUX2, _TEXT_QKV),
    "flux2-raw-mixed": (*_FLUX2, _TEXT_QKV, _TEXT_REST),
}
"""The validated set of the transformer, and what the two official raw files leave in BF16.

In those `txt_attn.qkv` is known to be BF16, and more layers in the mixed file; here they are the
rest of the text stream.
"""

TINY: Mapping[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "axes_dims_rope": (32, 32, 32, 32),
    "in_channels": 128,
    "joint_attention_dim": 384,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
}
FULL: Mapping[str, Any] = {}
ONE_BLOCK: Mapping[str, Any] = {"num_layers": 1, "num_single_layers": 1}
STEP = Step()
STAND_IN = StandIn(
    transformer=TINY,
    vae=Part("AutoencoderKLFlux2", {**IMAGE_VAE, "latent_channels": 32}),
    vae_buffers={"bn.running_mean": Ramp(-0.1, 0.2), "bn.running_var": Ramp(0.75, 0.5)},
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
    text_encoders={"text_encoder": "mistral"},
)


def call_arguments(request: Request) -> dict[str, Any]:
    """Keyword arguments of the pipeline call."""
    refuse_flags(request, NAME, "num_frames", "negative_prompt")
    defaults = TINY_DEFAULTS if request.tiny else DEFAULTS
    guidance = defaults.guidance if request.guidance_scale is None else request.guidance_scale
    arguments: dict[str, Any] = {
        "height": request.height or defaults.height,
        "width": request.width or defaults.width,
        "num_inference_steps": request.num_inference_steps or defaults.steps,
        "guidance_scale": guidance,
    }
    if request.tiny:
        arguments["max_sequence_length"] = 32
    return arguments


def forward_inputs(config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
    """Arguments of one forward, shapes as `draw` documents them: 1024 pixels and 512 words."""
    return {
        **draw.packed(config, tiny=tiny),
        **draw.positions(config, tiny=tiny),
        "guidance": draw.number(4.0),
    }
