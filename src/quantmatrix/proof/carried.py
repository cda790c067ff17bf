"""Carried: changes of the shared code that were shown to compute nothing else.

The `cpu` twin of a record (same checkpoint, flags and seed; of true size at the stand-ins' width) runs
the same shared code. Where all that the twin gives is bit-identical before and after a change, on one
machine in one job, the pair of digests stands in `reports/carried.csv`, and a record whose shared
digest leads through that file to today's stays fresh. The `device` digest is never carried.

| column  | content |
| ------- | ------- |
| old, new | shared digests before and after |
| commit  | commit of the code after, `+changes` when files differed |
| machine | processor and system of the machine that ran both |
| latents | digest of the latents of every twin; of true size in both forms |
| twins   | how many twins were run, of either scope |
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path

from quantmatrix.errors import QuantmatrixError

CARRIED = "carried.csv"
DIGEST = "sha256:"


class CarriedError(QuantmatrixError, ValueError):
    """A line of carried.csv that is none."""


@dataclass(frozen=True)
class Pair:
    """One change that was shown to compute nothing else."""

    old: str
    new: str
    commit: str
    machine: str
    latents: str
    twins: str


COLUMNS = tuple(field.name for field in fields(Pair))


@dataclass(frozen=True)
class Carried:
    """The pairs of a carried.csv."""

    pairs: tuple[Pair, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Carried:
        """The pairs of a file, none where there is no file; CarriedError names a damaged line."""
        if not path.is_file():
            return cls()
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        if not rows or tuple(rows[0]) != COLUMNS:
            raise CarriedError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
        for number, row in enumerate(rows[1:], 2):
            whole = len(row) == len(COLUMNS) and all(row)
            if not whole or not all(text.startswith(DIGEST) for text in (*row[:2], row[4])):
                raise CarriedError(
                    f"{path}:{number}: expected {len(COLUMNS)} values, digests as `{DIGEST}...`; "
                    "write this file with `quantmatrix evidence carry`"
                )
        return cls(tuple(Pair(*row) for row in rows[1:]))

    @cached_property
    def _by_old(self) -> dict[str, list[Pair]]:
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.old, []).append(pair)
        return found

    def find_way(self, old: str, new: str) -> tuple[Pair, ...]:
        """The pairs that lead from one digest to another, fewest first; none where nothing does."""
        ways: dict[str, tuple[Pair, ...]] = {old: ()}
        pending = [old]
        while pending and new not in ways:
            here = pending.pop(0)
            for pair in self._by_old.get(here, ()):
                if pair.new not in ways:
                    ways[pair.new] = (*ways[here], pair)
                    pending.append(pair.new)
        return ways.get(new, ())

    def add(self, found: Iterable[Pair]) -> Carried:
        """The same with more pairs; those that are known already are left out."""
        known = {(pair.old, pair.new) for pair in self.pairs}
        return Carried((*self.pairs, *(p for p in found if (p.old, p.new) not in known)))

    def encode(self) -> bytes:
        """The bytes of a carried.csv."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([COLUMNS, *(astuple(pair) for pair in self.pairs)])
        return stream.getvalue().encode()
