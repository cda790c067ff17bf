"""Files of diffusers' conversion script for BFL's checkpoints: its own arithmetic, decoder and converter.

`quantize_fp8r` and `quantize_nvfp4` are what the script writes with, and the header's `quantization` is
all that it says of a file. Original names and diffusers' own, for the models that have them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.quantizers.bfl import utils as bfl
from original_files import SIZES, Tensors, ask, convert, learn_names, pack, read_base, read_numbers
from safetensors.torch import save_file

from quantmatrix.api import plan
from quantmatrix.runtime.plan.types import Plan

FAMILIES = {"fp8r": ("fp8", "fp8-channel"), "nvfp4": ("modelopt-nvfp4", "NVFP4")}


def quantize(packed: Tensors, form: str) -> tuple[Tensors, Tensors]:
    """(what the script stores, what its decoder makes of it); matrices inside the blocks are coded."""
    stored, decoded = dict(packed), dict(packed)
    for name, weight in packed.items():
        inside = any(part.isdecimal() for part in name.split(".")[1:2])
        if (
            not inside
            or not name.endswith(".weight")
            or weight.ndim != 2
            or weight.shape[1] % bfl.NVFP4_BLOCK
        ):
            continue
        layer = name.removesuffix(".weight")
        if form == "fp8r":
            codes, scale = bfl.quantize_fp8r(weight)
            stored |= {name: codes, f"{layer}.weight_scale": scale}
            decoded[name] = bfl.dequantize_fp8r(codes, scale)
            continue
        codes, scale, whole = bfl.quantize_nvfp4(weight)
        stored |= {name: codes, f"{layer}.weight_scale": scale, f"{layer}.weight_scale_2": whole}
        stored[f"{layer}.input_scale"] = torch.tensor(0.01)
        decoded[name] = bfl.dequantize_nvfp4(codes, scale, whole)
    return stored, decoded


@pytest.mark.parametrize("form", FAMILIES)
@pytest.mark.parametrize(
    ("model", "names"),
    [
        *((model, "original") for model in SIZES),
        *((m, "diffusers") for m in (*SIZES, "qwen-image")),
    ],
)
def test_files_of_the_conversion_script(model: str, names: str, form: str, tmp_path: Path) -> None:
    plain = read_base(model)
    original = names == "original"
    packed = pack(learn_names(model, plain), plain) if original else dict(plain)
    stored, decoded = quantize(packed, form)
    path = tmp_path / "w.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, path, {"format": "pt", "quantization": form})
    request = ask(model, str(path))
    planned = plan(request)
    assert isinstance(planned, Plan)
    component = planned.components["transformer"]
    family, scheme = FAMILIES[form]
    assert (component.family, {p.scheme.name for p in component.pieces()}) == (family, {scheme})
    assert len({p.layer for p in component.pieces()}) > 10
    got = read_numbers(request)
    expected = convert(model, decoded) if original else decoded
    assert set(got) == set(expected) == set(plain)
    assert [
        n for n in got if not torch.equal(got[n].float(), expected[n].float().reshape(got[n].shape))
    ] == []
