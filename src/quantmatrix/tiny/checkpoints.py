"""Tiny checkpoints: a row of checkpoints.csv as files, made from a base model's tiny weights.

The row says what is quantized, how, and in which form it is written; `quantizing` does it. Calibration
is a real pass of the tiny pipeline.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantmatrix import families, models
from quantmatrix.checkpoints.comfyui import MARKER
from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.models.dialect import Dialect
from quantmatrix.request import Request
from quantmatrix.runtime.light_processor import load_processors
from quantmatrix.runtime.pictures import call_arguments
from quantmatrix.runtime.pipeline import without_components
from quantmatrix.scheme import Scheme
from quantmatrix.tables.rows import CheckpointRow
from quantmatrix.tiny import fp8_forms
from quantmatrix.tiny.pictures import PICTURES, give_pictures, write_picture
from quantmatrix.tools.packing import Tensors, pack_tensors
from quantmatrix.tools.recipe import (
    WEIGHTS,
    Recipe,
    quantize_layers,
    round_up,
    watch_inputs,
    write_file,
    write_folder,
)
from quantmatrix.tools.recipe import choose_schemes as choose_by_recipe

SHARDS = 3


def write_checkpoint(row: CheckpointRow, inner: str, folder: Path, base: Path) -> None:
    """Write a row's checkpoint into a folder; `inner` is the file or folder name inside it."""
    if row.form == "pipeline":
        shutil.copytree(base, folder / inner, dirs_exist_ok=True)
    for component in row.components:
        written = make_component(row, component, base)
        write_component(row, written, component, inner, folder, base / component)


def write_component(
    row: CheckpointRow,
    written: tuple[Tensors, Declaration],
    component: str,
    inner: str,
    folder: Path,
    base: Path,
) -> Path:
    """Write one quantized component in the row's form; returns the file or folder.

    `written` is what `make_component` gives, tensors of any shape and dtype with their declaration.
    `base` is the component's folder in the base model, whose config.json is taken over.
    """
    if row.form == "pipeline":
        target = folder / inner / component
        for old in target.glob("*.safetensors*"):
            old.unlink()
        write_folder(*written, target, base, with_config=True)
    elif row.form in ("component-folder", "compressed-tensors"):
        target = folder / inner
        write_folder(*written, target, base, with_config=True)
    elif row.form == "sharded":
        target = folder / inner
        write_folder(*written, target, base, with_config=False, shards=SHARDS)
    elif row.form == "gguf-file":
        above, _, quantization = inner.rpartition(":")
        target = folder / above / f"{row.model}-{quantization}.gguf"
        write_file(*written, target, base)
    else:
        target = folder / (inner if inner.endswith(".safetensors") else f"{row.id}.safetensors")
        write_file(*written, target, base)
    return target


def make_component(row: CheckpointRow, component: str, base: Path) -> tuple[Tensors, Declaration]:
    """(tensors on disk, declaration) of one quantized component of the pipeline folder `base`.

    Shapes and dtypes are those of the family's format: codes [out, in], packed ones [out, in/2].
    """
    dialect = find_recipe(row).dialect
    packed = pack_tensors(load_file(base / component / WEIGHTS), dialect, find_kept(row))
    chosen = choose_schemes(row, packed, dialect)
    if row.form in fp8_forms.WRITERS:
        return fp8_forms.write(row.form, packed, chosen)
    ranges = calibrate(row.model, str(base))[component]
    family = families.load(row.family)
    tensors, declaration = quantize_layers(family, dialect, packed, chosen, ranges)
    return finish_tensors(row, tensors, declaration, chosen)


def finish_tensors(
    row: CheckpointRow,
    tensors: Tensors,
    declaration: Declaration,
    chosen: Mapping[str, Scheme],
) -> tuple[Tensors, Declaration]:
    """What the writers of some files do besides: ComfyUI's marks, no input scales in mixed ones.

    Tensors are as on disk, of any shape and dtype; those that stay are unchanged.
    """
    if row.form == "comfyui":
        return {**tensors, **mark_layers(chosen)}, Declaration()
    if "-mixed." in row.reference:
        tensors = {n: t for n, t in tensors.items() if not n.endswith(".input_scale")}
    return tensors, declaration


def find_recipe(row: CheckpointRow) -> Recipe:
    """What becomes of the layers of a row's model."""
    scheme = families.load(row.family).SCHEMES[row.scheme]
    renamed = any(dialect.name == "bfl" for dialect in models.load(row.model).DIALECTS)
    raw = row.form in ("raw", "gguf-file", "scaled-fp8") or (row.form == "comfyui" and renamed)
    return Recipe(row.model, row.family, scheme, find_kept(row), raw=raw)


def find_kept(row: CheckpointRow) -> Callable[[str], bool]:
    """Whether a module, by diffusers' name, is one that the row leaves in full precision."""
    sets = models.load(row.model).FALLBACKS
    patterns = [re.compile(pattern) for name in row.kept.split() for pattern in sets[name]]
    return lambda module: any(pattern.fullmatch(module) for pattern in patterns)


def choose_schemes(
    row: CheckpointRow, packed: Mapping[str, torch.Tensor], dialect: Dialect
) -> dict[str, Scheme]:
    """Scheme of each layer on disk that the row quantizes.

    `packed` has the model's tensors in the dialect's names, weights [out, in] of any float dtype.
    """
    return choose_by_recipe(find_recipe(row), packed)


def mark_layers(chosen: Mapping[str, Scheme]) -> Tensors:
    """What ComfyUI's writers put beside each FP8 layer instead of a declaration: uint8 [bytes]."""
    formats = {"tensor": "float8_e4m3fn", "channel": "float8_e4m3fn_rowwise"}
    entries = {layer: {"format": formats[scheme.scale]} for layer, scheme in chosen.items()}
    return {
        f"{layer}{MARKER}": torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
        for layer, entry in entries.items()
    }


@lru_cache(maxsize=8)
def calibrate(model: str, base: str) -> dict[str, dict[str, Calibration]]:
    """Input ranges of every linear layer of every transformer component, from one real pass."""
    import diffusers

    module = models.load(model)
    parts = load_processors(read_json(Path(base) / "model_index.json"), Path(base))
    with without_components(base, tuple(parts)) as view:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(view, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, dict[str, Calibration]] = {}
    for component in module.COMPONENTS:
        found[component] = watch_inputs(getattr(pipeline, component))
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for name in PICTURES:
            write_picture(name, Path(folder))
        request = Request(model_path=base, tiny=True, **give_pictures(module, f"{folder}/"))
        pipeline(
            prompt="a curious pikachu",
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
            **call_arguments(module, request),
        )
    return {
        component: {name: round_up(seen) for name, seen in ranges.items()}
        for component, ranges in found.items()
    }
