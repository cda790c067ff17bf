"""Transformer classes: what every one of diffusers showed, small, in every form; a table on its own.

`reports/transformer-classes.csv` is written by `python -m quantmatrix.measure.classes`. A class has a
line for each form that it was proved in, or one line with the reason why it was not. It is no claim
of a row and no record of a cell: it shows that the loader takes the class, whatever the pipeline.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from quantmatrix.errors import CheckpointError

FILE = "transformer-classes.csv"
LIMITS = {"fp8": 0.2, "modelopt-fp8": 0.2, "modelopt-nvfp4": 0.6, "msmodelslim": 0.08}
"""The largest relative L2 distance to BF16, by family, of one block of each kind.

The worst of 2026-11-29 times 1.2 or more; a layer of other numbers gives 0.7 and more.
"""


@dataclass(frozen=True)
class ClassLine:
    """One form of one class, or why a class has none."""

    class_name: str
    diffusers: str
    """Its version."""
    family: str = ""
    scheme: str = ""
    linear: int = 0
    """Linear layers of the small model."""
    quantized: int = 0
    """Those that stood quantized in the loaded model: all of the blocks that the scheme can store."""
    error: float = 0.0
    """Relative L2 distance of the output to that of the BF16 model."""
    witness: str = ""
    reason: str = ""
    """Why there is no small model of the class, or no forward of it."""


def read_lines(path: Path) -> tuple[ClassLine, ...]:
    """The lines of a table; none where there is no file. CheckpointError for another header."""
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        names = [field.name for field in fields(ClassLine)]
        if reader.fieldnames != names:
            raise CheckpointError(
                f"{path}: columns are {reader.fieldnames}, expected {names}: write it again with "
                "python -m quantmatrix.measure.classes"
            )
        return tuple(read_line(row) for row in reader)


def read_line(row: dict[str, str]) -> ClassLine:
    """One line from its texts."""
    kinds: dict[str, Any] = {"linear": int, "quantized": int, "error": float}
    return ClassLine(**{name: kinds.get(name, str)(text) for name, text in row.items()})


def write_lines(lines: Iterable[ClassLine]) -> str:
    """The table as text."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(field.name for field in fields(ClassLine))
    for line in lines:
        writer.writerow(
            f"{cell:.4g}" if isinstance(cell, float) else cell for cell in astuple(line)
        )
    return stream.getvalue()
