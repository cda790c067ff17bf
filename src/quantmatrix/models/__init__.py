"""The base models: one module per id, and the types with which they describe tensor names.

A *dialect* is one way of naming (and packing) a model's tensors. Its rules lead from a name on disk
to diffusers' module names, so that a checkpoint can be described from its headers alone. `{i}`
stands for a block number. Every model has the dialect `diffusers`, the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

from quantmatrix.errors import UsageError

IDS = ("flux-1", "flux-2", "wan-2-2", "qwen-image", "z-image")


@dataclass(frozen=True)
class Target:
    """A diffusers module that takes a layer on disk, or a part of it."""

    module: str
    part: tuple[int, int] = (0, 1)
    """(index, count): which of `count` equal runs of rows of the layer on disk."""
    columns: tuple[int, int, int] = (0, 1, 1)
    """(start, stop, of): which `of`-ths of the module's input columns this layer serves."""
    swap_halves: bool = False
    """On disk the second half of the rows comes first."""
    interleave: int = 0
    """S > 1: row d * S + i on disk is row i * D + d of the module."""
    plus_one: tuple[int, ...] = ()
    """Chunks (of `interleave`) in whose bias a 1 was folded."""
    unsigned: bool = False
    """The layer's input follows a GELU: an int4 SVDQuant file codes it without a sign."""


@dataclass(frozen=True)
class Rule:
    """`source` (a layer name on disk, or a whole tensor name in `Dialect.tensors`) -> targets."""

    source: str
    targets: tuple[Target, ...]
    quantized_only: bool = False
    """A writer uses this form for a quantized layer only; a plain one keeps diffusers' names."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """The source as a regular expression over whole names."""
        return _pattern(self.source)


@cache
def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)") + r"\Z")


@dataclass(frozen=True)
class Dialect:
    """One naming of a model's tensors. A name that no rule matches keeps its spelling."""

    name: str
    marker: str
    """Regular expression that some tensor name of the dialect matches, and none of the others."""
    layers: tuple[Rule, ...] = ()
    """Rules on layer names: every suffix of the layer follows."""
    tensors: tuple[Rule, ...] = ()
    """Rules on whole tensor names, tried first."""

    def matches(self, names: Iterable[str]) -> bool:
        """Whether these tensor names are of this dialect."""
        marker = re.compile(self.marker)
        return any(marker.search(name) for name in names)

    def layer_targets(self, layer: str) -> tuple[Target, ...]:
        """Diffusers modules of a layer on disk, block number filled in."""
        return _apply(self.layers, layer)

    def tensor_targets(self, name: str) -> tuple[Target, ...] | None:
        """Targets of a whole tensor name, when a tensor rule covers it (module = tensor name)."""
        found = _apply(self.tensors, name)
        return None if found == (Target(name),) else found


def _apply(rules: tuple[Rule, ...], name: str) -> tuple[Target, ...]:
    for rule in rules:
        if match := rule.pattern.match(name):
            number = match.groupdict().get("i") or ""
            return tuple(replace(t, module=t.module.replace("{i}", number)) for t in rule.targets)
    return (Target(name),)


def find_sources(rules: Iterable[Rule], name: str) -> list[str]:
    """Names on disk whose rules lead to a module (or tensor), block number filled in."""
    found = []
    for rule in rules:
        for target in rule.targets:
            if match := _pattern(target.module).match(name):
                found.append(rule.source.replace("{i}", match.groupdict().get("i") or ""))
    return found


@dataclass(frozen=True)
class Defaults:
    """What a request takes when the user says nothing; sizes in pixels, frames in frames."""

    height: int
    width: int
    steps: int
    guidance: float
    frames: int = 1
    negative_prompt: str = ""
    fps: int = 16


class Model(Protocol):
    """The names that every module in `quantmatrix.models` has."""

    ID: str
    NAME: str
    """Short name, as `--model-id` takes it (`FLUX.1-dev`)."""
    REPO: str
    PIPELINE: str
    """Class name of the diffusers pipeline."""
    TRANSFORMER: str
    """Class name of the diffusers transformer."""
    COMPONENTS: tuple[str, ...]
    """Transformer components, primary first."""
    DEFAULTS: Defaults
    TINY_DEFAULTS: Defaults
    DIALECTS: tuple[Dialect, ...]
    FALLBACKS: Mapping[str, tuple[str, ...]]
    """Named sets of regular expressions over module names that a checkpoint keeps in BF16."""
    BLOCKS: tuple[str, ...]
    """Attribute names of the transformer's block lists, in forward order (layerwise offload)."""

    def call_arguments(self, request: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline call for a request (size, steps, guidance ...).

        Raises UsageError for a flag that the model does not take.
        """

    def build_tiny(self, folder: Any) -> None:
        """Write the tiny stand-in pipeline (BF16, structured weights) into a folder."""


def refuse_flags(request: Any, name: str, *fields: str) -> None:
    """Raise UsageError for a field that is set although the model has no use for it."""
    for field in fields:
        if getattr(request, field) is not None:
            raise UsageError(f"--{field.replace('_', '-')}: {name} takes none; leave the flag out")


def load(model: str) -> Model:
    """The module of a model id."""
    if model not in IDS:
        raise KeyError(f"no such base model: {model}; known: {', '.join(IDS)}")
    return cast("Model", import_module(f"quantmatrix.models.{model.replace('-', '_')}"))


def by_class(class_name: str) -> str | None:
    """Model id of a transformer or pipeline class name, or None."""
    for name in IDS:
        model = load(name)
        if class_name in (model.TRANSFORMER, model.PIPELINE):
            return name
    return None


def by_short_name(short_name: str) -> str | None:
    """Model id of a `--model-id` value (the hub id's last part, any case), or None."""
    for name in IDS:
        if short_name.lower() in (
            load(name).NAME.lower(),
            load(name).REPO.rsplit("/", 1)[-1].lower(),
        ):
            return name
    return None


def dialect_of(model: str, names: Iterable[str]) -> Dialect:
    """The dialect that a set of tensor names is written in; `diffusers` when no other matches."""
    listed = list(names)
    others = [d for d in load(model).DIALECTS if d.name != "diffusers"]
    return next((d for d in others if d.matches(listed)), DIFFUSERS)


DIFFUSERS = Dialect(name="diffusers", marker=r"^")
