"""Limit samples: the measurements that limits rest on, in two CSV files under `reports/`.

| file         | one line is |
| ------------ | ----------- |
| `limits.csv` | the worst that was measured of a class of arithmetic on a model, on CPUs or on accelerators |
|              | (the hardware of the `cell`), by which `cell`, out of how many; `rounding`, what the format |
|              | alone costs a layer (see `rounding_model`, 0: no bound); and which source `decided` |
| `spread.csv` | how far a model's BF16 run is from its FP32 run, same seed and size (see `spread`) |

A line without its measurement is refused: a number that nobody measured is no limit. Files of earlier
revisions, without the last three columns, are read as they were meant then: measured alone.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TypeVar

from quantmatrix.errors import QuantmatrixError

SPREADS = "spread.csv"
"""File of spreads, beside limits.csv."""


class LimitsError(QuantmatrixError, LookupError):
    """No limit is known, or a file of samples is damaged."""


def name_side(hardware: str) -> str:
    """`cpu` or `accelerator`: BF16 runs of the two differ by more than those of one of them."""
    return "cpu" if hardware == "cpu" else "accelerator"


@dataclass(frozen=True)
class Sample:
    """The worst values that were measured for one class on one model, on one side."""

    kind: str
    """The class of arithmetic."""
    model: str
    psnr_db: float
    cosine: float
    relative_l2: float
    layer_error: float
    cell: str
    """Id of the cell with the lowest PSNR."""
    cells: int
    """How many cells were looked at."""
    torch: str
    margin: float = 1.5
    """What the error was multiplied by; earlier files do not tell, it was this."""
    rounding: float = 0.0
    """Relative L2 error of a layer that the format's rounding alone may give; 0 without a bound."""
    decided: str = ""
    """Which source decided: `measured`, and what else for which metric."""

    @property
    def side(self) -> str:
        """Where it was measured: `cpu` or `accelerator`."""
        return name_side(self.cell.partition("@")[2].partition("+")[0])


@dataclass(frozen=True)
class Spread:
    """A model's BF16 run against its FP32 run: the worst step, and the worst layer on its input."""

    model: str
    psnr_db: float
    cosine: float
    relative_l2: float
    layer_error: float
    layer: str
    """The layer with the largest error."""
    layers: int
    """How many were looked at."""
    steps: int
    size: str
    """Frames x height x width of what was generated."""
    torch: str
    processor: str
    commit: str
    made: str


Row = TypeVar("Row", Sample, Spread)
PROOF: dict[type, tuple[str, ...]] = {
    Sample: ("kind", "model", "cell", "cells", "torch"),
    Spread: ("model", "layer", "layers", "steps", "torch", "made"),
}
"""What a line must tell of its measurement."""
NUMBERS = ("psnr_db", "cosine", "relative_l2", "layer_error", "margin", "rounding")


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, none when there is no file; LimitsError names a damaged line."""
    return parse_samples(read_text(path), str(path)) if path.is_file() else []


def read_spreads(path: Path) -> dict[str, Spread]:
    """The spreads of a file by model, none when there is no file; errors as above."""
    return parse_spreads(read_text(path), str(path)) if path.is_file() else {}


def read_text(path: Path) -> str:
    """The text of a file; LimitsError for one that is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LimitsError(f"{path}: not UTF-8 text: {error.reason}; measure it again") from error


def parse_samples(text: str, name: str) -> list[Sample]:
    """The samples of a file's text; LimitsError names a damaged line of `name`."""
    return parse_rows(Sample, text, name)


def parse_spreads(text: str, name: str) -> dict[str, Spread]:
    """The spreads of a file's text, by model; LimitsError names a damaged line of `name`."""
    return {spread.model: spread for spread in parse_rows(Spread, text, name)}


def parse_rows(kind: type[Row], text: str, name: str) -> list[Row]:
    """Lines of a CSV file as dataclasses; those with a default may be missing, together.

    Raises LimitsError for other columns, a value of another kind, a line without its measurement
    and two of one place.
    """
    kinds = {"float": float, "int": int, "str": str}
    columns = {column.name: kinds[str(column.type)] for column in fields(kind)}
    needed = [column.name for column in fields(kind) if column.default is MISSING]
    rows = csv.DictReader(io.StringIO(text))
    head = list(rows.fieldnames or ())
    if head != list(columns) and head != needed:
        raise LimitsError(f"{name}:1: expected the columns {','.join(columns)}")
    found: list[Row] = []
    lines: dict[str, int] = {}
    for row in rows:
        try:
            one = kind(**{key: columns[key](row[key]) for key in head})
        except (TypeError, ValueError) as error:
            raise LimitsError(f"{name}:{rows.line_num}: {error}") from error
        if problem := find_bareness(one):
            raise LimitsError(f"{name}:{rows.line_num}: {problem}")
        if (key := name_key(one)) in lines:
            first = f"line {lines[key]} has a sample of {key}, too"
            raise LimitsError(f"{name}:{rows.line_num}: {first}; delete the one that was added")
        lines[key] = rows.line_num
        found.append(one)
    return found


def name_key(row: Sample | Spread) -> str:
    """What a line is the only one of: the looser of two would decide."""
    if isinstance(row, Spread):
        return row.model
    return f"{row.kind} on {row.model} ({row.side})"


def find_bareness(row: Sample | Spread) -> str | None:
    """Why a line is a bare number, or not even one; None for a measurement."""
    missing = [name for name in PROOF[type(row)] if not getattr(row, name)]
    if missing:
        return f"a limit without its sample: {', '.join(missing)} missing; measure instead"
    odd = [n for n in NUMBERS if hasattr(row, n) and not math.isfinite(getattr(row, n))]
    return f"{', '.join(odd)}: not a finite number" if odd else None


def write_rows(kind: type[Row], rows: Iterable[Row]) -> str:
    """The text of a file, sorted."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [column.name for column in fields(kind)]
    writer.writerow(names)
    for row in sorted(
        rows, key=lambda r: (getattr(r, "kind", ""), r.model, getattr(r, "cell", ""))
    ):
        writer.writerow([getattr(row, name) for name in names])
    return stream.getvalue()
