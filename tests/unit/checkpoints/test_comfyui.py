"""What ComfyUI's writers say of each layer: in the header, or in a tensor beside the layer."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from weight_files import COMMIT, join_file, make_header

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import NEAR, read_contents
from quantmatrix.checkpoints.hub import HubFolder
from quantmatrix.checkpoints.opening import open_component, open_weights
from quantmatrix.errors import CheckpointError
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan.inspect import describe
from quantmatrix.runtime.plan.schemes import find_schemes
from quantmatrix.runtime.plan.sources import Source

FP8 = {"format": "float8_e4m3fn"}
FULL = {**FP8, "full_precision_matrix_mult": True}
NOTED = {**FP8, "orig_dtype": "torch.bfloat16", "orig_shape": [16, 16]}


def encode(entry: Any) -> bytes:
    return entry if isinstance(entry, bytes) else json.dumps(entry).encode()


def write_marked(
    path: Path, markers: Mapping[str, Any], listed: Mapping[str, Any] | None = None
) -> Path:
    """A file of FP8 layers, each with its entry beside it; `listed` goes into the header."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in [*markers, *(listed or {})]:
        tensors |= {f"{layer}.weight": ("F8_E4M3", (16, 16)), f"{layer}.weight_scale": ("F32", ())}
    contents = {f"{layer}.comfy_quant": encode(entry) for layer, entry in markers.items()}
    tensors |= {name: ("U8", (len(content),)) for name, content in contents.items()}
    text = json.dumps({"format_version": "1.0", "layers": listed})
    header = make_header(tensors, {"_quantization_metadata": text} if listed else None)
    data = bytearray(max(entry["data_offsets"][1] for n, entry in header.items() if n[0] != "_"))
    for name, content in contents.items():
        begin, end = header[name]["data_offsets"]
        data[begin:end] = content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(join_file(header, bytes(data)))
    return path


def open_file(path: Path) -> Checkpoint:
    return open_weights(str(path), Hub(offline=True))


def test_tensors_beside_the_layers_declare_them(tmp_path: Path) -> None:
    path = write_marked(tmp_path / "w.safetensors", {"a": FP8, "b": FULL, "c": NOTED})
    checkpoint = open_file(path)
    assert checkpoint.quantization == {
        "format_version": "1.0",
        "layers": {"a": FP8, "b": FULL, "c": FP8},
    }
    assert checkpoint.quantization_from == f"{path}: tensors *.comfy_quant"
    assert families.detect(checkpoint) == (
        "fp8",
        f"layers of format float8_e4m3fn in {path}: tensors *.comfy_quant",
    )
    schemes = families.load("fp8").schemes(checkpoint)
    assert {name: s.activation for name, s in schemes.items()} == {
        "a": "tensor-dynamic",
        "b": "none",
        "c": "tensor-dynamic",
    }


def test_the_header_counts_where_it_lists_a_layer(tmp_path: Path) -> None:
    """As in ComfyUI, which puts its entries in the place of the tensors."""
    path = write_marked(tmp_path / "w.safetensors", {"a": FULL, "b": FULL}, listed={"a": NOTED})
    checkpoint = open_file(path)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization["layers"] == {"a": FP8, "b": FULL}
    assert checkpoint.quantization_from == f"{path}: _quantization_metadata"


def test_shards_have_their_own(tmp_path: Path) -> None:
    for shard, layer in (("a", "x"), ("b", "y")):
        write_marked(tmp_path / f"{shard}.safetensors", {layer: FULL if layer == "y" else FP8})
    index = {"x.weight": "a.safetensors", "y.weight": "b.safetensors"}
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = open_weights(str(tmp_path), Hub(offline=True)).quantization
    assert found is not None
    assert found["layers"] == {"x": FP8, "y": FULL}


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quantization": {"quant_algo": "FP8"}},
    ],
)
def test_a_method_needs_no_list(tmp_path: Path, block: dict[str, Any]) -> None:
    write_marked(tmp_path / "w.safetensors", {"a": FULL})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    assert open_component(str(tmp_path), Hub(offline=True)).quantization == block


@pytest.mark.parametrize("content", [bytes(20), b"\xff\xfe{}", b"[1]", b"{", b" " * 5000])
def test_what_is_no_entry_says_nothing(tmp_path: Path, content: bytes) -> None:
    checkpoint = open_file(write_marked(tmp_path / "w.safetensors", {"a": content}))
    assert checkpoint.quantization is None
    assert "nothing declares how" in describe(checkpoint)["why"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("in_header", [False, True])
def test_rotated_weights_are_refused(tmp_path: Path, in_header: bool, nested: bool) -> None:
    """The NVFP4 family looks at an entry's format only, and would give noise."""
    said = {"convrot": True, "convrot_groupsize": 256}
    entry: dict[str, Any] = {"a": {"format": "nvfp4", **({"params": said} if nested else said)}}
    path = tmp_path / "w.safetensors"
    write_marked(path, {} if in_header else entry, listed=entry if in_header else None)
    with pytest.raises(CheckpointError, match=r"weight of a was rotated .*convrot"):
        open_file(path)
    said["convrot"] = False
    entry["a"] = {"format": "nvfp4", **({"params": said} if nested else said)}
    write_marked(path, {} if in_header else entry, listed=entry if in_header else None)
    open_file(path)


@pytest.mark.parametrize("word", ["int8_blockwise", "mxfp4"])
def test_formats_that_no_family_takes_are_named(tmp_path: Path, word: str) -> None:
    path = write_marked(
        tmp_path / "w.safetensors", {"a": {"format": "bf16"}, "b": {"format": word}}
    )
    said = f"b has the format {word}, which no quant family takes"
    found = describe(open_file(path))
    assert said in found["why"]
    assert found["unknown"]
    source = Source(open_file(path), "FluxTransformer2DModel", {}, "config.json", primary=True)
    with pytest.raises(CheckpointError, match=said):
        find_schemes(source, "flux-1", Request(model_path="x"))


def test_a_list_of_plain_layers_is_no_quantization() -> None:
    plain = {"format_version": "1.0", "layers": {"a": {"format": "bf16"}, "b": "float32", "c": {}}}
    assert explain_unknown(Checkpoint("r", (), {}, quantization=plain)) is None


class Counted(io.BytesIO):
    """An open remote file, and how much was asked of it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.lengths: list[int] = []

    def read(self, size: int | None = -1, /) -> bytes:
        self.lengths.append(size if size is not None else -1)
        return super().read(size)


@pytest.mark.parametrize(
    ("gaps", "lengths"),
    [
        ((NEAR + 1, NEAR), [4, 5 + NEAR + 6]),
        ((NEAR, NEAR + 1), [4 + NEAR + 5, 6]),
        ((NEAR, NEAR), [4 + NEAR + 5 + NEAR + 6]),
        ((NEAR + 1, NEAR + 1), [4, 5, 6]),
    ],
)
def test_what_lies_together_is_read_at_once(gaps: tuple[int, int], lengths: list[int]) -> None:
    shapes = {"a": 4, "first gap": gaps[0], "b": 5, "second gap": gaps[1], "c": 6}
    header = make_header({name: ("U8", (size,)) for name, size in shapes.items()})
    parts = {"a": b"aaaa", "b": b"bbbbb", "c": b"cccccc"}
    data = b"".join(parts.get(name, bytes(size)) for name, size in shapes.items())
    file = Counted(join_file(header, data))
    assert read_contents(file, ["c", "a", "b"]) == parts
    assert file.lengths[2:] == lengths


def test_an_entry_is_read_as_the_header_reads_it() -> None:
    """Other keys of an entry, however long, do not count: nor did they when the names were read."""
    header = make_header({"a": ("U8", (4,))})
    header["a"]["x" * 5000] = 1
    assert read_contents(io.BytesIO(join_file(header, b"aaaa")), ["a"]) == {"a": b"aaaa"}


def test_of_a_remote_file_only_the_ranges_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_marked(tmp_path / "there" / "w.safetensors", {"a": FP8, "b": FULL})
    content = path.read_bytes()
    opened: list[Counted] = []

    class FakeFiles:
        def open(self, place: str, *, revision: str, cache_type: str) -> Counted:
            assert (place, revision, cache_type) == ("o/r/t/w.safetensors", COMMIT, "none")
            opened.append(Counted(content))
            return opened[-1]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FakeFiles)
    folder = HubFolder("o/r", COMMIT, ("t/w.safetensors",), str(tmp_path / "cache"), prefix="t")
    found = folder.contents("w.safetensors", ["b.comfy_quant", "a.comfy_quant"])
    assert found == {"a.comfy_quant": encode(FP8), "b.comfy_quant": encode(FULL)}
    header = struct.unpack("<Q", content[:8])[0]
    assert opened[0].lengths == [8, header, len(encode(FP8)) + len(encode(FULL))]
    assert opened[0].closed


def test_a_remote_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoFiles:
        def open(self, *_: Any, **__: Any) -> Any:
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", NoFiles)
    folder = HubFolder("o/r", COMMIT, ("w.safetensors",), str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"o/r/w.safetensors: cannot be read .*no route"):
        folder.contents("w.safetensors", ["a.comfy_quant"])
