"""Quantizing a model: full-precision tensors become a checkpoint of a family, in its true format.

1. *Calibrate.* A pass of the real pipeline shows the range of every linear layer's input
   (`watch_inputs`). The tiny stand-ins round ranges up to powers of two, so that their bytes do not
   depend on the last bits of a processor's sums.
2. *Pack.* The tensors get the names and the packing of the dialect that the family's files have.
3. *Choose.* Two-dimensional weights of the model's blocks get the scheme, but for those kept back.
4. *Quantize, declare, write.* The family's own `quantize` and `declare`, and one writer for folders
   and one for single files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch

from quantmatrix import families, models
from quantmatrix.checkpoints import gguf_writer, writer
from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.dtypes import from_torch
from quantmatrix.checkpoints.gguf import ARCHITECTURES
from quantmatrix.checkpoints.writer import Item
from quantmatrix.errors import UsageError
from quantmatrix.families.protocol import Calibration, Declaration, Family
from quantmatrix.models.dialect import DIFFUSERS, Dialect
from quantmatrix.scheme import Scheme, explain_width
from quantmatrix.tools.packing import Tensors, split

WEIGHTS = "diffusion_pytorch_model.safetensors"
ORIGINAL = ("bfl", "wan-original", "original")
"""Dialects that are the names of a model's first release."""
Ranges = Mapping[str, Calibration]
"""Input range of each linear layer, by diffusers' module name."""


@dataclass(frozen=True)
class Recipe:
    """What is to become of a model's layers."""

    model: str
    family: str
    scheme: Scheme
    kept: Callable[[str], bool]
    """Whether a module, by diffusers' name, stays in full precision."""
    raw: bool = False
    """Written with the model's original names, where it has some; NVFP4 with swapped nibbles and
    tiled scales, too."""
    linear: frozenset[str] | None = None
    """The modules that may be quantized, by diffusers' name; None: those of the model file's blocks."""

    @property
    def dialect(self) -> Dialect:
        """The dialect that the files are written in."""
        own, listed = families.load(self.family).DIALECT, models.load(self.model).DIALECTS
        if own is None and self.raw:
            return next((dialect for dialect in listed if dialect.name in ORIGINAL), DIFFUSERS)
        return next(dialect for dialect in listed if dialect.name == (own or DIFFUSERS.name))


def choose_schemes(recipe: Recipe, packed: Mapping[str, torch.Tensor]) -> dict[str, Scheme]:
    """Scheme of each layer on disk that is quantized: linear layers of the blocks, not kept.

    `packed` are tensors by name, weights [out, in], of any dtype. A layer of a width that the scheme
    cannot store stays in full precision. Raises UsageError when a layer is kept that the dialect has
    no plain form for.
    """
    family, dialect = families.load(recipe.family), recipe.dialect
    found: dict[str, Scheme] = {}
    for name in sorted(packed):
        layer, leaf = split(name)
        targets = dialect.layer_targets(layer)
        inside = is_inside(recipe, targets[0].module)
        if leaf != "weight" or packed[name].ndim != 2 or not inside:
            continue
        if any(recipe.kept(target.module) for target in targets):
            if any(target.interleave > 1 for target in targets):
                raise UsageError(
                    f"{layer} cannot be kept in full precision: the {dialect.name} layout has it "
                    "as AWQ codes only"
                )
            continue
        scheme = family.scheme_of(
            layer,
            recipe.scheme,
            raw=recipe.raw,
            gelu=any(target.unsigned for target in targets),
            interleaved=any(target.interleave for target in targets),
            columns=packed[name].shape[1],
        )
        if scheme is not None and not explain_width(scheme, packed[name].shape[1]):
            found[layer] = scheme
    return found


def is_inside(recipe: Recipe, module: str) -> bool:
    """Whether a module is one that may be quantized."""
    if recipe.linear is not None:
        return module in recipe.linear
    return module.split(".")[0] in models.load(recipe.model).BLOCKS


def quantize_layers(
    family: Family,
    dialect: Dialect,
    packed: Tensors,
    chosen: Mapping[str, Scheme],
    ranges: Ranges,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Tensors, Declaration]:
    """(tensors on disk, declaration) of a component whose packed tensors are given.

    `packed` has weights [out, in] of any float dtype; what is not chosen goes through unchanged,
    and each chosen layer becomes what its family's table lists. `progress` wraps the layers while
    they are worked on. Raises UsageError where a scheme needs a calibration that `ranges` lacks.
    """
    tensors = {name: tensor for name, tensor in packed.items() if split(name)[0] not in chosen}
    kept = [layer for layer, leaf in map(split, sorted(tensors)) if leaf == "weight"]
    kept = [layer for layer in kept if tensors[f"{layer}.weight"].ndim == 2]
    for layer, scheme in progress(list(chosen.items())):
        quantized = family.quantize(
            packed[f"{layer}.weight"],
            scheme,
            bias=packed.get(f"{layer}.bias"),
            calibration=find_range(ranges, layer, dialect),
            parts=dialect.layer_targets(layer)[0].rows[2],
        )
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in quantized.items()}
    return tensors, family.declare(chosen, kept, sorted(tensors))


def watch_inputs(component: torch.nn.Module) -> dict[str, Calibration]:
    """Ranges of the inputs of a component's linear layers; they grow with every pass."""
    ranges: dict[str, Calibration] = {}
    for name, layer in component.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(_watch(ranges, name))
    return ranges


def _watch(ranges: dict[str, Calibration], name: str) -> Any:
    def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].detach().float().flatten(0, -2)
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        if name in ranges:
            low = torch.minimum(low, ranges[name].low)
            high = torch.maximum(high, ranges[name].high)
        ranges[name] = Calibration(low, high)

    return hook


def round_up(seen: Calibration) -> Calibration:
    """Ranges with each end moved away from zero to a power of two."""

    def widen(x: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(x.abs())
        whole = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return torch.sign(x) * torch.ldexp(torch.ones_like(x), whole)

    return Calibration(widen(seen.low), widen(seen.high))


def find_range(ranges: Ranges, layer: str, dialect: Dialect) -> Calibration | None:
    """Input range of a layer on disk: that of the module it serves, cut to its columns."""
    target = dialect.layer_targets(layer)[0]
    seen = ranges.get(target.module)
    if seen is None:
        return None
    start, stop, of = target.columns
    unit = seen.low.shape[0] // of
    return Calibration(seen.low[start * unit : stop * unit], seen.high[start * unit : stop * unit])


def write_folder(
    tensors: Tensors,
    declaration: Declaration,
    folder: Path,
    base: Path,
    *,
    with_config: bool,
    shards: int = 1,
) -> None:
    """Write a component folder: weights (with an index for several shards), config, description.

    Tensors are written as they are: any shape and dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    metadata = {"format": "pt", **declaration.metadata}
    if not with_config and declaration.config is not None:
        metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
    if declaration.blocks is not None:
        write_gguf(tensors, declaration.blocks, folder / f"{PurePath(WEIGHTS).stem}.gguf", base)
    elif shards == 1:
        save(tensors, names, folder / WEIGHTS, metadata)
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
            file = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save(tensors, part, folder / file, metadata)
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{WEIGHTS}.index.json", index)
    if with_config:
        config = read_json(base / "config.json")
        if declaration.config is not None:
            config["quantization_config"] = declaration.config
        write_json(folder / "config.json", config)
    if declaration.description is not None:
        write_json(folder / declaration.description[0], declaration.description[1])


def write_file(tensors: Tensors, declaration: Declaration, path: Path, base: Path) -> None:
    """Write a single weight file whose header declares what it is, unless its names do.

    Tensors are written as they are: any shape and dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if is_raw(tensors) else dict(declaration.metadata)
    if declaration.blocks is not None:
        write_gguf(tensors, declaration.blocks, path, base)
        return
    if declaration.config is not None:
        metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
    if "quantization_config" in metadata:
        metadata["config"] = (base / "config.json").read_text(encoding="utf-8")
    save(tensors, sorted(tensors), path, {"format": "pt", **metadata})


def write_gguf(tensors: Tensors, blocks: Mapping[str, str], path: Path, base: Path) -> None:
    """Write a GGUF file that names the architecture of the model in the folder `base`.

    Tensors have any shape and dtype; those in `blocks` are uint8 [N, bytes of a row]. Raises
    UsageError for a model that has no name there.
    """
    class_name = str(read_json(base / "config.json").get("_class_name"))
    architecture = ARCHITECTURES.get(class_name)
    if architecture is None:
        raise UsageError(
            f"{base}: {class_name} has no name in GGUF files; known: {', '.join(ARCHITECTURES)}"
        )
    gguf_writer.write_file(path, tensors, blocks, {"general.architecture": architecture})


def is_raw(tensors: Tensors) -> bool:
    """Whether these are the official raw names, whose files declare nothing.

    Only names count; tensors may have any shape and dtype.
    """
    return any(name.startswith("double_blocks.") for name in tensors)


def save(tensors: Tensors, names: list[str], path: Path, metadata: Mapping[str, str]) -> None:
    """Write some of the tensors, of any shape and dtype, in the order of `names`.

    The library's writer would shuffle several metadata entries.
    """
    items = [
        Item(
            name,
            from_torch(tensors[name].dtype),
            tuple(tensors[name].shape),
            partial(tensors.__getitem__, name),
        )
        for name in names
    ]
    writer.write_file(path, items, dict(sorted(metadata.items())))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write sorted JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
