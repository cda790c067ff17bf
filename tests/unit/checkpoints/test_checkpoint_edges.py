"""Checkpoints: headers, declarations, names and references, each edge from both sides."""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weight_files import COMMIT, join_file, make_cache, make_header, write_json, write_weights

from quantmatrix.checkpoints import (
    comfyui,
    declaration,
    folders,
    foreign,
    header,
    hub,
    indexes,
    name_prefixes,
    opening,
    original_names,
    row_reader,
    scaled_fp8,
    writer,
)
from quantmatrix.checkpoints.adapters import explain_adapter
from quantmatrix.checkpoints.checkpoint import Checkpoint, RemoteFiles, find_offsets
from quantmatrix.checkpoints.dtypes import ITEM_BITS, count_bytes, from_torch, to_torch
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Hub

Shape = tuple[int, ...]


def make(stored: Mapping[str, tuple[str, Shape]], *files: str, **more: Any) -> Checkpoint:
    tensors = {n: TensorHeader(n, dtype, shape, "f.st") for n, (dtype, shape) in stored.items()}
    return Checkpoint("here", files or ("f.st",), tensors, **more)


def refusal(act: Any, *given: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        act(*given)
    return str(caught.value)


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "items", "found"),
    [
        ("F4", 6, 3), ("F4", 7, 3), ("F6_E2M3", 8, 6), ("BOOL", 5, 5), ("F16", 5, 10),
        ("F32", 5, 20), ("F64", 5, 40), ("C64", 3, 24), ("Q8_0", 96, 102), ("Q8_0", 95, 68),
        ("Q4_K", 512, 288), ("I64", 0, 0),
    ],
)  # fmt: skip
def test_bytes_of_items(dtype: str, items: int, found: int) -> None:
    assert count_bytes(dtype, items) == found


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [("F8_E4M3", torch.float8_e4m3fn), ("BF16", torch.bfloat16), ("U8", torch.uint8),
     ("I8", torch.int8), ("F64", torch.float64), ("BOOL", torch.bool)],
)  # fmt: skip
def test_spellings(spelling: str, dtype: torch.dtype) -> None:
    assert to_torch(spelling) == dtype
    assert from_torch(dtype) == spelling


# --- foreign names ---------------------------------------------------------------------------

WAN = (
    "; this is Wan2.2 in its original layout, as msmodelslim writes it: convert it with `python -m "
    "quantmatrix.tools.wan_repack` first"
)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (["WanModel"], True), (["high_noise_model"], True), (["vae", "high_noise_model"], True),
        (["WanModel", "high_noise_model"], True), ([], False), (["vae"], False),
        (["low_noise_model"], False), (["WanModels", "A", "z"], False),
    ],
)  # fmt: skip
def test_the_original_layout_of_wan(found: list[str], said: bool) -> None:
    assert foreign.explain_original(found) == (WAN if said else "")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NunchakuFluxTransformer2dModel", "FluxTransformer2DModel"),
        ("NunchakuFluxTransformer2DModelV2", "FluxTransformer2DModel"),
        ("NunchakuTransformer2DModel", "NunchakuTransformer2DModel"),
        ("XNunchakuFluxTransformer2DModel", "XNunchakuFluxTransformer2DModel"),
        ("FluxTransformer2DModel", "FluxTransformer2DModel"),
        (None, None),
        (3, 3),
    ],
)
def test_classes_of_the_engine(name: Any, found: Any) -> None:
    assert foreign.plain_class(name) == found


BLOCKS_FILE, OTHER_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"


@pytest.mark.parametrize(
    ("files", "tensors", "what"),
    [
        ((BLOCKS_FILE,), ("transformer_blocks.0.q", "transformer_blocks.1.q"), "the blocks"),
        ((OTHER_FILE,), ("x_embedder.w",), "what is outside the blocks"),
        ((BLOCKS_FILE,), ("single_transformer_blocks.0.q",), "the blocks"),
        ((BLOCKS_FILE,), ("transformer_blocks.0.q", "x_embedder.w"), ""),
        ((BLOCKS_FILE, OTHER_FILE), ("transformer_blocks.0.q",), ""),
        (("other.safetensors",), ("transformer_blocks.0.q",), ""),
        ((BLOCKS_FILE,), (), ""),
        ((), ("transformer_blocks.0.q",), ""),
    ],
)
def test_one_half_of_a_folder(files: Shape, tensors: tuple[str, ...], what: str) -> None:
    paths = tuple(f"/m/{name}" for name in files)
    stored = {n: TensorHeader(n, "F32", (2,), "f.st") for n in tensors}
    checkpoint = Checkpoint("here", paths, stored)
    if not what:
        foreign.check_halves(checkpoint)
        return
    other = OTHER_FILE if BLOCKS_FILE in files else BLOCKS_FILE
    assert refusal(foreign.check_halves, checkpoint) == (
        f"{paths[0]}: this is one of the two files of an older SVDQuant folder, with {what} only: "
        f"expected {other} beside it. Name the folder that holds both"
    )


# --- headers ---------------------------------------------------------------------------------


class Counted(io.BytesIO):
    """A file that notes where and how much is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def read(self, size: int | None = -1, /) -> bytes:
        before = self.tell()
        found = super().read(size)
        self.reads.append((before, len(found)))
        return found


@pytest.mark.parametrize(
    ("gap", "together"), [(0, True), (1, True), (2**20, True), (2**20 + 1, False), (2**22, False)]
)
def test_near_tensors_are_read_together(gap: int, together: bool) -> None:
    tensors = {"first": ("U8", (3,)), "between": ("U8", (gap,)), "second": ("U8", (5,))}
    data = b"abc" + bytes(gap) + b"defgh"
    file = Counted(join_file(make_header(tensors), data))
    start = len(file.getvalue()) - len(data)
    assert header.read_contents(file, ["second", "first"]) == {"first": b"abc", "second": b"defgh"}
    spans = [(start, gap + 8)] if together else [(start, 3), (start + gap + 3, 5)]
    assert file.reads == [(0, 8), (8, start - 8), *spans]


def test_overlong_lengths_are_not_read() -> None:
    file = Counted(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(KeyError):
        header.read_contents(file, ["a"])
    assert file.reads == [(0, 8), (8, 2)]


def entry(dtype: str, shape: Any, *offsets: Any) -> tuple[str, tuple[Any, ...], tuple[Any, ...]]:
    return dtype, tuple(shape), offsets


@pytest.mark.parametrize(
    ("ranges", "data_bytes", "text"),
    [
        ({"a": entry("F32", [2], 0, 8)}, 8, ""),
        ({"a": entry("F32", [2], 0, 8)}, None, ""),
        ({"b": entry("U8", [3], 8, 11), "a": entry("F32", [2], 0, 8)}, 11, ""),
        ({"a": entry("U8", [1] * 64, 0, 1)}, 1, ""),
        ({"a": entry("U8", [1] * 65, 0, 1)}, 1,
         "f: tensor a has 65 dimensions, expected at most 64; the header is damaged"),
        ({"a": entry("F32", [2], 0, 8)}, 9,
         "f: the header describes 8 bytes of tensors, the file holds 9: it is truncated or damaged; "
         "download it again"),
        ({"a": entry("F32", [2], 0, 8)}, 7,
         "f: the header describes 8 bytes of tensors, the file holds 7: it is truncated or damaged; "
         "download it again"),
        ({"a": entry("F32", [2], 0, 7)}, 7,
         "f: tensor a (F32 [2]) needs 8 bytes, the header gives it 7; the header is damaged"),
        ({"a": entry("F32", [2], 3, 12)}, 12,
         "f: tensor a (F32 [2]) needs 8 bytes, the header gives it 9; the header is damaged"),
        ({"a": entry("F4", [3], 0, 1)}, 1,
         "f: tensor a (F4 [3]) needs 1.5 bytes, the header gives it 1; the header is damaged"),
        ({"a": entry("U8", [2**60, 2**60], 0, 1)}, 1,
         f"f: tensor a (U8 [{2**60}, {2**60}]) needs more than 2**97 bytes, the header gives it 1; the "
         "header is damaged"),
        ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [3], 4, 7)}, 7,
         "f: tensor a and tensor b leave a gap: it begins at byte 4, expected 3; the header is damaged"),
        ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [3], 2, 5)}, 5,
         "f: tensor a and tensor b overlap: it begins at byte 2, expected 3; the header is damaged"),
        ({"a": entry("U8", [3], 1, 4)}, 4,
         "f: the start of the data and tensor a leave a gap: it begins at byte 1, expected 0; the "
         "header is damaged"),
        ({"a": entry("U8", [-1], 0, 1)}, 1,
         "f: tensor a has shape [-1] and data_offsets [0, 1]: expected whole numbers, two of them as "
         "offsets; the header is damaged"),
        ({"a": entry("U8", [True], 0, 1)}, 1,
         "f: tensor a has shape [true] and data_offsets [0, 1]: expected whole numbers, two of them as "
         "offsets; the header is damaged"),
        ({"a": entry("U8", [1], 0)}, 1,
         "f: tensor a has shape [1] and data_offsets [0]: expected whole numbers, two of them as "
         "offsets; the header is damaged"),
        ({"a": entry("U8", [0], 0, 0), "b": entry("U8", [], 0, 1)}, 1, ""),
    ],
)  # fmt: skip
def test_ranges(ranges: Any, data_bytes: int | None, text: str) -> None:
    if text:
        assert refusal(header.check_ranges, ranges, "f", data_bytes) == text
    else:
        found = header.check_ranges(ranges, "f", data_bytes)
        assert {n: (t.name, t.dtype, t.shape, t.file) for n, t in found.items()} == {
            n: (n, dtype, shape, "f") for n, (dtype, shape, _) in ranges.items()
        }


@pytest.mark.parametrize(
    ("bits", "found"),
    [(12, "1.5"), (8, "1"), (2**99, "7.92282e+28"), (2**100, "more than 2**97"),
     (2**100 - 8, "1.58456e+29")],
)  # fmt: skip
def test_bytes_in_words(bits: int, found: str) -> None:
    assert header._count_bytes(bits) == found


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"a": {"dtype": "F32"}}, "'shape', 'data_offsets'"),
        ({"a": {"shape": [1], "data_offsets": [0, 1]}}, "'dtype'"),
        ({"a": 3}, "'dtype', 'shape', 'data_offsets'"),
    ],
)
def test_entries_that_are_no_tensors(entries: Any, what: str) -> None:
    said = refusal(header.parse_header, json.dumps(entries).encode(), "f")
    shown = json.dumps(entries["a"])
    assert said == (
        f"f: the safetensors header is not a valid JSON table of tensors (a is {shown}: it has no {what})"
        ": the file is damaged or of another format; download it again"
    )


def test_entries_of_wrong_types() -> None:
    text = json.dumps({"a": {"dtype": 1, "shape": [1], "data_offsets": [0, 1]}}).encode()
    assert ": it is of wrong types): the file is damaged" in refusal(header.parse_header, text, "f")


def test_metadata_that_is_no_text() -> None:
    text = json.dumps({"__metadata__": {"a": 3, "b": "x"}}).encode()
    assert header.parse_header(text, "f") == ({}, {"a": "3", "b": "x"})
    assert header.parse_header(b'{"__metadata__": null}', "f", data_bytes=0) == ({}, {})
    assert "(__metadata__ is [1])" in refusal(header.parse_header, b'{"__metadata__": [1]}', "f")
    assert "(it is [1])" in refusal(header.parse_header, b"[1]", "f")


@pytest.mark.parametrize("size", [0, 7, 8, 9, 10])
def test_short_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((struct.pack("<Q", 2) + b"{}")[:size])
    if size == 10:
        assert header.read_header(path) == ({}, {})
    elif size < 8:
        assert refusal(header.read_header, path) == (
            f"{path}: {size} bytes are too few for a safetensors file: download it again"
        )
    else:
        assert refusal(header.read_header, path) == (
            f"{path}: no complete safetensors header: it claims 2 bytes in a file of {size} (the limit "
            "is 33554432); the file is truncated or of another format: download it again"
        )


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    assert refusal(header.read_header, path) == (
        f"{path}: expected a safetensors file, this is a pipe or a device"
    )


def test_errors_of_the_system_without_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_weights(tmp_path / "x.safetensors")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("odd")

    monkeypatch.setattr(Path, "open", fail)
    assert refusal(header.read_header, path) == f"{path}: cannot be read: odd"


# --- declarations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "what"),
    [
        ("config", "[1]", "a JSON list"),
        ("quantization_config", '"x"', "a JSON str"),
        ("_quantization_metadata", "3", "a JSON int"),
        ("config", "", ""),
        ("config", " null ", ""),
        ("config", "{}", ""),
        ("configs", "[1]", ""),
        ("aconfig", "[1]", ""),
    ],
)
def test_values_of_headers(key: str, text: str, what: str) -> None:
    if not what:
        declaration.check_json(key, text, "f")
        return
    assert refusal(declaration.check_json, key, text, "f") == (
        f"f: {key} in the header is {text!r}, {what}: expected a JSON object. What it should declare is "
        "unknown: correct it, or write the file again without it"
    )


def test_two_descriptions() -> None:
    first = {"a": 1, "deep": {"x": 1, "list": ["p", "q"]}, "only": 3}
    second = {"a": 1, "deep": {"list": ["q", "p"], "y": 2}, "more": 4}
    assert declaration.merge_blocks(first, "A", second, "B") == {
        "a": 1,
        "deep": {"x": 1, "list": ["p", "q"], "y": 2},
        "only": 3,
        "more": 4,
    }
    for change, path, mine, theirs in (
        ({"a": 2}, "a", "1", "2"),
        ({"a": 0}, "a", "1", "0"),
        ({"deep": {"x": 5}}, "deep.x", "1", "5"),
        ({"deep": {"list": ["q"]}}, "deep.list", '["p", "q"]', '["q"]'),
        ({"deep": 1}, "deep", '{"x": 1, "list": ["p", "q"]}', "1"),
    ):
        assert refusal(declaration.merge_blocks, first, "A", change, "B") == (
            f"A and B disagree about {path} of the quantization: {mine} and {theirs}; one of the two is "
            "stale, correct or remove it"
        )


def test_metadata_of_several_files() -> None:
    def one(name: str, file: str) -> dict[str, TensorHeader]:
        return {name: TensorHeader(name, "F32", (2,), file)}

    key = "quantization_config"
    headers = {
        "a": (one("x", "a"), {key: '{"m": 1}', "format": "pt", "note": "A"}),
        "b": (one("y", "b"), {key: '{"n": 2}', "format": "np", "more": "B"}),
    }
    tensors, metadata = declaration.merge_headers(headers)
    assert list(tensors) == ["x", "y"]
    assert json.loads(metadata.pop(key)) == {"m": 1, "n": 2}
    assert metadata == {"format": "pt", "note": "A", "more": "B"}
    headers["c"] = ({}, {key: '{"n": 3}'})
    assert refusal(declaration.merge_headers, headers).startswith(
        f"a: {key} and c: {key} disagree about n of the quantization: 2 and 3;"
    )
    twice = {"a": (one("x", "a"), {}), "b": (one("x", "b"), {})}
    assert refusal(declaration.merge_headers, twice) == (
        "tensor x is in a and in b: these are two checkpoints, not shards of one; name one file"
    )


@pytest.mark.parametrize(
    ("config", "metadata", "nested", "found"),
    [
        ({"quantization_config": {"m": 1}}, {}, None, ({"m": 1}, "c.json: quantization_config")),
        ({"text_config": {"quantization_config": {"m": 2}}}, {}, None,
         ({"m": 2}, "c.json: text_config.quantization_config")),
        ({"compression_config": {"m": 3}}, {}, None, ({"m": 3}, "c.json: compression_config")),
        ({"compression_config": {"m": 3}, "quantization_config": {"m": 1}}, {}, None,
         ({"m": 1}, "c.json: quantization_config")),
        ({"text_config": 3}, {}, None, (None, None)),
        ({}, {"quantization_config": '{"m": 4}'}, None, ({"m": 4}, "f0: quantization_config")),
        ({"quantization_config": {"m": 1}}, {"quantization_config": '{"n": 4}'}, None,
         ({"m": 1, "n": 4}, "c.json: quantization_config")),
        ({}, {"_quantization_metadata": '{"layers": {}}', "quantization_config": '{"n": 4}'}, None,
         ({"layers": {}, "n": 4}, "f0: _quantization_metadata")),
        ({}, {"_quantization_metadata": '{"method": "x"}', "quantization_config": '{"n": 4}'}, None,
         ({"method": "x"}, "f0: _quantization_metadata")),
        ({}, {"_quantization_metadata": '{"layers": {}}'}, None,
         ({"layers": {}}, "f0: _quantization_metadata")),
        ({}, {}, {"quant_algo": "FP8"},
         ({"quant_method": "modelopt", "quant_algo": "FP8"}, "n.json")),
        ({}, {}, {"quantization": {"quant_algo": "FP8", "exclude_modules": ["a"]}},
         ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["a"]}, "n.json")),
        ({}, {}, {"quantization": {"quant_algo": None}}, (None, None)),
        ({}, {}, {"quantization": 3}, (None, None)),
        ({"quantization_config": {"m": 1}}, {}, {"quant_algo": "FP8"},
         ({"m": 1}, "c.json: quantization_config")),
        ({}, {}, None, (None, None)),
    ],
)  # fmt: skip
def test_where_a_quantization_is_described(
    config: Any, metadata: Any, nested: Any, found: Any
) -> None:
    beside = None if nested is None else (nested, "n.json")
    assert declaration.find_block(config, "c.json", metadata, ("f0", "f1"), beside) == found


def test_descriptions_that_are_no_objects() -> None:
    for value, shown in (("x", '"x"'), ([1], "[1]"), (3, "3")):
        config = {"quantization_config": value}
        assert refusal(declaration.find_config_block, config, "c.json") == (
            f"c.json: quantization_config is {shown}: expected a JSON object"
        )
    for value in (None, {}, [], 0, ""):
        assert declaration.find_config_block({"quantization_config": value}, "c.json") == ({}, "")
    assert declaration.find_block(None, None, {"quantization_config": '{"a": 1}'}, ()) == (
        {"a": 1},
        "header: quantization_config",
    )


@pytest.mark.parametrize(
    ("text", "value"), [("Infinity", float("inf")), ("-Infinity", -float("inf"))]
)
def test_numbers_without_an_end(tmp_path: Path, text: str, value: float) -> None:
    path = tmp_path / "x.json"
    path.write_text(f'{{"a": {text}}}')
    assert declaration.read_json(path, endless=True) == {"a": value}
    assert refusal(declaration.read_json, path).startswith(
        f"{path}: not valid JSON: {text} is not a"
    )
    path.write_text("[]")
    assert refusal(declaration.read_json, path) == f"{path}: expected a JSON object, found list"


# --- ComfyUI ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "size", "taken"),
    [
        ("a.comfy_quant", "U8", 4096, True), ("a.comfy_quant", "U8", 4097, False),
        ("a.comfy_quant", "U8", 0, True), ("a.comfy_quant", "I8", 9, False),
        ("a.comfy_quant", "A", 9, False), ("a.comfy_quants", "U8", 9, False),
        ("b.comfy_quant", "U8", 9, False), (".comfy_quant", "U8", 9, True),
    ],
)  # fmt: skip
def test_markers(name: str, dtype: str, size: int, taken: bool) -> None:
    stored = {name: SimpleNamespace(dtype=dtype, nbytes=size, file="f")}
    found = comfyui.find_markers(stored, {"b": 1})  # type: ignore[arg-type]
    assert found == ({"f": [name]} if taken else {})


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"quant_method": "x"}, True), ({"quant_algo": "x"}, True), ({"method": "x"}, True),
        ({"quantization": {"quant_algo": "x"}}, True), ({"quantization": "method"}, False),
        ({"layers": {}}, False), ({}, False),
    ],
)  # fmt: skip
def test_blocks_with_a_method(block: Any, found: bool) -> None:
    assert comfyui.has_method(block) is found


@pytest.mark.parametrize(
    ("rotated", "form", "refused"),
    [
        ({"convrot": True}, "nvfp4", True), ({"params": {"convrot": True}}, "nvfp4", True),
        ({"convrot": True}, "a", True), ({"convrot": True}, "int8_tensorwise", False),
        ({"convrot": False}, "nvfp4", False), ({"params": "convrot"}, "nvfp4", False), ({}, "x", False),
    ],
)  # fmt: skip
def test_rotated_entries(rotated: Any, form: str, refused: bool) -> None:
    noted = {"format": form, **rotated, "orig_dtype": "x", "orig_shape": [1]}
    if not refused:
        assert comfyui.read_entry("a", noted, "s") == {"format": form, **rotated}
        return
    assert refusal(comfyui.read_entry, "a", noted, "s") == (
        f"s: the weight of a was rotated before it was quantized (ConvRot, {form} with convrot), which no "
        "quant family takes: without the same rotation of its inputs a layer gives other numbers. "
        "Quantize without it, or name a file in float8_e4m3fn, int8_tensorwise or nvfp4, or in full "
        "precision"
    )


def test_entries_of_several_files() -> None:
    stored = {
        "a.comfy_quant": TensorHeader("a.comfy_quant", "U8", (4,), "one"),
        "b.comfy_quant": TensorHeader("b.comfy_quant", "U8", (4,), "two"),
        "c.comfy_quant": TensorHeader("c.comfy_quant", "U8", (4,), "two"),
    }

    def read(file: str, names: list[str]) -> dict[str, bytes]:
        return {n: b"no json" if n[0] == "c" else f'{{"format": "{file}"}}'.encode() for n in names}

    expected = {"a": {"format": "one"}, "b": {"format": "two"}}
    assert comfyui.complete(None, None, stored, read) == (
        {"format_version": "1.0", "layers": expected},
        "one: tensors *.comfy_quant",
    )
    listed = {"format_version": "1.1", "layers": {"a": "x"}}
    assert comfyui.complete(listed, "h", stored, read) == (
        {"format_version": "1.1", "layers": {"a": "x", "b": {"format": "two"}}},
        "h",
    )
    assert comfyui.complete({"method": "m"}, "h", stored, read) == ({"method": "m"}, "h")
    assert comfyui.complete({"note": 1}, "h", {}, read) == ({"note": 1}, "h")
    assert comfyui.complete(None, "h", {}, read) == (None, None)


# --- ComfyUI's first form --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "content", "value"),
    [
        ("F32", struct.pack("<f", 1.5), 1.5),
        ("F16", struct.pack("<e", -2.5), -2.5),
        ("BF16", struct.pack("<f", 3.0)[2:], 3.0),
        ("BF16", b"\x80\x3f", 1.0),
    ],
)
def test_single_numbers(dtype: str, content: bytes, value: float) -> None:
    assert scaled_fp8.unpack(dtype, content) == value


@pytest.mark.parametrize(
    ("dtype", "shape", "value", "measured"),
    [
        ("F32", (), 1.0, False), ("F32", (1,), 1.0, False), ("F32", (2,), 1.0, True),
        ("F32", (1, 1), 1.0, True), ("F32", (), 0.5, True), ("F32", (), 2.0, True),
        ("F16", (), 1.0, False), ("BF16", (), 1.0, False), ("BF16", (), 1.5, True),
        ("F64", (), 1.0, True),
    ],
)  # fmt: skip
def test_scales_of_inputs(dtype: str, shape: Shape, value: float, measured: bool) -> None:
    packed = {"F32": struct.pack("<f", value), "F16": struct.pack("<e", value),
              "BF16": struct.pack("<f", value)[2:], "F64": struct.pack("<d", value)}  # fmt: skip
    stored = {
        "a.weight": TensorHeader("a.weight", "F8_E4M3", (2, 3), "f"),
        "a.scale_weight": TensorHeader("a.scale_weight", "F32", (), "f"),
        "a.scale_input": TensorHeader("a.scale_input", dtype, shape, "f"),
    }
    found, layers, where = scaled_fp8.rename(
        stored, lambda _, names: dict.fromkeys(names, packed[dtype])
    )
    assert ("a.input_scale" in found) is measured
    assert layers["a"] == {
        "format": "float8_e4m3fn",
        **({} if measured else {"full_precision_matrix_mult": True}),
    }
    assert where == "f: tensor a.scale_weight"
    assert found["a.weight_scale"].on_disk == "a.scale_weight"


@pytest.mark.parametrize(
    ("dtype", "shape", "form", "whole"),
    [
        ("F8_E4M3", (2,), "float8_e4m3fn", True), ("F8_E5M2", (0,), "float8_e5m2", False),
        ("F32", (2,), "float8_e4m3fn", True), ("F8_E4M3", (1,), "float8_e4m3fn", False),
        ("F8_E4M3", (3,), "float8_e4m3fn", False), ("F8_E4M3", (0,), "float8_e4m3fn", False),
    ],
)  # fmt: skip
def test_the_mark_of_a_file(dtype: str, shape: Shape, form: str, whole: bool) -> None:
    stored = {
        "scaled_fp8": TensorHeader("scaled_fp8", dtype, shape, "f"),
        "a.weight": TensorHeader("a.weight", "F8_E4M3", (2, 3), "f"),
        "a.scale_input": TensorHeader("a.scale_input", "F32", (), "f"),
        "n.weight": TensorHeader("n.weight", "F8_E4M3", (3,), "f"),
        "p.weight": TensorHeader("p.weight", "BF16", (2, 3), "f"),
        "q.weight": TensorHeader("q.weight", "BF16", (2, 3), "f"),
        "q.scale_weight": TensorHeader("q.scale_weight", "F32", (), "f"),
    }
    half = struct.pack("<f", 0.5)
    found, layers, where = scaled_fp8.rename(stored, lambda _, names: dict.fromkeys(names, half))
    entry = {"format": form}
    left = {**entry, "full_precision_matrix_mult": True}
    assert layers == {"a": left if whole else entry, "q": left}
    assert "scaled_fp8" not in found
    assert where == "f: tensor scaled_fp8"


# --- prefixes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.a", "model.b"], "model."), (["model.a", "b"], ""), ([], ""),
        (["module._orig_mod.a"], "module._orig_mod."),
        (["model.diffusion_model.a", "model.diffusion_model.b"], "model.diffusion_model."),
        (["model.diffusion_model.a", "model.b"], "model."), (["modela"], ""),
    ],
)  # fmt: skip
def test_prefixes_of_all_names(names: list[str], prefix: str) -> None:
    assert name_prefixes.find_prefix(names) == prefix


def test_other_parts_are_counted() -> None:
    names = ["vae.a", "text_encoders.x", "vae.b", "model.diffusion_model.w", "scaled_fp8", "vae.c"]
    stored = {n: TensorHeader(n, "F32", (2,), "f") for n in names}
    found, prefix, aside = name_prefixes.strip_tensors(stored)
    assert {n: t.on_disk for n, t in found.items()} == {
        "w": "model.diffusion_model.w",
        "scaled_fp8": "scaled_fp8",
    }
    assert prefix == "model.diffusion_model."
    assert list(aside.items()) == [("text_encoders.", 1), ("vae.", 3)]
    alone = {n: stored[n] for n in ("vae.a", "vae.b")}
    assert name_prefixes.strip_tensors(alone) == (alone, "", {})
    bare = {n: TensorHeader(n, "F32", (2,), "f") for n in ("w", "vae.a")}
    assert name_prefixes.strip_tensors(bare)[1:] == ("", {"vae.": 1})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("p.q.known", "p.q."),
        ("known", ""),
        ("p.known", "p."),
        ("p.known.x", ""),
        ("p.q", ""),
        ("", ""),
    ],
)
def test_levels_before_a_known_name(name: str, found: str) -> None:
    names = [name, "other.known"] if name else []
    assert name_prefixes.find_common_prefix(names, lambda n: n == "known") == found


def test_blocks_without_prefixes() -> None:
    block = {
        "layers": {"model.a": 1},
        "quantized_layers": {"model.a": 1, "a": 2},
        "ignore": ["model.b", 3],
        "ignored_layers": ["transformer.model.c"],
        "other": ["model.d"],
        "quantization": {"exclude_modules": ["module.e"], "modules_to_not_convert": "model.f"},
    }
    assert name_prefixes.strip_block(block) == {
        "layers": {"a": 1},
        "quantized_layers": {"model.a": 1, "a": 2},
        "ignore": ["b", 3],
        "ignored_layers": ["c"],
        "other": ["model.d"],
        "quantization": {"exclude_modules": ["e"], "modules_to_not_convert": "model.f"},
    }
    assert name_prefixes.strip_block(None) is None
    assert name_prefixes.list_foreign(["model.a", "b"]) == (
        "model.diffusion_model.", "diffusion_model.", "transformer.", "base_model.model.", "module.",
        "_orig_mod.",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("class_name", "said"),
    [("FluxTransformer2DModel", False), ("A", True), ("Z", True), ("", True)],
)
def test_original_names_of_another_model(class_name: str, said: bool) -> None:
    names = ["x", "double_blocks.3.img_mod.lin.weight"]
    text = (
        "These are FLUX.1's original names: the file belongs to a FluxTransformer2DModel, not to a "
        f"{class_name}; name a base model of that class"
    )
    assert original_names.explain_original(names, class_name) == (text if said else None)
    assert original_names.is_original(names, class_name) is not said
    assert original_names.explain_original(["x"], class_name) is None
    assert not original_names.is_original(["x"], class_name)


# --- adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.lora_A.weight", "a.alpha"],
         "f.st: tensor a.lora_A.weight and no weights of a model: this is a LoRA, which adds to a "
         "model. Name the model's own weights here"),
        (["a.weight", "a.lora_down"],
         "f.st: tensor a.lora_down beside the weights of a model is a factor of a LoRA, which is not "
         "applied: leaving it out would give another model without an error. Name weights without it, "
         "or merge it first (in diffusers fuse_lora, then save_pretrained)"),
        (["a.lora_down", "a.qweight", "a.wscales"], None),
        (["a.qweight", "a.wscales", "a.x", "b.lora_down"], None),
        (["a.weight", "a.alpha"], None),
        (["a.alpha"], None),
    ],
)  # fmt: skip
def test_factors(names: list[str], text: str | None) -> None:
    assert explain_adapter(make(dict.fromkeys(names, ("F32", (2, 3))))) == text


def test_factors_beside_half_of_a_layer() -> None:
    said = explain_adapter(make(dict.fromkeys(("a.lora_down", "a.qweight"), ("F32", (2, 3)))))
    assert said is not None
    assert said.startswith("f.st: tensor a.lora_down beside the weights of a model")


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (slice(3, 9), [(3, 9)]), ([5], [(5, 6)]), ([5, 6, 7], [(5, 8)]), ([5, 7], [(5, 6), (7, 8)]),
        ([6, 5], [(6, 7), (5, 6)]), ([5, 5], [(5, 6), (5, 6)]), ([1, 2, 4, 5, 6, 0], [(1, 3), (4, 7), (0, 1)]),
        ([], []),
    ],
)  # fmt: skip
def test_runs_of_rows(rows: Any, found: list[tuple[int, int]]) -> None:
    given = rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.int64)
    assert row_reader.find_runs(given) == found


def test_rows_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    asked: list[tuple[int, int, int]] = []
    read = os.pread

    def note(handle: int, count: int, start: int) -> bytes:
        asked.append((count, start, 0))
        return read(handle, min(count, 11), start)

    tensors = {"first": ("U8", (5,)), "it": ("F32", (6, 2, 3))}
    data = bytes(5) + struct.pack("<36f", *range(36))
    path.write_bytes(join_file(make_header(tensors), data))
    found, _ = header.read_header(path)
    monkeypatch.setattr(os, "pread", note)
    with row_reader.RowReader(Checkpoint("x", (str(path),), found)) as reader:
        got = reader.read("it", torch.tensor([4, 1, 2]))
        assert got.tolist() == [
            torch.arange(6.0 * row, 6.0 * row + 6).reshape(2, 3).tolist() for row in (4, 1, 2)
        ]
        start = path.stat().st_size - 144
        assert asked == [
            (24, start + 96, 0), (13, start + 107, 0), (2, start + 118, 0), (48, start + 24, 0),
            (37, start + 35, 0), (26, start + 46, 0), (15, start + 57, 0), (4, start + 68, 0),
        ]  # fmt: skip
        with pytest.raises(OSError, match="the file ends at byte") as caught:
            reader.read("it", slice(5, 7))
    size = path.stat().st_size
    assert str(caught.value) == f"the file ends at byte {size}, expected 48 from {size - 24}"


def test_offsets_of_tensors(tmp_path: Path) -> None:
    header_ = make_header({"a": ("F32", (3,)), "b": ("U8", (2,))}, {"k": "v"})
    data = join_file(header_, bytes(14))
    start = len(data) - 14
    assert find_offsets(io.BytesIO(data)) == {"a": start, "b": start + 12}


# --- writing ---------------------------------------------------------------------------------


def item(name: str, dtype: str, tensor: torch.Tensor) -> writer.Item:
    return writer.Item(name, dtype, tuple(tensor.shape), lambda: tensor)


def test_a_file_that_is_written(tmp_path: Path) -> None:
    """Wide items first, then by name; the header is a multiple of 8 bytes."""
    path = tmp_path / "x.safetensors"
    items = [
        item("b", "U8", torch.tensor([1, 2, 3], dtype=torch.uint8)),
        item("z", "F32", torch.tensor([1.5])),
        item("a", "U8", torch.tensor([4], dtype=torch.uint8)),
        item("h", "F16", torch.tensor([[2.0, 4.0]]).half()),
    ]
    size = writer.write_file(path, items, {"k": "ü"})
    data = path.read_bytes()
    assert size == len(data) == path.stat().st_size
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    text = data[8 : 8 + length].decode()
    assert text.rstrip(" ") == (
        '{"__metadata__":{"k":"ü"},'
        '"z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"h":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]},'
        '"a":{"dtype":"U8","shape":[1],"data_offsets":[8,9]},'
        '"b":{"dtype":"U8","shape":[3],"data_offsets":[9,12]}}'
    )
    assert len(text.encode()) - len(text.encode().rstrip(b" ")) < 8
    assert data[8 + length :] == struct.pack("<fee", 1.5, 2, 4) + bytes([4, 1, 2, 3])
    assert writer.write_file(path, []) == path.stat().st_size == 16
    assert path.read_bytes()[8:] == b"{}      "


def test_items_that_are_not_as_announced(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = item("a", "U8", torch.tensor([1], dtype=torch.uint8))
    assert refusal(writer.write_file, path, [one, one]) == (
        f"{path}: tensor a would be written twice"
    )
    for found, said in (
        (torch.zeros(3), "torch.float32 [3]"),
        (torch.zeros(1, 1), "torch.float32 [1, 1]"),
    ):
        wrong = writer.Item("a", "F32", (2,), lambda found=found: found)  # type: ignore[misc]
        assert refusal(writer.write_file, path, [wrong]) == (
            f"{path}: tensor a was announced as F32 [2], but is {said}"
        )
    same = writer.Item("a", "F32", (2,), lambda: torch.tensor([1, 2], dtype=torch.int32))
    writer.write_file(path, [same])


# --- references ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "revision", "found"),
    [
        ("o/r", None, ("o/r", "", None)),
        ("o/r/", "v", ("o/r", "", "v")),
        ("o/r/a/b.st", "v", ("o/r", "a/b.st", "v")),
        ("https://huggingface.co/o/r", "v", ("o/r", "", "v")),
        ("http://hf.co/o/r/tree/v2", None, ("o/r", "", "v2")),
        ("https://www.huggingface.co/o/r/blob/v2/a%20b/c.st", "v2", ("o/r", "a b/c.st", "v2")),
        ("https://huggingface.co/o/r/resolve/refs%2Fpr%2F1/c", None, ("o/r", "c", "refs/pr/1")),
    ],
)
def test_references_to_the_hub(reference: str, revision: str | None, found: Any) -> None:
    assert folders.parse_hub_reference(reference, Hub(revision=revision)) == found


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("ftp://huggingface.co/o/r",
         "not an address of the hub; known hosts: huggingface.co, www.huggingface.co, hf.co. Download "
         "the files and name the folder"),
        ("https://example.org/o/r",
         "not an address of the hub; known hosts: huggingface.co, www.huggingface.co, hf.co. Download "
         "the files and name the folder"),
        ("https://hf.co/datasets/o/r", "this names a dataset, expected a model"),
        ("https://hf.co/spaces/o/r", "this names a space, expected a model"),
        ("https://hf.co/o", "expected an owner and a name in the address"),
        ("https://hf.co/", "expected an owner and a name in the address"),
        ("https://hf.co/o/r/raw/main/x", "expected /tree/, /blob/ or /resolve/ and a revision after o/r"),
        ("https://hf.co/o/r/tree", "expected /tree/, /blob/ or /resolve/ and a revision after o/r"),
        ("https://hf.co/o/r/tree/v2",
         "the address names revision v2, --revision says v1: leave one of them out"),
        ("https://hf.co/o!/r",
         "no such file or folder here, and o!/r is not a hub id, which has the form owner/repo"),
        ("o!/r", "no such file or folder here, and o!/r is not a hub id, which has the form owner/repo"),
    ],
)  # fmt: skip
def test_references_that_are_none(reference: str, text: str) -> None:
    said = refusal(folders.parse_hub_reference, reference, Hub(revision="v1"))
    assert said == f"{reference}: {text}"


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("", "an empty path: name a file, a folder or a hub id"),
        (" ", "an empty path: name a file, a folder or a hub id"),
        ("/nowhere/x", "/nowhere/x: no such file or folder"),
        ("./x.st", "./x.st: no such file or folder"),
        ("../x/y.st", "../x/y.st: no such file or folder"),
        ("x.st", "x.st: no such file or folder here, and not a hub id, which has the form owner/repo"),
        ("x.st/", "x.st/: no such file or folder here, and not a hub id, which has the form owner/repo"),
        ("/path/to/x",
         "/path/to/x: no such file or folder. It is a placeholder of the guide: name a path of yours, or "
         "add --tiny, which makes a stand-in for it"),
        ("a/b", ""),
    ],
)  # fmt: skip
def test_paths_that_are_not_there(
    reference: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    if text:
        assert refusal(folders.find_local, reference, Hub()) == text
    else:
        assert folders.find_local(reference, Hub()) is None


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("o/r:Q4_K_M", ("o/r", "Q4_K_M")), ("o/r:q8", ("o/r", "q8")), ("o/r", ("o/r", "")),
        ("C:\\x", ("C:\\x", "")), ("o/r:4bit", ("o/r:4bit", "")), ("https://hf.co/o/r", ("https://hf.co/o/r", "")),
        ("o/r::Q8", ("o/r::Q8", "")), ("o/:Q8", ("o/:Q8", "")),
    ],
)  # fmt: skip
def test_quantizations_of_references(reference: str, found: tuple[str, str]) -> None:
    assert folders.split_quantization(reference) == found


@pytest.mark.parametrize("inner", ["x", "+x", "a/+x", "..x"])
def test_files_in_folders_of_a_repository(
    inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file at the top, and in folders whose names sort before the point."""
    name = f"{inner}/w.safetensors"
    folder = hub.HubFolder("o/r", COMMIT, (name, "top.safetensors"), str(tmp_path))
    monkeypatch.setattr(folders, "open_repository", lambda repo, hub: folder)
    found, file = folders.look_up(f"o/r/{name}", Hub())
    assert (str(found), file) == (f"o/r/{inner}", "w.safetensors")
    found, file = folders.look_up("o/r/top.safetensors", Hub())
    assert (str(found), file) == ("o/r", "top.safetensors")
    found, file = folders.look_up(f"o/r/{inner}", Hub())
    assert (str(found), file) == (f"o/r/{inner}", "")
    assert refusal(folders.look_up, "o/r/z", Hub()) == (
        "o/r/z: no such path on this machine, and o/r has no file or folder z; o/r has "
        f"{', '.join(sorted({inner.split('/')[0], 'top.safetensors'}))}"
    )


def test_a_repository_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.HubFolder("o/r", COMMIT, (), str(tmp_path))
    monkeypatch.setattr(folders, "open_repository", lambda repo, hub: folder)
    assert refusal(folders.look_up, "o/r/z", Hub()) == (
        "o/r/z: no such path on this machine, and o/r has no file or folder z; o/r has nothing"
    )


# --- hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "unreachable"),
    [
        (400, False), (401, True), (402, False), (403, True), (404, False), (407, False), (408, True),
        (409, False), (428, False), (429, True), (430, False), (499, False), (500, True), (501, True),
        (599, True),
    ],
)  # fmt: skip
def test_answers_of_the_hub(status: int, unreachable: bool) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError.__new__(HfHubHTTPError, "no")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    assert hub.is_unreachable(error) is unreachable


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("refused\nmore", "OSError: refused"),
        ("\n \n  late\n", "OSError: late"),
        ("", "OSError: OSError"),
    ],
)
def test_errors_of_the_client_in_words(text: str, why: str) -> None:
    def fail() -> None:
        with hub.translate_hub_errors("o/r: what", "o/r"):
            raise OSError(text)

    assert refusal(fail) == (
        f"o/r: what ({why}). Check the name and your connection; for a gated repository accept its "
        "licence on https://huggingface.co/o/r and run `hf auth login`; or use --tiny for a stand-in"
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [(f"{COMMIT}\n", COMMIT), ("", None), ("\n", None), ("tiny-1.x\n", "tiny-1.x"), ("../x", "!"),
     ("x" * 300, "x" * 256), (".x", "!")],
)  # fmt: skip
def test_refs_of_a_cache(tmp_path: Path, content: str, found: str | None) -> None:
    folder = make_cache(tmp_path, "o/r").parents[1]
    (folder / "refs" / "main").write_text(content)
    if found == "!":
        assert refusal(hub.read_ref, folder, "main") == (
            f"{folder}/refs/main: {content} is not a commit; remove the file"
        )
    else:
        assert hub.read_ref(folder, "main") == found
    assert hub.read_ref(folder, "other") is None
    assert hub.read_ref(folder, "../refs/main") is None


@pytest.mark.parametrize(
    ("revision", "kept"),
    [("main", True), ("refs/pr/1", True), (COMMIT, False), ("f" * 39, True), ("F" * 40, True)],
)
def test_which_revisions_are_noted(tmp_path: Path, revision: str, kept: bool) -> None:
    folder = hub.HubFolder("o/r", COMMIT, (), str(tmp_path), revision=revision)
    ref = tmp_path / "models--o--r" / "refs" / revision
    for content in (COMMIT, "other"):
        folder.keep_ref()
        assert (ref.read_text() if ref.exists() else None) == (content if kept else None)
        if kept:
            ref.write_text("other")


def test_folders_of_a_repository(tmp_path: Path) -> None:
    names = ("b.st", "a/c.st", "a/d/e.st", "a.st")
    folder = hub.HubFolder("o/r", COMMIT, names, str(tmp_path))
    inner = folder.enter("a")
    assert folder.names == ("a.st", "a/c.st", "a/d/e.st", "b.st")
    assert folder.top == ("a.st", "b.st")
    assert (inner.names, inner.top) == (("c.st", "d/e.st"), ("c.st",))
    assert inner.enter("d").names == ("e.st",)
    assert (str(folder), str(inner), str(inner.enter("d"))) == ("o/r", "o/r/a", "o/r/a/d")
    assert folder.enter("") is folder
    assert inner.has("c.st")
    assert not inner.has("b.st")
    assert inner.address("c.st") == f"hf://o/r@{COMMIT}/a/c.st"
    assert not inner.is_local("c.st")
    assert RemoteFiles("o/r", COMMIT, ()).revision == "main"


def test_hints_for_parts_of_a_repository(tmp_path: Path) -> None:
    hint = (
        "; this is a cached snapshot, which may hold a part of the repository only: go online or run `hf "
        "download` for the rest"
    )
    assert hub.explain_partial(LocalFolder(make_cache(tmp_path, "o/r"))) == hint
    assert hub.explain_partial(LocalFolder(tmp_path / "snapshot")) == ""
    assert hub.explain_partial(hub.HubFolder("o/snapshots", COMMIT, (), "snapshots")) == ""


def test_snapshots_of_a_cache_in_words(tmp_path: Path) -> None:
    """A folder that is named like a cache and has no snapshots is any folder."""
    snapshot = make_cache(tmp_path, "o/r", ref=None)
    cache = snapshot.parents[1]
    assert folders.enter_cached(cache) == snapshot
    assert folders.enter_cached(snapshot) == snapshot
    (cache / "snapshots" / ("f" * 40)).mkdir()
    listed = "".join(f"\n  {cache}/snapshots/{name}" for name in (COMMIT, "f" * 40))
    assert refusal(folders.enter_cached, cache) == (
        f"{cache}: a cache folder without refs/main and with 2 snapshots; name one of them:{listed}"
    )
    for name in ("models--a", "model--a"):
        (tmp_path / name).mkdir()
        assert folders.enter_cached(tmp_path / name) == tmp_path / name


# --- indexes and folders ---------------------------------------------------------------------

INDEX = "d.safetensors.index.json"


def test_shards_that_are_missing(tmp_path: Path) -> None:
    """What is there beside them is named where no shard is there at all."""
    shards = {"a.w": "a.safetensors", "b.w": "b.safetensors", "c.w": "c.safetensors"}
    write_json(tmp_path / INDEX, {"weight_map": shards})
    folder = LocalFolder(tmp_path)
    lists = f"{tmp_path}/{INDEX}: lists 3 shards, "
    again = "download them again"
    assert refusal(indexes.read_index, folder, INDEX) == (
        f"{lists}3 are missing: a.safetensors, b.safetensors, c.safetensors; {again}"
    )
    write_weights(tmp_path / "sub" / "x.safetensors")
    assert refusal(indexes.read_index, LocalFolder(tmp_path), INDEX).endswith(f"; {again}")
    write_weights(tmp_path / "x.safetensors")
    assert refusal(indexes.read_index, LocalFolder(tmp_path), INDEX) == (
        f"{lists}3 are missing: a.safetensors, b.safetensors, c.safetensors; there is x.safetensors "
        "instead: if the index was left behind by an earlier export into this folder, remove it"
    )
    write_weights(tmp_path / "b.safetensors")
    assert refusal(indexes.read_index, LocalFolder(tmp_path), INDEX) == (
        f"{lists}2 are missing: a.safetensors, c.safetensors; {again}"
    )


def test_shards_with_other_tensors(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", {"x": ("U8", (2,)), "y": ("U8", (2,))})
    folder = LocalFolder(tmp_path)
    assert indexes.holds_just(folder, INDEX, {"a.safetensors": frozenset("xy")})
    assert not indexes.holds_just(folder, INDEX, {"a.safetensors": frozenset("x")})
    missing = {"a.safetensors": frozenset("xzw")}
    assert refusal(indexes.holds_just, folder, INDEX, missing) == (
        f"{tmp_path}/{INDEX}: a.safetensors has no tensor w"
    )
    write_json(tmp_path / INDEX, {"weight_map": dict.fromkeys("xzw", "a.safetensors")})
    assert refusal(opening.open_weights, str(tmp_path), Hub()) == (
        f"{tmp_path}/a.safetensors: the index promises 3 tensors in it, 2 are not there, the first is w: "
        "index and shards are not of one checkpoint; download both again"
    )


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["d.st"], ["d.st"]),
        (["d.safetensors", "d.fp16.safetensors"], ["d.safetensors"]),
        (["d.fp16.safetensors"], ["d.fp16.safetensors"]),
        (["d.txt", "d.fp16.txt"], ["d.txt", "d.fp16.txt"]),
        (["d.safetensors", "d.fp8.safetensors"], ["d.safetensors", "d.fp8.safetensors"]),
        (["d.safetensors", "d.bf16-00001-of-00002.safetensors"],
         ["d.safetensors", "d.bf16-00001-of-00002.safetensors"]),
        (["d.safetensors", "d.safetensors.index.fp16.json"], ["d.safetensors"]),
        (["d.safetensors.index.json", "d.fp32.safetensors.index.json"], ["d.safetensors.index.json"]),
    ],
)  # fmt: skip
def test_copies_in_other_precisions(names: list[str], left: list[str]) -> None:
    assert opening.drop_precisions(names) == left


@pytest.mark.parametrize(
    ("name", "components", "without", "needed"),
    [
        ("vae/d.safetensors", ["vae"], [], True), ("vae/d.safetensors", ["vae"], ["vae"], False),
        ("vae/config.json", ["vae"], ["vae"], True), ("other/config.json", ["vae"], [], False),
        ("model_index.json", ["vae"], [], True), ("flux.safetensors", ["vae"], [], False),
        ("vae/d.bin", ["vae"], [], False), ("vae/d.CKPT", ["vae"], [], False),
        ("vae/d.safetensors.index.json", ["vae"], ["vae"], False), ("d.safetensors", [], [], True),
        ("d.safetensors.index.json", ["vae"], [], False), ("sub/d.safetensors", [], [], False),
        ("d.pt", [], [], False),
    ],
)  # fmt: skip
def test_files_that_are_needed(
    name: str, components: list[str], without: list[str], needed: bool
) -> None:
    assert opening.is_needed(name, components, without) is needed


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["diffusers", "A"], ("diffusers", "A")), ([None, "A"], (None, "A")),
        (["diffusers", None], ()), (["diffusers"], ()), (["a", "b", "c"], ()), ("x", ()), ([], ()),
        (["a.b", "NunchakuFluxTransformer2dModel"], ("a.b", "FluxTransformer2DModel")),
    ],
)  # fmt: skip
def test_components_of_an_index(value: Any, found: Any) -> None:
    components = opening.read_components({"part": value, "_hidden": ["a", "B"]}, "f")
    assert components == ({"part": found} if found else {})


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("a/b", ["d", "A"], '["d", "A"]'), ("a", ["d", "A B"], '["d", "A B"]'),
     ("a", ["d..e", "A"], '["d..e", "A"]'), ("a", ["d", 3], '["d", 3]'), ("a", [3, "A"], '[3, "A"]')],
)  # fmt: skip
def test_components_that_are_no_names(key: str, value: Any, shown: str) -> None:
    assert refusal(opening.read_components, {key: value}, "f") == (
        f"f: the component {key} is {shown}: expected a plain name, of a library and a class; the file is "
        "damaged"
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["quant_model_description.json", "quant_model_description_w8a8.json"],
         "quant_model_description.json"),
        (["quant_model_description_b.json", "quant_model_description_a.json"],
         "quant_model_description_a.json"),
        (["a_quant_model_description.json", "quant_model_description.txt"], None),
    ],
)  # fmt: skip
def test_descriptions_beside_weights(tmp_path: Path, names: list[str], found: str | None) -> None:
    for name in names:
        write_json(tmp_path / name, {})
    assert opening.find_description(LocalFolder(tmp_path)) == found


def test_folders_without_weights(tmp_path: Path) -> None:
    text = "no .safetensors weights in it{}; name a folder or file that has them"
    assert str(opening.no_weights(LocalFolder(tmp_path))) == f"{tmp_path}: {text.format('')}"
    for name in ("b.BIN", "a.pt", "x.txt"):
        (tmp_path / name).write_bytes(b"")
    more = "; a.pt is a pickle file, which is refused"
    assert str(opening.no_weights(LocalFolder(tmp_path))) == f"{tmp_path}: {text.format(more)}"


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("b.st", ".a.st", "sub/c.st", "sub/.d/e.st", "a.st"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = LocalFolder(tmp_path)
    assert folder.names == ("a.st", "b.st", "sub/c.st")
    assert folder.top == ("a.st", "b.st")
    assert LocalFolder(tmp_path / "none").top == ()
    assert folder.enter("") is folder
    assert folder.enter("sub") == LocalFolder(tmp_path / "sub", tmp_path)
    assert folder.enter("sub").enter("x").base == tmp_path


def test_bits_are_in_the_name_of_a_dtype() -> None:
    """`F6_E2M3` has six, `C64` 64; the byte of a boolean alone is not said."""
    named = {name: re.match(r"[A-Z]+(\d+)", name) for name in ITEM_BITS}
    assert [name for name, found in named.items() if not found] == ["BOOL"]
    assert {name: int(found[1]) for name, found in named.items() if found} == {
        name: bits for name, bits in ITEM_BITS.items() if name != "BOOL"
    }
    assert ITEM_BITS["BOOL"] == 8
