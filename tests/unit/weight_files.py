"""Safetensors files, indexes and hub caches for tests, made with the standard library alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantmatrix.checkpoints.dtypes import ITEM_BITS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def make_header(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A correct header of tensors that lie one after another."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * ITEM_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header


def join_file(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header (text, or data for JSON) and what follows it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_weights(
    path: Path, tensors: Tensors | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """A file of zeros; without tensors it holds one that is named after the file."""
    tensors = (
        {f"{path.name.split('.')[0]}.weight": ("BF16", (2, 3))} if tensors is None else tensors
    )
    header = make_header(tensors, metadata)
    end = max((e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(join_file(header, bytes(end)))
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_index(path: Path, shards: Iterable[str]) -> Path:
    """An index that lists shards by the names that `write_weights` gives their tensors."""
    return write_json(path, {"weight_map": {f"{s.split('.')[0]}.weight": s for s in shards}})


def make_cache(cache: Path, repo: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """The empty snapshot of a repository in a hub cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    if ref is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def link_blob(snapshot: Path, name: str, digest: str) -> Path:
    """Move a file of a snapshot among the blobs and put a link in its place, as the hub client does."""
    path = snapshot / name
    blob = snapshot.parents[1] / "blobs" / digest
    path.rename(blob)
    path.symlink_to(blob)
    return path
