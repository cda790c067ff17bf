"""Checkpoint: what a set of weight files is, read from headers and JSON, never from tensors.

A safetensors file starts with eight bytes, the little-endian length of a JSON header, then the
header: tensor names with dtype, shape and byte range, and `__metadata__` with strings. What the
files say about their quantization may stand in four places: `quantization_config` of the config.json
beside them, the header's metadata (`_quantization_metadata`, else `quantization_config`), a
description file (`quant_model_description*.json`), or `hf_quant_config.json`. Two places that
disagree about one key are an error.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantmatrix.errors import CheckpointError

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER_LIMIT = 100 * 2**20
"""Largest header in bytes that the safetensors format allows."""

QUANTIZATION_KEYS = ("quantization_config", "text_config.quantization_config", "compression_config")
"""Where one config.json may describe the quantization, best first."""


@dataclass(frozen=True)
class Hub:
    """Where hub ids and the guide's placeholder paths are looked up."""

    cache_dir: str | None = None
    """A hub cache folder; None: the user's own."""
    offline: bool = False
    local_root: str | None = None
    """Folder whose `path/to/...` stands in for paths that begin with /path/to/."""
    revision: str | None = None


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a header describes it; dtype in safetensors spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class RemoteFiles:
    """Files of a hub repository that are not here yet, pinned to one commit."""

    repo: str
    commit: str
    files: tuple[str, ...]


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
    remote: RemoteFiles | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.tensors.values())

    def layers(self) -> dict[str, frozenset[str]]:
        """Suffixes of every layer, a layer's name being what stands before the last dot."""
        found: dict[str, set[str]] = {}
        for name in self.tensors:
            layer, _, suffix = name.rpartition(".")
            found.setdefault(layer, set()).add(suffix)
        return {layer: frozenset(suffixes) for layer, suffixes in found.items()}


def read_header(path: str | Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """(tensors, metadata) of one safetensors file; raises CheckpointError for anything else."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: a pickle file can run code when it is opened, so it is refused; "
            "expected a .safetensors file: convert it with its own tool first"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise CheckpointError(_explain_no_header(path, start, length, size))
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_header(text, str(path), data_bytes=size - 8 - length)


def _explain_no_header(path: Path, start: bytes, length: int, size: int) -> str:
    if start.startswith(b"version "):
        return f"{path}: this is a Git LFS pointer, not the file: run `git lfs pull` there"
    return (
        f"{path}: no complete safetensors header: it claims {length} bytes in a file of {size}; "
        "the file is truncated or of another format: download it again"
    )


def parse_header(
    text: bytes, file: str, *, data_bytes: int | None = None
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """(tensors, metadata) of a header's JSON; `data_bytes` is the size of what follows it."""
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        ranges = {
            name: (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is no valid JSON: {error}"
        ) from error
    tensors: dict[str, TensorHeader] = {}
    for name, (dtype, shape, (begin, end)) in ranges.items():
        if dtype not in ITEM_BITS:
            raise CheckpointError(f"{file}: tensor {name} has the unknown dtype {dtype}")
        header = TensorHeader(name, dtype, shape, file)
        if end - begin != header.nbytes:
            raise CheckpointError(
                f"{file}: tensor {name} ({dtype} {list(shape)}) needs {header.nbytes} bytes, "
                f"the header gives it {end - begin}"
            )
        tensors[name] = header
    last = max((end for _, _, (_, end) in ranges.values()), default=0)
    if data_bytes is not None and last != data_bytes:
        raise CheckpointError(
            f"{file}: the header describes {last} bytes of tensors, the file holds {data_bytes}: "
            "it is truncated or damaged; download it again"
        )
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def merge_headers(
    headers: Iterable[tuple[dict[str, TensorHeader], dict[str, str]]],
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Tensors and metadata of several files; a tensor in two files is an error."""
    tensors: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    for found, strings in headers:
        for name, header in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].file} and in {header.file}: these are "
                    "two checkpoints, not shards of one; name one file"
                )
            tensors[name] = header
        for key, value in strings.items():
            if key in ("quantization_config", "_quantization_metadata") and key in metadata:
                check_agreement(
                    parse_block(metadata[key]),
                    "an earlier file",
                    parse_block(value),
                    "a later file",
                )
            metadata.setdefault(key, value)
    return tensors, metadata


def parse_block(text: str) -> dict[str, Any]:
    """A JSON object written as a metadata string; empty when it is none."""
    try:
        block = json.loads(text)
    except ValueError:
        return {}
    return block if isinstance(block, dict) else {}


def check_agreement(
    first: Mapping[str, Any], first_place: str, second: Mapping[str, Any], second_place: str
) -> None:
    """Two descriptions of one quantization must not contradict each other."""
    for key in first.keys() & second.keys():
        if first[key] != second[key]:
            raise CheckpointError(
                f"{first_place} and {second_place} disagree about {key!r} of the quantization: "
                f"{json.dumps(first[key])[:120]} and {json.dumps(second[key])[:120]}"
            )


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
    block: dict[str, Any] = {}
    place: str | None = None
    for key in QUANTIZATION_KEYS:
        value: Any = config or {}
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and value:
            block, place = dict(value), f"{config_file}: {key}"
            break
    for key in ("_quantization_metadata", "quantization_config"):
        header = parse_block(metadata.get(key, ""))
        if header:
            where = f"{files[0] if files else 'header'}: {key}"
            if block:
                check_agreement(block, place or "", header, where)
            block, place = {**header, **block}, place or where
    if not block and nested is not None:
        content, where = nested
        inner = content.get("quantization", content)
        if isinstance(inner, Mapping) and inner:
            block = {"quant_method": "modelopt", **inner}
            if "exclude_modules" in block:
                block["ignore"] = block.pop("exclude_modules")
            place = where
    return (block, place) if block else (None, None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
