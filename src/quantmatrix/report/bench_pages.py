"""Bench pages: what reports show of the benchmarks: bars and a table in a cell's panel, one table
per family.

Results are shown with the device they were made on, and with a remark where row or code have changed
since. Nothing here is judged again; `quantmatrix bench --compare` is the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmatrix.proof import record as records
from quantmatrix.proof.bench_results import BENCHMARKS, FORMS, Result, list_comparisons, show_ratio

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell

HEAD = (
    "cell", "size", "device", "component", "step, of BF16", "smallest detectable change", "verdict", "load, of BF16",
    "weights, of BF16", "peak, of BF16", "made",
)  # fmt: skip
LEGEND = (
    "A ratio below 1 is faster, or smaller, than BF16; in brackets its 95 % interval. A change that is "
    "smaller than *smallest detectable change* could not have been detected."
)
MEMORY = (("weights", "weights"), ("working", "step memory"))


def describe_result(result: Result, cell: Cell, old: str) -> dict[str, Any]:
    """A result as index.html shows it: timings as lists, medians in milliseconds, bytes.

    `old` says what changed since it was made.
    """
    timings = []
    for name, timing in list_comparisons(result):
        medians = [timing["median"][form] for form in FORMS]
        numbers = [timing[key] for key in ("ratio", "low", "high", "detectable")]
        timings.append([name, *medians, *numbers, timing["verdict"]])
    memory = [
        [f"{component} {text}", *(part["memory"][form][key] for form in FORMS)]
        for component, part in sorted(result["components"].items())
        for key, text in MEMORY
    ]
    first = next(iter(result["components"].values()))
    return {
        "file": f"{BENCHMARKS}/{records.path_of(cell.id)}",
        "size": result["size"],
        "device": result["device"],
        "clock": result["settings"]["clock"],
        "counted": first["memory"]["counted_by"],
        "command": result["command"],
        "made": result["made"],
        "commit": result["commit"],
        "old": old,
        "timings": timings,
        "memory": memory,
    }


def list_lines(
    results: Mapping[str, Result], changes: Mapping[str, str], cells: Sequence[Cell]
) -> list[list[str]]:
    """Cells of the table `HEAD` for a family page, one line per component."""
    lines = []
    for cell in cells:
        if (result := results.get(cell.id)) is None:
            continue
        old = changes[cell.id]
        day = f"{result['made'][:10]}{f'; {old}' if old else ''}"
        link = f"[{cell.id}](../{BENCHMARKS}/{records.path_of(cell.id)})"
        for component, part in sorted(result["components"].items()):
            step, memory = part["step"], part["memory"]
            sizes = [f"{memory[f'{what}_ratio']:.3f}" for what in ("weights", "peak")]
            load = show_ratio(part["load"]) if "load" in part else "not measured"
            lines.append(
                [
                    *(link, result["size"], result["device"], component, show_ratio(step)),
                    *(f"{step['detectable']:.1%}", step["verdict"], load, *sizes, day),
                ]
            )
    return lines
