"""The base models: every foreign name leads to a parameter of diffusers' model, and back."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.models.dialect import Dialect, Target
from quantmatrix.request import Request
from quantmatrix.runtime.load import select_rows
from quantmatrix.tools.packing import pack_tensors

FULL: dict[str, dict[str, Any]] = {"flux-1": {"guidance_embeds": True}}
SIZES = ("tiny", "full")
FOREIGN = [
    (m, d.name) for m in models.IDS for d in models.load(m).DIALECTS if d.name != "diffusers"
]

# Names as the files have them, spelled without the rules under test. {n} runs over the blocks.
BFL_DOUBLE = (
    "double_blocks.{n}.{img,txt}_attn.{qkv,proj}.weight",
    "double_blocks.{n}.{img,txt}_attn.norm.{query,key}_norm.scale",
    "double_blocks.{n}.{img,txt}_mlp.{0,2}.weight",
)
BFL_SINGLE = (
    "single_blocks.{n}.linear{1,2}.weight",
    "single_blocks.{n}.norm.{query,key}_norm.scale",
)
BFL_TOP = (
    "{img_in,txt_in}.weight",
    "{time_in,guidance_in}.{in,out}_layer.weight",
    "double_stream_modulation_{img,txt}.lin.weight",
    "single_stream_modulation.lin.weight",
    "final_layer.{adaLN_modulation.1,linear}.weight",
)
WAN_BLOCK = (
    "blocks.{n}.{self,cross}_attn.{q,k,v,o}.{weight,bias}",
    "blocks.{n}.{self,cross}_attn.norm_{q,k}.weight",
    "blocks.{n}.norm3.{weight,bias}",
    "blocks.{n}.ffn.{0,2}.{weight,bias}",
    "blocks.{n}.modulation",
)
WAN_TOP = (
    "patch_embedding.{weight,bias}",
    "{text,time}_embedding.{0,2}.{weight,bias}",
    "time_projection.1.{weight,bias}",
    "head.head.{weight,bias}",
    "head.modulation",
)
FLUX_DOUBLE = (
    "transformer_blocks.{n}.{qkv_proj,out_proj}{,_context}",
    "transformer_blocks.{n}.mlp_{fc,context_fc}{1,2}",
    "transformer_blocks.{n}.norm1{,_context}.linear",
    "transformer_blocks.{n}.norm_{q,k,added_q,added_k}",
)
FLUX_SINGLE = (
    "single_transformer_blocks.{n}.{qkv_proj,out_proj,mlp_fc1,mlp_fc2,norm.linear,norm_q,norm_k}",
)
FLUX_TOP = (
    "{x_embedder,context_embedder,norm_out.linear,proj_out}",
    "time_text_embed.{timestep,guidance,text}_embedder.linear_{1,2}",
)
QWEN_BLOCK = (
    "transformer_blocks.{n}.attn.{to_qkv,add_qkv_proj,to_out.0,to_add_out}",
    "transformer_blocks.{n}.attn.norm_{q,k,added_q,added_k}",
    "transformer_blocks.{n}.{img,txt}_mlp.net.{0.proj,2}",
    "transformer_blocks.{n}.{img,txt}_mod.1",
)
QWEN_TOP = (
    "{img_in,txt_in,txt_norm,norm_out.linear,proj_out}",
    "time_text_embed.timestep_embedder.linear_{1,2}",
)
Z_BLOCK = (
    ".{n}.attention.{to_qkv,to_out.0,norm_q,norm_k}",
    ".{n}.feed_forward.net.{0.proj,2}",
    ".{n}.{attention,ffn}_norm{1,2}",
)
Z_TOP = (
    "all_x_embedder.2-1",
    "all_final_layer.2-1.{linear,adaLN_modulation.1}",
    "cap_embedder.{0,1}",
    "t_embedder.mlp.{0,2}",
    "{x,cap}_pad_token",
)


def expand(pattern: str, count: int = 1) -> Iterator[str]:
    """Names of a pattern with {a,b} alternatives, for each of `count` blocks."""
    pieces = re.split(
        r"(\{[^{}]*\})", pattern.replace("{n}", "{" + ",".join(map(str, range(count))) + "}")
    )
    choices = [p[1:-1].split(",") if p.startswith("{") else [p] for p in pieces]
    return ("".join(words) for words in itertools.product(*choices))


def spell(patterns: tuple[str, ...], count: int = 1) -> list[str]:
    return [name for pattern in patterns for name in expand(pattern, count)]


def list_foreign(model: str, size: str) -> list[str]:
    """Tensor names (BFL, original Wan) or layer names (nunchaku) of a whole foreign file."""
    blocks = {b: len(getattr(build(model, size), b)) for b in models.load(model).BLOCKS}
    if model == "flux-2":
        double, single = blocks.values()
        return spell(BFL_DOUBLE, double) + spell(BFL_SINGLE, single) + spell(BFL_TOP)
    if model == "wan-2-2":
        return spell(WAN_BLOCK, blocks["blocks"]) + spell(WAN_TOP)
    if model == "flux-1":
        double, single = blocks.values()
        return spell(FLUX_DOUBLE, double) + spell(FLUX_SINGLE, single) + spell(FLUX_TOP)
    if model == "qwen-image":
        return spell(QWEN_BLOCK, blocks["transformer_blocks"]) + spell(QWEN_TOP)
    names = [name for b, n in blocks.items() for name in spell(tuple(b + p for p in Z_BLOCK), n)]
    modulated = [
        f"{b}.{i}.adaLN_modulation.0" for b in ("layers", "noise_refiner") for i in range(blocks[b])
    ]
    return names + modulated + spell(Z_TOP)


@cache
def build(model: str, size: str) -> torch.nn.Module:
    """diffusers' transformer without memory."""
    module = models.load(model)
    options = dict(module.TINY) if size == "tiny" else FULL.get(model, {})  # type: ignore[attr-defined]
    with no_init_weights(), init_empty_weights():
        made: torch.nn.Module = getattr(diffusers, module.TRANSFORMER)(**options)
    return made


def dialect(model: str, name: str) -> Dialect:
    return next(d for d in models.load(model).DIALECTS if d.name == name)


def lead(rules: Dialect, name: str) -> list[str]:
    """Where a tensor name leads."""
    whole = rules.tensor_targets(name)
    if whole is not None:
        return [target.module for target in whole]
    layer, _, leaf = name.rpartition(".")
    return [f"{target.module}.{leaf}".lstrip(".") for target in rules.layer_targets(layer)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", ["flux-2", "wan-2-2"])
def test_every_tensor_name_leads_to_one_parameter_and_none_is_left(model: str, size: str) -> None:
    rules = models.load(model).DIALECTS[1]
    led = Counter(place for name in list_foreign(model, size) for place in lead(rules, name))
    assert set(led) == set(build(model, size).state_dict())
    assert set(led.values()) == {1}


def test_the_raw_files_of_flux_2_have_299_plain_tensors() -> None:
    assert len(set(list_foreign("flux-2", "full"))) == 299


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", ["flux-1", "qwen-image", "z-image"])
def test_every_layer_name_leads_to_modules_and_none_is_left(model: str, size: str) -> None:
    rules = models.load(model).DIALECTS[1]
    shares: dict[str, list[tuple[tuple[int, int, int], tuple[int, int, int]]]] = {}
    for layer in list_foreign(model, size):
        targets = rules.layer_targets(layer)
        parts = [target.rows for target in targets]
        assert parts == [(i, i + 1, len(targets)) for i in range(len(targets))], layer
        for target in targets:
            shares.setdefault(target.module, []).append((target.rows, target.columns))
    made = build(model, size)
    assert set(shares) == {
        n if n.endswith("_token") else n.rpartition(".")[0] for n in made.state_dict()
    }
    for module, own in shares.items():
        columns = sorted(column for _, column in own)
        assert columns[0][0] == 0, module
        assert columns[-1][1] == columns[-1][2], module
        assert all(a[1] == b[0] for a, b in itertools.pairwise(columns)), module


@pytest.mark.parametrize(("model", "name"), FOREIGN)
def test_a_dialect_is_known_by_its_names(model: str, name: str) -> None:
    names = list_foreign(model, "tiny")
    if name == "nunchaku":
        names = [f"{layer}.{suffix}" for layer in names for suffix in ("qweight", "wscales")]
    assert models.dialect_of(model, names).name == name
    assert models.dialect_of(model, build(model, "tiny").state_dict()).name == "diffusers"


@pytest.mark.parametrize(("model", "name"), FOREIGN)
def test_what_is_packed_unpacks_to_the_same_numbers(model: str, name: str) -> None:
    rules = dialect(model, name)
    shapes = {n: t.shape for n, t in build(model, "tiny").state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    plain = {n: torch.randint(-50, 50, s, generator=generator).float() for n, s in shapes.items()}
    packed = pack_tensors(plain, rules)
    layers = {n.rpartition(".")[0] if name == "nunchaku" else n for n in packed}
    spelled = {
        n.replace("x_pad_token", "").replace("cap_pad_token", "")
        for n in list_foreign(model, "tiny")
    }
    assert layers - {""} == spelled - {""}
    assert unpack(packed, rules, plain) == plain.keys()


def unpack(
    packed: dict[str, torch.Tensor], rules: Dialect, plain: dict[str, torch.Tensor]
) -> set[str]:
    """Undo a packing with the loader's own row selection; returns the names that agree."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in packed.items():
        layer, _, leaf = name.rpartition(".")
        for place, target in zip(
            lead(rules, name), rules.tensor_targets(name) or rules.layer_targets(layer), strict=True
        ):
            rows = select_rows(target, tensor.shape[0])
            part = tensor if rows is None else tensor[rows]
            if leaf == "bias" and target.plus_one:
                part = part.unflatten(0, (target.interleave, -1)).clone()
                part[list(target.plus_one)] -= 1
                part = part.flatten(0, 1)
            if target.columns[2] > 1 and leaf == "weight":
                start, _, of = target.columns
                unit = plain[place].shape[1] // of
                whole = torch.zeros_like(plain[place])
                whole[:, start * unit : start * unit + part.shape[1]] = part
                part = whole
            found[place] = found[place] + part if place in found else part
    return {name for name, tensor in found.items() if torch.equal(tensor, plain[name])}


def test_parts_that_invite_mistakes() -> None:
    def one(model: str, layer: str) -> Target:
        return models.load(model).DIALECTS[1].layer_targets(layer)[0]

    flux = "transformer_blocks.3."
    assert one("flux-1", f"{flux}mlp_fc2").unsigned
    assert one("flux-1", f"{flux}mlp_context_fc2").unsigned
    assert not one("flux-1", f"{flux}mlp_fc1").unsigned
    assert one("flux-1", f"single_{flux}mlp_fc2").unsigned
    assert one("flux-1", f"single_{flux}mlp_fc2").columns == (1, 5, 5)
    assert one("flux-1", f"single_{flux}out_proj").columns == (0, 1, 5)
    for model, layer in (
        ("flux-1", "norm1.linear"),
        ("flux-1", "norm1_context.linear"),
        ("qwen-image", "img_mod.1"),
        ("qwen-image", "txt_mod.1"),
    ):
        assert (one(model, flux + layer).interleave, one(model, flux + layer).plus_one) == (
            6,
            (1, 4),
        )
    single = one("flux-1", f"single_{flux}norm.linear")
    assert (single.interleave, single.plus_one) == (3, (1,))
    assert one("qwen-image", f"{flux}txt_mlp.net.2").unsigned
    assert not one("z-image", "layers.3.feed_forward.net.2").unsigned
    assert one("flux-2", "final_layer.adaLN_modulation.1").swap_halves
    assert one("wan-2-2", "blocks.3.norm3").module == "blocks.3.norm2"
    rotated = models.load("wan-2-2").DIALECTS[1].tensor_targets("blocks.3.self_attn.q_rot")
    assert rotated is not None
    assert rotated[0].module == "blocks.3.attn1.to_q_rot"


@pytest.mark.parametrize(
    ("model", "layer", "modules"),
    [
        ("flux-1", "transformer_blocks.3.qkv_proj", "attn.to_q attn.to_k attn.to_v"),
        (
            "flux-1",
            "transformer_blocks.3.qkv_proj_context",
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        ),
        ("flux-2", "double_blocks.3.img_attn.qkv", "attn.to_q attn.to_k attn.to_v"),
        (
            "flux-2",
            "double_blocks.3.txt_attn.qkv",
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        ),
        ("qwen-image", "transformer_blocks.3.attn.to_qkv", "attn.to_q attn.to_k attn.to_v"),
        ("z-image", "layers.3.attention.to_qkv", "attention.to_q attention.to_k attention.to_v"),
        ("z-image", "layers.3.feed_forward.net.0.proj", "feed_forward.w3 feed_forward.w1"),
    ],
)
def test_order_of_fused_rows(model: str, layer: str, modules: str) -> None:
    targets = models.load(model).DIALECTS[1].layer_targets(layer)
    assert [target.module.partition(".3.")[2] for target in targets] == modules.split()


def test_refiners_in_full_precision_are_not_fused() -> None:
    model = models.load("z-image")
    plain = {n: torch.zeros(t.shape) for n, t in build("z-image", "tiny").state_dict().items()}
    keep = re.compile("|".join(model.FALLBACKS["z-image-refiners"])).fullmatch
    packed = pack_tensors(plain, model.DIALECTS[1], lambda module: keep(module) is not None)
    assert {f"noise_refiner.0.attention.to_{x}.weight" for x in "qkv"} <= packed.keys()
    assert "noise_refiner.0.feed_forward.net.0.proj.weight" in packed
    assert "layers.0.attention.to_qkv.weight" in packed
    assert unpack(packed, model.DIALECTS[1], plain) == plain.keys()


COUNTS = {
    ("flux-1", "flux1"): 152,
    ("flux-1", "flux1-nvfp4"): 190,
    ("flux-2", "flux2"): 10,
    ("flux-2", "flux2-raw"): 34,
    ("flux-2", "flux2-raw-mixed"): 58,
    ("wan-2-2", "wan-modelopt"): 6,
    ("qwen-image", "qwen-image"): 186,
    ("z-image", "z-image-refiners"): 30,
}


@pytest.mark.parametrize(
    ("model", "word"), [(m, w) for m in models.IDS for w in models.load(m).FALLBACKS]
)
def test_linear_layers_that_a_full_size_fallback_set_keeps(model: str, word: str) -> None:
    linear = [n for n, m in build(model, "full").named_modules() if isinstance(m, torch.nn.Linear)]
    patterns = models.load(model).FALLBACKS[word]
    assert sum(any(re.fullmatch(p, n) for p in patterns) for n in linear) == COUNTS[model, word]


@pytest.mark.parametrize("model", models.IDS)
def test_blocks_are_lists_and_tiny_sizes_suit_every_format(model: str) -> None:
    made = build(model, "tiny")
    for name in models.load(model).BLOCKS:
        assert isinstance(getattr(made, name), torch.nn.ModuleList)
    sizes = {
        size
        for name, m in made.named_modules()
        if isinstance(m, torch.nn.Linear) and name.split(".")[0] in models.load(model).BLOCKS
        for size in (m.in_features, m.out_features)
    }
    assert all(size % 128 == 0 for size in sizes)


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("model", models.IDS)
def test_the_pipeline_takes_the_arguments(model: str, tiny: bool) -> None:
    module = models.load(model)
    known = inspect.signature(getattr(diffusers, module.PIPELINE).__call__).parameters
    requests = [Request(model_path="x", tiny=tiny, height=96, guidance_scale=0.0)]
    if model != "flux-2":
        requests.append(Request(model_path="x", tiny=tiny, negative_prompt="blurry"))
    for request in requests:
        assert module.call_arguments(request).keys() <= known.keys()
    first = module.call_arguments(requests[0])
    assert first["height"] == 96
    assert first["num_inference_steps"] == (module.TINY_DEFAULTS if tiny else module.DEFAULTS).steps
    assert 0.0 in (first.get("guidance_scale"), first.get("true_cfg_scale"))


@pytest.mark.parametrize("model", [m for m in models.IDS if m != "wan-2-2"])
def test_a_flag_without_use_is_an_error(model: str) -> None:
    with pytest.raises(UsageError, match=r"--num-frames: .* takes none"):
        models.load(model).call_arguments(Request(model_path="x", num_frames=5))
    if model == "flux-2":
        with pytest.raises(UsageError, match="--negative-prompt"):
            models.load(model).call_arguments(Request(model_path="x", negative_prompt="blurry"))


@pytest.mark.parametrize("model", models.IDS)
def test_models_are_found_by_class_and_by_short_name(model: str) -> None:
    module = models.load(model)
    assert models.by_class(module.PIPELINE) == models.by_class(module.TRANSFORMER) == model
    assert models.by_short_name(module.NAME.upper()) == model
    assert models.by_short_name(module.REPO.rpartition("/")[2]) == model
    assert models.by_class("UNet2DConditionModel") is None
    assert models.by_short_name("SD3") is None
