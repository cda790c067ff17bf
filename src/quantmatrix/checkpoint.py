"""Checkpoint: what a set of weight files is, read from headers and JSON, not from weights.

A safetensors file starts with eight bytes, the little-endian length of a JSON header, then the
header: tensor names with dtype, shape and byte range, and `__metadata__` with strings. What the
files say about their quantization may stand in four places: config.json beside them
(`quantization_config`), the header's metadata (`_quantization_metadata`, `quantization_config`), a
description file (`quant_model_description*.json`), or `hf_quant_config.json`. Two places that
disagree about one key are an error. ComfyUI's files may say it in small tensors, a fifth place
(`quantmatrix.layer_lists`).
"""

from __future__ import annotations

import json
import math
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from quantmatrix import strict_json
from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote, quote_json
from quantmatrix.strict_json import JsonError, NotJsonError

ITEM_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
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
    b"GGUF": "a GGUF file, which no quant family takes: name a .safetensors file, or let diffusers "
    "write plain weights (from_single_file, then dequantize() and save_pretrained())",
    b"<": "a web page, saved in place of the file: download the file itself",
    b"{": "JSON: name the .safetensors file, or the .safetensors.index.json of its shards",
}
"""First bytes of files that are often taken for safetensors, and what to do about them."""

QUANTIZATION_KEYS = ("quantization_config", "text_config.quantization_config", "compression_config")
"""Where one config.json may describe the quantization, best first."""
HEADER_KEYS = ("_quantization_metadata", "quantization_config")
"""Where a header may describe the quantization, best first; both hold JSON."""
JSON_KEYS = (*HEADER_KEYS, "config")
"""Keys of a header whose values are read, and are JSON objects; `config` is the model's own."""
METHOD_KEYS = ("quant_method", "quant_algo", "method")
"""Keys of which a complete description of a quantization has at least one."""


@dataclass(frozen=True)
class Hub:
    """Where hub ids and the guide's placeholder paths are looked up."""

    cache_dir: str | None = None
    """A hub cache folder; None: the user's own."""
    offline: bool = False
    local_root: str | None = None
    """Folder whose `path/to/...` stands in for paths that begin with /path/to/."""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a header describes it; dtype in safetensors spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    stored_name: str = ""
    """Its name in the file, where that has a prefix that was taken off (`name_prefixes`)."""

    @property
    def on_disk(self) -> str:
        """Its name in the file."""
        return self.stored_name or self.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


Header = tuple[dict[str, TensorHeader], dict[str, str]]
"""Tensors by name, and the strings of `__metadata__`."""


@dataclass(frozen=True)
class RemoteFiles:
    """Files of a hub repository that are not here yet, pinned to one commit."""

    repo: str
    commit: str
    files: tuple[str, ...]
    """Names in the repository."""
    revision: str = "main"
    """The branch, tag or commit that led to the commit."""

    def address(self, name: str) -> str:
        """How a file of the repository is named until it is here."""
        return f"hf://{self.repo}@{self.commit}/{name}"


@dataclass(frozen=True)
class Checkpoint:
    """A set of weight files and everything they say about themselves."""

    reference: str
    """What the user wrote."""
    files: tuple[str, ...]
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    config_file: str | None = None
    quantization: Mapping[str, Any] | None = None
    quantization_from: str | None = None
    description: Mapping[str, Any] | None = None
    description_file: str | None = None
    prefix: str = ""
    """What every tensor name of the transformer begins with in the files; it was taken off."""
    aside: Mapping[str, int] = field(default_factory=dict)
    """Tensors of other parts of a whole checkpoint, which are no part of this: number by prefix."""
    remote: RemoteFiles | None = None
    left_out: tuple[str, ...] = ()
    """Files of the folder that hold a LoRA: no part of the weights, and not applied."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Words for what the files leave open (`nibble_order`, `nvfp4_layout`), and `why` these."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.tensors.values())

    def layers(self) -> dict[str, frozenset[str]]:
        """Suffixes of every layer, a layer's name being what stands before the last dot.

        A tensor without a dot in its name belongs to no layer.
        """
        found: dict[str, set[str]] = {}
        for name in self.tensors:
            layer, dot, suffix = name.rpartition(".")
            if not dot:
                continue
            found.setdefault(layer, set()).add(suffix)
        return {layer: frozenset(suffixes) for layer, suffixes in found.items()}


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


def find_places(file: BinaryIO) -> dict[str, int]:
    """First byte of every tensor in an open safetensors file, by its name there."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    return {n: 8 + length + e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}


def read_contents(file: BinaryIO, names: Sequence[str]) -> dict[str, bytes]:
    """Bytes of small tensors of an open safetensors file, by name; one read for those together."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = strict_json.parse(file.read(min(length, HEADER_LIMIT)))
    spans = sorted((*header[name]["data_offsets"], name) for name in names)
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
    """A file that by its name is a pickle is never opened."""
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
    """(tensors, metadata) of a header's JSON; `data_bytes` is the size of what follows it."""
    try:
        entries = strict_json.parse(text, _pack_entry)
        strings = _take_metadata(entries)
        for name, entry in entries.items():
            _check_entry(name, entry)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is no valid JSON table of tensors ({error}): the file "
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
    """Tensors from (dtype, shape, (begin, end)) per name; sizes must fit and leave no gap."""
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
    place, before = 0, "the start of the data"
    for name in sorted(ranges, key=lambda name: ranges[name][2]):
        begin, end = ranges[name][2]
        if begin != place:
            what = "overlap" if begin < place else "leave a gap"
            raise CheckpointError(
                f"{file}: {before} and tensor {name} {what}: it begins at byte {begin}, expected "
                f"{place}; the header is damaged"
            )
        place, before = end, f"tensor {name}"
    if data_bytes is not None and place != data_bytes:
        raise CheckpointError(
            f"{file}: the header describes {place} bytes of tensors, the file holds {data_bytes}: "
            "it is truncated or damaged; download it again"
        )
    return tensors


def _count_bytes(bits: int) -> str:
    """Bytes as a number; too large ones, which no float holds, in words."""
    return f"{bits / 8:g}" if bits < 2**100 else "more than 2**97"


def merge_headers(headers: Mapping[str, Header]) -> Header:
    """Tensors and metadata of several files, by file name; a tensor in two files is an error.

    Descriptions of the quantization are joined (`merge_blocks`); of other metadata the first file
    that has a key counts. A value that is no JSON where JSON belongs is an error (`JSON_KEYS`).
    """
    tensors: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    origin: dict[str, str] = {}
    for file, (found, strings) in headers.items():
        for name, header in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].file} and in {header.file}: these are "
                    "two checkpoints, not shards of one; name one file"
                )
            tensors[name] = header
        for key, value in strings.items():
            check_json(key, value, file)
            if key in HEADER_KEYS and key in metadata and metadata[key] != value:
                here = (parse_block(metadata[key]), f"{origin[key]}: {key}")
                there = (parse_block(value), f"{file}: {key}")
                metadata[key] = json.dumps(merge_blocks(*here, *there))
            metadata.setdefault(key, value)
            origin.setdefault(key, file)
    return tensors, metadata


def check_json(key: str, text: str, file: str) -> None:
    """Refuse a header's value that is no JSON object where one belongs; empty ones say nothing."""
    if key not in JSON_KEYS or text.strip() in ("", "null"):
        return
    try:
        found: Any = strict_json.parse(text)
        what = f"a JSON {type(found).__name__}"
    except JsonError as error:
        found, what = None, f"no JSON ({error})"
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file}: {key} in the header is {quote(text, 120)!r}, {what}: expected a JSON object. What "
            "it was to declare is unknown: correct it, or write the file again without it"
        )


def parse_block(text: str) -> dict[str, Any]:
    """A JSON object written as a metadata string; empty when it is none."""
    try:
        block = strict_json.parse(text)
    except NotJsonError:
        return {}
    except JsonError as error:
        raise CheckpointError(
            f"a JSON text in the header cannot be used: {error}; the file is damaged"
        ) from error
    return block if isinstance(block, dict) else {}


def merge_blocks(
    first: Mapping[str, Any], place: str, second: Mapping[str, Any], other: str, path: str = ""
) -> dict[str, Any]:
    """Two descriptions of one quantization as one; a key that they disagree about is an error.

    Objects are joined key by key; lists of the same entries agree in any order.
    """
    joined = dict(first)
    for key, value in second.items():
        mine = first.get(key, value)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            joined[key] = merge_blocks(mine, place, value, other, f"{path}{key}.")
        elif _sort_list(mine) == _sort_list(value):
            joined[key] = mine
        else:
            raise CheckpointError(
                f"{place} and {other} disagree about {path}{key} of the quantization: "
                f"{quote_json(mine, 120)} and {quote_json(value, 120)}; one of the two is stale, "
                "correct or remove it"
            )
    return joined


def _sort_list(value: Any) -> Any:
    return sorted(map(json.dumps, value)) if isinstance(value, list) else value


def find_block(
    config: Mapping[str, Any] | None,
    config_file: str | None,
    metadata: Mapping[str, str],
    files: Sequence[str],
    nested: tuple[Mapping[str, Any], str] | None = None,
) -> tuple[dict[str, Any] | None, str | None]:
    """(quantization block, where it was found), config.json and headers agreeing.

    `nested` is the content and name of an hf_quant_config.json, the last source.
    """
    block, place = find_config_block(config or {}, config_file or "config.json")
    header, where = find_header_block(metadata, files[0] if files else "header")
    if block and header:
        return merge_blocks(block, place, header, where), place
    if block or header:
        return (block, place) if block else (header, where)
    if nested is not None:
        content, where = nested
        inner = content.get("quantization", content)
        if isinstance(inner, Mapping) and inner.get("quant_algo"):
            block = {"quant_method": "modelopt", **inner}
            if "exclude_modules" in block:
                block["ignore"] = block.pop("exclude_modules")
            return block, where
    return None, None


def find_config_block(config: Mapping[str, Any], file: str) -> tuple[dict[str, Any], str]:
    """(block, place) that a config.json describes its quantization with; empty when it does not."""
    for key in QUANTIZATION_KEYS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and value:
            return dict(value), f"{file}: {key}"
        if value:
            raise CheckpointError(
                f"{file}: {key} is {quote_json(value, 120)}: expected a JSON object"
            )
    return {}, ""


def find_header_block(metadata: Mapping[str, str], file: str) -> tuple[dict[str, Any], str]:
    """(block, place) that the headers describe the quantization with; empty when they do not.

    `_quantization_metadata` counts. One that only lists layers is completed by
    `quantization_config`, which otherwise counts where the first is absent.
    """
    for key in HEADER_KEYS:
        check_json(key, metadata.get(key, ""), file)
    block, other = (parse_block(metadata.get(key, "")) for key in HEADER_KEYS)
    first, second = (f"{file}: {key}" for key in HEADER_KEYS)
    if any(key in block for key in METHOD_KEYS):
        return block, first
    if block and other:
        return merge_blocks(block, first, other, second), first
    return (block, first) if block else (other, second if other else "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError naming the file.

    Where the path leads is looked at by the folder that gives it.
    """
    try:
        content = strict_json.parse(strict_json.read_bytes(path, Path(path.absolute().anchor)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
