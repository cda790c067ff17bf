"""Bench pages: what reports show of the benchmarks: bars and a table in a cell's panel, one table
per family.

Results are shown with the device they were made on, and with a remark where row or code have changed
since. Nothing here is judged again; `quantmatrix bench --compare` is the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmatrix import evidence as records
from quantmatrix.bench_form import FORMS
from quantmatrix.bench_results import BENCHMARKS, Result, list_comparisons, show_ratio
from quantmatrix.scopes import PUBLISHED, STAND_IN

if TYPE_CHECKING:
    from quantmatrix.code_digest import Code
    from quantmatrix.matrix import Cell, Matrix

HEAD = (
    "cell", "size", "device", "component", "step, of BF16", "noticed from", "verdict", "load, of BF16",
    "weights, of BF16", "peak, of BF16", "made",
)  # fmt: skip
LEGEND = (
    "A ratio below 1 is faster, or smaller, than BF16; in brackets its 95 % interval. A change that is "
    "smaller than *noticed from* would not have been told from none."
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


def find_change(result: Result, cell: Cell, tables: Matrix, code: Code | None = None) -> str:
    """What changed since a result was made, in words; empty when nothing did.

    Without `code` that is not looked at.
    """
    now: dict[str, Any] = records.describe_cell(cell, tables)
    if code is not None:
        now = sign(now, result, tables, code)
    then = result.get("cell") or {}
    words = {"row_digest": "the row", "device_digest": "the code", "shared_digest": "the code"}
    told = (word for key, word in words.items() if key in now and then.get(key) != now[key])
    changed = list(dict.fromkeys(told))
    return f"{' and '.join(changed)} changed since" if changed else ""


def describe_plan(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result tells of its plan, as a record's plan does: backends and schemes."""
    parts = {}
    for name, backends in result["backends"].items():
        layers = result["components"].get(name, {}).get("layers", ())
        schemes = sorted({str(layer["scheme"]) for layer in layers})
        parts[name] = {"backends": backends, "precision": " + ".join(schemes)}
    return {"components": parts}


def find_scope(result: Mapping[str, Any]) -> str:
    """The scope that a record of a result's size has."""
    return STAND_IN if result["size"] == "tiny" else PUBLISHED


def sign(
    cell: Mapping[str, Any], result: Mapping[str, Any], tables: Matrix, code: Code | None = None
) -> dict[str, Any]:
    """A result's `cell` with the digests of the code that runs here, or of another."""
    from quantmatrix.code_digest import own_code

    row, plan = tables.hardware[cell["hardware"]], describe_plan(result)
    found = (code or own_code()).describe(cell, plan, (row.vendor, row.arch), find_scope(result))
    return {**cell, **found}


def list_lines(
    results: Mapping[str, Result], changes: Mapping[str, str], cells: Sequence[Cell]
) -> list[list[str]]:
    """Cells of the table `HEAD` for a family page, one line per component."""
    lines = []
    for cell in cells:
        if (result := results.get(cell.id)) is None:
            continue
        old = changes[cell.id]
        made = f"{result['made'][:10]}{f'; {old}' if old else ''}"
        link = f"[{cell.id}](../{BENCHMARKS}/{records.path_of(cell.id)})"
        for component, part in sorted(result["components"].items()):
            step, memory = part["step"], part["memory"]
            sizes = [f"{memory[f'{what}_ratio']:.3f}" for what in ("weights", "peak")]
            load = show_ratio(part["load"]) if "load" in part else "not measured"
            lines.append(
                [
                    *(link, result["size"], result["device"], component, show_ratio(step)),
                    *(f"{step['detectable']:.1%}", step["verdict"], load, *sizes, made),
                ]
            )
    return lines
