"""GGUF headers at their limits, values in words, and which files belong together."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix.checkpoints import gguf, gguf_writer
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Hub

U32, U64, INT, TEXT, LIST = 4, 10, 5, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def join(entries: list[bytes], infos: list[bytes], data: int, align: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries))
    head += b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % align) + bytes(data)


def parse(data: bytes) -> Any:
    return gguf.parse_header(io.BytesIO(data), len(data), "f.gguf")


def refuse(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(data)
    return str(caught.value)


def wrong(found: str, expected: str) -> str:
    return f"f.gguf: in the GGUF header {found}: expected {expected}; download the file again"


def read_value(kind: int, value: bytes) -> str:
    found: str = parse(join([entry("k", kind, value)], [], 0))[1]["k"]
    return found


@pytest.mark.parametrize(
    ("count", "found"),
    [(0, "[]"), (1, "[7]"), (64, f"[{', '.join(['7'] * 64)}]"), (65, "[65 numbers]")],
)
def test_long_lists_of_numbers_are_counted(count: int, found: str) -> None:
    values = struct.pack(f"<{count}I", *[7] * count)
    assert read_value(LIST, struct.pack("<IQ", U32, count) + values) == found


@pytest.mark.parametrize(
    ("count", "found"),
    [(0, "[]"), (3, "['x', 'x', 'x']"), (64, str(["x"] * 64)), (65, "[65 items]")],
)
def test_long_lists_of_texts_are_counted(count: int, found: str) -> None:
    assert read_value(LIST, struct.pack("<IQ", TEXT, count) + text("x") * count) == found


@pytest.mark.parametrize(
    ("kind", "form", "value", "found"),
    [
        (0, "<B", 255, "255"), (1, "<b", -128, "-128"), (2, "<H", 65535, "65535"),
        (3, "<h", -300, "-300"), (4, "<I", 2**32 - 1, "4294967295"), (5, "<i", -70000, "-70000"),
        (6, "<f", 1.5, "1.5"), (7, "<?", False, "False"), (10, "<Q", 2**63, str(2**63)),
        (11, "<q", -(2**40), str(-(2**40))), (12, "<d", 0.1, "0.1"),
    ],
)  # fmt: skip
def test_kinds_of_numbers(kind: int, form: str, value: Any, found: str) -> None:
    assert read_value(kind, struct.pack(form, value)) == found


@pytest.mark.parametrize("depth", [1, 2, 4, 5])
def test_lists_in_lists(depth: int) -> None:
    """Four within each other are read; each is shown as the text of its items."""
    value = struct.pack("<IQ", LIST, 1) * (depth - 1) + struct.pack("<IQB", 0, 1, 9)
    if depth <= 4:
        shown = "[9]"
        for _ in range(depth - 1):
            shown = str([shown])
        assert read_value(LIST, value) == shown
        return
    assert refuse(join([entry("k", LIST, value)], [], 0)) == wrong(
        "the value of k holds arrays 4 deep", "a number, a text or an array"
    )


@pytest.mark.parametrize("kind", [13, 77])
def test_kinds_that_are_unknown(kind: int) -> None:
    assert refuse(join([entry("k", kind, b"")], [], 64)) == wrong(
        f"the value of k is of type {kind}", "a number, a text or an array"
    )


@pytest.mark.parametrize(
    ("tensors", "entries", "what"),
    [
        (2**17 + 1, 0, "131073 tensors"),
        (0, 2**16 + 1, "65537 metadata entries"),
    ],
)
def test_numbers_of_entries(tensors: int, entries: int, what: str) -> None:
    most = 131072 if tensors else 65536
    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + bytes(64)
    assert refuse(data) == wrong(f"it announces {what}", f"at most {most}")
    less = b"GGUF" + struct.pack("<IQQ", 3, tensors and most, entries and most)
    assert "announces" not in refuse(less)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4])
def test_versions(version: int) -> None:
    data = b"GGUF" + struct.pack("<IQQ", version, 0, 0)
    swapped = b"GGUF" + struct.pack(">IQQ", version, 0, 0)
    if version in (2, 3):
        assert parse(data) == ({}, {})
        what = "a file for big-endian machines"
    else:
        assert refuse(data) == wrong(
            f"the version says version {version}", "version 2 or 3, little-endian"
        )
        what = f"version {version << 24}"
    assert refuse(swapped) == wrong(f"the version says {what}", "version 2 or 3, little-endian")


def test_lengths_of_names() -> None:
    longest = "k" * 65535
    assert list(parse(join([entry(longest, 0, b"\1")], [], 0))[1]) == [longest]
    assert refuse(join([entry(f"{longest}k", 0, b"\1")], [], 0)) == wrong(
        "a key of the metadata has 65536 bytes", "at most 65535"
    )
    assert list(parse(join([], [info(longest, (3,), 0, 0)], 12))[0]) == [longest]
    assert refuse(join([], [info(f"{longest}k", (3,), 0, 0)], 12)) == wrong(
        "a tensor's name has 65536 bytes", "at most 65535"
    )


@pytest.mark.parametrize(("count", "fits"), [(0, True), (64, True), (65, False)])
def test_numbers_of_dimensions(count: int, fits: bool) -> None:
    data = join([], [info("a", (1,) * count, 0, 0)], 4)
    if fits:
        assert parse(data)[0]["a"].shape == (1,) * count
        return
    assert refuse(data) == wrong("tensor a has 65 dimensions", "at most 64")


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (1, True), (2, True), (64, True), (65536, True), (131072, False), (0, False), (3, False),
        (48, False), (65537, False),
    ],
)  # fmt: skip
def test_alignments(value: int, fits: bool) -> None:
    key = entry("general.alignment", U32, struct.pack("<I", value))
    infos = [info("a", (3,), 24, 0), info("b", (5,), 24, -(-3 // value) * value if fits else 0)]
    data = join([key], infos, 2 * max(value, 8), align=max(value, 1))
    if not fits:
        assert refuse(data) == wrong(f"general.alignment is {value}", "a power of two up to 65536")
        return
    first, second = parse(data)[0].values()
    assert first.start == len(data) - 2 * max(value, 8)
    assert second.start - first.start == -(-3 // value) * value


@pytest.mark.parametrize(
    ("value", "said"),
    [("64", "64"), ("000000064", "000000064"), ("0000000064", ""), ("x", ""), ("-8", ""), ("", "")],
)
def test_alignments_that_are_texts(value: str, said: str) -> None:
    data = join([entry("general.alignment", TEXT, text(value))], [], 64)
    if said:
        assert parse(data)[0] == {}
    else:
        assert refuse(data) == wrong(f"general.alignment is {value}", "a power of two up to 65536")


def test_ends_of_tensors() -> None:
    one = join([], [info("a", (3,), 0, 0)], 12)
    assert parse(one)[0]["a"].nbytes == 12
    assert refuse(one[:-1]) == wrong(
        f"tensor a ends at byte {len(one)} of {len(one) - 1}", "it in the file: it is truncated"
    )
    assert refuse(join([], [info("a", (3,), 0, 0), info("b", (5,), 0, 16)], 64)) == wrong(
        "tensor b begins at byte 16 of the data", "32, where the one before ends"
    )
    assert refuse(join([], [info("a", (3,), 0, 0), info("a", (5,), 0, 32)], 64)) == wrong(
        "tensor a appears twice", "each name once"
    )


def test_ends_of_headers() -> None:
    data = join([entry("k", TEXT, text("value"))], [], 0)
    expected = "it to end in the file: it is truncated or damaged"
    long = join([entry("k", TEXT, text("v" * 100))], [], 0)
    assert refuse(long[:60]) == wrong("the value of k takes 100 bytes from byte 45 of 60", expected)
    assert refuse(long[:99]) == wrong("the value of k takes 100 bytes from byte 45 of 99", expected)
    assert refuse(data[:44]) == wrong("a number takes 8 bytes from byte 37 of 44", expected)
    assert refuse(data[:49]) == wrong("the value of k takes 5 bytes from byte 45 of 49", expected)
    assert parse(data[:50])[1] == {"k": "value"}
    many = join([entry("k", LIST, struct.pack("<IQ", TEXT, 10**6))], [], 0)
    assert refuse(many) == wrong("the value of k has 1000000 items", "as many as fit")


def test_a_file_that_ends_while_it_is_read() -> None:
    data = join([entry("k", TEXT, text("value"))], [], 0)
    with pytest.raises(CheckpointError) as caught:
        gguf.parse_header(io.BytesIO(data[:48]), 500, "f.gguf")
    assert str(caught.value) == wrong("it ends at byte 48", "500 bytes")


def test_values_above_the_limit_of_a_header() -> None:
    """A value that the file holds and a header may not is told from one that it does not hold."""
    data = join([entry("k", TEXT, struct.pack("<Q", 2**25))], [], 0)
    for size, limit in ((2**26, ", the limit of a header is 33554432"), (2**25 - 1, "")):
        with pytest.raises(CheckpointError) as caught:
            gguf.parse_header(io.BytesIO(data), size, "f.gguf")
        assert str(caught.value) == wrong(
            f"the value of k takes 33554432 bytes from byte 45 of {size}{limit}",
            "it to end in the file: it is truncated or damaged",
        )


@pytest.mark.parametrize(
    ("shape", "fits"), [((3, 4), True), ((12,), True), ((1, 12, 1), True), ((13,), False),
                        ((2, 5), False), ((), False)],
)  # fmt: skip
def test_shapes_of_a_tensor_in_its_model(shape: tuple[int, ...], fits: bool) -> None:
    value = struct.pack(f"<IQ{len(shape)}i", INT, len(shape), *shape)
    data = join([entry("comfy.gguf.orig_shape.a", LIST, value)], [info("a", (2, 6), 0, 0)], 48)
    if fits:
        assert parse(data)[0]["a"].shape == shape
        return
    assert refuse(data) == wrong(
        f"comfy.gguf.orig_shape.a is {list(shape)}",
        "a shape of 12 numbers, as tensor a has them",
    )


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (4, "Q4_2, which ggml removed"), (9, "Q8_1, a form of inputs"),
        (33, "Q4_0_8_8, which ggml removed"), (41, "Q1_0"), (5, "Q4_3, which ggml removed"),
        (42, "which is unknown here"),
    ],
)  # fmt: skip
def test_types_that_nothing_decodes(kind: int, what: str) -> None:
    found = refuse(join([], [info("a", (32,), kind, 0)], 64))
    assert found.startswith(
        f"f.gguf: tensor a is of the GGUF type {kind}, {what}: expected one of F32, F16, Q4_0, "
    )
    assert found.endswith(", MXFP4, NVFP4. Name a file of one of these, such as Q8_0 or Q4_K_M")


@pytest.mark.parametrize(
    ("shape", "nbytes"), [((3, 64), 204), ((32,), 34), ((0, 32), 0), ((3, 48), -1), ((), -1)]
)
def test_bytes_of_blocks(shape: tuple[int, ...], nbytes: int) -> None:
    data = join([], [info("a", shape, 8, 0)], 256)
    if nbytes >= 0:
        assert parse(data)[0]["a"].nbytes == nbytes
        return
    assert refuse(data) == wrong(f"tensor a is Q8_0 {list(shape)}", "rows of whole blocks of 32")


# --- files -----------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    errors = [OSError(5, "Input/output error"), OSError("odd")]

    def fail(*_: Any, **__: Any) -> Any:
        raise errors[0]

    monkeypatch.setattr(Path, "open", fail)
    for why in ("Input/output error", "odd"):
        with pytest.raises(CheckpointError) as caught:
            gguf.read_header(path)
        assert str(caught.value) == f"{path}: cannot be read: {why}"
        errors.pop(0)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m-00001-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        ("M-00001-OF-00001.GGUF", ["M-00001-OF-00001.GGUF"]),
        ("m.gguf", ["m.gguf"]),
        ("m-0001-of-0002.gguf", ["m-0001-of-0002.gguf"]),
        ("b/m-00001-of-00001.gguf", ["b/m-00001-of-00001.gguf"]),
    ],
)
def test_parts_of_a_file(name: str, found: list[str]) -> None:
    """Other models' parts, whose names sort before and after, are none of them."""
    names = [
        "z-00001-of-00001.gguf", "m-00002-of-00002.gguf", "m-00001-of-00002.gguf",
        "a-00001-of-00001.gguf", "m.gguf", "M-00001-OF-00001.GGUF", "b/m-00001-of-00001.gguf",
    ]  # fmt: skip
    assert gguf.list_shards(name, names) == found


def test_checkpoints_among_names() -> None:
    names = ["b.gguf", "m-00002-of-00002.gguf", "m-00001-of-00002.gguf", "x.txt", "a.GGUF"]
    assert gguf.list_wholes(names) == {
        "a.GGUF": ["a.GGUF"],
        "b.gguf": ["b.gguf"],
        "m-00001-of-00002.gguf": ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
    }


@pytest.mark.parametrize(
    ("stem", "quantization", "fits"),
    [
        ("x-Q8_0", "q8_0", True), ("x.Q8_0", "Q8_0", True), ("x Q8_0", "Q8_0", True),
        ("x_Q8_0", "Q8_0", True), ("xQ8_0", "Q8_0", False), ("Q8_0", "Q8_0", True),
        ("x-Q4_K_XL", "Q4_K", True), ("x-Q4_K_XLS", "Q4_K", False), ("x-Q4_K_S-v2", "Q4_K", False),
        ("x-Q8_0-00001-of-00001", "Q8_0", True), ("x-Q8.0", "Q8_0", False),
    ],
)  # fmt: skip
def test_quantizations_in_names(stem: str, quantization: str, fits: bool) -> None:
    name = f"{stem}.gguf"
    assert gguf.find_quantized([name, "y.gguf"], quantization) == ([name] if fits else [])


def test_a_whole_name_counts_before_a_longer_one() -> None:
    names = ["x-Q4_K_S.gguf", "x-Q4_K.gguf"]
    assert gguf.find_quantized(names, "Q4_K") == ["x-Q4_K.gguf"]


FILE = join([], [info("a", (3,), 0, 0)], 12)


@pytest.mark.parametrize("above", ["", "+x", "x"])
def test_a_quantization_in_a_folder_of_any_name(tmp_path: Path, above: str) -> None:
    """A folder that sorts before `.` is entered as any other."""
    path = tmp_path / above / "m-Q8_0.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(FILE)
    assert open_weights(f"{tmp_path}:Q8_0", Hub()).files == (str(path),)


def test_quantizations_that_are_not_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for names, text_ in (
        ((), f"{folder}: no GGUF files of the quantization Q8_0: expected one; name a file, or another "
             "quantization: it has no .gguf file"),
        (("a-F16.gguf", "b.gguf"),
         f"{folder}: no GGUF files of the quantization Q8_0: expected one; name a file, or another "
         f"quantization:\n  {folder}/a-F16.gguf\n  {folder}/b.gguf"),
        (("c-Q8_0.gguf", "d-Q8_0.gguf"),
         f"{folder}: 2 GGUF files of the quantization Q8_0: expected one; name a file, or another "
         f"quantization:\n  {folder}/c-Q8_0.gguf\n  {folder}/d-Q8_0.gguf"),
    ):  # fmt: skip
        for name in names:
            (folder / name).write_bytes(FILE)
        with pytest.raises(CheckpointError) as caught:
            open_weights(f"{folder}:Q8_0", Hub())
        assert str(caught.value) == text_


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_folder_of_some_gguf_files(tmp_path: Path, count: int) -> None:
    names = [f"{number}.gguf" for number in range(count)]
    for name in names:
        (tmp_path / name).write_bytes(FILE)
    if count == 1:
        assert open_weights(str(tmp_path), Hub()).files == (str(tmp_path / "0.gguf"),)
        return
    listed = "".join(f"\n  {tmp_path}/{name}" for name in names)
    with pytest.raises(CheckpointError, match=re.escape(listed) + r"\Z") as caught:
        open_weights(str(tmp_path), Hub())
    assert str(caught.value).startswith(
        f"{tmp_path}: {count} GGUF files, name one by its quantization as {tmp_path}:Q8_0; name one of "
        "them:"
    )


# --- what is written and read ----------------------------------------------------------------


def test_a_file_that_is_written(tmp_path: Path) -> None:
    """Every byte: names in order, tensors at multiples of 32, dimensions fastest first."""
    path = tmp_path / "x.gguf"
    blocks = torch.arange(68, dtype=torch.uint8).reshape(2, 34)
    tensors = {
        "b.weight": blocks,
        "a.bias": torch.tensor([1.5, -2.0, 3.0]).half(),
        "c.weight": torch.tensor([[1.0, 2.0, 4.0]]).half(),
    }
    gguf_writer.write_file(path, tensors, {"b.weight": "Q8_0"}, {"k": "v", "n": 70000})
    head = b"GGUF" + struct.pack("<IQQ", 3, 3, 3)
    head += entry("k", 8, text("v")) + entry("n", 4, struct.pack("<I", 70000))
    head += entry("general.quantization_version", 4, struct.pack("<I", 2))
    head += info("a.bias", (3,), 0, 0) + info("b.weight", (2, 32), 8, 32)
    head += info("c.weight", (1, 3), 1, 128)
    data = struct.pack("<fff", 1.5, -2.0, 3.0).ljust(32, b"\0")
    data += bytes(range(68)).ljust(96, b"\0") + struct.pack("<eee", 1, 2, 4).ljust(32, b"\0")
    assert path.read_bytes() == head.ljust(-(-len(head) // 32) * 32, b"\0") + data


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind"),
    [
        ("a.weight", (2, 3), torch.bfloat16, "BF16"),
        ("a.weight", (2, 3), torch.float16, "F16"),
        ("a.weight", (2,), torch.bfloat16, "F32"),
        ("a.weight", (2, 3, 1), torch.bfloat16, "F32"),
        ("a.bias", (2, 3), torch.bfloat16, "F32"),
    ],
)
def test_dtypes_of_plain_tensors(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> None:
    found, size, data = gguf_writer.describe(name, torch.ones(shape, dtype=dtype), None)
    assert (found, size, data.shape) == (kind, shape, shape)
    assert data.dtype == (dtype if kind != "F32" else torch.float32)


@pytest.mark.parametrize(
    ("kind", "size", "columns"), [("Q8_0", 34, 32), ("Q4_K", 144, 256), ("NVFP4", 36, 64)]
)
def test_shapes_of_blocks(kind: str, size: int, columns: int) -> None:
    blocks = torch.zeros(5, 3 * size, dtype=torch.uint8)
    assert gguf_writer.describe("a.weight", blocks, kind) == (kind, (5, 3 * columns), blocks)


def open_bytes(path: Path, data: bytes) -> Checkpoint:
    path.write_bytes(data)
    tensors, metadata = gguf.read_header(path)
    return Checkpoint(str(path), (str(path),), tensors, metadata)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    """Only what is not aligned to its items is copied."""
    key = entry("general.alignment", U32, struct.pack("<I", 2))
    infos = [
        info("a", (3,), 1, 0),
        info("b", (2,), 0, 6),
        info("c", (5,), 24, 14),
        info("d", (1,), 0, 20),
    ]
    head = join([key], infos, 0, align=2)
    assert len(head) == 190
    data = (
        head
        + struct.pack("<eee", 1, 2, 4)
        + struct.pack("<ff", 0.5, -8)
        + bytes([1, 2, 3, 4, 5, 0])
    )
    data += struct.pack("<f", 32)
    checkpoint = open_bytes(tmp_path / "x.gguf", data)
    starts = {name: header.start for name, header in checkpoint.tensors.items()}
    with TensorReader(checkpoint, "cpu") as reader:
        got = {name: reader.read(name) for name in "abcd"}
        again = reader.read("c")
    assert {name: tensor.tolist() for name, tensor in got.items()} == {
        "a": [1.0, 2.0, 4.0],
        "b": [0.5, -8.0],
        "c": [1, 2, 3, 4, 5],
        "d": [32.0],
    }
    base = again.untyped_storage().data_ptr()
    copied = {n for n, tensor in got.items() if tensor.untyped_storage().data_ptr() != base}
    assert starts == {"a": 190, "b": 196, "c": 204, "d": 210}
    assert copied == {"d"}


@pytest.mark.parametrize(
    ("shape", "kind", "number", "found"),
    [
        ((2, 64), "Q8_0", 8, (2, 68)),
        ((3, 1, 32), "Q8_0", 8, (3, 1, 34)),
        ((5, 256), "Q4_K", 12, (5, 144)),
    ],
)
def test_blocks_are_read_as_bytes(
    tmp_path: Path, shape: tuple[int, ...], kind: str, number: int, found: tuple[int, ...]
) -> None:
    size = torch.Size(found).numel()
    data = join([], [info("a.weight", shape, number, 0)], 0) + bytes(n % 251 for n in range(size))
    checkpoint = open_bytes(tmp_path / "x.gguf", data)
    assert checkpoint.tensors["a.weight"].dtype == kind
    with TensorReader(checkpoint, "cpu") as reader:
        got = reader.read("a.weight")
    assert got.shape == found
    assert got.flatten().tolist() == [n % 251 for n in range(size)]


def test_blocks_whose_model_has_other_rows(tmp_path: Path) -> None:
    """A tensor that was given other dimensions has no rows of whole blocks: its bytes are flat."""
    own = entry("comfy.gguf.orig_shape.a", LIST, struct.pack("<IQii", INT, 2, 4, 16))
    data = join([own], [info("a", (2, 32), 8, 0)], 0) + bytes(range(68))
    checkpoint = open_bytes(tmp_path / "x.gguf", data)
    with TensorReader(checkpoint, "cpu") as reader:
        assert reader.read("a").tolist() == list(range(68))
