"""Part files: what the folder of each part of a pipeline must hold before anything is loaded.

| part | its folder must hold |
| ---- | -------------------- |
| a scheduler | `scheduler_config.json` |
| a tokenizer | a whole vocabulary: see `VOCABULARIES` |
| a guider | `guider_config.json` |
| a processor | `preprocessor_config.json` or `processor_config.json` |
| a model (text encoder, VAE ...) | `config.json` and safetensors: every shard, none cut off |

diffusers and transformers tell of some of these faults in a traceback, of others with the name of a
temporary folder, and of a tokenizer without its vocabulary not at all: one with a default vocabulary
is built, and the pictures are of another prompt. A class that neither library has would be asked
for with code from the model's own folder, which is never run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.hub import explain_partial
from quantmatrix.checkpoints.opening import select_component
from quantmatrix.errors import CheckpointError

if TYPE_CHECKING:
    from quantmatrix.checkpoints.hub import Folder

LIBRARIES = ("diffusers", "transformers")
BYTE_PAIRS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PIECES = (
    ("tokenizer.json",),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
)
VOCABULARIES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "CLIP": BYTE_PAIRS,
    "Qwen": BYTE_PAIRS,
    "GPT2": BYTE_PAIRS,
    "T5": PIECES,
    "Llama": PIECES,
    "Gemma": PIECES,
    "ByT5": (("tokenizer_config.json",),),  # its vocabulary are the bytes
    "": (*BYTE_PAIRS, *PIECES[1:], ("tekken.json",), ("vocab.txt",)),
}
"""Files that are a tokenizer's vocabulary, one set of them, by the beginning of its class."""
END = 64
"""Bytes at the end of a vocabulary in which its last bracket stands."""


def check_class(name: str, library: str | None, class_name: str | None, file: str) -> None:
    """CheckpointError for a part whose class is none of diffusers' or transformers'.

    `file` is the model_index.json that names it.
    """
    what = ""
    if (module := find_module(library)) is None:
        what = f"{library} is neither"
    elif class_name not in list_names(module.__name__):
        version = import_module(module.__name__.partition(".")[0]).__version__
        what = f"{library} {version} has no such class"
    if what:
        raise CheckpointError(
            f"{file}: {name} is {library}.{class_name}: expected a class of "
            f"{' or '.join(LIBRARIES)}, and {what}. Code that comes with a model is never run: name "
            "the model's own repository; a newer release of the library may have the class"
        )


def find_module(library: object) -> ModuleType | None:
    """A library by its name in a model_index.json; None for any other.

    The parts of a pipeline whose folder in diffusers is named as their own module (`glm_image`) stand
    under the name of that folder, which offers them.
    """
    if library in LIBRARIES:
        return import_module(str(library))
    found = getattr(import_module("diffusers.pipelines"), str(library), None)
    return found if isinstance(found, ModuleType) and hasattr(found, "__path__") else None


@cache
def list_names(library: str) -> frozenset[str]:
    """What a library offers, without importing all of it."""
    return frozenset(dir(import_module(library)))


def check_files(folder: Folder, name: str, class_name: str) -> None:
    """The folder of a part must hold its files, none of them cut off.

    Headers of weights are read where they lie on this machine; of others the names count. Raises
    CheckpointError where one is missing or cut off.
    """
    if not folder.names:
        raise wrong(folder, name, "is missing, or empty", "the files of the part")
    if name.startswith("tokenizer") or "Tokenizer" in class_name:
        check_vocabulary(folder, name, class_name)
    elif name.startswith("scheduler") or class_name.endswith("Scheduler"):
        check_config(folder, name, ("scheduler_config.json",), endless=True)
    elif class_name.endswith("Guidance"):
        check_config(folder, name, ("guider_config.json",), endless=True)
    elif any(part in class_name for part in ("Processor", "FeatureExtractor")):
        check_config(folder, name, ("preprocessor_config.json", "processor_config.json"))
    else:
        check_config(folder, name, ("config.json",))
        check_weights(folder, name)


def wrong(folder: Folder, name: str, what: str, expected: str) -> CheckpointError:
    """The error about the folder of a part."""
    return CheckpointError(
        f"{folder}: {name} {what}: expected {expected}. Download the model again, or name another "
        f"with --{name.replace('_', '-')}-path{explain_partial(folder)}"
    )


def check_config(
    folder: Folder, name: str, files: tuple[str, ...], *, endless: bool = False
) -> None:
    """A part must say what it is, in one of these JSON files.

    `endless`: a number may be `-Infinity`, as diffusers writes the bound that a scheduler lacks. Raises
    CheckpointError where there is none, or one that is not a JSON object.
    """
    found = [file for file in files if folder.has(file)]
    if not found:
        beside = ", ".join(folder.top[:4]) or "its sub-folders"
        raise wrong(folder, name, f"has no {' or '.join(files)}", f"one beside {beside}")
    for file in found:
        if folder.is_local(file):
            read_json(folder.path(file), endless=endless)


def check_vocabulary(folder: Folder, name: str, class_name: str) -> None:
    """A tokenizer must have one whole set of vocabulary files, none of them cut off.

    Raises CheckpointError where it does not.
    """
    sets = next(sets for start, sets in VOCABULARIES.items() if class_name.startswith(start))
    found = next((files for files in sets if all(map(folder.has, files))), None)
    if found is None:
        listed = ", or ".join(" with ".join(files) for files in sets)
        raise wrong(folder, name, f"({class_name}) has no vocabulary", listed)
    for file in found:
        if folder.is_local(file) and (what := explain_vocabulary(folder.path(file))):
            raise wrong(folder, name, f"has a {file} that {what}", "the whole file")


def explain_vocabulary(path: Path) -> str:
    """Why a vocabulary file is not whole, or ''; its end tells, so that it need not be parsed."""
    size = path.stat().st_size
    if not size:
        return "is empty"
    with path.open("rb") as file:
        start = file.read(END)
        file.seek(max(0, size - END))
        end = file.read()
    if path.suffix != ".json":
        return "is a Git LFS pointer" if start.startswith(b"version https://git-lfs") else ""
    whole = start.lstrip().startswith(b"{") and end.rstrip().endswith(b"}")
    return "" if whole else "is not a JSON object, or is cut off"


def check_weights(folder: Folder, name: str) -> None:
    """Weights must be there, every shard with the tensors that its index promises, none cut off.

    Raises CheckpointError where they are not.
    """
    try:
        selection = select_component(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({name} of the pipeline)") from error
    for file, promised in selection.items():
        if not folder.is_local(file):
            continue
        absent = sorted(promised - folder.header(file)[0].keys())
        if absent:
            raise wrong(
                folder, name, f"has {file} without {absent[0]}", f"{len(promised)} tensors in it"
            )
