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
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantmatrix import families, models
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.matrix import CheckpointRow
from quantmatrix.models import DIFFUSERS, Dialect, Target
from quantmatrix.request import Request
from quantmatrix.scheme import Scheme

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = 3
FOREIGN_DIALECTS = {"nunchaku-svdq": "nunchaku"}
Tensors = dict[str, torch.Tensor]


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
    plain = load_file(base / component / WEIGHTS)
    dialect = find_dialect(row)
    packed = pack_tensors(plain, dialect)
    family = families.load(row.family)
    chosen = choose_schemes(row, packed, dialect)
    ranges = calibrate(row.model, str(base)) if chosen else {}
    tensors: Tensors = {}
    kept = []
    layers = {name.rpartition(".")[0] for name in packed}
    for layer in sorted(layers):
        own = {n.rpartition(".")[2]: t for n, t in packed.items() if n.rpartition(".")[0] == layer}
        scheme = chosen.get(layer)
        if scheme is None:
            tensors |= {f"{layer}.{suffix}".lstrip("."): t for suffix, t in own.items()}
            if own.get("weight") is not None and own["weight"].ndim == 2:
                kept.append(layer)
            continue
        calibration = find_range(ranges[component], layer, dialect)
        made = family.quantize(own["weight"], scheme, bias=own.get("bias"), calibration=calibration)
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
    if row.form == "raw" and "mixed" in row.reference:
        tensors = {n: t for n, t in tensors.items() if not n.endswith(".input_scale")}
    declare: Any = family.declare
    try:
        declaration = declare(chosen, kept, tensors=sorted(tensors))
    except TypeError:
        declaration = declare(chosen, kept)
    return tensors, declaration


def find_dialect(row: CheckpointRow) -> Dialect:
    """The dialect that a row's files are written in."""
    name = FOREIGN_DIALECTS.get(row.family, "bfl" if row.form == "raw" else "diffusers")
    return next(d for d in models.load(row.model).DIALECTS if d.name == name)


def choose_schemes(
    row: CheckpointRow, packed: Mapping[str, torch.Tensor], dialect: Dialect
) -> dict[str, Scheme]:
    """Scheme of each layer on disk that the row quantizes: linear layers of the blocks, not kept."""
    model = models.load(row.model)
    family = families.load(row.family)
    patterns = [
        re.compile(pattern) for word in row.kept.split() for pattern in model.FALLBACKS[word]
    ]
    found: dict[str, Scheme] = {}
    for name, tensor in packed.items():
        layer, _, leaf = name.rpartition(".")
        targets = dialect.layer_targets(layer)
        inside = targets[0].module.split(".")[0] in model.BLOCKS
        if leaf != "weight" or tensor.ndim != 2 or not inside:
            continue
        if any(p.fullmatch(target.module) for p in patterns for target in targets):
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


def invert(dialect: Dialect, modules: set[str]) -> dict[str, list[tuple[Target, str]]]:
    """Layers on disk with the modules (and how) that go into each, in order of their rows."""
    found: dict[str, list[tuple[Target, str]]] = {}
    rules = [(rule, target) for rule in dialect.layers for target in rule.targets]
    compiled = [
        (rule, target, re.compile(re.escape(target.module).replace(r"\{i\}", r"(\d+)") + r"\Z"))
        for rule, target in rules
    ]
    for module in sorted(modules):
        hits = [
            (rule.source.replace("{i}", match.group(1) if match.groups() else ""), target)
            for rule, target, pattern in compiled
            if (match := pattern.match(module))
        ]
        for source, target in hits or [(module, Target(module))]:
            found.setdefault(source, []).append((target, module))
    for parts in found.values():
        parts.sort(key=lambda part: part[0].part)
    return found


def pack_tensors(plain: Tensors, dialect: Dialect) -> Tensors:
    """The tensors of a diffusers transformer as a dialect names and packs them."""
    if dialect.name == DIFFUSERS.name:
        return plain
    whole = {target.module: rule.source for rule in dialect.tensors for target in rule.targets}
    packed: Tensors = {}
    rest = dict(plain)
    for template, source in whole.items():
        pattern = re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)") + r"\Z")
        for name in list(rest):
            if match := pattern.match(name):
                number = match.group(1) if match.groups() else ""
                packed[source.replace("{i}", number)] = rest.pop(name)
    modules = {name.rpartition(".")[0] for name in rest}
    for source, parts in invert(dialect, modules).items():
        own = [
            (
                target,
                {n.rpartition(".")[2]: t for n, t in rest.items() if n.rpartition(".")[0] == m},
            )
            for target, m in parts
        ]
        for suffix in own[0][1]:
            tensor = torch.cat([pack_part(target, suffix, part[suffix]) for target, part in own])
            packed[f"{source}.{suffix}".lstrip(".")] = tensor
    return packed


def pack_part(target: Target, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
    """A module's tensor as its layer on disk holds it: the inverse of what loading does."""
    start, stop, of = target.columns
    if of > 1 and suffix == "weight":
        unit = tensor.shape[1] // of
        tensor = tensor[:, start * unit : stop * unit]
    if of > 1 and suffix == "bias" and stop != of:
        tensor = torch.zeros_like(tensor)
    if target.swap_halves:
        half = tensor.shape[0] // 2
        tensor = torch.cat([tensor[half:], tensor[:half]])
    if target.interleave > 1:
        chunks = tensor.unflatten(0, (target.interleave, -1)).clone()
        if suffix == "bias":
            chunks[list(target.plus_one)] += 1
        tensor = chunks.transpose(0, 1).flatten(0, 1)
    return tensor.contiguous()


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
        save_file({n: tensors[n].contiguous() for n in names}, folder / WEIGHTS, metadata=metadata)
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
            file = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata=metadata)
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
    """Write a single weight file whose header declares what it is, where the family does so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **declaration.metadata}
    if declaration.config is not None and not is_raw(tensors):
        metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
        metadata["config"] = (base / "config.json").read_text()
    elif "quantization_config" in metadata:
        metadata["config"] = (base / "config.json").read_text()
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(ordered, path, metadata=metadata)


def is_raw(tensors: Tensors) -> bool:
    """Whether these are the official raw names, whose files declare nothing."""
    return any(name.startswith("double_blocks.") for name in tensors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write sorted JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
