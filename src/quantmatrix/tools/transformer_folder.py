"""Transformer folders as the builders read and write them.

A folder holds config.json, the weights, and perhaps more. Its weights are what the first of these
says: `model.safetensors.index.json`, `diffusion_pytorch_model.safetensors.index.json`, the first
other index by name, or else its only `.safetensors` file.

A new folder keeps the shards of its source (names and number), always has an index, and gets every
other file of the source. It is written beside its path, tensor by tensor, and moved there when it
is complete; what stood there before goes only then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import merge_headers, read_json
from quantmatrix.checkpoints.header import TensorHeader, read_header
from quantmatrix.checkpoints.writer import Item, write_file
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.files import whole

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
FIRST_INDEXES = (f"model{INDEX}", f"diffusion_pytorch_model{INDEX}")


@dataclass(frozen=True)
class TransformerFolder:
    """The weights and the configuration of one transformer."""

    root: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    """File names of the weights, below `root`."""
    index: str
    """Name of the index; of a single file without one, the name that it would have."""
    checkpoint: Checkpoint
    metadata: Mapping[str, Mapping[str, str]]
    """Header metadata of each shard."""

    @property
    def class_name(self) -> str:
        """Class of the transformer, as config.json names it; empty when it does not."""
        return str(self.config.get("_class_name") or "")

    def tensors_of(self, shard: str) -> dict[str, TensorHeader]:
        """The tensors of one shard, by name."""
        path = str(self.root / shard)
        return {name: h for name, h in self.checkpoint.tensors.items() if h.file == path}

    def modules(self) -> list[str]:
        """Names of the modules that have a weight, sorted."""
        suffix = ".weight"
        return sorted(n.removesuffix(suffix) for n in self.checkpoint.tensors if n.endswith(suffix))


def open_transformer(path: Path, flag: str) -> TransformerFolder:
    """The transformer in a folder or in its `transformer/`; `flag` is what named the folder.

    Raises UsageError where there is none, CheckpointError for damaged weights.
    """
    root = next((p for p in (path, path / "transformer") if (p / "config.json").is_file()), None)
    if root is None:
        raise UsageError(
            f"{flag} {path}: no config.json in it or in its transformer/: expected a transformer "
            "folder in Diffusers' layout"
        )
    shards, index = find_shards(root)
    headers = {shard: read_header(root / shard) for shard in shards}
    tensors, _ = merge_headers(headers)
    files = tuple(str(root / shard) for shard in shards)
    return TransformerFolder(
        root=root,
        config=read_json(root / "config.json"),
        shards=shards,
        index=index,
        checkpoint=Checkpoint(str(root), files, tensors),
        metadata={shard: metadata for shard, (_, metadata) in headers.items()},
    )


def find_shards(root: Path) -> tuple[tuple[str, ...], str]:
    """(shards, index name) of a folder; raises CheckpointError when that is ambiguous."""
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    indexes = [*FIRST_INDEXES, *(name for name in names if name.endswith(INDEX))]
    index = next((name for name in indexes if name in names), None)
    if index is not None:
        listed = sorted(set(read_json(root / index).get("weight_map", {}).values()))
        missing = [shard for shard in listed if not (root / shard).is_file()]
        if missing or not listed:
            others = [name for name in names if name.endswith(WEIGHTS)]
            left = others and len(missing) == len(listed)
            hint = f"; an index left behind? Remove it to take {', '.join(others)}" if left else ""
            raise CheckpointError(
                f"{root / index}: {len(missing)} of the {len(listed)} shards that it lists are "
                f"missing: {', '.join(missing) or 'it lists none'}{hint}"
            )
        return tuple(listed), index
    single = [name for name in names if name.endswith(WEIGHTS)]
    if len(single) != 1:
        raise CheckpointError(
            f"{root}: {len(single)} .safetensors files and no index: expected an index, or exactly "
            f"one file; found {', '.join(single) or 'none'}"
        )
    return (single[0],), single[0].removesuffix(WEIGHTS) + INDEX


def read_block(folder: TransformerFolder) -> dict[str, Any]:
    """The flat ModelOpt `quantization_config` of a folder's config.json.

    Raises CheckpointError where there is none.
    """
    block = folder.config.get("quantization_config")
    if not isinstance(block, Mapping) or block.get("quant_method") != "modelopt":
        found = block.get("quant_method") if isinstance(block, Mapping) else block
        raise CheckpointError(
            f"{folder.root / 'config.json'}: expected a quantization_config with quant_method "
            f"modelopt, found {found}: is this the folder that ModelOpt exported?"
        )
    return dict(block)


def check_output(output: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """The output must be free, or free to go, and no part of what is read.

    Raises UsageError where it is not.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"--output-dir {output} exists already: choose another, or --overwrite")
    path = output.resolve()
    for source in (path.resolve() for path in sources):
        if path == source or path in source.parents or source in path.parents:
            raise UsageError(f"--output-dir {output} overlaps {source}, which is read")


def write_transformer(
    output: Path,
    source: TransformerFolder,
    shards: Mapping[str, Sequence[Item]],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write a folder like `source` with these tensors per shard; all or nothing.

    `metadata` is added to each shard's own header; existing output is replaced at the end.
    """
    with whole(output, overwrite=True) as written:
        copy_others(source, written)
        for shard, items in shards.items():
            header = {"format": "pt", **source.metadata[shard], **metadata}
            write_file(written / shard, items, dict(sorted(header.items())))
        write_json(written / source.index, make_index(shards))
        write_json(written / "config.json", config)


def copy_others(source: TransformerFolder, target: Path) -> None:
    """Copy everything but weights, indexes and configuration."""

    def leave_out(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != source.root:
            return set()
        return {n for n in names if n == "config.json" or n.endswith((WEIGHTS, INDEX))}

    shutil.copytree(source.root, target, ignore=leave_out)


def make_index(shards: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    """The index of shards: which tensor lies where, and the bytes of all."""
    weight_map = {item.name: shard for shard, items in shards.items() for item in items}
    total = sum(item.nbytes for items in shards.values() for item in items)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers does: indented, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
