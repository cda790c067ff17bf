"""Plans: what every checkpoint would run as on every hardware, and what it needs there at true size.

`reports/plans.csv` is written by `python -m quantmatrix.measure.plans`, which plans stand-ins of every
checkpoint for every row of hardware.csv; it needs torch, its readers do not. A plan is no proof: it says
which kernels would be chosen, or by which rule there are none. A line holds for all hardware that it names.

| column      | content |
| ----------- | ------- |
| `checkpoint`, `hardware`, `backend` | a row of checkpoints.csv; rows of hardware.csv; the backend that was |
|             | asked for, blank: whichever the plan chose |
| `kernels`   | backends of the layers with their numerics, most frequent first: `torch:W8A8` |
| `rule`, `message` | of a refusal; both are blank where there is a plan |
| `whole_mib` | weights of all transformers in the device's memory, MiB |
| `largest_mib` | of the largest transformer; what `--dit-cpu-offload` needs, where the family allows it |
| `layerwise_mib` | of two blocks and all that is in none; what `--dit-layerwise-offload` needs |
| `movable`   | 1 where `--dit-cpu-offload` is allowed |
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from quantmatrix.errors import QuantmatrixError

FILE = "plans.csv"
COMMAND = "python -m quantmatrix.measure.plans"


class PlansError(QuantmatrixError):
    """A table of plans that cannot be read."""


@dataclass(frozen=True)
class PlanLine:
    """One outcome of planning a checkpoint; see the module's table."""

    checkpoint: str
    hardware: tuple[str, ...]
    backend: str
    kernels: tuple[str, ...] = ()
    rule: str = ""
    message: str = ""
    whole_mib: int = 0
    largest_mib: int = 0
    layerwise_mib: int = 0
    movable: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        """The kernels without their numerics."""
        return tuple(dict.fromkeys(name.partition(":")[0] for name in self.kernels))

    @property
    def numerics(self) -> tuple[str, ...]:
        """The numerics of the kernels, sorted."""
        return tuple(sorted({name.partition(":")[2] for name in self.kernels}))


Key = tuple[str, str, str]
"""(checkpoint, hardware, backend)."""
NAMES = tuple(field.name for field in fields(PlanLine))


def read_plans(path: Path) -> dict[Key, PlanLine]:
    """The outcome of every key; nothing where there is no file. PlansError for another form."""
    if not path.is_file():
        return {}
    found: dict[Key, PlanLine] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != NAMES:
            raise PlansError(
                f"{path}: columns are {reader.fieldnames}, expected {list(NAMES)}: write it again with {COMMAND}"
            )
        for number, row in enumerate(reader, 2):
            try:
                line = read_line(row)
            except (TypeError, ValueError, AttributeError) as error:
                raise PlansError(
                    f"{path}:{number}: {error}: write it again with {COMMAND}"
                ) from error
            found |= {(line.checkpoint, name, line.backend): line for name in line.hardware}
    return found


def read_line(row: Mapping[str, str]) -> PlanLine:
    """One line from its texts; ValueError for a number that is none."""
    kinds: dict[str, Any] = {
        "hardware": lambda text: tuple(text.split()),
        "kernels": lambda text: tuple(text.split()),
        "movable": lambda text: bool(int(text)),
    }
    return PlanLine(**{n: kinds.get(n, int if n.endswith("_mib") else str)(row[n]) for n in NAMES})


def write_plans(lines: Iterable[PlanLine]) -> str:
    """The table as text; outcomes of one checkpoint that differ in hardware alone become one line."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for line in lines:
        key = tuple(v for n, v in zip(NAMES, astuple(line), strict=True) if n != "hardware")
        groups.setdefault(key, []).extend(line.hardware)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(NAMES)
    for (checkpoint, *rest), hardware in groups.items():
        writer.writerow([checkpoint, " ".join(hardware), *map(show, rest)])
    return stream.getvalue()


def show(value: Any) -> str:
    """A value of a column as text."""
    if isinstance(value, tuple):
        return " ".join(value)
    return str(int(value)) if isinstance(value, bool) else str(value)
