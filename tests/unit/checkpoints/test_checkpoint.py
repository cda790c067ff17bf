"""Headers, their merging, and where a checkpoint says how it is quantized."""

from __future__ import annotations

import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from weight_files import join_file, make_header, write_index, write_json, write_weights

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import find_block, merge_headers, read_json
from quantmatrix.checkpoints.dtypes import ITEM_BITS
from quantmatrix.checkpoints.header import (
    HEADER_LIMIT,
    TensorHeader,
    parse_header,
    read_header,
)
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Hub

TENSORS = {
    "a.weight": ("F8_E4M3", (4, 6)),
    "a.weight_scale": ("F32", ()),
    "b.weight": ("BF16", (3, 5)),
    "empty": ("F16", (0, 7)),
    "scales": ("I64", (2,)),
}


def test_header_of_a_good_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    tensors, metadata = read_header(path)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == TENSORS
    assert tensors["a.weight"] == TensorHeader("a.weight", "F8_E4M3", (4, 6), str(path))
    assert [t.nbytes for t in tensors.values()] == [24, 4, 30, 0, 16]
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("metadata", [None, {}])
def test_header_without_metadata_or_tensors(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = write_weights(tmp_path / "x.safetensors", {}, metadata)
    assert read_header(path) == ({}, {})


def test_headers_agree_with_the_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import save_file

    dtypes = (torch.float8_e4m3fn, torch.bfloat16, torch.uint8, torch.int8, torch.int64, torch.bool)
    made = {f"t{i}": torch.zeros(i + 1, 3, dtype=dtype) for i, dtype in enumerate(dtypes)}
    made |= {"scalar": torch.zeros(()), "empty": torch.zeros(0, 4)}
    path = tmp_path / "x.safetensors"
    save_file(made, path, {"k": "v"})
    tensors, metadata = read_header(path)
    assert metadata == {"k": "v"}
    with safe_open(path, "pt") as file:
        assert set(tensors) == set(file.keys())
        for name, header in tensors.items():
            found = file.get_slice(name)
            assert (header.dtype, list(header.shape)) == (found.get_dtype(), found.get_shape())
            assert header.nbytes == made[name].nbytes


def test_every_dtype_of_the_library_is_known() -> None:
    """The library names its dtypes in the error for an unknown one."""
    from safetensors import SafetensorError, deserialize

    bad = {"t": {"dtype": "NONE", "shape": [1], "data_offsets": [0, 1]}}
    with pytest.raises(SafetensorError, match="expected one of") as caught:
        deserialize(join_file(bad, b"\0"))
    listed = str(caught.value).partition("expected one of")[2]
    assert set(re.findall("`([A-Z0-9_]+)`", listed)) == set(ITEM_BITS)


DATA = bytes(8)
TWO = {"a": ("F32", (1,)), "b": ("F32", (1,))}


def damage(**changes: Any) -> dict[str, Any]:
    """A header of two float32 scalars, with tensor b changed."""
    header = make_header(TWO)
    header["b"] |= changes
    return header


BAD_FILES = {
    "empty": (b"", "0 bytes are too few"),
    "seven bytes": (b"1234567", "7 bytes are too few"),
    "length only": (struct.pack("<Q", 40), "claims 40 bytes in a file of 8"),
    "zero length": (struct.pack("<Q", 0) + DATA, "claims 0 bytes"),
    "truncated header": (join_file(make_header(TWO), DATA)[:40], "in a file of 40"),
    "truncated data": (
        join_file(make_header(TWO), DATA)[:-1],
        "8 bytes of tensors, the file holds 7",
    ),
    "data left over": (join_file(make_header(TWO), DATA + b"\0"), "the file holds 9"),
    "header too long": (struct.pack("<Q", HEADER_LIMIT + 1) + DATA, f"limit is {HEADER_LIMIT}"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "git lfs pull",
    ),
    "zip of torch.save": (b"PK\x03\x04" + bytes(60), "pickles are refused"),
    "pickle": (b"\x80\x02}q\x00" + bytes(60), "a pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), "GGUF"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(60), "a web page"),
    "json": (b'{"weight_map": {}}' + b" " * 60, "this is JSON"),
    "no json": (join_file(b"{not json", DATA), "not a valid JSON"),
    "no utf-8": (join_file(b'{"\xff\xfe": 1}', DATA), "not a valid JSON"),
    "a list": (join_file([1, 2], DATA), "not a valid JSON"),
    "deep nesting": (join_file(b"[" * 200_000, DATA), "not a valid JSON"),
    "tensor that is a number": (join_file({"a": 1}, DATA), "not a valid JSON"),
    "no shape": (join_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, DATA), "'shape'"),
    "name twice": (
        join_file(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""),
        "'a' appears twice",
    ),
    "unknown dtype": (join_file(damage(dtype="F12"), DATA), "tensor b has the dtype F12"),
    "shape too big": (join_file(damage(shape=[2]), DATA), r"tensor b \(F32 \[2\]\) needs 8 bytes"),
    "negative shape": (join_file(damage(shape=[-1, -1]), DATA), r"tensor b has shape \[-1, -1\]"),
    "fractional shape": (join_file(damage(shape=[1.0]), DATA), r"tensor b has shape \[1.0\]"),
    "three offsets": (join_file(damage(data_offsets=[4, 8, 9]), DATA), r"\[4, 8, 9\]"),
    "offsets reversed": (join_file(damage(data_offsets=[8, 4]), DATA), "gives it -4"),
    "overlap": (join_file(damage(data_offsets=[0, 4]), DATA), "tensor a and tensor b overlap"),
    "gap": (join_file(damage(data_offsets=[5, 9]), bytes(9)), "leave a gap: it begins at byte 5"),
    "gap at the start": (
        join_file({"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, DATA),
        "the start of the data and tensor b leave a gap",
    ),
    "half a byte": (
        join_file({"b": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0"),
        "needs 1.5 bytes",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".PT"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match="pickle file can run code"):
        read_header(tmp_path / f"not-even-there{suffix}")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_what_is_accepted_the_library_accepts_too() -> None:
    """Random damage: a file that passes here must never surprise the loader later."""
    from safetensors import SafetensorError, deserialize

    good = join_file(make_header(TENSORS, {"format": "pt"}), bytes(74))
    assert deserialize(good)
    random.seed(7)
    accepted = 0
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(random.randint(1, 3)):
            bad[random.randrange(len(bad) - 74)] = random.choice(b'0123456789[]{},:"aF8 \x00\xff')
        (length,) = struct.unpack("<Q", bad[:8])
        try:
            if not 0 < length <= len(bad) - 8:
                continue
            parse_header(bytes(bad[8 : 8 + length]), "x", data_bytes=len(bad) - 8 - length)
        except CheckpointError:
            continue
        accepted += 1
        try:
            deserialize(bytes(bad))
        except SafetensorError as error:
            pytest.fail(f"{bytes(bad[8 : 8 + length])!r}: {error}")
    assert accepted > 100


def test_layers_end_at_the_last_dot() -> None:
    names = ["a.0.weight", "a.0.weight_scale", "a.0.div.mul_scale", "table"]
    tensors = {name: TensorHeader(name, "F32", (2,), "f") for name in names}
    checkpoint = Checkpoint("f", ("f",), tensors)
    assert checkpoint.layers() == {
        "a.0": {"weight", "weight_scale"},
        "a.0.div": {"mul_scale"},
    }
    assert checkpoint.nbytes == 32


def header_of(file: str, *names: str, **metadata: Any) -> tuple[dict[str, TensorHeader], Any]:
    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    return {name: TensorHeader(name, "F32", (1,), file) for name in names}, strings


def test_shards_are_merged() -> None:
    first = {"quant_method": "fp8", "layers": {"a": "x"}}
    second = {"layers": {"b": "x"}, "quant_method": "fp8"}
    tensors, metadata = merge_headers(
        {
            "1": header_of("1", "a", format="pt", _quantization_metadata=first),
            "2": header_of("2", "b", format="np", _quantization_metadata=second, more="m"),
        }
    )
    assert {name: header.file for name, header in tensors.items()} == {"a": "1", "b": "2"}
    assert metadata["format"] == "pt"
    assert metadata["more"] == "m"
    joined = json.loads(metadata["_quantization_metadata"])
    assert joined == {"quant_method": "fp8", "layers": {"a": "x", "b": "x"}}


def test_one_tensor_in_two_files() -> None:
    with pytest.raises(CheckpointError, match="tensor a is in one and in two: these are two check"):
        merge_headers({"one": header_of("one", "a"), "two": header_of("two", "a")})


@pytest.mark.parametrize("key", ["_quantization_metadata", "quantization_config"])
def test_headers_of_shards_that_disagree(key: str) -> None:
    first, second = ({key: {"quant_method": m, "x": {"rank": m}}} for m in ("fp8", "modelopt"))
    with pytest.raises(CheckpointError) as caught:
        merge_headers({"one": header_of("one", **first), "two": header_of("two", **second)})
    assert f"one: {key} and two: {key} disagree about quant_method" in str(caught.value)
    assert '"fp8" and "modelopt"' in str(caught.value)


def test_disagreement_inside_names_the_whole_key() -> None:
    config = {"quantization_config": {"config_groups": {"group_0": {"num_bits": 8}}}}
    metadata = {"quantization_config": '{"config_groups": {"group_0": {"num_bits": 4}}}'}
    with pytest.raises(CheckpointError, match=r"about config_groups\.group_0\.num_bits of"):
        find_block(config, "config.json", metadata, ["f"])


FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["a", "b"]}
SVDQUANT: dict[str, Any] = {"method": "svdquant", "rank": 32, "weight": {"dtype": "int4"}}
LAYERS: dict[str, Any] = {"format_version": "1.0", "layers": {"a": {"format": "nvfp4"}}}
NESTED: dict[str, Any] = {
    "producer": {"name": "modelopt"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["a"]},
}
UNNESTED = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["a"]}

BLOCKS: dict[str, tuple[Any, dict[str, Any], Any, Any, str | None]] = {
    # case: (config.json, header, hf_quant_config.json, block expected, where)
    "nothing": (None, {}, None, None, None),
    "nothing declared": ({"_class_name": "X"}, {"format": "pt"}, None, None, None),
    "null": ({"quantization_config": None}, {}, None, None, None),
    "config": ({"quantization_config": FP8}, {}, None, FP8, "c: quantization_config"),
    "text config": (
        {"text_config": {"quantization_config": FP8}},
        {},
        None,
        FP8,
        "c: text_config.quantization_config",
    ),
    "compression": ({"compression_config": FP8}, {}, None, FP8, "c: compression_config"),
    "config before compression": (
        {"compression_config": FP8, "quantization_config": MODELOPT},
        {},
        None,
        MODELOPT,
        "c: quantization_config",
    ),
    "header": (None, {"quantization_config": FP8}, None, FP8, "f: quantization_config"),
    "svdquant": (None, {"quantization_config": SVDQUANT}, None, SVDQUANT, "f: quantization_config"),
    "metadata first": (
        None,
        {"_quantization_metadata": FP8, "quantization_config": MODELOPT},
        None,
        FP8,
        "f: _quantization_metadata",
    ),
    "layer list completed": (
        None,
        {"_quantization_metadata": LAYERS, "quantization_config": MODELOPT},
        None,
        {**LAYERS, **MODELOPT},
        "f: _quantization_metadata",
    ),
    "layer list alone": (
        None,
        {"_quantization_metadata": LAYERS},
        None,
        LAYERS,
        "f: _quantization_metadata",
    ),
    "config and header agree": (
        {"quantization_config": MODELOPT},
        {"quantization_config": {**MODELOPT, "ignore": ["b", "a"], "quant_type": "FP8"}},
        None,
        {**MODELOPT, "quant_type": "FP8"},
        "c: quantization_config",
    ),
    "hf_quant_config": (None, {}, NESTED, UNNESTED, "h"),
    "hf_quant_config comes last": (
        {"quantization_config": FP8},
        {},
        NESTED,
        FP8,
        "c: quantization_config",
    ),
    "hf_quant_config of a plain model": (
        None,
        {},
        {"quantization": {"quant_algo": None}},
        None,
        None,
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_where_the_block_is_found(case: str) -> None:
    config, header, nested, expected, place = BLOCKS[case]
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in header.items()}
    named = None if nested is None else (nested, "h")
    assert find_block(config, "c", metadata, ["f"], named) == (expected, place)


def test_config_and_header_disagree() -> None:
    metadata = {"quantization_config": json.dumps({**MODELOPT, "quant_algo": "NVFP4"})}
    with pytest.raises(CheckpointError) as caught:
        find_block(
            {"quantization_config": MODELOPT}, "dir/config.json", metadata, ["x.safetensors"]
        )
    for word in ("dir/config.json", "x.safetensors", "quant_algo", "FP8", "NVFP4"):
        assert word in str(caught.value)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("key", ["_quantization_metadata", "quantization_config", "config"])
@pytest.mark.parametrize("text", ["{not json", "see config", "[1]", '"fp8"', "7", "[" * 9999])
def test_a_header_value_that_is_no_json_is_an_error(
    tmp_path: Path, key: str, text: str, shards: int
) -> None:
    """Whatever else declares the quantization: what this value was to say is unknown."""
    other = {"quantization_config": json.dumps(FP8), "_quantization_metadata": json.dumps(FP8)}
    folder = tmp_path / "folder"
    names = [f"model-0000{i + 1}-of-0000{shards}.safetensors" for i in range(shards)]
    for name in names:
        write_weights(folder / name, metadata=other | ({key: text} if name == names[-1] else {}))
    write_json(folder / "config.json", {"quantization_config": FP8})
    write_index(folder / "model.safetensors.index.json", names)
    with pytest.raises(CheckpointError, match="expected a JSON object") as caught:
        open_weights(str(folder), Hub())
    for part in (names[-1], f"{key} in the header", text[:20]):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["", " ", "null", "{}"])
@pytest.mark.parametrize("key", ["_quantization_metadata", "quantization_config", "config"])
def test_an_empty_header_value_says_nothing(tmp_path: Path, key: str, text: str) -> None:
    path = write_weights(tmp_path / "a.safetensors", metadata={key: text, "note": "no {json"})
    assert open_weights(str(path), Hub()).quantization is None


@pytest.mark.parametrize("value", ["fp8", ["fp8"], 8])
def test_a_block_that_is_no_object(value: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"c: quantization_config is .*expected a JSON object"
    ):
        find_block({"quantization_config": value}, "c", {}, ["f"])
    metadata = {"quantization_config": value if isinstance(value, str) else json.dumps(value)}
    with pytest.raises(CheckpointError, match="f: quantization_config in the header"):
        find_block(None, None, metadata, ["f"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_bad_json_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)
