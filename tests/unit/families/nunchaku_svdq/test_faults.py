"""What writers of SVDQuant files leave out or leave behind: named by its cause, or read as
meant."""

from __future__ import annotations

import json
import shutil
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
    Tensors,
    build_plain,
    expect,
    find,
    forward,
    load,
    read_file,
    read_flux,
)
from test_svdq_damage import QKV, Edit, change_config, drop, write
from weight_files import write_json

from quantmatrix import plan
from quantmatrix.api import load_transformer
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Request
from quantmatrix.runtime.plan import inspect
from quantmatrix.tiny.hub import use_tiny
from quantmatrix.tools import quantize
from quantmatrix.tools.dequantize import dequantize

SHIFT = 0.171875


def request(model_id: str, path: Path) -> Request:
    return Request(model_path=str(find(BASES[model_id])), weights_paths={"transformer": str(path)})


# --- a layer without a low-rank branch -------------------------------------------------------


def drop_branches(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith((".proj_down", ".proj_up", "lora_down", "_up"))]:
        del tensors[name]


def add_zeros(tensors: Tensors) -> None:
    """Branches of zeros, as the error says to make them."""
    for name in [n for n in tensors if n.endswith(".qweight") and tensors[n].dtype == torch.int8]:
        layer, (rows, half) = name.removesuffix(".qweight"), tensors[name].shape
        tensors[f"{layer}.proj_down"] = torch.zeros(2 * half, 16, dtype=torch.bfloat16)
        tensors[f"{layer}.proj_up"] = torch.zeros(rows, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen-image int4", "flux-1 nvfp4"])
def test_a_file_without_branches_says_what_to_add(name: str, tmp_path: Path) -> None:
    """It is whole: the quantizer has no branch at rank 0, and leaves its tensors out."""
    path = write(tmp_path / "custom.safetensors", name, drop_branches, {})
    for use in (
        lambda: plan(request(name.split()[0], path)),
        lambda: inspect.inspect(str(path)),
    ):
        with pytest.raises(CheckpointError, match=r"no low-rank branch .*one of zeros.*, 16\]"):
            use()


def test_branches_of_zeros_change_nothing(tmp_path: Path) -> None:
    """A branch that was cut off leaves other weights than the base model's, hence no witness."""

    def edit(tensors: Tensors) -> None:
        drop_branches(tensors)
        add_zeros(tensors)

    path = write(tmp_path / "custom.safetensors", "flux-1 int4", edit, {})
    expected = forward("flux-1", build_plain("flux-1", read_flux(load_file(path))))
    found = forward("flux-1", load("flux-1", path, witness="off"))
    assert oracle.relative_error(found, expected) < ALIKE


def test_one_layer_without_a_branch_gets_the_rank_of_the_others(tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn.to_out.0"

    def edit(tensors: Tensors) -> None:
        del tensors[f"{layer}.proj_down"], tensors[f"{layer}.proj_up"]

    path = write(tmp_path / "custom.safetensors", "qwen-image int4", edit)
    with pytest.raises(CheckpointError, match=rf"layer {layer} has no .*proj_up \[256, 32\]"):
        plan(request("qwen-image", path))


@pytest.mark.parametrize(
    ("name", "group", "dtype", "word"),
    [
        ("qwen-image int4", 128, torch.bfloat16, "BF16 scale per 128"),
        ("qwen-image nvfp4", 32, torch.float8_e8m0fnu, "F8_E8M0 scale per 32"),
        ("qwen-image nvfp4", 64, torch.float8_e4m3fn, "F8_E4M3 scale per 64"),
    ],
)
def test_groups_of_another_size_are_told(
    name: str, group: int, dtype: torch.dtype, word: str, tmp_path: Path
) -> None:
    """They were called damage."""

    def edit(tensors: Tensors) -> None:
        rows, half = tensors[f"{QKV}.qweight"].shape
        tensors[f"{QKV}.wscales"] = torch.ones(2 * half // group, rows).to(dtype)

    path = write(tmp_path / "custom.safetensors", name, edit)
    with pytest.raises(CheckpointError, match=rf"tensor {QKV}\.wscales holds one {word} columns"):
        plan(request("qwen-image", path))


# --- a scale that is not part of the engine's state -------------------------------------------


def save_state(tensors: Tensors) -> None:
    """What saving a model of the engine's classes writes: channel scales always, `wtscale` never."""
    for name in [n for n in tensors if n.endswith(".wtscale")]:
        del tensors[name]
        layer = name.removesuffix(".wtscale")
        rows = tensors[f"{layer}.qweight"].shape[0]
        tensors[f"{layer}.wcscales"] = torch.ones(rows, dtype=torch.bfloat16)


def test_a_saved_state_without_its_scales_is_refused(tmp_path: Path) -> None:
    """Weights were hundreds of times too large, without an error."""
    path = write(tmp_path / "custom.safetensors", "qwen-image nvfp4", save_state)
    message = r"\.wscales holds scales of up to \d+.*1 throughout.*wtscale as a plain number"
    with pytest.raises(CheckpointError, match=message):
        load("qwen-image", path)
    with pytest.raises(CheckpointError, match=message):
        dequantize(request("qwen-image", path), str(tmp_path / "plain"))


# --- class names of the engine ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("qwen-image", "NunchakuQwenImageTransformer2DModel"),
        ("flux-1", "NunchakuFluxTransformer2dModel"),
        ("flux-1", "NunchakuFluxTransformer2DModelV2"),
    ],
)
def test_class_names_of_the_engine_are_those_of_diffusers(
    model_id: str, name: str, tmp_path: Path
) -> None:
    """`save_pretrained` of the engine's classes writes their own names."""
    base, folder = find(BASES[model_id]), tmp_path / "saved" / "transformer"
    folder.mkdir(parents=True)
    config = json.loads((base / "transformer" / "config.json").read_text())
    write_json(folder / "config.json", {**config, "_class_name": name})
    index = json.loads((base / "model_index.json").read_text())
    write_json(folder.parent / "model_index.json", {**index, "transformer": ["nunchaku", name]})
    shutil.copy(find(FILES[f"{model_id} int4"]), folder / "svdq-int4_r32-x.safetensors")
    found = load_transformer(str(folder.parent), backend="merged", dtype=torch.float32)
    assert oracle.relative_error(forward(model_id, found), expect(f"{model_id} int4")) < ALIKE
    for words in ({"model_path": str(folder)}, {"transformer_path": str(folder)}):
        assert load_transformer(**{"model_path": str(base), **words}, backend="merged")
    dequantize(Request(model_path=str(folder)), str(tmp_path / "plain"))
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert written["_class_name"] == config["_class_name"]


def test_a_header_may_name_the_class_of_the_engine(tmp_path: Path) -> None:
    path, name = tmp_path / "custom.safetensors", "qwen-image int4"
    write(path, name, metadata=change_config(_class_name="NunchakuQwenImageTransformer2DModel"))
    assert load("qwen-image", path)
    write(path, name, metadata=change_config(_class_name="NunchakuFluxTransformer2dModel"))
    with pytest.raises(CheckpointError, match=r"weights of FluxTransformer2DModel.*wrong model"):
        load("qwen-image", path)


# --- one of two files ------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["transformer_blocks", "unquantized_layers"])
def test_one_file_of_an_older_folder_is_refused(half: str, tmp_path: Path) -> None:
    tensors, _ = read_file(find(FILES["flux-1 int4"]))
    inside = {n: t for n, t in tensors.items() if "transformer_blocks." in n}
    own = (
        inside if half == "transformer_blocks" else {n: tensors[n] for n in tensors - inside.keys()}
    )
    save_file(own, tmp_path / f"{half}.safetensors")
    for place in (tmp_path, tmp_path / f"{half}.safetensors"):
        with pytest.raises(CheckpointError, match=r"one of the two files .*the folder that holds"):
            plan(request("flux-1", place))


# --- layers that are left in full precision --------------------------------------------------

LAST, HALF = "transformer_blocks.0.mlp_fc2", "single_transformer_blocks.0.mlp_fc2"


def lay_bare(layer: str, name: str, module: str | None = None) -> Edit:
    """Put a layer's plain weights in the place of its codes, under a module's name if given."""

    def edit(tensors: Tensors) -> None:
        plain = READ[name]
        target = module or layer
        own = {leaf: plain[f"{MODULES[layer]}.{leaf}"].bfloat16() for leaf in ("weight", "bias")}
        drop(tensors, layer)
        if target == HALF:
            own["weight"] = own["weight"][:, 256:].contiguous()
        tensors.update({f"{target}.{leaf}": tensor for leaf, tensor in own.items()})

    return edit


MODULES = {
    LAST: "transformer_blocks.0.ff.net.2",
    HALF: "single_transformer_blocks.0.proj_out",
    "transformer_blocks.0.norm1.linear": "transformer_blocks.0.norm1.linear",
}
READ: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _read_plain() -> None:
    READ.update(
        {n: read_flux(read_file(find(FILES[n]))[0]) for n in ("flux-1 int4", "flux-1 nvfp4")}
    )


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LAST, rf"may not be whole: .*{SHIFT} times .*write the layer as {MODULES[LAST]}$"),
        (HALF, rf"part of the columns of {MODULES[HALF]} only: .*{SHIFT} times"),
        ("transformer_blocks.0.norm1.linear", "AWQ codes only"),
    ],
)
def test_plain_layers_that_may_mean_two_things_are_refused(
    layer: str, message: str, tmp_path: Path
) -> None:
    """A converter copies them as they were, with a shift in the bias; the plan says so already."""
    path = write(tmp_path / "custom.safetensors", "flux-1 int4", lay_bare(layer, "flux-1 int4"))
    with pytest.raises(
        CheckpointError, match=rf"tensor {layer}\.weight is stored plainly, .*{message}"
    ):
        plan(request("flux-1", path))


@pytest.mark.parametrize(
    ("name", "module"), [("flux-1 int4", MODULES[LAST]), ("flux-1 nvfp4", None)]
)
def test_plain_layers_that_mean_one_thing_are_read(
    name: str, module: str | None, tmp_path: Path
) -> None:
    """Under diffusers' name the bias is whole, and nvfp4 has no shift."""
    path = write(tmp_path / "custom.safetensors", name, lay_bare(LAST, name, module))
    plain = dict(READ[name])
    plain |= {n: t.bfloat16().double() for n, t in plain.items() if n.startswith(MODULES[LAST])}
    expected = forward("flux-1", build_plain("flux-1", plain))
    assert oracle.relative_error(forward("flux-1", load("flux-1", path)), expected) < ALIKE


def test_what_is_kept_while_quantizing_can_be_read(tmp_path: Path) -> None:
    """Layers of two parts, and those of shifted inputs, keep the model's own names."""
    kept = [r"transformer_blocks\.\d+\.ff\.net\.2", r"single_transformer_blocks\.\d+\.proj_out"]
    output = tmp_path / "svdq-int4_r16-x.safetensors"
    base = find(BASES["flux-1"])
    quantize.quantize(
        use_tiny(Request(model_path=BASES["flux-1"], tiny=True, device="cpu")),
        family="nunchaku-svdq",
        output=output,
        precision="int4",
        rank=16,
        kept=kept,
        prompts=["a fox"],
    )
    written, own = load_file(output), load_file(next((base / "transformer").glob("*.safetensors")))
    for name in (f"{MODULES[LAST]}.bias", f"{MODULES[HALF]}.weight"):
        assert torch.equal(written[name], own[name])
    assert load("flux-1", output)
