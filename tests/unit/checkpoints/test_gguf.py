"""GGUF files: read against the `gguf` package, written for it, and every damage named."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix.checkpoints import gguf, gguf_writer
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.checkpoints.header import HEADER_LIMIT
from quantmatrix.checkpoints.opening import open_component, open_weights
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.checkpoints.row_reader import RowReader
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Hub, Request
from quantmatrix.scheme import BLOCKS
from quantmatrix.tiny.hub import repository_of

package = pytest.importorskip("gguf", reason="needs the package gguf: the extra `gguf`")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def join(
    entries: list[bytes], infos: list[bytes], data: int, *, version: int = 3, align: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(entries))
    head += b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % align) + bytes(data)


FLUX = entry("general.architecture", 8, text("flux"))
ONE = info("a.weight", (2, 32), 8, 0)
TWO = [ONE, info("b", (3,), 0, 96)]  # 68 bytes of Q8_0, then three of F32
GOOD = join([FLUX], TWO, 108)


def read(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return gguf.read_header(path)


def test_a_header_is_read(tmp_path: Path) -> None:
    tensors, metadata = read(tmp_path / "x.gguf", GOOD)
    assert metadata == {"general.architecture": "flux"}
    assert [(h.dtype, h.shape, h.nbytes) for h in tensors.values()] == [
        ("Q8_0", (2, 32), 68),
        ("F32", (3,), 12),
    ]
    starts = [header.start for header in tensors.values()]
    assert starts == [len(GOOD) - 108, len(GOOD) - 12]


def test_values_of_the_metadata_are_texts(tmp_path: Path) -> None:
    long = struct.pack("<IQ", 4, 100) + bytes(400)
    nested = struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 5, 2) + struct.pack("<ii", -1, 7)
    entries = [
        entry("int", 5, struct.pack("<i", -3)),
        entry("bool", 7, b"\x01"),
        entry("float", 6, struct.pack("<f", 0.5)),
        entry("long", 9, long),
        entry("texts", 9, struct.pack("<IQ", 8, 2) + text("x") + text("y")),
        entry("nested", 9, nested),
    ]
    _, metadata = read(tmp_path / "x.gguf", join(entries, [], 0))
    assert metadata == {
        "int": "-3",
        "bool": "True",
        "float": "0.5",
        "long": "[100 numbers]",
        "texts": "['x', 'y']",
        "nested": "['[-1, 7]']",
    }


def test_blocks_have_the_sizes_of_the_package() -> None:
    types = package.GGMLQuantizationType
    assert {name: package.GGML_QUANT_SIZES[types[name]] for name in BLOCKS} == BLOCKS
    known = dict(gguf.TYPES.items())
    assert all(types(number).name == name for number, name in known.items())
    left = {kind.value for kind in types} - set(known)
    assert left == set(gguf.FOREIGN_TYPES) & left  # every other type is refused by its name


NESTED = struct.pack("<IQ", 9, 1) * 5 + struct.pack("<IQ", 4, 0)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "begins with b''"),
    "another magic": (b"GGML" + GOOD[4:], "begins with b'GGML"),
    "safetensors": (b"{" * 64, "this is JSON"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (join([], [], 0, version=1), "says version 1: expected version 2 or 3"),
    "big-endian": (join([], [], 0, version=3 << 24), "a file for big-endian machines"),
    "many tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0),
        f"it announces {2**40} tensors",
    ),
    "many entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), f"{2**63} metadata entries"),
    "cut in the header": (GOOD[:50], "truncated or damaged"),
    "cut in the data": (GOOD[:-1], r"tensor b ends at byte \d+ of \d+"),
    "long key": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64),
        f"a key of the metadata has {2**62} bytes: expected at most 65535",
    ),
    "long value": (
        join([entry("k", 8, struct.pack("<Q", HEADER_LIMIT))], [], 64),
        r"the value of k takes 33554432 bytes",
    ),
    "long array": (
        join([entry("k", 9, struct.pack("<IQ", 4, 2**60))], [], 64),
        "the value of k takes",
    ),
    "array of many texts": (
        join([entry("k", 9, struct.pack("<IQ", 8, 2**60))], [], 64),
        "has 1152921504606846976 items: expected as many as fit",
    ),
    "deep arrays": (join([entry("k", 9, NESTED)], [], 64), "holds arrays 4 deep"),
    "unknown kind of value": (join([entry("k", 77, b"")], [], 64), "the value of k is of type 77"),
    "key twice": (join([FLUX, FLUX], TWO, 108), "the metadata has general.architecture twice"),
    "no utf-8": (join([text("k").replace(b"k", b"\xff")], [], 64), "is not UTF-8"),
    "tensor twice": (
        join([], [ONE, info("a.weight", (3,), 0, 96)], 108),
        "a.weight appears twice",
    ),
    "many dimensions": (
        join([], [text("a") + struct.pack("<I", 2**31)], 64),
        f"tensor a has {2**31} dimensions",
    ),
    "unknown type": (
        join([], [info("a", (32,), 99, 0)], 64),
        "GGUF type 99, which is unknown here",
    ),
    "removed type": (join([], [info("a", (32,), 31, 0)], 64), "Q4_0_4_4, which ggml removed"),
    "type of inputs": (join([], [info("a", (32,), 15, 0)], 64), "Q8_K, a form of inputs"),
    "part of a block": (join([], [info("a", (2, 33), 8, 0)], 108), "rows of whole blocks of 32"),
    "a number of blocks": (join([], [info("a", (), 8, 0)], 108), "rows of whole blocks of 32"),
    "gap": (
        join([], [ONE, info("b", (3,), 0, 128)], 256),
        "begins at byte 128 of the data: expected 96",
    ),
    "overlap": (join([], [ONE, info("b", (3,), 0, 64)], 256), "begins at byte 64"),
    "huge shape": (
        join([], [info("a", (2**40, 2**40), 0, 0)], 64),
        "it in the file: it is truncated",
    ),
    "alignment of zero": (
        join([entry("general.alignment", 4, struct.pack("<I", 0))], TWO, 108),
        "general.alignment is 0: expected a power of two",
    ),
    "alignment of three": (
        join([entry("general.alignment", 4, struct.pack("<I", 3))], TWO, 108),
        "general.alignment is 3",
    ),
    "another shape of another size": (
        join([entry("comfy.gguf.orig_shape.b", 9, struct.pack("<IQi", 5, 1, 4))], TWO, 108),
        r"orig_shape.b is \[4\]: expected a shape of 3 numbers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_one_error_in_words(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "x.gguf", data)
    assert str(tmp_path / "x.gguf") in str(caught.value)


@pytest.mark.parametrize("stop", [*range(0, len(GOOD), 7), len(GOOD) - 1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, stop: int) -> None:
    with pytest.raises(CheckpointError):
        read(tmp_path / "x.gguf", GOOD[:stop])


def test_a_shape_of_its_own_is_taken(tmp_path: Path) -> None:
    own = entry("comfy.gguf.orig_shape.b", 9, struct.pack("<IQii", 5, 2, 3, 1))
    tensors, _ = read(tmp_path / "x.gguf", join([own], TWO, 108))
    assert tensors["b"].shape == (3, 1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_by_package(path: Path, alignment: int = 32) -> dict[str, torch.Tensor]:
    """A file that the package writes: what its own reader decodes, in torch."""
    types = package.GGMLQuantizationType
    tensors = {
        "double_blocks.0.img_mod.lin.weight": (draw(6, 64), types.Q8_0),
        "x.bias": (draw(6, seed=1), types.F32),
        "half.weight": (draw(4, 3, seed=2).half().float(), types.F16),
        "brain.weight": (draw(4, 32, seed=3).bfloat16().float(), types.BF16),
        "patch.weight": (draw(2, 3, 1, 2, 2, seed=4), types.F32),
    }
    writer = package.GGUFWriter(path, "flux")
    writer.add_custom_alignment(alignment)
    writer.add_file_type(7)
    for name, (tensor, kind) in tensors.items():
        writer.add_tensor(name, package.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: tensor for name, (tensor, _) in tensors.items()}


def open_file(path: Path) -> Checkpoint:
    tensors, metadata = gguf.read_header(path)
    return Checkpoint(str(path), (str(path),), tensors, metadata)


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_what_the_package_writes_is_read_bit_by_bit(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    plain = write_by_package(path, alignment)
    checkpoint = open_file(path)
    assert checkpoint.metadata["general.file_type"] == "7"
    theirs = {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}
    with TensorReader(checkpoint, "cpu") as reader:
        for name, tensor in plain.items():
            found = reader.read(name)
            assert found.view(torch.uint8).numpy().tobytes() == theirs[name].data.tobytes()
            if checkpoint.tensors[name].dtype not in BLOCKS:
                assert found.shape == tensor.shape
                assert torch.equal(found.float(), tensor)
        assert reader.read("double_blocks.0.img_mod.lin.weight").shape == (6, 68)


def test_what_is_not_aligned_to_its_items_is_read(tmp_path: Path) -> None:
    one = entry("general.alignment", 4, struct.pack("<I", 1))
    infos = [info("a", (1,), 24, 0), info("b", (2,), 0, 1)]
    data = join([one], infos, 0, align=1) + b"\x05" + struct.pack("<ff", 1.5, -2.0)
    (tmp_path / "x.gguf").write_bytes(data)
    with TensorReader(open_file(tmp_path / "x.gguf"), "cpu") as reader:
        assert reader.read("b").tolist() == [1.5, -2.0]


def test_what_is_written_is_what_the_package_reads(tmp_path: Path) -> None:
    weight, table = draw(4, 64), draw(1, 6, 8, seed=1).bfloat16()
    codes = torch.from_numpy(
        package.quants.quantize(weight.numpy(), package.GGMLQuantizationType.Q8_0)
    )
    tensors = {"b.weight": codes, "a.table": table, "c.weight": draw(2, 5).bfloat16()}
    path = tmp_path / "x.gguf"
    gguf_writer.write_file(path, tensors, {"b.weight": "Q8_0"}, {"general.architecture": "wan"})
    theirs = package.GGUFReader(path)
    assert theirs.get_field("general.architecture").contents() == "wan"
    found = {tensor.name: tensor for tensor in theirs.tensors}
    assert list(found) == ["a.table", "b.weight", "c.weight"]
    assert found["b.weight"].data.tobytes() == codes.numpy().tobytes()
    assert found["b.weight"].shape.tolist() == [64, 4]
    assert found["a.table"].tensor_type.name == "F32"
    assert torch.equal(torch.from_numpy(found["a.table"].data.copy()), table.float())
    assert found["c.weight"].tensor_type.name == "BF16"
    first = path.read_bytes()
    gguf_writer.write_file(path, tensors, {"b.weight": "Q8_0"}, {"general.architecture": "wan"})
    assert path.read_bytes() == first


def test_rows_of_a_plain_tensor_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    plain = write_by_package(path)
    with RowReader(open_file(path)) as reader:
        assert torch.equal(
            reader.read("half.weight", slice(1, 3)).float(), plain["half.weight"][1:3]
        )


# --- which file is meant ---------------------------------------------------------------------

Names = tuple[str, ...]
FLUX_FILES = ("x-Q4_K_S.gguf", "x-Q4_K_M.gguf", "x-Q8_0.gguf", "x-F16.gguf")
WAN_FILES = ("HighNoise/x-HighNoise-Q8_0.gguf", "LowNoise/x-LowNoise-Q8_0.gguf")
SPLIT = ("x-BF16-00001-of-00002.gguf", "x-BF16-00002-of-00002.gguf", "x-Q8_0.gguf")


@pytest.mark.parametrize(
    ("names", "quantization", "found"),
    [
        (FLUX_FILES, "Q8_0", ["x-Q8_0.gguf"]),
        (FLUX_FILES, "q4_k_m", ["x-Q4_K_M.gguf"]),
        (FLUX_FILES, "Q4_K", ["x-Q4_K_S.gguf", "x-Q4_K_M.gguf"]),
        (FLUX_FILES, "Q5_K", []),
        (WAN_FILES, "Q8_0", list(WAN_FILES)),
        (SPLIT, "BF16", [SPLIT[0]]),
        (("a/Q8_0.gguf",), "Q8_0", ["a/Q8_0.gguf"]),
    ],
    ids=str,
)
def test_a_quantization_names_a_file(names: Names, quantization: str, found: list[str]) -> None:
    assert sorted(gguf.find_quantized(names, quantization)) == sorted(found)


def fill(folder: Path, names: Names) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(GOOD.replace(b"a.weight", f"{len(name):08d}".encode()))
    return folder


def test_a_file_of_a_folder_is_named_by_its_quantization(tmp_path: Path) -> None:
    folder = fill(tmp_path, (*FLUX_FILES, *WAN_FILES))
    assert open_weights(f"{folder}:Q4_K_M", Hub()).files == (str(folder / "x-Q4_K_M.gguf"),)
    found = open_weights(f"{folder}/HighNoise:q8_0", Hub())
    assert found.files == (str(folder / WAN_FILES[0]),)
    with pytest.raises(
        CheckpointError, match=r"2 GGUF files of the quantization Q4_K: (.|\n)*x-Q4_K_S"
    ):
        open_weights(f"{folder}:Q4_K", Hub())
    with pytest.raises(
        CheckpointError, match=r"no GGUF files of the quantization Q2_K(.|\n)*x-Q8_0"
    ):
        open_weights(f"{folder}:Q2_K", Hub())
    with pytest.raises(CheckpointError, match="this is a single file: leave it out"):
        open_weights(f"{folder}/x-Q8_0.gguf:Q8_0", Hub())


def test_a_name_with_a_colon_is_a_path_where_it_exists(tmp_path: Path) -> None:
    fill(tmp_path / "a:Q8_0", ("x-F16.gguf",))
    folder, name = open_folder(str(tmp_path / "a:Q8_0"), Hub())
    assert (str(folder), name) == (str(tmp_path / "a:Q8_0"), "")


def test_a_folder_of_one_gguf_is_opened_and_of_several_is_not(tmp_path: Path) -> None:
    folder = fill(tmp_path / "one", ("x-Q8_0.gguf",))
    assert open_weights(str(folder), Hub()).files == (str(folder / "x-Q8_0.gguf"),)
    assert open_component(str(folder), Hub()).files == (str(folder / "x-Q8_0.gguf"),)
    folder = fill(tmp_path / "several", FLUX_FILES)
    with pytest.raises(
        CheckpointError, match=r"4 GGUF files, name one by its quantization(.|\n)*x-F16"
    ):
        open_weights(str(folder), Hub())


def test_parts_of_a_file_are_one_checkpoint(tmp_path: Path) -> None:
    parts = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf")
    for number, name in enumerate(parts):
        data = join([FLUX], [info(f"t{number}", (3,), 0, 0)], 12)
        (tmp_path / name).write_bytes(data)
    found = open_weights(str(tmp_path / parts[0]), Hub())
    assert sorted(found.tensors) == ["t0", "t1"]
    assert found.metadata["general.architecture"] == "flux"


def test_a_request_takes_a_gguf_file_as_weights() -> None:
    request = Request(model_path="x/y", component_paths={"transformer": "a/b/c-Q8_0.gguf"})
    assert request.weights_paths == {"transformer": "a/b/c-Q8_0.gguf"}
    assert repository_of("a/b:Q4_K_S") == repository_of("a/b/High:Q8_0") == "a/b"


def test_of_a_remote_file_the_header_alone_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import huggingface_hub

    from quantmatrix.checkpoints.hub import HubFolder

    class Remote(io.BytesIO):
        size = len(GOOD)

    opened = []

    class Hubs:
        def open(self, path: str, revision: str, block_size: int) -> Remote:
            opened.append((path, revision, block_size))
            return Remote(GOOD[:-108])  # the data is not there to be read

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hubs)
    folder = HubFolder("a/b", "c" * 40, ("x-Q8_0.gguf",), "/nowhere")
    tensors, metadata = folder.header("x-Q8_0.gguf")
    assert opened == [("a/b/x-Q8_0.gguf", "c" * 40, 2**20)]
    assert metadata["general.architecture"] == "flux"
    assert tensors["a.weight"].file == f"hf://a/b@{'c' * 40}/x-Q8_0.gguf"
