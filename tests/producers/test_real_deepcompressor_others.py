"""What the real converter of SVDQuant makes of other models, and of less than a whole recipe.

Its own entry point knows FLUX.1 only; its functions take any names, here those of the files of
Qwen-Image and Z-Image. What it leaves out (a branch) or copies (a layer without scales) is the
converter's own doing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepcompressor")

import modelopt_exports as exports
from deepcompressor.backend.nunchaku import convert
from safetensors.torch import save_file
from test_real_deepcompressor import (
    MODEL,
    SMOOTHED_AS,
    Source,
    add_group,
    add_modulation,
    check,
    convert_all,
    make_source,
)

from quantmatrix import plan
from quantmatrix.api import load_transformer
from quantmatrix.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
QWEN = {
    "attn.to_q": ("attn.to_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_k_proj": (
        "attn.add_qkv_proj",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
    ),
    "attn.to_out.0": ("attn.to_out.0", "attn.to_out.0"),
    "attn.to_add_out": ("attn.to_add_out", "attn.to_add_out"),
    "img_mlp.net.0.proj": ("img_mlp.net.0.proj", "img_mlp.net.0.proj"),
    "img_mlp.net.2.linear": ("img_mlp.net.2", "img_mlp.net.2"),
    "txt_mlp.net.0.proj": ("txt_mlp.net.0.proj", "txt_mlp.net.0.proj"),
    "txt_mlp.net.2.linear": ("txt_mlp.net.2", "txt_mlp.net.2"),
}
"""Name of a layer in the converter's input: its name in the file, the modules that it holds."""
Z_IMAGE = {
    "attention.to_q": (
        "attention.to_qkv",
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
    ),
    "attention.to_out.0": ("attention.to_out.0", "attention.to_out.0"),
    "feed_forward.w3": ("feed_forward.net.0.proj", "feed_forward.w3", "feed_forward.w1"),
    "feed_forward.w2": ("feed_forward.net.2", "feed_forward.w2"),
}
TABLES = {"qwen-image": QWEN, "z-image": Z_IMAGE}
BLOCKS = ("transformer_blocks.", "layers.", "noise_refiner.", "context_refiner.")
MODULATIONS = ("img_mod.1", "txt_mod.1")
NEWER = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}


def make_base(model: str, folder: Path) -> Path:
    """The folder of a model in BF16."""
    exports.make_transformer(model, torch.bfloat16).save_pretrained(folder)
    return folder


def convert_block(made: Source, block: str, table: Mapping[str, tuple[str, ...]]) -> Tensors:
    """The layers of one block, as the converter writes them."""
    local: dict[str, str | list[str]] = {}
    for name, (file, *modules) in table.items():
        add_group(made, block, name, modules)
        local[file] = modules if len(modules) > 1 else name
    for name in MODULATIONS:
        if f"{block}.{name}.weight" in made.plain:
            add_modulation(made, f"{block}.{name}")
            local[name] = name
    sources = {file: name for name, (file, *_) in table.items()}
    kinds = {file: "adanorm_zero" if file in MODULATIONS else "linear" for file in local}
    found: Tensors = convert.convert_to_nunchaku_transformer_block_state_dict(
        {name: tensor.clone() for name, tensor in made.state.items()},
        made.scales,
        made.smooth,
        made.branch,
        block_name=block,
        local_name_map=local,
        smooth_name_map={file: SMOOTHED_AS.get(name, name) for file, name in sources.items()},
        branch_name_map=sources,
        convert_map=kinds,
        float_point=not made.int4,
    )
    return {f"{block}.{name}": tensor for name, tensor in found.items()}


def convert_model(made: Source, model: str) -> Tensors:
    """A whole file: the converted blocks, and the rest as it is."""
    base = exports.make_transformer(model, torch.bfloat16).state_dict()
    made.plain = {name: tensor.float() for name, tensor in base.items()}
    blocks = sorted({".".join(name.split(".")[:2]) for name in base if name.startswith(BLOCKS)})
    file: Tensors = {}
    for block in blocks:
        file |= convert_block(made, block, TABLES[model])
    modules = [module for _, *names in TABLES[model].values() for module in names]
    coded = {f"{block}.{module}" for block in blocks for module in (*modules, *MODULATIONS)}
    return file | {n: t for n, t in base.items() if n.rpartition(".")[0] not in coded}


@pytest.mark.parametrize("newer", [True, False], ids=["newer", "older"])
@pytest.mark.parametrize(("int4", "rank"), [(True, 48), (False, 32)], ids=["int4", "nvfp4"])
@pytest.mark.parametrize("model", TABLES)
def test_converted_blocks_are_the_model_that_went_in(
    tmp_path: Path, model: str, int4: bool, rank: int, newer: bool
) -> None:
    made = Source(int4, rank, fuse=False)
    file = convert_model(made, model)
    if newer:
        split = {name: name.rpartition(".") for name in file}
        file = {f"{a}{dot}{NEWER.get(b, b)}": file[n] for n, (a, dot, b) in split.items()}
    save_file(file, tmp_path / "file.safetensors")
    check(model, make_base(model, tmp_path / "base"), tmp_path / "file.safetensors", made.plain)


# --- FLUX.1 with less than the whole recipe --------------------------------------------------


def write_flux(made: Source, path: Path, extra: Tensors | None = None) -> None:
    blocks, others = convert_all(made)
    save_file({**blocks, **others, **(extra or {})}, path)


def refuse(base: Path, path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan(model_path=str(base), weights_paths={"transformer": str(path)})


def leave_branches(made: Source) -> Tensors:
    """Take every branch out; returns branches of zeros, as the file would hold them."""
    for branch in made.branch.values():
        for leaf in ("a.weight", "b.weight"):
            branch[leaf].zero_()
    zeros = {n: t for n, t in convert_all(made)[0].items() if n.endswith(("_down", "_up"))}
    made.branch.clear()
    return zeros


def test_a_recipe_without_branches_says_what_to_add(tmp_path: Path) -> None:
    """The file was called incomplete."""
    made, path = make_source(int4=False, rank=16, fuse=True), tmp_path / "file.safetensors"
    base, zeros = make_base(MODEL, tmp_path / "base"), leave_branches(made)
    write_flux(made, path)
    refuse(base, path, r"no low-rank branch .* add one of zeros")
    write_flux(made, path, zeros)
    assert load_transformer(
        str(base), transformer_weights_path=str(path), backend="decode", witness="off"
    )


SHIFTED = "transformer_blocks.0.ff_context.net.2"


def copy_layer(made: Source, name: str) -> None:
    """Leave one layer without scales, so that the converter copies it; the shift stays in it."""
    del made.scales[f"{name}.weight.scale.0"], made.smooth[name], made.branch[name]
    made.scales.pop(f"{name}.weight.scale.1", None)


def test_a_copied_layer_keeps_the_shift_in_its_bias(tmp_path: Path) -> None:
    """It was taken for a whole bias: outputs were off by what the shift adds."""
    made, path = make_source(int4=True, rank=16, fuse=False), tmp_path / "file.safetensors"
    base = make_base(MODEL, tmp_path / "base")
    copy_layer(made, f"{SHIFTED}.linear")
    write_flux(made, path)
    refuse(base, path, rf"0\.mlp_context_fc2\.weight is stored plainly.*0\.171875.*{SHIFTED}$")
    blocks, others = convert_all(made)
    weight = blocks.pop("transformer_blocks.0.mlp_context_fc2.weight")
    bias = blocks.pop("transformer_blocks.0.mlp_context_fc2.bias")
    whole = bias.float() + 0.171875 * weight.float().sum(dim=1)
    blocks |= {f"{SHIFTED}.weight": weight, f"{SHIFTED}.bias": whole}
    save_file({**blocks, **others}, path)
    plain = {**made.plain, f"{SHIFTED}.weight": weight.float(), f"{SHIFTED}.bias": whole}
    check(MODEL, base, path, plain)
