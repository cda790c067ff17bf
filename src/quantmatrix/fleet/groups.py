"""Groups: the cells of one checkpoint on one hardware, which one task runs, so that it is loaded once.

Of each hardware the group that will take longest goes first, by the times of the last evidence; ties
are broken by names. So the end of a run is made of short groups, and no node waits long for the last.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantmatrix.harness import shards
from quantmatrix.harness.completeness import fits

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell

PLAN_ONLY = frozenset({"refuse", "compile"})
"""Checks that need no device; `harness.plugin` runs them anywhere."""


@dataclass(frozen=True)
class Group:
    """One task."""

    hardware: str
    model: str
    checkpoint: str
    cells: tuple[str, ...]
    """Ids, in the order of the tables."""
    checks: int
    """Number of checks of all its cells."""
    seconds: float
    """Estimated."""
    needs_device: bool

    @property
    def name(self) -> str:
        """`h200/flux-1/fp8-flux-1-online`; no two groups of a run share it."""
        return f"{self.hardware}/{self.model}/{self.checkpoint}"

    def order(self, checks: Collection[str], limit: int, *, full_size: bool) -> bytes:
        """What the node is asked to do, as JSON; `limit` is seconds that one check may take."""
        return json.dumps(
            {
                "group": self.name,
                "hardware": self.hardware,
                "cells": self.cells,
                "checks": sorted(checks),
                "limit": limit,
                "most_seconds": limit * self.checks + STARTING,
                "full_size": full_size,
            }
        ).encode()


STARTING = 900
"""Seconds that a process may take beside its checks."""


def make_groups(
    cells: Iterable[Cell], evidence: Mapping[str, Evidence], only: Collection[str] = ()
) -> list[Group]:
    """The groups of some cells, hardware by hardware, the longest first; `only` are the checks asked for."""
    by_hardware: dict[str, list[Cell]] = {}
    for cell in cells:
        by_hardware.setdefault(cell.hardware, []).append(cell)
    groups = []
    for hardware, found in by_hardware.items():
        seconds = shards.estimate_all(found, evidence)
        units: dict[tuple[str, str], list[Cell]] = {}
        for cell in found:
            units.setdefault((cell.model, cell.checkpoint), []).append(cell)
        units_of = [make_group(hardware, key, unit, seconds, only) for key, unit in units.items()]
        groups += sorted(units_of, key=lambda group: (-group.seconds, group.name))
    return groups


def make_group(
    hardware: str,
    key: tuple[str, str],
    cells: Iterable[Cell],
    seconds: Mapping[str, float],
    only: Collection[str],
) -> Group:
    """One group; `key` is (model, checkpoint), `seconds` are those of each cell."""
    cells = list(cells)
    checks = [check for cell in cells for check in cell.checks if fits(check, only)]
    return Group(
        hardware,
        *key,
        cells=tuple(cell.id for cell in cells),
        checks=len(checks),
        seconds=sum(seconds[cell.id] for cell in cells),
        needs_device=not PLAN_ONLY.issuperset(checks),
    )
