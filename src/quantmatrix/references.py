"""References: which files of a folder or repository make up a checkpoint.

A *weights reference* is read strictly: an index, or exactly one file; anything ambiguous is an
error that lists the candidates. A *component folder* is read softly: every file of it, after an
index or copies in other precisions are taken care of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from quantmatrix.checkpoint import (
    PICKLES,
    Checkpoint,
    Hub,
    RemoteFiles,
    find_block,
    merge_headers,
    read_json,
)
from quantmatrix.errors import CheckpointError
from quantmatrix.folders import Folder, HubFolder, LocalFolder, open_folder

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
MIXED = re.compile(r"-mixed(-\d+-of-\d+)?\.safetensors$")
PRECISION = re.compile(r"\.(fp16|bf16|fp32)(?=\.safetensors)")
DESCRIPTION = re.compile(r"quant_model_description.*\.json$")


@dataclass(frozen=True)
class PipelineFolder:
    """A model folder: its pipeline class and components, or one bare component."""

    reference: str
    folder: Folder
    class_name: str | None
    """Pipeline class, or the class of a bare component."""
    components: Mapping[str, tuple[str | None, str | None]]
    """(library, class) per component; empty for a bare component folder."""


def open_weights(reference: str, hub: Hub) -> Checkpoint:
    """The checkpoint of a weights reference: a file, an index, a folder or a hub id of these."""
    folder, name = open_folder(reference, hub)
    if name.endswith(INDEX):
        names = read_index(folder, name)
    elif name:
        refuse_pickle(folder, name)
        names = [name]
    else:
        names = select_weights(folder)
    return build_checkpoint(reference, folder, names)


def open_component(reference: str, hub: Hub, subfolder: str = "") -> Checkpoint:
    """The checkpoint of a component folder; `subfolder` is a component of a pipeline."""
    folder, name = open_folder(reference, hub)
    if name:
        raise CheckpointError(
            f"{reference}: a component is a folder with a config.json; for a single file use "
            "the --<component>-weights-path flag"
        )
    folder = enter_component(folder, subfolder)
    return build_checkpoint(reference, folder, select_component(folder))


def enter_component(folder: Folder, subfolder: str) -> Folder:
    """The component folder itself, or `transformer/` in a folder that has no config.json."""
    if subfolder:
        return folder.enter(subfolder)
    if "config.json" not in folder.names and "transformer/config.json" in folder.names:
        return folder.enter("transformer")
    return folder


def open_compat(reference: str, hub: Hub) -> Checkpoint:
    """Weights of a `--model-path` that is a weights-only repository: `*-mixed` is looked for first.

    Without a mixed file at the top level the whole folder is read as a weights reference.
    """
    folder, name = open_folder(reference, hub)
    if not name:
        mixed = [n for n in top_level(folder) if n.endswith("-mixed.safetensors")]
        if mixed:
            return build_checkpoint(reference, folder, [mixed[0]])
    return open_weights(reference, hub)


def open_pipeline(reference: str, hub: Hub) -> PipelineFolder:
    """A model folder or repository; a bare component folder is accepted too."""
    folder, name = open_folder(reference, hub)
    if name:
        raise CheckpointError(f"{reference}: a base model is a folder, this is a file")
    if "model_index.json" in folder.names:
        index = read_json(folder.path("model_index.json"))
        components = {
            key: (value[0], value[1])
            for key, value in index.items()
            if not key.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1]
        }
        return PipelineFolder(reference, folder, index.get("_class_name"), components)
    if "config.json" in folder.names:
        config = read_json(folder.path("config.json"))
        return PipelineFolder(reference, folder, config.get("_class_name"), {})
    raise CheckpointError(
        f"{reference}: neither model_index.json nor config.json in it: expected a diffusers model "
        "folder. Weights alone go to --transformer-weights-path, beside a base --model-path"
    )


def read_component_config(
    reference: str, hub: Hub, subfolder: str = ""
) -> tuple[dict[str, Any], str]:
    """(config, its file) of a component; weights need not be there."""
    folder, name = open_folder(reference, hub)
    folder = enter_component(folder, subfolder)
    if name or "config.json" not in folder.names:
        raise CheckpointError(f"{folder}: no config.json: expected a diffusers component folder")
    path = folder.path("config.json")
    return read_json(path), str(path)


def fetch(checkpoint: Checkpoint, hub: Hub) -> Checkpoint:
    """The checkpoint with every file on this machine; what is remote is downloaded."""
    if checkpoint.remote is None:
        return checkpoint
    remote = checkpoint.remote
    source = HubFolder(remote.repo, remote.commit, remote.files, hub.cache_dir)
    paths = {name: str(source.path(name)) for name in remote.files}
    local = {PurePosixPath(name).name: path for name, path in paths.items()}
    tensors = {
        name: replace(header, file=local.get(PurePosixPath(header.file).name, header.file))
        for name, header in checkpoint.tensors.items()
    }
    files = tuple(local.get(PurePosixPath(file).name, file) for file in checkpoint.files)
    return replace(checkpoint, files=files, tensors=tensors, remote=None)


def fetch_pipeline(reference: str, hub: Hub, without: tuple[str, ...] = ()) -> str:
    """A local folder of a model, without the weights of some components."""
    folder, _ = open_folder(reference, hub)
    if isinstance(folder, LocalFolder):
        return str(folder.root)
    from huggingface_hub import snapshot_download

    return snapshot_download(
        folder.repo,
        revision=folder.commit,
        cache_dir=hub.cache_dir,
        ignore_patterns=[f"{name}/*.safetensors*" for name in without]
        + ["*.bin", "*.pt", "*.ckpt"],
    )


def build_checkpoint(reference: str, folder: Folder, names: list[str]) -> Checkpoint:
    """Read the headers and JSON files of the selected weight files."""
    tensors, metadata = merge_headers(folder.header(name) for name in names)
    parent = str(PurePosixPath(names[0]).parent)
    beside = folder if parent == "." else folder.enter(parent)
    config_file = str(beside.path("config.json")) if "config.json" in beside.names else None
    config = read_json(Path(config_file)) if config_file else None
    missing = tuple(name for name in names if not folder.is_local(name))
    files = tuple(name if name in missing else str(folder.path(name)) for name in names)
    nested = None
    if "hf_quant_config.json" in beside.names:
        path = beside.path("hf_quant_config.json")
        nested = (read_json(path), str(path))
    block, place = find_block(config, config_file, metadata, files, nested)
    described = find_description(beside)
    remote = None
    if missing and isinstance(folder, HubFolder):
        prefix = f"{folder.prefix}/" if folder.prefix else ""
        remote = RemoteFiles(folder.repo, folder.commit, tuple(f"{prefix}{n}" for n in missing))
    return Checkpoint(
        reference=reference,
        files=files,
        tensors=tensors,
        metadata=metadata,
        config=config,
        config_file=config_file,
        quantization=block,
        quantization_from=place,
        description=read_json(described) if described else None,
        description_file=str(described) if described else None,
        remote=remote,
    )


def find_description(folder: Folder) -> Path | None:
    """The description file beside the weights: the exact name first, else the first that fits."""
    names = [name for name in top_level(folder) if DESCRIPTION.match(name)]
    exact = "quant_model_description.json"
    chosen = exact if exact in names else next(iter(names), None)
    return folder.path(chosen) if chosen else None


def top_level(folder: Folder) -> list[str]:
    """Names directly in a folder."""
    return [name for name in folder.names if "/" not in name]


def select_weights(folder: Folder) -> list[str]:
    """Files of a weights folder: one index, one mixed file or one file; else an error."""
    indexes = drop_precisions([n for n in folder.names if n.endswith(INDEX)])
    if len(indexes) > 1:
        raise ambiguous(folder, indexes, "indexes")
    if indexes:
        return read_index(folder, indexes[0])
    files = drop_precisions([n for n in folder.names if n.endswith(WEIGHTS)])
    if not files:
        raise no_weights(folder)
    mixed = [name for name in files if MIXED.search(name)]
    if len(mixed) > 1:
        raise ambiguous(folder, mixed, "mixed checkpoints")
    if mixed:
        return mixed
    if len(files) > 1:
        raise ambiguous(folder, files, "weight files and no index")
    return files


def select_component(folder: Folder) -> list[str]:
    """Files of a component folder: those of its index, else every file, mixed ones preferred."""
    names = top_level(folder)
    indexes = drop_precisions([n for n in names if n.endswith(INDEX)])
    if len(indexes) > 1:
        raise ambiguous(folder, indexes, "indexes")
    if indexes:
        return read_index(folder, indexes[0])
    files = drop_precisions([n for n in names if n.endswith(WEIGHTS)])
    if not files:
        raise no_weights(folder)
    mixed = [name for name in files if MIXED.search(name)]
    return mixed if mixed else files


def read_index(folder: Folder, name: str) -> list[str]:
    """Shards that an index lists; a shard that is not there is an error."""
    index = read_json(folder.path(name))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}/{name}: no weight_map in it: expected a safetensors index")
    parent = PurePosixPath(name).parent
    shards = sorted({str(parent / shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if shard not in folder.names]
    if missing:
        raise CheckpointError(
            f"{folder}/{name}: lists {len(shards)} shards, {len(missing)} are not there: "
            f"{', '.join(missing)}; download them again"
        )
    return shards


def drop_precisions(names: Iterable[str]) -> list[str]:
    """Names without the fp16, bf16 and fp32 copies of files that are there without a suffix."""
    listed = list(names)
    plain = set(listed)
    return [n for n in listed if not PRECISION.search(n) or PRECISION.sub("", n) not in plain]


def refuse_pickle(folder: Folder, name: str) -> None:
    """A pickle is never opened."""
    if PurePosixPath(name).suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{folder}/{name}: a pickle file can run code when it is opened, so it is refused; "
            "expected a .safetensors file"
        )


def ambiguous(folder: Folder, names: list[str], what: str) -> CheckpointError:
    """The error for several candidates."""
    listed = "".join(f"\n  {name}" for name in names)
    return CheckpointError(f"{folder}: {len(names)} {what}; name one of them:{listed}")


def no_weights(folder: Folder) -> CheckpointError:
    """The error for a folder without weights; pickles are named."""
    pickles = [n for n in folder.names if PurePosixPath(n).suffix.lower() in PICKLES]
    more = f"; {pickles[0]} is a pickle file, which is refused" if pickles else ""
    return CheckpointError(f"{folder}: no .safetensors weights in it{more}")
