"""SVDQuant files that are nobody's, or not quite: read as what they are, or refused by name.

Each test takes a good tiny file, changes a few tensors or a word of the header, and loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import svdq_oracle as oracle
import torch
from safetensors.torch import load_file, save_file
from test_nunchaku_models import (
    ALIKE,
    BASES,
    FILES,
    READERS,
    Tensors,
    build_plain,
    expect,
    find,
    forward,
    load,
    read_file,
)
from weight_files import write_json

from quantmatrix import plan
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Request
from quantmatrix.tools.dequantize import dequantize

Edit = Callable[[Tensors], object]
QKV = "transformer_blocks.0.attn.to_qkv"
LAST = "transformer_blocks.0.img_mlp.net.2"
MODULATION = "transformer_blocks.0.img_mod.1"


def write(
    path: Path, name: str, edit: Edit | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """A copy of one of the good files, changed; `metadata` replaces the header's."""
    tensors, header = read_file(find(FILES[name]))
    if edit is not None:
        edit(tensors)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        path,
        header if metadata is None else {"format": "pt", **metadata},
    )
    return path


def drop(tensors: Tensors, layer: str) -> Tensors:
    """Take a layer out of a file; returns its tensors by suffix."""
    prefix = f"{layer}."
    return {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}


# --- whose names are they --------------------------------------------------------------------

FUSED = {
    "qwen-image int4": {
        "transformer_blocks.0.attn.to_qkv": "transformer_blocks.0.attn.to_{}",
        "transformer_blocks.1.attn.to_qkv": "transformer_blocks.1.attn.to_{}",
    },
    "z-image int4": {
        f"{block}.attention.to_qkv": f"{block}.attention.to_{{}}"
        for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    },
}


@pytest.mark.parametrize("name", FUSED)
def test_attention_in_full_precision_leaves_the_rest_as_it_was(name: str, tmp_path: Path) -> None:
    """Without a fused q, k and v no name may say whose layout it is; the family does."""
    model_id = name.split()[0]
    tensors, header = read_file(find(FILES[name]))
    plain = READERS[model_id](tensors)
    for layer, module in FUSED[name].items():
        drop(tensors, layer)
        for part in (f"{module.format(x)}.{leaf}" for x in "qkv" for leaf in ("weight", "bias")):
            if part in plain:
                tensors[part] = plain[part].bfloat16()
                plain[part] = tensors[part].double()
    path = tmp_path / "svdq-int4_r32-part.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    expected = forward(model_id, build_plain(model_id, plain))
    assert oracle.relative_error(forward(model_id, load(model_id, path)), expected) < ALIKE


def rename(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({f"{new}.{s}": t for s, t in drop(tensors, old).items()})


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("qwen-image int4", QKV, f"{QKV[:-4]}_q", rf"{QKV[:-4]}_q is quantized under .* in {QKV}"),
        (
            "flux-1 int4",
            "transformer_blocks.0.mlp_fc2",
            "transformer_blocks.0.ff.net.2",
            r"0\.ff\.net\.2 is quantized under diffusers' name; expected .*0\.mlp_fc2",
        ),
        (
            "flux-1 int4",
            "single_transformer_blocks.0.mlp_fc2",
            "single_transformer_blocks.0.proj_out",
            r"expected it in .*out_proj and .*mlp_fc2",
        ),
        ("qwen-image int4", "transformer_blocks.0.img_mlp.net.0.proj", MODULATION, "AWQ codes"),
    ],
)
def test_a_layer_that_is_stored_in_another_way_is_refused(
    name: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    def edit(tensors: Tensors) -> None:
        drop(tensors, new)
        rename(old, new)(tensors)

    with pytest.raises(CheckpointError, match=message):
        load(name.split()[0], write(tmp_path / "custom.safetensors", name, edit))


@pytest.mark.parametrize(
    ("base", "layer"),
    [
        ("black-forest-labs/FLUX.2-dev", "transformer_blocks.0.ff.linear_in"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "blocks.0.ffn.net.2"),
    ],
)
def test_models_without_a_layout_of_their_own_are_refused(
    base: str, layer: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "custom.safetensors", "qwen-image int4", rename(LAST, layer), {})
    with pytest.raises(CheckpointError, match=r"known of FLUX.1-dev, Qwen-Image, Z-Image-Turbo"):
        plan(model_path=str(find(base)), weights_paths={"transformer": str(path)})


SINGLE = "single_transformer_blocks.0"


def exchange(tensors: Tensors) -> None:
    """Give `out_proj` the shapes of `mlp_fc2`, and the other way round."""
    left, right = (drop(tensors, f"{SINGLE}.{layer}") for layer in ("out_proj", "mlp_fc2"))
    tensors.update({f"{SINGLE}.mlp_fc2.{suffix}": t for suffix, t in left.items()})
    tensors.update({f"{SINGLE}.out_proj.{suffix}": t for suffix, t in right.items()})


SPLIT: dict[str, tuple[Edit, str]] = {
    "bias": (lambda t: t.pop(f"{SINGLE}.mlp_fc2.bias"), rf"{SINGLE}.mlp_fc2.bias is missing"),
    "zero bias": (
        lambda t: t.pop(f"{SINGLE}.out_proj.bias"),
        rf"{SINGLE}.out_proj.bias is missing",
    ),
    "one half": (lambda t: drop(t, f"{SINGLE}.out_proj"), rf"{SINGLE}.out_proj.*not there"),
    "exchanged": (exchange, "out_proj 1024 and .*mlp_fc2 64 columns"),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_halves_of_a_layer_belong_together(kind: str, tmp_path: Path) -> None:
    edit, message = SPLIT[kind]
    path = write(tmp_path / "custom.safetensors", "flux-1 int4", edit)
    with pytest.raises(CheckpointError, match=f"custom.safetensors: .*{message}"):
        load("flux-1", path)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    """`norm_q` and `attn.norm_q` are one parameter: which of them would win is nobody's choice."""
    name = "transformer_blocks.0.norm_q.weight"
    other = name.replace("norm_q", "attn.norm_q")
    path = write(
        tmp_path / "a.safetensors", "flux-1 int4", lambda t: t.update({other: t[name] * 2})
    )
    with pytest.raises(CheckpointError, match=rf"{name}.* are both {other}"):
        load("flux-1", path)


def test_biases_of_zeros_where_the_model_has_none(tmp_path: Path) -> None:
    """As the quantizer's own converter writes them."""

    def edit(tensors: Tensors) -> None:
        for layer in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
            rows = tensors[f"{layer}.qweight"].shape[0]
            tensors.setdefault(f"{layer}.bias", torch.zeros(rows, dtype=torch.bfloat16))

    path = write(tmp_path / "custom.safetensors", "z-image int4", edit)
    found = forward("z-image", load("z-image", path))
    assert oracle.relative_error(found, expect("z-image int4")) < ALIKE
    request = Request(
        model_path=str(find(BASES["z-image"])), weights_paths={"transformer": str(path)}
    )
    dequantize(request, str(tmp_path / "plain"))
    plain = read_file(next((tmp_path / "plain").glob("*.safetensors")))[0]
    assert "layers.0.attention.to_q.weight" in plain
    assert "layers.0.attention.to_q.bias" not in plain


# --- the model that a header was made for ----------------------------------------------------


def change_config(**words: Any) -> dict[str, str]:
    """The header of the Qwen-Image file with some words of its model's configuration changed."""
    _, header = read_file(find(FILES["qwen-image int4"]))
    return {**header, "config": json.dumps({**json.loads(header["config"]), **words})}


@pytest.mark.parametrize(
    "words",
    [{"attention_head_dim": 64, "num_attention_heads": 4}, {"axes_dims_rope": [32, 48, 48]}],
    ids=["heads", "positions"],
)
def test_a_header_of_another_shape_is_refused(words: dict[str, Any], tmp_path: Path) -> None:
    """All tensors fit, and the picture would be another one."""
    path = tmp_path / "custom.safetensors"
    write(path, "qwen-image int4", metadata=change_config(**words))
    key = next(iter(words))
    with pytest.raises(CheckpointError, match=rf"header's config says {key} .*config\.json says"):
        load("qwen-image", path)


@pytest.mark.parametrize(
    ("words", "message"),
    [({"axes_dims_rope": [32, 48, 48]}, "axes_dims_rope"), ({"_class_name": "Other"}, "of Other")],
    ids=["positions", "class"],
)
def test_an_older_folder_of_another_shape_is_refused(
    words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """There the configuration is a file beside the two that hold the weights."""
    tensors, _ = read_file(find(FILES["flux-1 int4"]))
    blocks = {n: t for n, t in tensors.items() if "transformer_blocks." in n}
    rest = {n: t for n, t in tensors.items() if n not in blocks}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    save_file(rest, tmp_path / "unquantized_layers.safetensors")
    config = json.loads((find(BASES["flux-1"]) / "transformer" / "config.json").read_text())
    write_json(tmp_path / "config.json", config)
    assert load("flux-1", tmp_path)
    write_json(tmp_path / "config.json", {**config, **words})
    with pytest.raises(CheckpointError, match=rf"config\.json: this config says .*{message}"):
        load("flux-1", tmp_path)


def test_words_that_one_config_leaves_out_are_not_compared(tmp_path: Path) -> None:
    header = change_config(
        _diffusers_version="0.1", pooled_projection_dim=None, sample_size=64, quantization_config={}
    )
    path = write(tmp_path / "custom.safetensors", "qwen-image int4", metadata=header)
    found = forward("qwen-image", load("qwen-image", path))
    assert oracle.relative_error(found, expect("qwen-image int4")) < ALIKE


def test_words_that_change_no_number_are_not_compared(tmp_path: Path) -> None:
    """Lengths of position tables, of which writers have different defaults."""
    name = "z-image int4"
    _, header = read_file(find(FILES[name]))
    config = json.loads(header["config"])
    other = {"axes_lens": [2 * n for n in config["axes_lens"]], "torch_dtype": "bfloat16"}
    changed = {"config": json.dumps({**config, **other, "t_scale": int(config["t_scale"])})}
    path = write(tmp_path / "custom.safetensors", name, metadata={**header, **changed})
    found = forward("z-image", load("z-image", path))
    assert oracle.relative_error(found, expect(name)) < ALIKE


# --- numbers that cannot be meant ------------------------------------------------------------


def fill(name: str, value: float, *, whole: bool = False) -> Edit:
    """Put a number in one place of a tensor, or everywhere."""

    def edit(tensors: Tensors) -> None:
        numbers = tensors[name].float()
        numbers.flatten()[slice(None) if whole else slice(3, 4)] = value
        tensors[name] = numbers.to(tensors[name].dtype)

    return edit


NUMBERS: list[tuple[str, str, Edit, str]] = [
    *(
        ("qwen-image int4", f"{layer}.{suffix}", fill(f"{layer}.{suffix}", float(word)), word)
        for layer, suffix, word in (
            (QKV, "smooth_factor", "0"),
            (QKV, "smooth_factor", "-1"),
            (QKV, "smooth_factor", "nan"),
            (QKV, "wscales", "0"),
            (QKV, "wscales", "-1"),
            (QKV, "wscales", "inf"),
            (QKV, "bias", "nan"),
            (QKV, "proj_down", "inf"),
            (QKV, "proj_up", "nan"),
            (MODULATION, "wscales", "-1"),
            (MODULATION, "wzeros", "nan"),
        )
    ),
    *(
        (file, f"{layer}.wscales", fill(f"{layer}.wscales", 0, whole=True), "zero scales")
        for file, layer in (("qwen-image int4", MODULATION), ("qwen-image nvfp4", LAST))
    ),
    ("qwen-image nvfp4", f"{QKV}.wcscales", fill(f"{QKV}.wcscales", 0), "0"),
    ("qwen-image nvfp4", f"{LAST}.wtscale", fill(f"{LAST}.wtscale", -1, whole=True), "-1"),
    ("qwen-image nvfp4", f"{QKV}.wscales", lambda t: t.pop(f"{QKV}.wcscales"), "neither wtscale"),
    ("qwen-image nvfp4", f"{LAST}.wscales", lambda t: t.pop(f"{LAST}.wtscale"), "neither wtscale"),
]
WORDS = {"0": "zero ", "-1": "negative", "nan": "NaN", "inf": "infinite"}


@pytest.mark.parametrize(
    ("name", "tensor", "edit", "word"), NUMBERS, ids=[f"{t}-{w}" for _, t, _, w in NUMBERS]
)
def test_numbers_that_cannot_be_meant(
    name: str, tensor: str, edit: Edit, word: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "custom.safetensors", name, edit)
    message = rf"custom\.safetensors: tensor {tensor} holds .*{WORDS.get(word, word)}.*: expected"
    with pytest.raises(CheckpointError, match=message):
        load("qwen-image", path)
    output = tmp_path / "plain"
    with pytest.raises(CheckpointError, match=message):
        dequantize(
            Request(
                model_path=str(find("Qwen/Qwen-Image")), weights_paths={"transformer": str(path)}
            ),
            str(output),
        )
    assert not output.exists()


def test_scales_that_stand_alone_are_whole(tmp_path: Path) -> None:
    """A missing wtscale is 1, and what is not used may be anything.

    The layer is not the base model's any more, hence no witness.
    """

    def edit(tensors: Tensors) -> None:
        scales = tensors[f"{LAST}.wscales"].float() * tensors.pop(f"{LAST}.wtscale").float() * 64
        tensors[f"{LAST}.wscales"] = scales.to(torch.float8_e4m3fn)
        fill(f"{LAST}.smooth_factor_orig", 0)(tensors)

    path = write(tmp_path / "custom.safetensors", "qwen-image nvfp4", edit)
    expected = forward(
        "qwen-image", build_plain("qwen-image", READERS["qwen-image"](load_file(path)))
    )
    assert (
        oracle.relative_error(
            forward("qwen-image", load("qwen-image", path, witness="off")), expected
        )
        < ALIKE
    )
