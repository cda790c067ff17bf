"""Pipeline parts: the components beside the transformers, which diffusers and transformers load.

Neither library reads ModelOpt's exports. transformers does not know the method and takes FP8 codes
for numbers, silently: the pictures are of another prompt. diffusers stops at the declaration. A
part that such a declaration stands in is refused before it is loaded, and a pipeline folder that
holds only some parts (an export with `components`) is distinguished from a whole model. So is a
part that the SVDQuant engine quantized (its T5): nothing declares that, and where codes stand
instead of a weight transformers draws one at random.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.declaration import find_config_block, read_json
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.checkpoints.header import PICKLES, read_header
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.checkpoints.opening import read_components
from quantmatrix.errors import CheckpointError
from quantmatrix.links import check_link, check_name
from quantmatrix.request import Hub
from quantmatrix.runtime.plan.part_files import check_class, check_files, find_module

if TYPE_CHECKING:
    from quantmatrix.checkpoints.opening import PipelineFolder


def explain_export(config: Mapping[str, Any], file: str, name: str) -> str | None:
    """Why a part with this config.json cannot be loaded: ModelOpt quantized it; None: it can be."""
    block, source = find_config_block(config, file)
    method = str(block.get("quant_method") or "").lower()
    if not method.startswith("modelopt") or "quant_algo" not in block:
        return None
    return (
        f"{source}: {name} was quantized by ModelOpt (quant_algo {block['quant_algo']}), which is "
        "read of transformers only: here its codes would be taken for numbers, without an error. "
        f"Name one in full precision: --{name.replace('_', '-')}-path"
    )


def explain_codes(folder: Path, name: str) -> str | None:
    """Why a part whose config.json declares no quantization cannot be loaded: it holds codes.

    A file that cannot be read is left to the library that loads the part: it may not be wanted.
    """
    for file in sorted(folder.glob("*.safetensors")):
        names: Collection[str] = ()
        with suppress(CheckpointError):
            names = read_header(file)[0]
        coded = next((n for n in names if n.endswith(".qweight")), None)
        if coded:
            return (
                f"{file}: tensor {coded} holds codes, which {folder / 'config.json'} declares "
                f"nowhere: {name} would be loaded with random numbers in their place. Name one in "
                f"full precision: --{name.replace('_', '-')}-path"
            )
    return None


def explain_pickle(folder: Path, name: str) -> str | None:
    """Why the weights of a part are not loaded: they are pickles, and nothing else is there."""
    files = sorted(folder.glob("*"))
    pickles = [file for file in files if file.suffix.lower() in PICKLES]
    if not pickles or any(file.suffix == ".safetensors" for file in files):
        return None
    return (
        f"{pickles[0]}: a pickle file can run code when it is opened, so it is refused: expected "
        f"{name} as .safetensors. Convert it first, or name another: --{name.replace('_', '-')}-path"
    )


def check_inside(folder: Path, base: Path) -> None:
    """CheckpointError for a file of a part that leads out of `base`, by a link or in an index.

    The libraries that load the part would follow both.
    """
    part = LocalFolder(folder, base)
    check_link(folder, base)
    for name in part.top:
        path = part.path(name)
        if name.endswith(".index.json"):
            weight_map = read_json(path).get("weight_map")
            for shard in weight_map.values() if isinstance(weight_map, dict) else ():
                check_name(str(shard), path)


def explain_part(
    folder: Path, name: str, base: Path | None = None, *, coded: bool = False
) -> str | None:
    """Why the folder of a part cannot be loaded as what it is; None: it can be.

    `coded`: it may be quantized, which is looked at elsewhere (`plan.encoders`). CheckpointError where
    something in it leads out of `base`, the model's folder.
    """
    check_inside(folder, base or folder)
    if why := explain_pickle(folder, name):
        return why
    file = folder / "config.json"
    if coded or not file.is_file():
        return None
    config = read_json(file)
    declared = find_config_block(config, str(file))[0]
    return explain_export(config, str(file), name) if declared else explain_codes(folder, name)


def check_part(folder: Path, name: str, base: Path | None = None) -> None:
    """Refuse a part that ModelOpt or the SVDQuant engine quantized, pickles, and links elsewhere.

    Raises CheckpointError for each of these.
    """
    if why := explain_part(folder, name, base):
        raise CheckpointError(why)


def check_folder(folder: Path, class_name: str, built: Collection[str]) -> None:
    """Refuse a model folder [model_index.json, a folder per part] that cannot be put together.

    `built` are the parts that do not come from it. Each other one that the pipeline class must have
    has to be in the index, and readable. Raises CheckpointError where it is not.
    """
    import diffusers

    file = LocalFolder(folder).path("model_index.json")
    index = read_json(file)
    pipeline = getattr(diffusers, class_name, None)
    if pipeline is not None:
        expected = set(pipeline._get_signature_keys(pipeline)[0])
        needed = expected - set(pipeline._optional_components) - set(built)
        if missing := sorted(needed - index.keys()):
            raise CheckpointError(explain_partial(f"{folder}/model_index.json", ", ".join(missing)))
    for name in sorted(read_components(index, str(file)).keys() - set(built)):
        check_part(folder / name, name, folder)


def check_rest(
    pipeline: PipelineFolder, built: Collection[str], overrides: Mapping[str, str], hub: Hub
) -> None:
    """Refuse a model whose other parts cannot be loaded, as far as names and headers tell.

    `built` are the transformers. A part with an override comes from there, and is of the class that
    the model names for it. Raises CheckpointError for the first that cannot.
    """
    for name in sorted(pipeline.components.keys() - set(built)):
        library, class_name = pipeline.components[name]
        check_class(name, library, class_name, f"{pipeline.folder}/model_index.json")
        folder = pipeline.folder.enter(name)
        if name in overrides:
            folder, file = open_folder(overrides[name], hub)
            if file:
                raise CheckpointError(
                    f"{overrides[name]}: --{name.replace('_', '-')}-path takes a folder, this is a "
                    "file"
                )
        check_files(folder, name, str(class_name))


def explain_partial(file: str, missing: str) -> str:
    """The error about a model folder without some parts."""
    return (
        f"{file}: this is a part of a model, without {missing}, as ModelOpt writes it when its "
        "export is given `components`: expected a whole model. Name one with --model-path, and "
        "this folder with --transformer-path (Wan2.2: and --transformer-2-path)"
    )


def list_warnings(pipeline: PipelineFolder, built: Collection[str]) -> list[str]:
    """What a model folder on this machine lacks for a whole run, as far as its JSON files tell."""
    folder = pipeline.folder
    if not pipeline.components or not isinstance(folder, LocalFolder):
        return []
    others = pipeline.components.keys() - set(built)
    if not others:
        return [explain_partial(str(folder.root / "model_index.json"), "the other components")]
    found = []
    for name in sorted(others):
        own = name.startswith("text_encoder")
        why = explain_part(folder.root / name, name, folder.base or folder.root, coded=own)
        found += [why] if why else []
    return found


def find_class(index: Mapping[str, Any], name: str) -> Any:
    """The class that a model's index names for a part, or None when it is not one to be found.

    An automatic class will not do: it makes a T5 encoder the whole T5, decoder and all.
    """
    entry = index.get(name)
    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    module = find_module(library)
    return None if module is None else getattr(module, str(class_name), None)
