"""Headers of safetensors files: names, dtypes, shapes and ranges, every damage named."""

from __future__ import annotations

import math
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

from quantmatrix import strict_json
from quantmatrix.checkpoints.dtypes import ITEM_BITS, count_bytes
from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, BinaryIO

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

HEADER_LIMIT = strict_json.LIMIT
"""Largest header in bytes that is read: the format allows 100 MB, real files have a few."""

MOST_DIMENSIONS = 64
"""More than any tensor library has."""

NEAR = 2**20
"""Bytes between two tensors that are rather read with them than asked for apart."""

FOREIGN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull` there",
    b"PK": "a zip archive, as torch.save writes it: pickles are refused, convert it first",
    b"\x80": "a pickle: it could run code when it is opened; convert it to safetensors first",
    b"GGUF": "a GGUF file, which is read under a name that ends in .gguf: rename it",
    b"<": "a web page, saved instead of the file: download the file itself",
    b"{": "JSON: name the .safetensors file, or the .safetensors.index.json of its shards",
}
"""First bytes of files that are often taken for safetensors, and what to do about them."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a header describes it; dtype in safetensors spelling, or a type of GGUF's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    stored_name: str = ""
    """Its name in the file, where that has a prefix that was taken off (`name_prefixes`)."""
    start: int | None = None
    """Its first byte in a GGUF file; None: the file's own header says it (safetensors)."""

    @property
    def on_disk(self) -> str:
        """Its name in the file."""
        return self.stored_name or self.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return count_bytes(self.dtype, math.prod(self.shape))


Header = tuple[dict[str, TensorHeader], dict[str, str]]
"""Tensors by name, and the strings of `__metadata__`."""


def read_header(path: str | Path) -> Header:
    """(tensors, metadata) of one safetensors file; raises CheckpointError for anything else."""
    path = Path(path)
    refuse_pickle(path)
    try:
        found = path.stat()
        special = not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode))
        if special:  # a pipe would be waited for, without an end
            raise CheckpointError(
                f"{path}: expected a safetensors file, this is a pipe or a device"
            )
        size = found.st_size
        with path.open("rb") as file:
            start = file.read(32)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else -1
            if not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise CheckpointError(_explain_no_header(path, start, length, size))
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_header(text, str(path), data_bytes=size - 8 - length)


def read_contents(file: BinaryIO, names: Sequence[str]) -> dict[str, bytes]:
    """Bytes of small tensors of an open safetensors file, by name; one read for those together."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = strict_json.parse(file.read(min(length, HEADER_LIMIT)), _pack_entry)
    spans = sorted((*header[name].data_offsets, name) for name in names)
    found: dict[str, bytes] = {}
    while spans:
        together = [spans.pop(0)]
        while spans and spans[0][0] - together[-1][1] <= NEAR:
            together.append(spans.pop(0))
        first, last = together[0][0], together[-1][1]
        file.seek(8 + length + first)
        content = file.read(last - first)
        found |= {name: content[begin - first : end - first] for begin, end, name in together}
    return found


def refuse_pickle(path: str | PurePath) -> None:
    """Raises CheckpointError for a file that by its name is a pickle, which is never opened."""
    if PurePath(path).suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: a pickle file can run code when it is opened, so it is refused; "
            "expected a .safetensors file: convert it with its own tool first"
        )


def _explain_no_header(path: Path, start: bytes, length: int, size: int) -> str:
    for foreign, why in FOREIGN_STARTS.items():
        if start.startswith(foreign):
            return f"{path}: expected a safetensors file, this is {why}"
    if length < 0:
        return f"{path}: {size} bytes are too few for a safetensors file: download it again"
    return (
        f"{path}: no complete safetensors header: it claims {length} bytes in a file of {size} "
        f"(the limit is {HEADER_LIMIT}); the file is truncated or of another format: download it "
        "again"
    )


def parse_header(text: bytes, file: str, *, data_bytes: int | None = None) -> Header:
    """(tensors, metadata) of a header's JSON; `data_bytes` is how many bytes follow it.

    Raises CheckpointError for a text that is no table of tensors, or whose ranges do not fit.
    """
    try:
        entries = strict_json.parse(text, _pack_entry)
        strings = _take_metadata(entries)
        for name, entry in entries.items():
            _check_entry(name, entry)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is not a valid JSON table of tensors ({error}): the file "
            "is damaged or of another format; download it again"
        ) from error
    return check_ranges(entries, file, data_bytes), strings


class _Entry(NamedTuple):
    """An entry of a header; small, since a header may have a hundred thousand."""

    dtype: str
    shape: tuple[Any, ...]
    data_offsets: tuple[Any, ...]


def _pack_entry(table: dict[str, Any]) -> Any:
    """The entry that an object describes; an object of another kind as it is."""
    get = table.get
    dtype, shape, offsets = get("dtype"), get("shape"), get("data_offsets")
    if type(dtype) is str and type(shape) is list and type(offsets) is list:
        return _Entry(sys.intern(dtype), tuple(shape), tuple(offsets))
    return table


def _take_metadata(entries: Any) -> dict[str, str]:
    """The strings of `__metadata__`, which is taken out of a header's entries."""
    if not isinstance(entries, dict):
        raise TypeError(f"it is {quote(entries)}")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise TypeError(f"__metadata__ is {quote(metadata)}")
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}


def _check_entry(name: str, entry: Any) -> None:
    """TypeError for an entry that describes no tensor."""
    if isinstance(entry, _Entry):
        return
    absent = [
        repr(key) for key in _Entry._fields if not isinstance(entry, dict) or key not in entry
    ]
    what = f"has no {', '.join(absent)}" if absent else "is of wrong types"
    raise TypeError(f"{quote(name)} is {quote(entry)}: it {what}")


def check_ranges(
    ranges: Mapping[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]],
    file: str,
    data_bytes: int | None,
) -> dict[str, TensorHeader]:
    """Tensors from (dtype, shape, (begin, end)) per name; ranges are bytes of the data.

    Raises CheckpointError for an unknown dtype, a bad shape, a range of another size than the
    tensor's, an overlap or a gap, and a sum other than `data_bytes` (None: not known).
    """
    tensors: dict[str, TensorHeader] = {}
    for name, (dtype, shape, offsets) in ranges.items():
        if dtype not in ITEM_BITS:
            raise CheckpointError(
                f"{file}: tensor {name} has the dtype {quote(dtype)}; known: {', '.join(ITEM_BITS)}"
            )
        if len(shape) > MOST_DIMENSIONS:
            raise CheckpointError(
                f"{file}: tensor {name} has {len(shape)} dimensions, expected at most "
                f"{MOST_DIMENSIONS}; the header is damaged"
            )
        numbers = (*shape, *offsets)
        if len(offsets) != 2 or {*map(type, numbers)} != {int} or min(numbers) < 0:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {quote(shape)} and data_offsets {quote(offsets)}: "
                "expected whole numbers, two of them as offsets; the header is damaged"
            )
        tensors[name] = TensorHeader(name, dtype, shape, file)
        bits = math.prod(shape) * ITEM_BITS[dtype]
        if (offsets[1] - offsets[0]) * 8 != bits:
            raise CheckpointError(
                f"{file}: tensor {name} ({dtype} {quote(shape)}) needs {_count_bytes(bits)} bytes, "
                f"the header gives it {offsets[1] - offsets[0]}; the header is damaged"
            )
    position, before = 0, "the start of the data"
    for name in sorted(ranges, key=lambda name: ranges[name][2]):
        begin, end = ranges[name][2]
        if begin != position:
            what = "overlap" if begin < position else "leave a gap"
            raise CheckpointError(
                f"{file}: {before} and tensor {name} {what}: it begins at byte {begin}, expected "
                f"{position}; the header is damaged"
            )
        position, before = end, f"tensor {name}"
    if data_bytes is not None and position != data_bytes:
        raise CheckpointError(
            f"{file}: the header describes {position} bytes of tensors, the file holds {data_bytes}: "
            "it is truncated or damaged; download it again"
        )
    return tensors


def _count_bytes(bits: int) -> str:
    """Bytes as a number; too large ones, which no float holds, as text."""
    return f"{bits / 8:g}" if bits < 2**100 else "more than 2**97"
