"""Page data: what `reports/index.html` knows, as plain data that is small and in a fixed order.

There are two blocks: one that the page reads when it opens, and `DETAILS`, which it reads when a cell is
first opened. A matrix of thousands of cells repeats itself: machines, versions, limits, plans and
pictures are in `shared` once, and a record refers to them by their position in that list.

| key           | content |
| ------------- | ------- |
| `states`, `scopes`, `weights`, `families`, `models`, `hardware`, `checkpoints` | tables that |
|               | numbers below point into |
| `rows`        | rows of cases.csv: id, family, model, checkpoint |
| `cells`       | row, hardware, backend, state, scope (-1: none), claim, rule, reason, offer (an index in |
|               | `shared`: title and commands), record (or null), other records ([scope, state, file]), |
|               | the number that is most worth knowing, as text |
| `answers`     | what `recommend` ranks: see `answers` |
| `speed`       | true size: the cell's index in `cells`, step of BF16 and quantized in s, weights of |
|               | both and peaks of both in bytes; null where it was not measured |
| `records`     | evidence of a cell: see `describe_record` |
| `benchmarks`  | by the cell's index in `cells`: see `bench_pages.describe_result` |
| `history`     | by the cell's index in `cells`: see `describe_history` |

Columns of other programs are the matter of `programs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmatrix.proof import record as records
from quantmatrix.proof.scopes import SCOPES, TRUE_SIZE, WEIGHTS, key_of, make_key
from quantmatrix.proof.states import STATES
from quantmatrix.proof.thumbnails import KEYS, PICTURES
from quantmatrix.report.answers import read_number
from quantmatrix.report.bench_pages import describe_result
from quantmatrix.report.history import say_since

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined
    from quantmatrix.proof.record import CheckResult, Evidence
    from quantmatrix.report.answers import Answers, Option
    from quantmatrix.report.history import Version
    from quantmatrix.tables.rows import Cell

STEP_METRICS = ("psnr_db", "cosine", "relative_l2")
COMPONENT_FACTS = (
    "family",
    "class",
    "precision",
    "rank",
    "quantized_layers",
    "total_layers",
    "backends",
    "numerics",
    "bytes",
)
"""What of a planned component is shown; paths are not."""
OMITTED_METRICS = ("steps", "thumbnails", "final", "programs")
"""Metrics that have a form of their own on the page, or that others repeat."""


PICTURE_BYTES = 1_000_000
"""Pictures that the page holds, as text, in the order of cells; the rest stays in the records. They hardly
get smaller, and the page is to be at most a megabyte as it travels."""
DETAILS = ("records", "benchmarks", "history", "shared", "runs", "statements")
"""What only an open cell needs."""


class Shared:
    """Values that stand in the page once, whoever uses them."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._indices: dict[str, int] = {}
        self._pictures: dict[str, int] = {}
        self._room = PICTURE_BYTES

    def put(self, value: Any) -> int:
        """The index of a value in the list."""
        key = repr(value)
        if key not in self._indices:
            self._indices[key] = len(self.values)
            self.values.append(value)
        return self._indices[key]

    def put_pictures(self, pictures: Sequence[str]) -> list[int]:
        """The indices of pictures, or none of them where the page has no room for all."""
        new = [p for p in dict.fromkeys(pictures) if p not in self._pictures]
        cost = sum(map(len, new))
        if cost > self._room:
            return []
        self._room -= cost
        for picture in new:
            self._pictures[picture] = len(self.values)
            self.values.append(picture)
        return [self._pictures[picture] for picture in pictures]


def collect(
    joined: Joined, found: Answers, past: Mapping[str, Sequence[Version]]
) -> dict[str, Any]:
    """Everything that the page shows; see the module's table."""
    numbered = {one.cell: show_number(one) for one in found.options if one.cell}
    tables = joined.tables
    families, models, hardware = (
        list(t) for t in (tables.families, tables.models, tables.hardware)
    )
    checkpoints = list(tables.checkpoints)
    rows: dict[str, Cell] = {}
    for cell in tables.cells:
        rows.setdefault(cell.row, cell)
    numbers = {name: number for number, name in enumerate(rows)}
    shared = Shared()
    observed: list[dict[str, Any]] = []
    cells: list[list[Any]] = []
    for cell in tables.cells:
        number = None
        standing, offered = joined.standings[cell.id], joined.offers[cell.id]
        if record := standing.record:
            number = len(observed)
            observed.append(describe_record(record, shared))
        cells.append(
            [
                numbers[cell.row],
                hardware.index(cell.hardware),
                cell.backend,
                STATES.index(standing.state),
                SCOPES.index(standing.scope) if standing.scope else -1,
                cell.claim,
                cell.rule,
                standing.reason or cell.notes,
                shared.put([offered.title, *offered.commands]),
                number,
                [
                    [SCOPES.index(s), STATES.index(n), name_file(make_key(cell.id, s))]
                    for s, n in standing.others
                ],
                numbered.get(cell.id, ""),
            ]
        )
    return {
        "states": list(STATES),
        "scopes": list(SCOPES),
        "weights": [WEIGHTS[scope] for scope in SCOPES],
        "families": families,
        "models": [[row.id, row.name] for row in tables.models.values()],
        "hardware": [
            [row.id, row.name, row.arch, row.memory_gib] for row in tables.hardware.values()
        ],
        "checkpoints": [
            [c.id, c.reference, c.base, families.index(c.family), models.index(c.model)]
            for c in tables.checkpoints.values()
        ],
        "rows": [
            [
                name,
                families.index(cell.family),
                models.index(cell.model),
                checkpoints.index(cell.checkpoint),
            ]
            for name, cell in rows.items()
        ],
        "cells": cells,
        "answers": found.to_json(),
        "speed": list_speeds(joined),
        "records": observed,
        "benchmarks": {
            str(number): describe_result(joined.benchmarks[cell.id], cell, joined.changes[cell.id])
            for number, cell in enumerate(tables.cells)
            if cell.id in joined.benchmarks
        },
        "history": {
            str(number): describe_history(past[cell.id])
            for number, cell in enumerate(tables.cells)
            if cell.id in past
        },
        "shared": shared.values,
    }


def describe_history(versions: Sequence[Version]) -> list[Any]:
    """Since when the cell is as it is, and its versions, the latest first: day, commit, scope, trend, verdict, error
    in dB, step of BF16's."""
    lines = [
        [v.date, v.commit[:12], SCOPES.index(v.scope), v.trend, v.verdict, v.psnr_db, v.step]
        for v in reversed(versions)
    ]
    return [say_since(versions), *lines]


def show_number(option: Option) -> str:
    """What is most worth knowing of a cell that ran, measured there: its step beside BF16, or its error."""
    if option.proof:
        return ""
    if option.step is not None and option.step_on == option.hardware != "cpu":
        return f"{option.step:.2f} of BF16's time"
    if option.psnr_db is not None and option.error_on.startswith(f"{option.hardware},"):
        return f"{option.psnr_db:.1f} dB"
    return ""


def list_speeds(joined: Joined) -> list[list[Any]]:
    """What was timed at true size, in the order of cells: see the module's table."""
    lines = []
    for number, cell in enumerate(joined.tables.cells):
        standing = joined.standings[cell.id]
        if standing.scope != TRUE_SIZE or standing.record is None or standing.state != "proven":
            continue
        metrics = standing.record.checks["true-size"].metrics
        times = [standing.record.timings.get(f"step {form}") for form in ("bf16", "quantized")]
        sizes = [
            read_number(metrics, what, f"{form}_bytes")
            for what in ("weights", "peak")
            for form in ("bf16", "quantized")
        ]
        lines.append([number, *times, *sizes])
    return lines


def describe_record(record: Evidence, shared: Shared) -> dict[str, Any]:
    """A record as the page shows it; numbers in `machine` ... `limits` are indices in `shared`."""
    plan = record.plan
    parts = {
        name: {fact: part[fact] for fact in COMPONENT_FACTS if part.get(fact)}
        for name, part in sorted(plan.get("components", {}).items())
    }
    proofs = {
        f"{name} compared with the base weights": describe_witness(part)
        for name, part in sorted(record.witness.items())
    }
    return {
        "file": name_file(key_of(record)),
        "made": record.made,
        "commit": record.commit,
        "command": record.command,
        "machine": shared.put(flatten(record.machine, ("versions",))),
        "versions": shared.put(flatten(record.versions)),
        "plan": shared.put({**{name: flatten(part) for name, part in parts.items()}, **proofs}),
        "refusal": str((plan.get("refusal") or {}).get("message", "")),
        "warnings": list(plan.get("warnings", ())),
        "timings": dict(sorted(record.timings.items())),
        "checks": [
            describe_check(name, check, shared) for name, check in sorted(record.checks.items())
        ],
    }


def name_file(key: str) -> str:
    """The file of a record below the reports folder, by its key."""
    return f"evidence/{records.path_of(key)}"


def describe_witness(part: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a witness found of a component: its verdict, and the cosine of each kind of layers."""
    facts = flatten(part, ("kinds", "bytes", "seconds"))
    return [*facts, *((f"cosine of {kind['kind']}", kind["cosine"]) for kind in part["kinds"])]


def describe_check(name: str, check: CheckResult, shared: Shared) -> dict[str, Any]:
    """A check: verdict, message, metrics and limits as pairs, steps, and pictures if there are.

    Limits and pictures are indices in `shared`: rows of one model have one BF16 picture. A list
    without pictures means that there are some, in the record only.
    """
    facts: dict[str, Any] = {
        "name": name,
        "verdict": check.verdict,
        "message": check.message,
        "metrics": [
            *flatten(check.metrics, OMITTED_METRICS),
            *map(describe_program, check.metrics.get("programs", ())),
        ],
        "limits": shared.put(flatten(check.limits)),
    }
    steps = check.metrics.get("steps")
    if isinstance(steps, Sequence) and steps:
        facts["steps"] = [[step.get(metric) for metric in STEP_METRICS] for step in steps]
    pictures = check.metrics.get("thumbnails")
    if isinstance(pictures, Mapping) and set(pictures) == KEYS:
        facts["pictures"] = shared.put_pictures([pictures[kind] for kind in PICTURES])
        facts["gain"], facts["shown"] = pictures["gain"], pictures["shown"]
    return facts


def describe_program(program: Mapping[str, Any]) -> tuple[str, str]:
    """(kernel, what its program takes, as text) of a program that was built."""
    takes = (
        f"{program['registers']} registers, {program['spilled']} bytes spilled, "
        f"{program['shared']} of {program['shared_limit']} bytes of shared memory, "
        f"{program['warps']} warps, code {program['digest'][:19]}"
    )
    text = "; ".join(program["faults"]) or takes
    return f"{program['kernel']} for {program['arch']}", f"{text} ({program['specialised']})"


def flatten(
    value: Mapping[str, Any], without: Sequence[str] = (), base: str = ""
) -> list[tuple[str, Any]]:
    """(dotted name, number or text) of nested data, in the order of names; empty values left out."""
    found: list[tuple[str, Any]] = []
    for name in sorted(value):
        item = value[name]
        if name in without or item is None or item == "":
            continue
        if isinstance(item, (str, float, int)):  # most are
            found.append((f"{base}{name}", item))
        elif isinstance(item, dict):
            found += flatten(item, (), f"{base}{name}.")
        elif isinstance(item, (list, tuple)):
            if item:
                found.append((f"{base}{name}", ", ".join(map(str, item))))
        else:
            found.append((f"{base}{name}", item))
    return found
