"""ComfyUI's INT8, rotated or not: decoded and multiplied as plain formulas say, and refused by name."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_files import MODELS, Made, compare, decode, draw, list_linears, mark, plan_folder, write
from torch.nn import functional
from weight_files import write_weights

from quantmatrix import families
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import comfyui_int8
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.kernels import kernels_of, linear_convrot
from quantmatrix.request import Hub

SIGNS = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def build_rotation(size: int) -> torch.Tensor:
    """The matrix by its definition: a product of signs over the digits of row and column to base 4."""
    digits = list(itertools.product(range(4), repeat=round(math.log(size, 4))))
    rows = [
        [math.prod(SIGNS[a][b] for a, b in zip(row, column, strict=True)) for column in digits]
        for row in digits
    ]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(size)


def rotate(weight: torch.Tensor, size: int) -> torch.Tensor:
    groups = weight.double().split(size, dim=1)
    return torch.cat([group @ build_rotation(size).T for group in groups], dim=1)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_a_rotation_is_its_own_inverse(size: int) -> None:
    matrix = linear_convrot.build_hadamard(size)
    assert torch.equal(matrix.double(), build_rotation(size))
    assert torch.equal(matrix @ matrix, torch.eye(size))
    with pytest.raises(ValueError, match="rotation of 32 columns"):
        linear_convrot.build_hadamard(32)


def make(model: str, size: int, shape: tuple[int, ...] | None) -> Made:
    """Codes of every layer of the blocks; scales of this shape, or one a row."""
    state = draw(model)
    made = Made(dict(state), {name: tensor.float() for name, tensor in state.items()})
    for name in list_linears(state):
        weight = rotate(state[name], size) if size else state[name].double()
        amax = weight.abs().amax(1, keepdim=True)
        scale = ((amax if shape is None else amax.amax()) / 127).float()
        codes = (weight / scale).round().clamp(-128, 127)
        made.tensors[name] = codes.to(torch.int8)
        made.tensors[f"{name}_scale"] = scale if shape is None else scale.reshape(shape)
        plain = codes * scale.double()
        made.expected[name] = (rotate(plain, size) if size else plain).float()
    more = {"convrot": True, "convrot_groupsize": size} if size else {}
    return mark(made, "int8_tensorwise", **more)


@pytest.mark.parametrize("size", [0, 64])
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_of_a_file(tmp_path: Path, model: str, size: int) -> None:
    made = make(model, size, None if size else ())
    planned = plan_folder(write(tmp_path / "it", made, model), model)
    assert planned.family == "comfyui-int8"
    assert {piece.scheme.group_size for piece in planned.pieces()} == {size}
    got = decode(planned)
    if not size:
        compare(got, made.expected)
    assert got.keys() == made.expected.keys()
    for name, tensor in made.expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


N, K = 48, 128


def make_layer(scheme: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    weight[:, 5] *= 30  # an outlier of a channel
    bias, x = torch.randn(N, generator=generator), torch.randn(7, 3, K, generator=generator)
    return comfyui_int8.quantize(weight, scheme, bias=bias), x


@pytest.mark.parametrize("backend", ["reference", "decode", "int8"])
@pytest.mark.parametrize("name", comfyui_int8.SCHEMES)
def test_every_kernel_gives_the_layer(name: str, backend: str) -> None:
    scheme = comfyui_int8.SCHEMES[name]
    stored, x = make_layer(scheme)
    plain = stored["weight"].double() * stored["weight_scale"].double()
    turned = x.double()
    if scheme.group_size:
        turned = rotate(x.flatten(0, 1), scheme.group_size).unflatten(0, (7, 3))
    if backend != "decode":
        step = turned.abs().amax(-1, keepdim=True) / 127
        turned = (turned / step).round() * step
    expected = functional.linear(turned, plain, stored["bias"].double()).float()
    kernel = next(k for k in kernels_of(scheme.op) if k.backend == backend)
    canonical = comfyui_int8.canonical(stored, scheme)
    bias = canonical.pop("bias")
    got = kernel.run(x, kernel.prepare(canonical, scheme, torch.float32), bias, scheme)
    assert got.shape == (7, 3, N)
    # a code on the edge of two may go either way
    assert ((got - expected).norm() / expected.norm()).item() < (
        1e-5 if backend == "decode" else 2e-3
    )


def test_inputs_are_left_alone_where_the_entry_says_so() -> None:
    entry = {"format": "int8_tensorwise", "full_precision_matrix_mult": True, "convrot": True}
    scheme = comfyui_int8.read_scheme("here", {**entry, "convrot_groupsize": 64})
    assert scheme.activation == "none"
    stored, x = make_layer(comfyui_int8.CONVROT)
    expected = functional.linear(x, comfyui_int8.dequantize(stored, scheme), stored["bias"])
    torch.testing.assert_close(comfyui_int8.reference(x, stored, scheme), expected)
    [int8] = [k for k in kernels_of(scheme.op) if k.backend == "int8"]
    assert int8.needs.activations == ("token-dynamic",)


def test_rotation_halves_the_error_of_an_outlier() -> None:
    """Why weights are rotated at all: one large channel costs the others their steps."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    weight[:, 5] *= 30
    errors = []
    for scheme in (replace(comfyui_int8.CONVROT, group_size=0), comfyui_int8.CONVROT):
        found = comfyui_int8.dequantize(comfyui_int8.quantize(weight, scheme), scheme)
        errors.append((found - weight).norm().item())
    assert errors[1] < errors[0] / 2
    with pytest.raises(UsageError, match="rotates groups of 64 columns, and a layer has 96"):
        comfyui_int8.quantize(weight[:, :96], comfyui_int8.CONVROT)


GOOD = {
    "a.weight": ("I8", (8, 64)),
    "a.weight_scale": ("F32", (8, 1)),
    "b.weight": ("BF16", (4, 8)),
}
ENTRY = {"format": "int8_tensorwise"}
ROTATED = {**ENTRY, "convrot": True}


@pytest.mark.parametrize(
    ("tensors", "entries", "text"),
    [
        ({}, {"a": ENTRY}, ""),
        ({"a.weight_scale": ("BF16", ())}, {"a": ENTRY}, ""),
        ({"a.weight_scale": ("F16", (1, 1))}, {"a": {**ENTRY, "per_row": True}}, ""),
        ({}, {"a": {**ROTATED, "convrot_groupsize": 16}}, ""),
        ({}, {"a": {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 4}}}, ""),
        ({}, {"a": ROTATED}, "64 inputs, which is not a whole number of groups of the 256 columns"),
        ({}, {"a": {**ROTATED, "convrot_groupsize": 32}}, "convrot_groupsize 32: expected a power of 4"),
        ({}, {"a": {**ROTATED, "convrot_groupsize": "64"}}, "convrot_groupsize \"64\": expected"),
        ({}, {"a": {**ENTRY, "group_size": 128}}, "has group_size 128 in its entry"),
        ({}, {"a": ENTRY, "c": ENTRY}, "lists c as int8_tensorwise, but .* have no such layer"),
        ({}, {"a": ENTRY, "b": {"format": "float8_e4m3fn"}}, "b has the format float8_e4m3fn beside"),
        ({"a.weight": ("BF16", (8, 64))}, {"a": ENTRY}, "a.weight is BF16 .*expected I8"),
        ({"a.weight_scale": None}, {"a": ENTRY}, "a.weight_scale is missing"),
        ({"a.weight_scale": ("F32", (2,))}, {"a": ENTRY}, r"a.weight_scale is F32 \[2\]"),
        ({"a.zero_point": ("F32", ())}, {"a": ENTRY}, "a.zero_point stands beside the codes of a"),
        ({"c.weight": ("I8", (8, 64))}, {"a": ENTRY}, r"c.weight \(I8 \[8, 64\]\) has no entry"),
    ],
)  # fmt: skip
def test_what_headers_show(tmp_path: Path, tensors: Any, entries: Any, text: str) -> None:
    stored = {name: spec for name, spec in {**GOOD, **tensors}.items() if spec is not None}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": entries})}
    path = write_weights(tmp_path / "w.safetensors", stored, header)
    checkpoint = open_weights(str(path), Hub(offline=True))
    assert explain_unknown(checkpoint) is None
    assert (families.detect(checkpoint) or [""])[0] == "comfyui-int8"
    if not text:
        assert set(comfyui_int8.schemes(checkpoint)) == {"a"}
        return
    with pytest.raises(CheckpointError, match=text) as caught:
        comfyui_int8.schemes(checkpoint)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", ["convrot_w4a4", "asym_w4a8_int8", "nvfp4"])
def test_other_rotated_weights_are_refused_by_name(tmp_path: Path, form: str) -> None:
    entries = {"layers": {"a": {"format": form, "convrot": True}}}
    header = {"_quantization_metadata": json.dumps(entries)}
    path = write_weights(tmp_path / "w.safetensors", {"a.weight": ("U8", (8, 32))}, header)
    with pytest.raises(CheckpointError, match=rf"weight of a was rotated .*{form} with convrot"):
        open_weights(str(path), Hub(offline=True))
