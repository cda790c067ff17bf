"""GGUF files in original names, written by the package that ComfyUI-GGUF writes with.

The package decodes, and diffusers' converter says which rows are whose: nothing of ours is between a
tensor and what a module must hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import (
    SIZES,
    Tensors,
    ask,
    convert,
    find_base,
    learn_names,
    pack,
    read_base,
    read_numbers,
)

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.checkpoints.gguf import ARCHITECTURES, ORIGINAL_SHAPE
from quantmatrix.request import Request
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.plan.types import Plan

gguf = pytest.importorskip("gguf", reason="needs the package gguf: the extra `gguf`")
BLOCKS_BY_TURNS = ("Q8_0", "Q5_0", "Q4_1", "Q5_1", "Q4_0")


def choose_types(packed: Tensors, form: str) -> dict[str, str]:
    """Type of each tensor. `all`: every matrix in Q8_0, as programs that know no names write it.

    `mixed`: as ComfyUI-GGUF: several types in the blocks, embedders and last layers in numbers.
    """
    types = dict.fromkeys(packed, "F32")
    matrices = [n for n, t in packed.items() if t.ndim == 2 and n.endswith(".weight")]
    for turn, name in enumerate(matrices):
        inside = any(part.isdecimal() for part in name.split(".")[1:2])
        by_turns = BLOCKS_BY_TURNS[turn % len(BLOCKS_BY_TURNS)]
        if packed[name].shape[1] % 32 == 0:
            types[name] = "Q8_0" if form == "all" else by_turns if inside else "BF16"
    if form == "mixed":
        types |= {name: "F16" for name, tensor in packed.items() if tensor.ndim == 5}
    return types


def write_gguf(path: Path, packed: Tensors, form: str, model: str, prefix: str = "") -> Tensors:
    """A file of the package's own writer; what it stores of each tensor, rows of bytes or numbers.

    In `mixed` the first matrix in numbers has other dimensions in the file than in the model.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURES[models.load(model).TRANSFORMER])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types, stored = choose_types(packed, form), {}
    reshaped = next((n for n, kind in types.items() if kind == "BF16"), None)
    for name, tensor in packed.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        numbers = tensor.float().numpy()
        if name == reshaped:
            writer.add_array(f"{ORIGINAL_SHAPE}{prefix}{name}", list(numbers.shape))
            numbers = numbers.reshape(-1, 32)
        data = gguf.quants.quantize(numbers, kind)
        writer.add_tensor(prefix + name, data, raw_dtype=kind)
        kept = gguf.quants.dequantize(data, kind) if types[name] in ("BF16", "F16", "F32") else data
        shape = tensor.shape if kept is not data or kind.name == "F32" else data.shape
        stored[name] = torch.from_numpy(np.array(kept)).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def decode_blocks(packed: Tensors, stored: Tensors, types: Mapping[str, str]) -> Tensors:
    """The numbers of every tensor of a file, by the package's decoder."""
    decoded = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.uint8:
            kind = gguf.GGMLQuantizationType[types[name]]
            numbers = gguf.quants.dequantize(tensor.numpy(), kind)
            tensor = torch.from_numpy(numbers).reshape(packed[name].shape)
        decoded[name] = tensor
    return decoded


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["all", "mixed"])
@pytest.mark.parametrize("model", [*SIZES, "qwen-image"])
def test_gguf(model: str, form: str, prefix: str, tmp_path: Path) -> None:
    """Blocks of every type come to the modules that diffusers' converter gives them to."""
    plain = read_base(model)
    packed = dict(plain) if model == "qwen-image" else pack(learn_names(model, plain), plain)
    assert (set(packed) == set(plain)) == (model == "qwen-image")
    path, types = tmp_path / f"{model}.gguf", choose_types(packed, form)
    stored = write_gguf(path, packed, form, model, prefix)
    assert len(set(types.values())) == (2 if form == "all" else 7 + (model == "wan-2-2"))
    got = read_numbers(ask(model, str(path)))
    expected = convert(model, decode_blocks(packed, stored, types))
    assert set(got) == set(expected) == set(plain)
    assert [
        n for n in got if not torch.equal(got[n].float(), expected[n].reshape(got[n].shape))
    ] == []


@pytest.mark.parametrize("model", [*SIZES, "qwen-image"])
def test_gguf_blocks_stay_as_they_are(model: str, tmp_path: Path) -> None:
    """With `packed` a module holds the bytes of its rows, cut out of a fused layer's."""
    plain = read_base(model)
    packed = dict(plain) if model == "qwen-image" else pack(learn_names(model, plain), plain)
    path = tmp_path / f"{model}.gguf"
    expected = convert(model, write_gguf(path, packed, "mixed", model))
    request = Request(
        model_path=str(find_base(model)), weights_paths={"transformer": str(path)},
        device="cpu", backend="packed", witness="off",
    )  # fmt: skip
    planned = plan(request)
    assert isinstance(planned, Plan)
    component = planned.components["transformer"]
    loaded = load_component(component, request)
    assert len(component.layers) > 10
    for module in component.layers:
        held = loaded.get_submodule(module)._buffers["q_weight"]
        assert torch.equal(held, expected[f"{module}.weight"]), module
