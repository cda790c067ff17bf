"""Tiny checkpoints: a row of checkpoints.csv as files, made from a base model's tiny weights.

The transformer's weights are packed as the row's dialect packs them (its rules inverted), the
layers that the row quantizes go through the family's `quantize`, and the result is declared and
written in the row's form. Calibration is a real pass of the tiny pipeline; ranges are rounded up
to a power of two, so that the bytes do not depend on the processor's last bits.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantmatrix import families, models, safetensors_writer
from quantmatrix.families.protocol import Calibration, Declaration, Family
from quantmatrix.matrix import CheckpointRow
from quantmatrix.models import Dialect
from quantmatrix.request import Request
from quantmatrix.safetensors_writer import Item
from quantmatrix.scheme import Scheme
from quantmatrix.tiny_packing import Tensors, pack_tensors, split

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = 3
FOREIGN_DIALECTS = {"nunchaku-svdq": "nunchaku"}
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""Spelling of dtypes in a safetensors header."""


def write_checkpoint(row: CheckpointRow, inner: str, folder: Path, base: Path) -> None:
    """Write a row's checkpoint into a folder; `inner` is the file or folder name inside it."""
    if row.form == "pipeline":
        shutil.copytree(base, folder / inner, dirs_exist_ok=True)
    for component in row.components:
        made = make_component(row, component, base)
        if row.form == "pipeline":
            target = folder / inner / component
            for old in target.glob("*.safetensors*"):
                old.unlink()
            write_folder(*made, target, base / component, with_config=True)
        elif row.form == "component-folder":
            write_folder(*made, folder / inner, base / component, with_config=True)
        elif row.form == "sharded":
            write_folder(*made, folder / inner, base / component, with_config=False, shards=SHARDS)
        else:
            name = inner if inner.endswith(".safetensors") else f"{row.id}.safetensors"
            write_file(*made, folder / name, base / component)


def make_component(row: CheckpointRow, component: str, base: Path) -> tuple[Tensors, Declaration]:
    """(tensors on disk, declaration) of one quantized component."""
    dialect = find_dialect(row)
    packed = pack_tensors(load_file(base / component / WEIGHTS), dialect, find_kept(row))
    family = families.load(row.family)
    chosen = choose_schemes(row, packed, dialect)
    ranges = calibrate(row.model, str(base))[component]
    tensors = {name: tensor for name, tensor in packed.items() if split(name)[0] not in chosen}
    kept = [layer for layer, leaf in map(split, sorted(tensors)) if leaf == "weight"]
    kept = [layer for layer in kept if tensors[f"{layer}.weight"].ndim == 2]
    for layer, scheme in chosen.items():
        stacked: dict[str, Any] = {}
        if "parts" in signature(family.quantize).parameters:
            stacked["parts"] = dialect.layer_targets(layer)[0].part[1]
        made = family.quantize(
            packed[f"{layer}.weight"],
            scheme,
            bias=packed.get(f"{layer}.bias"),
            calibration=find_range(ranges, layer, dialect),
            **stacked,
        )
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
    if "-mixed." in row.reference:
        tensors = {n: t for n, t in tensors.items() if not n.endswith(".input_scale")}
    return tensors, declare(family, chosen, kept, sorted(tensors))


def declare(
    family: Family, chosen: Mapping[str, Scheme], kept: list[str], names: list[str]
) -> Declaration:
    """The family's declaration; one that describes every tensor is told their names, too."""
    if "tensors" in signature(family.declare).parameters:
        tell_names: Callable[..., Declaration] = family.declare
        return tell_names(chosen, kept, tensors=names)
    return family.declare(chosen, kept)


def find_dialect(row: CheckpointRow) -> Dialect:
    """The dialect that a row's files are written in."""
    name = FOREIGN_DIALECTS.get(row.family, "bfl" if row.form == "raw" else "diffusers")
    return next(d for d in models.load(row.model).DIALECTS if d.name == name)


def find_kept(row: CheckpointRow) -> Callable[[str], bool]:
    """Whether a module, by diffusers' name, is one that the row leaves in full precision."""
    sets = models.load(row.model).FALLBACKS
    patterns = [re.compile(pattern) for word in row.kept.split() for pattern in sets[word]]
    return lambda module: any(pattern.fullmatch(module) for pattern in patterns)


def choose_schemes(
    row: CheckpointRow, packed: Mapping[str, torch.Tensor], dialect: Dialect
) -> dict[str, Scheme]:
    """Scheme of each layer on disk that the row quantizes: linear layers of the blocks, not kept."""
    blocks = models.load(row.model).BLOCKS
    family = families.load(row.family)
    kept = find_kept(row)
    found: dict[str, Scheme] = {}
    for name in sorted(packed):
        layer, leaf = split(name)
        targets = dialect.layer_targets(layer)
        inside = targets[0].module.split(".")[0] in blocks
        if leaf != "weight" or packed[name].ndim != 2 or not inside:
            continue
        if any(kept(target.module) for target in targets):
            continue
        scheme = family.SCHEMES[row.scheme]
        if row.family == "nunchaku-svdq":
            if any(target.interleave for target in targets):
                scheme = family.SCHEMES["awq"]
            elif "norm" in layer or "adaLN" in layer:
                continue
            elif any(target.unsigned for target in targets) and scheme.weight == "int4":
                scheme = replace(scheme, unsigned=True)
        if row.form == "raw":
            scheme = replace(scheme, swap_nibbles=True, tiled_scales=True)
        found[layer] = scheme
    return found


@lru_cache(maxsize=8)
def calibrate(model: str, base: str) -> dict[str, dict[str, Calibration]]:
    """Input ranges of every linear layer of every transformer component, from one real pass."""
    import diffusers

    module = models.load(model)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, dict[str, Calibration]] = {}
    for component in module.COMPONENTS:
        ranges = found.setdefault(component, {})
        for name, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(_watch(ranges, name))
    request = Request(model_path=base, tiny=True)
    with torch.inference_mode():
        pipeline(
            prompt="a curious pikachu",
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
            **module.call_arguments(request),
        )
    return {
        component: {name: round_up(seen) for name, seen in ranges.items()}
        for component, ranges in found.items()
    }


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


def find_range(
    ranges: Mapping[str, Calibration], layer: str, dialect: Dialect
) -> Calibration | None:
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
    """Write a component folder: weights (with an index for several shards), config, description."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    metadata = {"format": "pt", **declaration.metadata}
    if not with_config and declaration.config is not None:
        metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
    if shards == 1:
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
        config = json.loads((base / "config.json").read_text())
        if declaration.config is not None:
            config["quantization_config"] = declaration.config
        write_json(folder / "config.json", config)
    if declaration.description is not None:
        write_json(folder / declaration.description[0], declaration.description[1])


def write_file(tensors: Tensors, declaration: Declaration, path: Path, base: Path) -> None:
    """Write a single weight file whose header declares what it is, unless its names do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if is_raw(tensors) else dict(declaration.metadata)
    if declaration.config is not None:
        metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
    if "quantization_config" in metadata:
        metadata["config"] = (base / "config.json").read_text()
    save(tensors, sorted(tensors), path, {"format": "pt", **metadata})


def is_raw(tensors: Tensors) -> bool:
    """Whether these are the official raw names, whose files declare nothing."""
    return any(name.startswith("double_blocks.") for name in tensors)


def save(tensors: Tensors, names: list[str], path: Path, metadata: Mapping[str, str]) -> None:
    """Write some of the tensors; the library's writer would shuffle several metadata entries."""
    items = [
        Item(
            name,
            DTYPES[tensors[name].dtype],
            tuple(tensors[name].shape),
            partial(tensors.__getitem__, name),
        )
        for name in names
    ]
    safetensors_writer.write_file(path, items, dict(sorted(metadata.items())))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write sorted JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
