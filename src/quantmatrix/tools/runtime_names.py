"""Runtime names: what SGLang calls the layers of a transformer, where diffusers says otherwise.

SGLang compares each entry of `ignore` with the name of its own layer, so that an entry under the
file's name alone leaves a BF16 weight to be loaded as FP8 codes. Its builder tries patterns on
these names, too:

| module in the file | layer of SGLang | in `ignore` |
| ------------------ | --------------- | ----------- |
| `X.img_mod.1`, `X.txt_mod.1` (Qwen-Image) | `X.img_mod`, `X.txt_mod` | yes |
| modules of HunyuanVideo | names of the original, q, k and v in one layer | yes |
| `X.ff.net.0.proj`, `X.ff.net.2` | `X.ff.proj_in`, `X.ff.proj_out` | no: FLUX.1's is `X.ff.net.2` |

Source: SGLang 0.5.23, its models and `build_modelopt_fp8_transformer`, run on the same inputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from quantmatrix.models.dialect import Dialect, Rule, Target

HUNYUAN_VIDEO = "HunyuanVideoTransformer3DModel"
"""The one class with these layers: `HunyuanVideo15Transformer3DModel` has others."""
MODULATION = re.compile(r"(?<=\.)(img_mod|txt_mod)\.1$")
FEED_FORWARD = {
    re.compile(r"(?<=\.)(ff|audio_ff)\.net\.0\.proj$"): r"\1.proj_in",
    re.compile(r"(?<=\.)(ff|audio_ff)\.net\.2$"): r"\1.proj_out",
}
PREFIXES = ("model.diffusion_model.", "velocity_model.")
"""What SGLang leaves out of a name before anything else."""

_MLP = ("fc_in", "fc_out")
_BLOCK, _DOUBLE = "transformer_blocks.{i}", "double_blocks.{i}"
_BLOCK_1, _SINGLE = "single_transformer_blocks.{i}", "single_blocks.{i}"
_TEXT, _REFINER = "context_embedder", "context_embedder.token_refiner.refiner_blocks.{i}"
_REFINED = "txt_in.refiner_blocks.{i}"


def _embedder(module: str, layer: str) -> dict[str, str]:
    return {f"{module}.linear_{i + 1}": f"{layer}.{leaf}" for i, leaf in enumerate(_MLP)}


def _feed_forward(module: str, layer: str) -> dict[str, str]:
    names = ("net.0.proj", "net.0", "net.2.proj", "net.2")
    return {f"{module}.{name}": f"{layer}.{_MLP[name[4] == '2']}" for name in names}


HUNYUAN_LAYERS = {
    **_embedder(f"{_TEXT}.time_text_embed.timestep_embedder", "txt_in.t_embedder.mlp"),
    **_embedder(f"{_TEXT}.time_text_embed.text_embedder", "txt_in.c_embedder"),
    f"{_TEXT}.proj_in": "txt_in.input_embedder",
    **{f"{_REFINER}.norm{n}": f"{_REFINED}.norm{n}" for n in (1, 2)},
    **{f"{_REFINER}.attn.to_{x}": f"{_REFINED}.self_attn_qkv" for x in "qkv"},
    f"{_REFINER}.attn.to_out.0": f"{_REFINED}.self_attn_proj",
    **_feed_forward(f"{_REFINER}.ff", f"{_REFINED}.mlp"),
    f"{_REFINER}.norm_out.linear": f"{_REFINED}.adaLN_modulation.linear",
    "x_embedder.proj": "img_in.proj",
    **_embedder("time_text_embed.timestep_embedder", "time_in.mlp"),
    **_embedder("time_text_embed.guidance_embedder", "guidance_in.mlp"),
    **_embedder("time_text_embed.text_embedder", "vector_in"),
    f"{_BLOCK}.norm1.linear": f"{_DOUBLE}.img_mod.linear",
    f"{_BLOCK}.norm1_context.linear": f"{_DOUBLE}.txt_mod.linear",
    **{f"{_BLOCK}.attn.norm_{x}": f"{_DOUBLE}.img_attn_{x}_norm" for x in "qk"},
    **{f"{_BLOCK}.attn.norm_added_{x}": f"{_DOUBLE}.txt_attn_{x}_norm" for x in "qk"},
    **{f"{_BLOCK}.attn.to_{x}": f"{_DOUBLE}.img_attn_qkv" for x in "qkv"},
    **{f"{_BLOCK}.attn.add_{x}_proj": f"{_DOUBLE}.txt_attn_qkv" for x in "qkv"},
    f"{_BLOCK}.attn.to_out.0": f"{_DOUBLE}.img_attn_proj",
    f"{_BLOCK}.attn.to_add_out": f"{_DOUBLE}.txt_attn_proj",
    **_feed_forward(f"{_BLOCK}.ff", f"{_DOUBLE}.img_mlp"),
    **_feed_forward(f"{_BLOCK}.ff_context", f"{_DOUBLE}.txt_mlp"),
    **{f"{_BLOCK_1}.attn.norm_{x}": f"{_SINGLE}.{x}_norm" for x in "qk"},
    **{f"{_BLOCK_1}.attn.to_{x}": f"{_SINGLE}.linear1" for x in "qkv"},
    f"{_BLOCK_1}.proj_mlp": f"{_SINGLE}.linear1",
    f"{_BLOCK_1}.proj_out": f"{_SINGLE}.linear2",
    f"{_BLOCK_1}.norm.linear": f"{_SINGLE}.modulation.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.linear",
    "proj_out": "final_layer.linear",
}
"""Layer of SGLang's HunyuanVideo by diffusers' name; `{i}` is the number of a block."""
HUNYUAN = Dialect(
    name="sglang",
    marker=r"^(double_blocks|single_blocks)\.",
    layers=tuple(Rule(module, (Target(layer),)) for module, layer in HUNYUAN_LAYERS.items()),
)


def name_layer(module: str, class_name: str) -> str:
    """SGLang's name of the layer that a module of this class is, or is a part of."""
    bare = strip_prefix(module)
    if class_name == HUNYUAN_VIDEO:
        return HUNYUAN.layer_targets(bare)[0].module
    return MODULATION.sub(r"\1", bare)


def list_names(module: str, class_name: str) -> list[str]:
    """Every name on which SGLang's builder tries a pattern, the module's own first."""
    names = [module, strip_prefix(module)]
    for pattern, name in {MODULATION: r"\1", **FEED_FORWARD}.items():
        names += [pattern.sub(name, start) for start in names[:2]]
    return list(dict.fromkeys([*names, name_layer(module, class_name)]))


def strip_prefix(module: str) -> str:
    """A module's name without the level above the transformer, where it has one."""
    return next((module.removeprefix(p) for p in PREFIXES if module.startswith(p)), module)


def list_ignored(
    unquantized: Collection[str], modules: Iterable[str], class_name: str
) -> list[str]:
    """SGLang's names, where they differ, of the layers of which no module is quantized, sorted."""
    coded = {name_layer(m, class_name) for m in modules if m not in unquantized}
    found = {name_layer(m, class_name) for m in unquantized}
    return sorted(found - coded - set(unquantized))
