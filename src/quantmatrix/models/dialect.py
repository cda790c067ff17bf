"""Dialects: names on disk to module names, as rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Target:
    """A diffusers module that takes a layer on disk, or a part of it."""

    module: str
    rows: tuple[int, int, int] = (0, 1, 1)
    """(start, stop, of): which `of`-ths of the rows of the layer on disk this module takes."""
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
    reshaped: bool = False
    """A plain tensor: the same numbers in the same order, in another shape than the model's."""

    def count_stored(self, taken: int) -> int:
        """Rows of the layer on disk of which the module takes so many."""
        start, stop, of = self.rows
        return taken * of // (stop - start)


def cut_rows(*modules: str) -> tuple[Target, ...]:
    """Targets of a layer on disk that holds the rows of several modules, equally many of each."""
    count = len(modules)
    return tuple(Target(module, rows=(i, i + 1, count)) for i, module in enumerate(modules))


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

    def dropped(self) -> dict[str, str]:
        """Tensors on disk that are no part of the model here, each with the reason."""
        return {}


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


DIFFUSERS = Dialect(name="diffusers", marker=r"^")
