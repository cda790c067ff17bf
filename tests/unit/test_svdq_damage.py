"""SVDQuant files that are nobody's, or not quite: read as what they are, or refused by name.

Each test takes a good tiny file, changes a few tensors or a word of the header, and loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import svdq_oracle as oracle
from safetensors.torch import save_file
from test_nunchaku_models import (
    ALIKE,
    FILES,
    READERS,
    Tensors,
    build_plain,
    find,
    forward,
    load,
    read_file,
)

from quantmatrix import plan
from quantmatrix.errors import CheckpointError

Edit = Callable[[Tensors], object]
QKV = "transformer_blocks.0.attn.to_qkv"
LAST = "transformer_blocks.0.img_mlp.net.2"
MODULATION = "transformer_blocks.0.img_mod.1"


def write(
    path: Path, name: str, edit: Edit | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """A copy of one of the good files, changed; `metadata` takes the place of the header's."""
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
