"""Sharding: the rows of one hardware, cut into parts that take about equally long.

The unit is a checkpoint on a model: its cells are run one after another, so that it is loaded once.
Units go, the longest first, to the part that has the least to do (longest processing time first);
ties are broken by names. The seconds come from the last evidence, an unknown cell takes as long as
the median of the known ones on that device. Everything follows from the committed files, so
machines that compute the parts on their own agree:

    part 1 of 2:  |fp8-flux-2 ....... 41 s|svdq-flux-1 12 s|
    part 2 of 2:  |fp8-wan-2-2 ... 38 s|fp8-flux-1 .. 14 s|
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

UNKNOWN_SECONDS = 300.0
"""Seconds of a cell on a hardware that has no evidence at all."""
REFUSAL_SECONDS = 1.0
"""Seconds of a cell that is only planned."""
TARGET_SECONDS = 1800.0
"""A part is cut so that it takes about this long."""
SHOWN = 5
"""Unknown rows that an error names."""
MOST_PARTS = 10
"""More parts than this are never made for one hardware."""


@dataclass(frozen=True)
class Part:
    """One share of the cells of a hardware."""

    number: int
    """From 1."""
    count: int
    hardware: str
    cells: tuple[str, ...]
    """Ids, in the order of the tables."""
    seconds: float
    """Estimated."""


def estimate(cell: Cell, record: Evidence | None, unknown: float = UNKNOWN_SECONDS) -> float:
    """Seconds that a cell will take: those of its last run, which generated twice beside its command."""
    if tuple(cell.checks) == ("refuse",):
        return REFUSAL_SECONDS
    if record is None or not record.timings:
        return unknown
    seconds = record.timings
    loading = sum(value for name, value in seconds.items() if name.startswith("load"))
    return loading + 2 * seconds.get("generate", 0.0) + seconds.get("command", 0.0)


def estimate_all(cells: Iterable[Cell], evidence: Mapping[str, Evidence]) -> dict[str, float]:
    """Seconds of each cell, by id; the cells are those of one hardware."""
    cells = list(cells)
    known = [
        estimate(cell, evidence[cell.id])
        for cell in cells
        if cell.id in evidence and evidence[cell.id].timings and cell.checks != ("refuse",)
    ]
    unknown = median(known) if known else UNKNOWN_SECONDS
    return {cell.id: estimate(cell, evidence.get(cell.id), unknown) for cell in cells}


def count_parts(seconds: float, units: int, target: float = TARGET_SECONDS) -> int:
    """How many parts make each last about `target` seconds."""
    return max(1, min(math.ceil(seconds / target), units, MOST_PARTS))


def cut(
    cells: Sequence[Cell],
    evidence: Mapping[str, Evidence],
    count: int | None = None,
    target: float = TARGET_SECONDS,
) -> list[Part]:
    """The parts of the cells of one device; every cell is in exactly one.

    `count` fixes the number of parts, some of which may then be empty.
    """
    seconds = estimate_all(cells, evidence)
    units: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        units.setdefault((cell.model, cell.checkpoint), []).append(cell)
    cost = {key: sum(seconds[cell.id] for cell in unit) for key, unit in units.items()}
    if count is None:
        count = count_parts(sum(cost.values()), len(units), target)
    parts: list[tuple[float, int, list[Cell]]] = [
        (0.0, number, []) for number in range(1, count + 1)
    ]
    for key in sorted(units, key=lambda key: (-cost[key], key)):
        load, number, held = heapq.heappop(parts)
        heapq.heappush(parts, (load + cost[key], number, [*held, *units[key]]))
    order = {cell.id: index for index, cell in enumerate(cells)}
    hardware = cells[0].hardware if cells else ""
    return [
        Part(
            number,
            count,
            hardware,
            tuple(sorted((c.id for c in held), key=order.__getitem__)),
            load,
        )
        for load, number, held in sorted(parts, key=lambda part: part[1])
    ]


def runnable(tables: Matrix, hardware: Collection[str] = ()) -> list[Cell]:
    """Cells that a run of a hardware must execute: claimed, and of a family that has a module."""
    from quantmatrix import families

    written = families.written()
    return [
        cell
        for cell in tables.select(hardware=hardware)
        if cell.claim != "planned" and cell.family in written
    ]


def list_jobs(
    tables: Matrix,
    evidence: Mapping[str, Evidence],
    hardware: Collection[str] = (),
    count: int | None = None,
    target: float = TARGET_SECONDS,
) -> dict[str, Any]:
    """The parts of each hardware as a CI matrix, `{"include": [...]}`; empty parts are left out."""
    rows = list(dict.fromkeys(cell.hardware for cell in runnable(tables, hardware)))
    entries = []
    for hardware_id in rows:
        row = tables.hardware[hardware_id]
        for part in cut(runnable(tables, [hardware_id]), evidence, count, target):
            if part.cells:
                entries.append(
                    {
                        "part": part.number,
                        "parts": part.count,
                        "shard": f"{part.number}/{part.count}",
                        "hardware": hardware_id,
                        "rows": list(part.cells),
                        "seconds": round(part.seconds, 1),
                        "job": row.job,
                        "label": row.label,
                        "runner": [row.label]
                        if row.vendor == "cpu"
                        else ["self-hosted", row.label],
                        "size": "" if row.vendor == "cpu" else "--full-size",
                    }
                )
    return {"include": entries}


def read_shard(text: str) -> tuple[int, int]:
    """(number, count) of `2/5`; UsageError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"--shard {text}: expected i/n with 1 <= i <= n, for instance 2/5")
    return number, count


def select_shard(cells: Sequence[Cell], evidence: Mapping[str, Evidence], text: str) -> list[Cell]:
    """The cells of one part; each device among them is cut on its own."""
    number, count = read_shard(text)
    chosen: set[str] = set()
    for hardware_id in dict.fromkeys(cell.hardware for cell in cells):
        here = [cell for cell in cells if cell.hardware == hardware_id]
        chosen.update(cut(here, evidence, count)[number - 1].cells)
    return [cell for cell in cells if cell.id in chosen]


def read_rows(path: Path, option: str = "") -> tuple[str, ...]:
    """Ids of rows or cells in a file, one per line; what follows a `#` is a comment.

    UsageError, which names the option (`--rows FILE`), for a file that is not text.
    """
    option = option or f"--rows {path}"
    try:
        lines = strict_json.read_bytes(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{option}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option}: not UTF-8 text ({error.reason}); write one row or cell per line"
        ) from error
    except strict_json.JsonError as error:
        raise UsageError(f"{option}: {error}; write one row or cell per line") from error
    names = (line.partition("#")[0].strip() for line in lines)
    return tuple(dict.fromkeys(name for name in names if name))


def select_rows(cells: Sequence[Cell], wanted: Collection[str], where: str) -> list[Cell]:
    """The cells of a list of row and cell ids; UsageError names those that do not exist.

    `where` is the option that gave the list, as errors name it.
    """
    known = {cell.id for cell in cells} | {cell.row for cell in cells}
    if unknown := [name for name in wanted if name not in known]:
        named = ", ".join(unknown[:SHOWN]) + (" ..." if len(unknown) > SHOWN else "")
        raise UsageError(f"{where}: {named:.400}: no such row or cell is claimed")
    return [cell for cell in cells if cell.id in wanted or cell.row in wanted]
