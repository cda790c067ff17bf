"""States: a claim and its records, joined. Whoever shows a state asks here.

A function of the row as it stands, of the records, and of what else went on (`freshness.Now`).

| state      | meaning |
| ---------- | ------- |
| `proven`   | every check of the row passed, in a run of the row as it stands |
| `refused`  | the row claims a refusal, and the plan was seen to refuse by that rule |
| `failing`  | a check of the row failed, exceeds today's limits, or is claimed to fail and passed |
| `unjudged` | a check of the row was run and measured something that no limit is known for |
| `stale`    | there is a record, but the row, its checkpoint's, its hardware's or its model's row, the |
|            | code of the cell or the packages of its machine changed since, or it was made on another |
|            | architecture; whether an old failure still holds is not known either |
| `unproven` | claimed, and not every check was run |
| `planned`  | nobody claims that it works yet |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.proof import record as records
from quantmatrix.proof import scopes
from quantmatrix.proof.freshness import Now, explain_carried, list_changes
from quantmatrix.proof.scopes import Standing

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

STATES = ("proven", "refused", "failing", "unjudged", "stale", "unproven", "planned")


def stand_all(
    tables: Matrix, evidence: Mapping[str, Evidence], now: Now | None = None
) -> dict[str, Standing]:
    """State and scope of every cell, by cell id; `evidence` holds records by key."""
    return {cell.id: stand(cell, evidence, tables, now) for cell in tables.cells}


def stand(
    cell: Cell, evidence: Mapping[str, Evidence], tables: Matrix, now: Now | None = None
) -> Standing:
    """State, reason and scope of a cell by all its records; `evidence` holds records by key."""
    found = scopes.find_records(evidence, cell.id)
    return scopes.decide(found, lambda record: explain_state(cell, record, tables, now))


def state_of(cell: Cell, evidence: Evidence | None, tables: Matrix, now: Now | None = None) -> str:
    """The state of a cell; see the module's table."""
    return explain_state(cell, evidence, tables, now)[0]


def explain_state(
    cell: Cell, evidence: Evidence | None, tables: Matrix, now: Now | None = None
) -> tuple[str, str]:
    """(state, the reason as text, empty where the state says it all).

    Without `now` only the rows are looked at.
    """
    now = now or Now()
    if cell.claim == "planned":
        return "planned", ""
    if evidence is None:
        return "unproven", "no run yet"
    row = records.describe_cell(cell, tables)
    if row["row_digest"] != evidence.cell["row_digest"]:
        changed = [
            f"{key} was {evidence.cell[key]!r}, is {row[key]!r}"
            for key in records.CELL_KEYS
            if key not in ("row_digest", "checks") and row[key] != evidence.cell[key]
        ]
        return "stale", "; ".join(changed) or f"the row of checkpoint {cell.checkpoint} changed"
    if why := find_other_row(cell, evidence, tables, row):
        return "stale", why
    hardware = tables.hardware[cell.hardware]
    if changes := list_changes(evidence, hardware, now):
        return "stale", "; ".join(changes)
    checks = scopes.list_checks(cell, scopes.read_scope(evidence))
    wanted = {name: evidence.checks[name] for name in checks if name in evidence.checks}
    if cell.claim == "failing" and cell.rule in wanted and wanted[cell.rule].verdict == "pass":
        return "failing", f"{cell.rule}: claimed to fail, but it passes: change the claim"
    failed = [f"{name}: {r.message}" for name, r in wanted.items() if r.verdict == "fail"]
    if failed:
        return "failing", "; ".join(failed)
    missing = [name for name in checks if name not in wanted]
    if missing or not checks:
        return "unproven", f"not run: {', '.join(missing) or 'the row names no check'}"
    unjudged = [f"{name}: {r.message}" for name, r in wanted.items() if r.verdict == "unjudged"]
    if unjudged:
        return "unjudged", "; ".join(unjudged)
    if now.list_exceeded is not None and (exceeded := now.list_exceeded(evidence)):
        return "failing", "; ".join(exceeded)
    state = "refused" if cell.claim == "refused" else "proven"
    return state, explain_carried(evidence, hardware, now)


def find_other_row(
    cell: Cell, evidence: Evidence, tables: Matrix, now: Mapping[str, Any]
) -> str | None:
    """Why a record is not of the hardware and the model as their rows stand, or None.

    A refusal is planned for a hardware, wherever that is done; all else was run on a machine.
    """
    recorded = evidence.cell.get("place_digest")
    if recorded and recorded != now["place_digest"]:
        return f"the row of the hardware {cell.hardware} or of the model {cell.model} changed"
    row, machine = tables.hardware[cell.hardware], evidence.plan.get("machine") or {}
    found = machine.get("vendor", row.vendor), machine.get("arch", row.arch)
    if cell.claim != "refused" and found != (row.vendor, row.arch):
        return f"made on {' '.join(map(str, found))}, {row.id} is {row.vendor} {row.arch}"
    return None


def fails_as_claimed(evidence: Evidence) -> bool:
    """Whether a record shows what a `failing` row claims: its check failed, and no other."""
    verdicts = {name: check.verdict for name, check in evidence.checks.items()}
    failed = [name for name in evidence.cell["checks"] if verdicts.get(name) == "fail"]
    return evidence.cell["claim"] == "failing" and failed == [evidence.cell["rule"]]
