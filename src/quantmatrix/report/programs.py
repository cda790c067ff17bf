"""Programs: columns of other runtimes in the matrix of the page, as plain data in a fixed order.

A cell of such a column is a run of the program (see `quantmatrix.peers`), or what its documentation says where
nobody has run it: a statement of others, never a claim of ours. A program has a column if there is one
of either.

| key          | content |
| ------------ | ------- |
| `programs`   | id, name, hardware that it runs on (numbers of `hardware`) |
| `verdicts`   | name, meaning; the last is `documented` |
| `others`     | checkpoint, program, hardware (-1: any that the program runs on), verdict, scope (-1: none), what is |
|              | documented, the number most worth knowing, position in `runs` (-1: not run), statements |
| `statements` | what it says, its words, source, version of the program, day it was read |
| `runs`       | what an open cell shows: see `describe_run` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantmatrix.proof.columns import STALE, VERDICTS, compare_said
from quantmatrix.proof.scopes import SCOPES
from quantmatrix.report.runtimes import MEANINGS
from quantmatrix.tables.rows import OWN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantmatrix.report.runtimes import Runtimes, Shown
    from quantmatrix.tables.rows import StatementRow

DOCUMENTED = "documented"
SHOWN = (*VERDICTS, STALE, DOCUMENTED)
"""What a cell of another program can be, the best first."""


def collect(runtimes: Runtimes) -> dict[str, Any]:
    """What the page knows of other programs; see the module's table."""
    tables = runtimes.tables
    found: dict[tuple[str, str], list[Shown]] = {}
    running: dict[str, list[int]] = {}
    hardware = list(tables.hardware)
    for shown in runtimes.cells.values():
        cell = shown.cell
        found.setdefault((cell.checkpoint, cell.runtime), []).append(shown)
        number = hardware.index(cell.hardware)
        if number not in running.setdefault(cell.runtime, []):
            running[cell.runtime].append(number)
    with_cells = {runtime for (_, runtime), cells in found.items() if any(map(is_known, cells))}
    programs = [row for row in tables.runtimes.values() if row.id in with_cells and row.id != OWN]
    runs: list[dict[str, Any]] = []
    others = []
    said = list(tables.statements)
    for checkpoint, name in enumerate(tables.checkpoints):
        for program, row in enumerate(programs):
            for line in list_cells(found[name, row.id], hardware, said, runs):
                others.append([checkpoint, program, *line])
    return {
        "programs": [[row.id, row.name, sorted(running[row.id])] for row in programs],
        "verdicts": [[name, MEANINGS.get(name, "its documentation says so")] for name in SHOWN],
        "others": others,
        "statements": list_statements(tables.statements.values()),
        "runs": runs,
    }


def is_known(shown: Shown) -> bool:
    """Whether there is a run, or a statement."""
    return shown.record is not None or bool(shown.statements)


def list_cells(
    cells: Iterable[Shown], hardware: list[str], said: list[str], runs: list[dict[str, Any]]
) -> list[list[Any]]:
    """Lines of `others`, from their hardware on, of a checkpoint in a program: a run on each hardware, and what is
    documented. Runs are put into `runs`."""
    lines: list[list[Any]] = []
    statements: list[int] = []
    claims = ""
    for shown in cells:
        statements = [said.index(one.id) for one in shown.statements]
        claims = compare_said("unproven", shown.statements)
        if shown.record is None:
            continue
        where, verdict = hardware.index(shown.cell.hardware), SHOWN.index(shown.state)
        scope = SCOPES.index(shown.record.scope) if shown.record.scope in SCOPES else -1
        number = show_number(shown)
        lines.append([where, verdict, scope, shown.said, number, len(runs), statements])
        runs.append(describe_run(shown))
    if statements:
        lines.append([-1, SHOWN.index(DOCUMENTED), -1, claims, "", -1, statements])
    return lines


def show_number(shown: Shown) -> str:
    """PSNR of the latents at the worst step, where the program ran to its end."""
    worst = shown.record.metrics.get("worst", {}) if shown.record else {}
    value = worst.get("psnr_db")
    return f"{value:.1f} dB" if isinstance(value, (int, float)) else ""


def list_statements(statements: Iterable[StatementRow]) -> list[list[str]]:
    """What documentation says, in the order of the table."""
    return [[one.says, one.quote, one.source, one.version, one.date] for one in statements]


def describe_run(shown: Shown) -> dict[str, Any]:
    """What an open cell shows of a run: message, numbers, how it was loaded, log."""
    record = shown.record
    assert record is not None
    return {
        "reason": shown.reason,
        "worst": [[n, v] for n, v in sorted(record.metrics.get("worst", {}).items())],
        "weights": sorted(record.weights.items()),
        "tried": list(record.tried),
        "command": record.command,
        "again": record.again,
        "version": record.version,
        "made": record.made,
        "commit": record.commit,
        "log": record.log,
        "file": shown.file,
    }
