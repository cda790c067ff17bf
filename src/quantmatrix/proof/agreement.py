"""Agreement: the share of claims with fresh, agreeing evidence, and what to run for the rest.

The life of a claim's evidence follows from its state (`states`), which every page shows, too:

| life            | states |
| --------------- | ------ |
| `fresh`         | `proven`, `refused`; of a `failing` claim: its check failed, and no other |
| `contradicting` | `failing`: claim and run differ, in whichever direction |
| `stale`         | `stale`: to be run again |
| `missing`       | `unproven`, `unjudged`, and `proven` of scope `compiled`: kernels exist for it, and none was run |

Old records are listed as due to be made again; their state does not depend on the day. `planned`
cells claim nothing and are not counted. The number stands on the badge (`reports/badge.json`, in the
form that shields.io's endpoint badge reads).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quantmatrix.proof.freshness import MAX_AGE_DAYS, find_age_problem
from quantmatrix.proof.scopes import COMPILED, SCOPES, SEPARATOR, Standing
from quantmatrix.proof.states import fails_as_claimed, stand_all

if TYPE_CHECKING:
    from datetime import date

    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

LIVES = ("fresh", "contradicting", "stale", "missing")
BY_STATE = {
    "proven": "fresh",
    "refused": "fresh",
    "failing": "contradicting",
    "stale": "stale",
    "unjudged": "missing",
    "unproven": "missing",
}
URGENCY = ("contradicting", "stale", "missing")
"""Lives that are burnt down, the most urgent first."""
COLOURS = ((90.0, "brightgreen"), (75.0, "green"), (50.0, "yellow"), (25.0, "orange"), (0.0, "red"))
"""Badge colour from this percentage on."""


@dataclass(frozen=True)
class Share:
    """Claims of one group, per life of their evidence."""

    claims: int = 0
    lives: Mapping[str, int] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Percentage with fresh, agreeing evidence, rounded down to a tenth; 0 without claims."""
        return 1000 * self.lives.get("fresh", 0) // self.claims / 10 if self.claims else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"claims": self.claims, "percent": self.percent, **self.lives}


@dataclass(frozen=True)
class Task:
    """A claim whose evidence does not agree."""

    cell: str
    family: str
    hardware: str
    claim: str
    life: str
    reason: str
    scope: str = ""
    """Of the record that names the cell; empty where there is none."""


@dataclass(frozen=True)
class Agreement:
    """How far claims and evidence agree."""

    overall: Share
    by_family: Mapping[str, Share]
    by_hardware: Mapping[str, Share]
    tasks: tuple[Task, ...]
    """The burn-down list, the most urgent first, then in table order."""
    by_scope: Mapping[str, int] = field(default_factory=dict)
    """Claims with fresh, agreeing evidence of each scope, the weakest first; `compiled` is no run."""
    due: Mapping[str, str] = field(default_factory=dict)
    """Fresh evidence that is old, and how old, by cell id."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "overall": self.overall.to_json(),
            "families": {name: share.to_json() for name, share in self.by_family.items()},
            "hardware": {name: share.to_json() for name, share in self.by_hardware.items()},
            "scopes": dict(self.by_scope),
            "tasks": [asdict(task) for task in self.tasks],
            "due": dict(self.due),
        }


def measure(
    tables: Matrix,
    evidence: Mapping[str, Evidence],
    now: Now | None = None,
    standings: Mapping[str, Standing] | None = None,
    today: date | None = None,
    max_age_days: int = MAX_AGE_DAYS,
) -> Agreement:
    """Judge the evidence of every claim; `standings` holds that of every cell where it is known.

    With `today` fresh evidence older than `max_age_days` is listed as due.
    """
    claims = [cell for cell in tables.cells if cell.claim != "planned"]
    by_cell = standings or stand_all(tables, evidence, now)
    lives = {c.id: find_life(by_cell[c.id]) for c in claims}
    shown = [c for c in claims if lives[c.id] == "fresh" or is_compiled(by_cell[c.id])]
    scopes = Counter(by_cell[c.id].scope for c in shown)
    tasks = [
        Task(
            *(c.id, c.family, c.hardware, c.claim, life),
            *(explain_life(by_cell[c.id]), by_cell[c.id].scope),
        )
        for life in URGENCY
        for c in claims
        if lives[c.id] == life
    ]
    due = {
        c.id: why
        for c in claims
        if today is not None and lives[c.id] == "fresh" and (record := by_cell[c.id].record)
        if (why := find_age_problem(record, today, max_age_days))
    }

    def share(cells: Iterable[Cell]) -> Share:
        return count_lives(lives[cell.id] for cell in cells)

    return Agreement(
        overall=share(claims),
        by_family={f: share(c for c in claims if c.family == f) for f in tables.families},
        by_hardware={h: share(c for c in claims if c.hardware == h) for h in tables.hardware},
        tasks=tuple(tasks),
        by_scope={scope: scopes[scope] for scope in SCOPES if scopes[scope]},
        due=due,
    )


def find_life(standing: Standing) -> str:
    """The life of the record that names a claim; see the module's table."""
    if standing.state == "failing" and standing.record and fails_as_claimed(standing.record):
        return "fresh"
    return "missing" if is_compiled(standing) else BY_STATE[standing.state]


def is_compiled(standing: Standing) -> bool:
    """Whether all that is known of a cell is that its kernels can be built."""
    return standing.state == "proven" and standing.scope == COMPILED


def explain_life(standing: Standing) -> str:
    """Why a claim's evidence does not agree, on one line."""
    if is_compiled(standing):
        return "its kernels were compiled, nothing was run"
    return standing.reason.partition("\n")[0]


def count_lives(lives: Iterable[str]) -> Share:
    """The share of a group."""
    counts = Counter(lives)
    return Share(counts.total(), {life: counts[life] for life in LIVES})


def write_badge(
    tables: Matrix,
    evidence: Mapping[str, Evidence],
    standings: Mapping[str, Standing] | None = None,
) -> bytes:
    """badge.json of a report."""
    found = measure(tables, evidence, None, standings)
    percent = found.overall.percent
    colour = next(name for bound, name in COLOURS if percent >= bound)
    badge = {
        "schemaVersion": 1,
        "label": "claims proven",
        "message": f"{percent:.1f} %{show_scopes(found.by_scope)}",
        "color": colour,
    }
    return (json.dumps(badge, indent=1) + "\n").encode()


def show_scopes(counts: Mapping[str, int]) -> str:
    """` · stand-in`, or ` · 400 stand-in, 9 true size`; nothing where nothing is proven."""
    if len(counts) < 2:
        return "".join(f"{SEPARATOR}{scope}" for scope in counts)
    return SEPARATOR + ", ".join(f"{count} {scope}" for scope, count in counts.items())


def suggest_runs(tasks: Iterable[Task]) -> dict[str, str]:
    """The command that makes the missing evidence of each hardware."""
    return {
        hardware: f"pytest --pyargs quantmatrix.suites --hardware {hardware} "
        "--evidence-dir reports/evidence"
        for hardware in dict.fromkeys(task.hardware for task in tasks)
    }
