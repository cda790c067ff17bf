"""References: which files of a folder or repository make up a checkpoint.

A *weights reference* is read strictly: an index, or exactly one file; anything ambiguous is an
error that lists the candidates. A *component folder* is read softly: every file of it, after an
index or copies in other precisions are taken care of.

| a weights reference finds | and takes |
| ------------------------- | --------- |
| one `.safetensors` | that file |
| one `.safetensors.index.json` | the shards that it lists, whatever else is there |
| two or more indexes | the one whose shards are there and hold just its names, or an error |
| no index, one `*-mixed.safetensors` among others | the mixed file |
| no index, several mixed files, or several plain ones | an error |
| `transformer_blocks` and `unquantized_layers` (older SVDQuant folders) | both |
| `d.safetensors` and `d.fp16.safetensors` (bf16, fp32; indexes, too) | the copy without suffix |
| files in sub-folders only | the same rules, with all of them |
| a LoRA beside weights | the weights; the LoRA is left out, and named |
| no `.safetensors`, one `.gguf` | that file, with its other parts (`-00001-of-00002.gguf`) |
| no `.safetensors`, several `.gguf` | an error: name one by its quantization, `FOLDER:Q4_K_M` |
| none of them | an error of its own |

`indexes` says what an index lists, and which of several counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath, PurePosixPath
from typing import Any

from quantmatrix.checkpoints import comfyui, gguf, name_prefixes, scaled_fp8
from quantmatrix.checkpoints.adapters import is_adapter
from quantmatrix.checkpoints.checkpoint import Checkpoint, RemoteFiles
from quantmatrix.checkpoints.declaration import find_block, merge_headers, read_json
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.checkpoints.foreign import (
    ORIGINAL_WAN,
    SVDQUANT_PAIR,
    explain_original,
    plain_class,
)
from quantmatrix.checkpoints.header import PICKLES, refuse_pickle
from quantmatrix.checkpoints.hub import Folder, HubFolder, explain_partial, translate_hub_errors
from quantmatrix.checkpoints.indexes import (
    INDEX,
    WEIGHTS,
    Selection,
    ambiguous,
    find_index,
    read_index,
)
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote_json
from quantmatrix.request import Hub

MIXED = re.compile(r"-mixed(-\d+-of-\d+)?\.safetensors$")
PRECISION = re.compile(r"\.(fp16|bf16|fp32)(?=[.-])")
DESCRIPTION = "quant_model_description"


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
    if not name:
        selection = select_weights(folder)
        return build_checkpoint(reference, folder, selection, list_adapters(folder, selection))
    if INDEX.search(name):
        selection = read_index(folder, name)
    else:
        refuse_pickle(PurePosixPath(f"{folder}/{name}"))
        selection = dict.fromkeys(gguf.list_shards(name, folder.top), frozenset())
    return build_checkpoint(reference, folder, selection)


def open_component(
    reference: str, hub: Hub, subfolder: str = "", name: str = "transformer"
) -> Checkpoint:
    """The checkpoint of a component folder; `subfolder` is a component of a pipeline.

    Without `subfolder` a whole pipeline may stand for its component of this `name`. Raises
    CheckpointError for a single file, and for a folder without weights or with damaged ones.
    """
    folder, file = open_folder(reference, hub)
    if file:
        raise CheckpointError(
            f"{reference}: a component is a folder with a config.json; for a single file use "
            "the --<component>-weights-path flag"
        )
    folder = enter_component(folder, subfolder, name)
    selection = select_component(folder)
    return build_checkpoint(reference, folder, selection, list_adapters(folder, selection))


def enter_component(folder: Folder, subfolder: str, name: str = "transformer") -> Folder:
    """The component folder itself, or the component's own in a folder that has no config.json.

    That is the folder of its name, so that a whole Wan pipeline gives `transformer_2` its second
    expert; a folder that has none of that name may hold the component as `transformer`.
    """
    if subfolder:
        return folder.enter(subfolder)
    if folder.has("config.json"):
        return folder
    inner = (part for part in (name, "transformer") if folder.has(f"{part}/config.json"))
    return folder.enter(next(inner, ""))


def open_compat(reference: str, hub: Hub) -> Checkpoint:
    """Weights of a `--model-path` that is a weights-only repository: `*-mixed` is looked for first.

    Without a mixed file at the top level the whole folder is read as a weights reference.
    """
    folder, name = open_folder(reference, hub)
    mixed = None if name else find_mixed(folder)
    if mixed is None:
        return open_weights(reference, hub)
    return build_checkpoint(reference, folder, {mixed: frozenset()})


def is_whole(reference: str, hub: Hub) -> bool:
    """Whether a reference is a model folder with an index and a transformer of its own."""
    folder, name = open_folder(reference, hub)
    return not name and folder.has("model_index.json") and folder.has("transformer/config.json")


def find_mixed(folder: Folder) -> str | None:
    """The first mixed checkpoint at the top level of a folder."""
    return next((name for name in folder.top if name.endswith("-mixed.safetensors")), None)


def open_pipeline(reference: str, hub: Hub) -> PipelineFolder:
    """A model folder or repository; a bare component folder is accepted too.

    Raises CheckpointError for a file, and for a folder with neither model_index.json nor
    config.json.
    """
    folder, name = open_folder(reference, hub)
    if name:
        raise CheckpointError(f"{reference}: a base model is a folder, this is a file")
    if folder.has("model_index.json"):
        file = folder.path("model_index.json")
        index = read_json(file)
        components = read_components(index, str(file))
        return PipelineFolder(reference, folder, read_class(index, str(file)), components)
    if folder.has("config.json"):
        file = folder.path("config.json")
        return PipelineFolder(reference, folder, read_class(read_json(file), str(file)), {})
    raise CheckpointError(
        f"{reference}: neither model_index.json nor config.json in it: expected a diffusers model "
        "folder. Weights alone go to --transformer-weights-path, beside a base --model-path"
        f"{explain_original([n for n in ORIGINAL_WAN if folder.enter(n).top])}"
        f"{explain_partial(folder)}"
    )


def read_components(
    index: Mapping[str, Any], file: str
) -> dict[str, tuple[str | None, str | None]]:
    """(library, class) per component that a model_index.json names; its folder has its name.

    Raises CheckpointError for a name, library or class that is no plain Python name.
    """
    components = {}
    for key, value in index.items():
        if key.startswith("_") or not isinstance(value, list) or len(value) != 2 or not value[1]:
            continue
        named = value if value[0] is not None else value[1:]
        if not key.isidentifier() or not all(
            isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
            for name in named
        ):
            raise CheckpointError(
                f"{file}: the component {key} is {quote_json(value)}: expected a plain name, of a "
                "library and a class; the file is damaged"
            )
        components[key] = (value[0], plain_class(value[1]))
    return components


def read_class(config: Mapping[str, Any], file: str) -> str | None:
    """The class that a config.json or model_index.json names; CheckpointError for another value."""
    name = plain_class(config.get("_class_name"))
    if name is None or (isinstance(name, str) and name.isidentifier()):
        return name
    raise CheckpointError(
        f"{file}: _class_name is {quote_json(name)}, expected the name of a class; the file is "
        "damaged"
    )


def read_component_config(
    reference: str, hub: Hub, subfolder: str = "", name: str = "transformer"
) -> tuple[dict[str, Any], str]:
    """(config, its file) of a component, as `open_component` finds it; without its weights.

    Raises CheckpointError where there is no config.json, or one that names no class.
    """
    folder, file = open_folder(reference, hub)
    folder = enter_component(folder, subfolder, name)
    if file or not folder.has("config.json"):
        raise CheckpointError(
            f"{folder}: no config.json: expected a diffusers component folder"
            f"{explain_partial(folder)}"
        )
    path = folder.path("config.json")
    config = read_json(path)
    read_class(config, str(path))
    return config, str(path)


def fetch(checkpoint: Checkpoint, hub: Hub) -> Checkpoint:
    """The checkpoint with every file on this machine; what is remote is downloaded."""
    remote = checkpoint.remote
    if remote is None:
        return checkpoint
    source = HubFolder(
        remote.repo, remote.commit, remote.files, hub.cache_dir, revision=remote.revision
    )
    local = {remote.address(name): str(source.path(name)) for name in remote.files}
    return replace(
        checkpoint,
        files=tuple(local.get(file, file) for file in checkpoint.files),
        tensors={
            name: replace(header, file=local.get(header.file, header.file))
            for name, header in checkpoint.tensors.items()
        },
        remote=None,
    )


def fetch_pipeline(reference: str, hub: Hub, without: tuple[str, ...] = ()) -> str:
    """A local folder of a model, without the weights of the components named in `without`.

    Of a repository only the folders of its components are downloaded, and neither pickles nor
    copies in other precisions.
    """
    folder, _ = open_folder(reference, hub)
    if isinstance(folder, LocalFolder):
        return str(folder.root)
    components = open_pipeline(reference, hub).components
    needed = [
        name for name in drop_precisions(folder.names) if is_needed(name, components, without)
    ]
    from huggingface_hub import snapshot_download

    with translate_hub_errors(f"{folder}: cannot be downloaded", folder.repo):
        root = snapshot_download(
            folder.repo,
            revision=folder.commit,
            cache_dir=hub.cache_dir,
            allow_patterns=[folder.full(name) for name in needed],
        )
    folder.keep_ref()
    return str(PurePath(root) / folder.prefix)


def is_needed(name: str, components: Iterable[str], without: Iterable[str]) -> bool:
    """Whether a model's file is loaded: without `components` the folder is one component itself."""
    part, _, inner = name.partition("/")
    weights = name.endswith(WEIGHTS) or INDEX.search(name) is not None
    if PurePosixPath(name).suffix.lower() in PICKLES:
        return False
    if not components:
        return not inner
    return part in components and not (weights and part in without) if inner else not weights


def build_checkpoint(
    reference: str, folder: Folder, selection: Selection, left_out: Iterable[str] = ()
) -> Checkpoint:
    """Read the headers and JSON files of the selected weight files.

    Raises CheckpointError where a file lacks tensors that its index promises, and for damaged
    headers or descriptions that disagree.
    """
    headers = {folder.address(name): folder.header(name) for name in selection}
    for name, promised in selection.items():
        absent = sorted(promised - headers[folder.address(name)][0].keys())
        if absent:
            raise CheckpointError(
                f"{folder}/{name}: the index promises {len(promised)} tensors in it, {len(absent)} "
                f"are not there, the first is {absent[0]}: index and shards are not of one "
                "checkpoint; download both again"
            )
    tensors, metadata = merge_headers(headers)
    beside = folder.enter(next(iter(selection)).rpartition("/")[0])
    config, config_file = read_beside(beside, "config.json")
    nested, nested_file = read_beside(beside, "hf_quant_config.json")
    block, source = find_block(
        config,
        config_file,
        metadata,
        tuple(headers),
        (nested, nested_file) if nested and nested_file else None,
    )
    tensors, prefix, aside = name_prefixes.strip_tensors(tensors)
    addresses = {folder.address(name): name for name in selection}

    def read(file: str, names: list[str]) -> dict[str, bytes]:
        stored = {tensors[name].on_disk: name for name in names}
        found = folder.contents(addresses[file], list(stored))
        return {stored[name]: content for name, content in found.items()}

    tensors, layers, where = scaled_fp8.rename(tensors, read)
    foreign = name_prefixes.list_foreign(tensors)
    block = name_prefixes.strip_block(block, foreign)
    if layers and not block:
        block, source = {"format_version": "1.0", "layers": layers}, where
    block, source = comfyui.complete(block, source, tensors, read)
    description, description_file = read_beside(beside, find_description(beside))
    return Checkpoint(
        reference=reference,
        files=tuple(headers),
        tensors=tensors,
        metadata=metadata,
        config=config,
        config_file=config_file,
        quantization=block,
        quantization_from=source,
        description=name_prefixes.strip_keys(description, foreign) if description else description,
        description_file=description_file,
        prefix=prefix,
        aside=aside,
        remote=find_remote(folder, selection),
        left_out=tuple(folder.address(name) for name in left_out),
    )


def find_remote(folder: Folder, selection: Selection) -> RemoteFiles | None:
    """The selected files that are not on this machine, or None when all of them are."""
    missing = tuple(name for name in selection if not folder.is_local(name))
    if isinstance(folder, LocalFolder) or not missing:
        return None
    files = tuple(folder.full(name) for name in missing)
    return RemoteFiles(folder.repo, folder.commit, files, folder.revision)


def read_beside(folder: Folder, name: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """(content, path) of a JSON file in a folder, if it is there."""
    if name is None or not folder.has(name):
        return None, None
    path = folder.path(name)
    return read_json(path), str(path)


def find_description(folder: Folder) -> str | None:
    """The description file beside the weights: the exact name first, else the first that fits."""
    names = [name for name in folder.top if name.startswith(DESCRIPTION) and name.endswith(".json")]
    exact = f"{DESCRIPTION}.json"
    return exact if exact in names else next(iter(names), None)


def select_weights(folder: Folder) -> Selection:
    """Files of a weights folder: one index, one mixed file or one file.

    Raises CheckpointError where there is none of these, or more than one.
    """
    names = drop_precisions(folder.names)
    index = find_index(folder, names)
    if index is not None:
        return read_index(folder, index)
    files = drop_adapters(folder, [name for name in names if name.endswith(WEIGHTS)])
    mixed = [name for name in files if MIXED.search(name)]
    if len(mixed) > 1:
        raise ambiguous(folder, mixed, "mixed checkpoints and no index")
    chosen = mixed or files
    if not chosen:
        return select_gguf(folder, names)
    if sorted(chosen) == SVDQUANT_PAIR:
        return dict.fromkeys(chosen, frozenset())
    if len(chosen) > 1:
        raise ambiguous(folder, chosen, "weight files and no index")
    return {chosen[0]: frozenset()}


def select_component(folder: Folder) -> Selection:
    """Files of a component folder: those of its index, else every file, mixed ones preferred.

    Raises CheckpointError where there are no weights, or two indexes.
    """
    names = drop_precisions(folder.top)
    index = find_index(folder, names)
    if index is not None:
        return read_index(folder, index)
    files = drop_adapters(folder, [name for name in names if name.endswith(WEIGHTS)])
    if not files:
        return select_gguf(folder, names)
    mixed = [name for name in files if MIXED.search(name)]
    return dict.fromkeys(mixed or files, frozenset())


def select_gguf(folder: Folder, names: Iterable[str]) -> Selection:
    """The one GGUF checkpoint among the names, all of its parts; CheckpointError for none or more."""
    wholes = gguf.list_wholes(names)
    if not wholes:
        raise no_weights(folder)
    if len(wholes) > 1:
        what = f"GGUF files, name one by its quantization as {folder}:Q8_0"
        raise ambiguous(folder, list(wholes), what)
    [parts] = wholes.values()
    return dict.fromkeys(parts, frozenset())


def drop_adapters(folder: Folder, files: list[str]) -> list[str]:
    """Weight files without those that hold a LoRA; where there is nothing else, all of them."""
    if len(files) < 2:
        return files
    return [name for name in files if not holds_adapter(folder, name)] or files


def list_adapters(folder: Folder, selection: Selection) -> list[str]:
    """Files with a LoRA that lie beside the selected ones, and are none of them."""
    above = PurePosixPath(next(iter(selection))).parent
    others = (n for n in drop_precisions(folder.names) if PurePosixPath(n).parent == above)
    files = [name for name in others if name.endswith(WEIGHTS) and name not in selection]
    return [name for name in files if holds_adapter(folder, name)]


def holds_adapter(folder: Folder, name: str) -> bool:
    """Whether a file holds a LoRA and nothing else; one that cannot be read does not."""
    try:
        tensors, _ = folder.header(name)
    except CheckpointError:
        return False
    return is_adapter(tensors)


def drop_precisions(names: Iterable[str]) -> list[str]:
    """Names without the fp16, bf16 and fp32 copies of files that are there without a suffix."""
    listed = list(names)
    plain = {name for name in listed if not PRECISION.search(name)}

    def is_copy(name: str) -> bool:
        bare = PRECISION.sub("", name)
        weights = bare.endswith(WEIGHTS) or bool(INDEX.search(bare))
        return weights and bare != name and (bare in plain or INDEX.sub(WEIGHTS, bare) in plain)

    return [name for name in listed if not is_copy(name)]


def no_weights(folder: Folder) -> CheckpointError:
    """The error for a folder without weights; pickles are named."""
    pickles = [n for n in folder.names if PurePosixPath(n).suffix.lower() in PICKLES]
    more = f"; {pickles[0]} is a pickle file, which is refused" if pickles else ""
    return CheckpointError(
        f"{folder}: no .safetensors weights in it{more}; name a folder or file that has them"
        f"{explain_partial(folder)}"
    )
