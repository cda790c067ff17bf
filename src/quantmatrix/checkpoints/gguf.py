"""GGUF: one file with metadata, tensors and blocks of codes, read without trusting a number in it.

| part | content |
| ---- | ------- |
| start | `GGUF`, version (uint32, 2 or 3), number of tensors and of metadata entries (uint64) |
| metadata | key, type (uint32) and value of each entry; strings are a length (uint64) and UTF-8 |
| tensors | name, number of dimensions (uint32), the dimensions (uint64, fastest first), type (uint32), |
|         | and the tensor's distance from the start of the data (uint64) |
| data | begins, and so does every tensor in it, at a multiple of `general.alignment` (32) |

A tensor [N, K] of a block type holds N rows of K / columns blocks, each with the codes and the
scales of its columns (`scheme.BLOCKS`; what they mean stands in `kernels.gguf_arithmetic`). Files of
image models are written by ComfyUI-GGUF and stable-diffusion.cpp. They store a model's original
names, `general.architecture` says which (`flux`, `wan` ...), and a tensor that was given other
dimensions keeps its own as `comfy.gguf.orig_shape.NAME`.

Of a hostile file nothing is believed: counts and lengths have limits, a value that ends behind the
file is an error before memory is taken for it, and every tensor lies in the file right behind the
one before, as ggml itself asks. Source: the GGUF specification and `gguf.cpp` of ggml.
"""

from __future__ import annotations

import math
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.dtypes import count_bytes
from quantmatrix.checkpoints.header import (
    FOREIGN_STARTS,
    HEADER_LIMIT,
    MOST_DIMENSIONS,
    TensorHeader,
)
from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote
from quantmatrix.scheme import BLOCKS

if TYPE_CHECKING:
    from typing import BinaryIO

    from quantmatrix.checkpoints.header import Header

ENDING = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
MOST_ALIGNMENT = 2**16
MOST_TENSORS, MOST_ENTRIES = 2**17, 2**16
LONGEST_NAME = 2**16 - 1
"""Bytes of a key or of a tensor's name, as the specification has it for keys."""
SHOWN = 64
"""Items of an array that are kept; a tokenizer has a hundred thousand."""
DEEPEST = 4
"""Arrays within each other."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
"""How numbers of the metadata are packed, by their type."""
STRING, ARRAY = 8, 9
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Names of the types of tensors that are read, by their number in a file."""
FOREIGN_TYPES = {
    4: "Q4_2, which ggml removed", 5: "Q4_3, which ggml removed",
    9: "Q8_1, a form of inputs", 15: "Q8_K, a form of inputs",
    31: "Q4_0_4_4, which ggml removed", 32: "Q4_0_4_8, which ggml removed",
    33: "Q4_0_8_8, which ggml removed", 36: "IQ4_NL_4_4, which ggml removed",
    37: "IQ4_NL_4_8, which ggml removed", 38: "IQ4_NL_8_8, which ggml removed",
    41: "Q1_0",
}  # fmt: skip
"""Types that nothing decodes: codes rearranged for one processor, or of activations."""
ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux",
    "WanTransformer3DModel": "wan",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "lumina2",
}
"""`general.architecture` by the class of a transformer; ComfyUI-GGUF's names."""
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)


def is_gguf(name: str) -> bool:
    """Whether a file is one of these, by its name."""
    return name.lower().endswith(ENDING)


def read_header(path: str | Path) -> Header:
    """(tensors, metadata) of one GGUF file; raises CheckpointError for anything else.

    Values of the metadata are texts: strings as they are, numbers as Python writes them, arrays as
    `[1, 2]`, and long ones by their length.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise CheckpointError(f"{path}: expected a GGUF file, this is a pipe or a device")
        with path.open("rb") as file:
            return parse_header(file, found.st_size, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_header(file: BinaryIO, size: int, name: str) -> Header:
    """(tensors, metadata) of an open GGUF file of so many bytes, called `name` in errors.

    Raises CheckpointError for a file that is damaged or of another format.
    """
    source = _Source(file, size, name)
    count, entries = _read_start(source)
    metadata: dict[str, str] = {}
    for _ in range(entries):
        key = source.read_string(LONGEST_NAME, "a key of the metadata")
        if key in metadata:
            raise source.wrong(f"the metadata has {quote(key)} twice", "each key once")
        metadata[key] = _read_value(source, source.read_number("<I"), key)
    infos = [_read_tensor(source) for _ in range(count)]
    return _locate(source, infos, metadata), metadata


@dataclass
class _Source:
    """An open file, read forward within its size and within what a header may have."""

    file: BinaryIO
    size: int
    name: str
    position: int = field(default=0, init=False)

    def take(self, count: int, what: str) -> bytes:
        """The next bytes; CheckpointError where the file, or a header's limit, ends before."""
        if count > min(self.size, HEADER_LIMIT) - self.position:
            inside = self.position + count <= self.size
            limit = f", the limit of a header is {HEADER_LIMIT}" if inside else ""
            raise self.wrong(
                f"{what} takes {count} bytes from byte {self.position} of {self.size}{limit}",
                "it to end in the file: it is truncated or damaged",
            )
        data = self.file.read(count)
        if len(data) != count:
            raise self.wrong(f"it ends at byte {self.position + len(data)}", f"{self.size} bytes")
        self.position += count
        return data

    def read_number(self, form: str) -> Any:
        """A number of the header, packed in this way."""
        return struct.unpack(form, self.take(struct.calcsize(form), "a number"))[0]

    def read_string(self, most: int, what: str) -> str:
        """A string of at most so many bytes."""
        length = self.read_number("<Q")
        if length > most:
            raise self.wrong(f"{what} has {length} bytes", f"at most {most}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 ({error.reason})", "a text") from error

    def wrong(self, found: str, expected: str) -> CheckpointError:
        """The error about something in the header."""
        return CheckpointError(
            f"{self.name}: in the GGUF header {found}: expected {expected}; download the file again"
        )


def _read_start(source: _Source) -> tuple[int, int]:
    """(number of tensors, number of metadata entries); CheckpointError for another format."""
    start = source.file.read(4)
    source.position = len(start)
    if start != MAGIC:
        start += source.file.read(28)
        known = (why for foreign, why in FOREIGN_STARTS.items() if start.startswith(foreign))
        what = next(known, f"something that begins with {start[:8]!r}")
        raise CheckpointError(
            f"{source.name}: expected a GGUF file, this is {what}. Name another file, or download "
            "it again"
        )
    version = source.read_number("<I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        what = "a file for big-endian machines" if swapped else f"version {version}"
        raise source.wrong(f"the version says {what}", "version 2 or 3, little-endian")
    count, entries = source.read_number("<Q"), source.read_number("<Q")
    for number, most, what in (
        (count, MOST_TENSORS, "tensors"),
        (entries, MOST_ENTRIES, "metadata entries"),
    ):
        if number > most:
            raise source.wrong(f"it announces {number} {what}", f"at most {most}")
    return count, entries


def _read_value(source: _Source, kind: int, key: str, depth: int = 0) -> str:
    """A value of the metadata as a text; of a long array the length alone is kept."""
    if kind in SCALARS:
        return str(source.read_number(SCALARS[kind]))
    if kind == STRING:
        return source.read_string(HEADER_LIMIT, f"the value of {quote(key)}")
    if kind != ARRAY or depth == DEEPEST:
        what = f"is of type {kind}" if kind != ARRAY else f"holds arrays {DEEPEST} deep"
        raise source.wrong(f"the value of {quote(key)} {what}", "a number, a text or an array")
    inner, count = source.read_number("<I"), source.read_number("<Q")
    if inner in SCALARS:
        form = SCALARS[inner]
        data = source.take(count * struct.calcsize(form), f"the value of {quote(key)}")
        if count > SHOWN:
            return f"[{count} numbers]"
        return str([number for (number,) in struct.iter_unpack(form, data)])
    if count > source.size:  # each item takes eight bytes at least
        raise source.wrong(f"the value of {quote(key)} has {count} items", "as many as fit")
    shown = []
    for number in range(count):
        item = _read_value(source, inner, key, depth + 1)
        if number < SHOWN:
            shown.append(item)
    return str(shown) if count <= SHOWN else f"[{count} items]"


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor as its entry says; dimensions in the order of torch."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _read_tensor(source: _Source) -> _Info:
    """The entry of one tensor; CheckpointError for dimensions that no file has."""
    name = source.read_string(LONGEST_NAME, "a tensor's name")
    count = source.read_number("<I")
    if count > MOST_DIMENSIONS:
        raise source.wrong(
            f"tensor {quote(name)} has {count} dimensions", f"at most {MOST_DIMENSIONS}"
        )
    sizes = struct.unpack(f"<{count}Q", source.take(8 * count, f"the shape of {quote(name)}"))
    return _Info(name, sizes[::-1], source.read_number("<I"), source.read_number("<Q"))


def _locate(
    source: _Source, infos: Iterable[_Info], metadata: Mapping[str, str]
) -> dict[str, TensorHeader]:
    """Tensors by name, each with its first byte; CheckpointError where they do not fit the file."""
    alignment = _read_alignment(source, metadata)
    data = -(-source.position // alignment) * alignment
    position = 0
    tensors: dict[str, TensorHeader] = {}
    for info in infos:
        shown = quote(info.name)
        if info.name in tensors:
            raise source.wrong(f"tensor {shown} appears twice", "each name once")
        size = _count_bytes(source, info)
        if info.offset != position:
            raise source.wrong(
                f"tensor {shown} begins at byte {info.offset} of the data",
                f"{position}, where the one before ends",
            )
        if data + position + size > source.size:
            raise source.wrong(
                f"tensor {shown} ends at byte {data + position + size} of {source.size}",
                "it in the file: it is truncated",
            )
        shape = _find_shape(source, info, metadata)
        tensors[info.name] = TensorHeader(
            info.name, TYPES[info.kind], shape, source.name, start=data + position
        )
        position += -(-size // alignment) * alignment
    return tensors


def _read_alignment(source: _Source, metadata: Mapping[str, str]) -> int:
    """What the data, and every tensor in it, begins at a multiple of."""
    text = metadata.get(ALIGNMENT_KEY, str(ALIGNMENT))
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 0 < number <= MOST_ALIGNMENT or number & (number - 1):
        raise source.wrong(
            f"{ALIGNMENT_KEY} is {quote(text)}", f"a power of two up to {MOST_ALIGNMENT}"
        )
    return number


def _count_bytes(source: _Source, info: _Info) -> int:
    """Bytes of a tensor; CheckpointError for a type that is not read, and for parts of a block."""
    shown = quote(info.name)
    if info.kind not in TYPES:
        what = FOREIGN_TYPES.get(info.kind, "which is unknown here")
        raise CheckpointError(
            f"{source.name}: tensor {shown} is of the GGUF type {info.kind}, {what}: expected one of "
            f"{', '.join(TYPES.values())}. Name a file of one of these, such as Q8_0 or Q4_K_M"
        )
    kind = TYPES[info.kind]
    columns = BLOCKS.get(kind, (1, 0))[0]
    if kind in BLOCKS and (not info.shape or info.shape[-1] % columns):
        raise source.wrong(
            f"tensor {shown} is {kind} {list(info.shape)}", f"rows of whole blocks of {columns}"
        )
    return count_bytes(kind, math.prod(info.shape))


def _find_shape(source: _Source, info: _Info, metadata: Mapping[str, str]) -> tuple[int, ...]:
    """A tensor's shape in its model: its own, unless the metadata has another one of that size."""
    text = metadata.get(f"{ORIGINAL_SHAPE}{info.name}")
    if text is None:
        return info.shape
    found = re.fullmatch(r"\[\d{1,18}(, \d{1,18}){0,15}\]", text)
    shape = tuple(map(int, text[1:-1].split(", "))) if found else ()
    if math.prod(shape) != math.prod(info.shape):
        raise source.wrong(
            f"{ORIGINAL_SHAPE}{quote(info.name)} is {quote(text)}",
            f"a shape of {math.prod(info.shape)} numbers, as tensor {quote(info.name)} has them",
        )
    return shape


def list_shards(name: str, names: Iterable[str]) -> list[str]:
    """The files that a file is one part of, itself among them, as llama.cpp splits large ones."""
    part = SHARD.search(name)
    if part is None:
        return [name]
    whole = SHARD.sub("", name)
    return sorted(other for other in names if SHARD.search(other) and SHARD.sub("", other) == whole)


def list_wholes(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of every checkpoint among some names, by its first file."""
    wholes: dict[str, list[str]] = {}
    for name in sorted(filter(is_gguf, names)):
        wholes.setdefault(SHARD.sub("", name), []).append(name)
    return {parts[0]: parts for parts in wholes.values()}


def find_quantized(names: Iterable[str], quantization: str) -> list[str]:
    """First files of the checkpoints whose names end in a quantization, any case.

    `Q4_K` finds `x-Q4_K.gguf` and otherwise `x-Q4_K_S.gguf`, too.
    """
    stems = {first: PurePosixPath(SHARD.sub("", first)).stem for first in list_wholes(names)}
    for tail in ("", "(_[A-Z]{1,2})?"):
        pattern = re.compile(rf"(^|[-_. ]){re.escape(quantization)}{tail}$", re.IGNORECASE)
        if found := [first for first, stem in stems.items() if pattern.search(stem)]:
            return found
    return []
