"""Scopes: what a record is proof of, from the weakest to the strongest.

| scope       | weights | sizes | what it shows |
| ----------- | ------- | ----- | ------------- |
| `compiled`  | none | the model's own | kernels of ours can be built for the hardware and fit; |
|             |      |                 | nothing was run, and nothing is said of their numbers |
| `stand-in`  | random, in the true on-disk format | tiny | the file form loads, every tensor is |
|             |         |       | accounted for, the arithmetic is that of the format |
| `true size` | random, in the true format, on the device | the model's own | kernels at real shapes: |
|             |         |       | speed, memory, and the error against BF16 |
| `published` | the repository that the row names, at a recorded revision | the model's own | everything |

Nobody types a scope: `read_scope` derives it from what ran, and never takes a record for more than it
shows. A refusal has a scope, too. The plan that refused read the headers of some file: names, dtypes
and shapes, and no numbers. Headers of a stand-in have the true form and tiny shapes, so such a refusal
is of scope `stand-in`; a rule that looks at a size could still decide otherwise about the published
file.

A cell has at most one record per scope. Its key in a mapping of records, and its file, say the scope
unless it is `stand-in`:

    flux-1-fp8@cpu+decode              cpu/flux-1-fp8+decode.json
    flux-1-fp8@cpu+decode:true-size    cpu/flux-1-fp8+decode.true-size.json

A failing record of any scope names its cell; otherwise the strongest one whose state agrees with the
claim does, and of the rest one that is stale before one that is incomplete.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell

COMPILED, STAND_IN = "compiled", "stand-in"
TRUE_SIZE, PUBLISHED = "true size", "published"
SCOPES = (COMPILED, STAND_IN, TRUE_SIZE, PUBLISHED)
"""The weakest first; a new scope is added here and nowhere else."""
WEIGHTS = {
    COMPILED: "kernels built, nothing run",
    STAND_IN: "random weights at a tiny size",
    TRUE_SIZE: "random weights at true size",
    PUBLISHED: "published weights",
}
"""What was run, as captions say it."""
OWN_CHECKS = {"compile": COMPILED, "true-size": TRUE_SIZE}
"""Checks that make a record of their own, with its scope; the others are of whatever was loaded."""
PREFERRED = ("proven", "refused", "unjudged", "stale", "unproven", "planned")
"""States of the record that names a cell where none is failing, the first one before the others."""
SEPARATOR = " · "

Explain = Callable[["Evidence | None"], tuple[str, str]]
"""(state, reason) of a cell by one of its records."""


@dataclass(frozen=True)
class Standing:
    """What all records of a cell say together."""

    state: str
    reason: str
    scope: str = ""
    """Of the record that names the cell; empty where there is none."""
    record: Evidence | None = None
    others: tuple[tuple[str, str], ...] = ()
    """(scope, state) of the other records, the weakest first."""

    @property
    def label(self) -> str:
        """`proven · stand-in`."""
        return label(self.state, self.scope)


def label(state: str, scope: str) -> str:
    """State and scope as one reads them: `proven · true size`, or `planned`."""
    return f"{state}{SEPARATOR}{scope}" if scope else state


def order_labels(states: Iterable[str]) -> tuple[str, ...]:
    """Every label there can be, state by state, the strongest scope first."""
    scopes = (*reversed(SCOPES), "")
    return tuple(label(state, scope) for state in states for scope in scopes)


def split_label(text: str) -> tuple[str, str]:
    """(state, scope) of a label; the scope may be empty."""
    state, _, scope = text.partition(SEPARATOR)
    return state, scope


def read_scope(record: Evidence) -> str:
    """The scope of a record, derived from its checks, its command and its checkpoint.

    Without a repository and a revision, which a stand-in never has, it is a stand-in: weights of
    unknown origin show no more.
    """
    own = [OWN_CHECKS[check] for check in record.checks if check in OWN_CHECKS]
    if own:
        return min(own, key=SCOPES.index)
    known = record.checkpoint.get("repository") and record.checkpoint.get("revision")
    return PUBLISHED if known and "--tiny" not in record.command.split() else STAND_IN


def list_checks(cell: Cell, scope: str) -> tuple[str, ...]:
    """The checks of a cell's row that a record of a scope must have."""
    return tuple(check for check in cell.checks if fits_scope(check, scope))


def fits_scope(check: str, scope: str) -> bool:
    """Whether a record of a scope may hold a check."""
    if scope in OWN_CHECKS.values():
        return OWN_CHECKS.get(check) == scope
    return check not in OWN_CHECKS


def find_foreign(checks: Collection[str]) -> list[str]:
    """Checks that may not be in one record with the others; empty when all are of one scope."""
    own = {OWN_CHECKS.get(check, "") for check in checks}
    return sorted(check for check in checks if check in OWN_CHECKS) if len(own) > 1 else []


def key_of(record: Evidence) -> str:
    """Key of a record in a mapping of records: the cell's id, and the scope unless `stand-in`."""
    return make_key(record.cell["id"], read_scope(record))


def make_key(cell_id: str, scope: str) -> str:
    """The key of a cell's record of a scope.

    >>> make_key("flux-1-fp8@cpu", TRUE_SIZE)
    'flux-1-fp8@cpu:true-size'
    """
    return cell_id if scope == STAND_IN else f"{cell_id}:{scope.replace(' ', '-')}"


def cell_of(key: str) -> str:
    """The cell's id in a key of a record."""
    return key.partition(":")[0]


def find_records(evidence: Mapping[str, Evidence], cell_id: str) -> dict[str, Evidence]:
    """Records of a cell by scope, the weakest first."""
    keys = {scope: make_key(cell_id, scope) for scope in SCOPES}
    return {scope: evidence[key] for scope, key in keys.items() if key in evidence}


def decide(found: Mapping[str, Evidence], explain: Explain) -> Standing:
    """What the records of a cell, by scope, say together; see the module.

    `explain` gives state and reason by one record, or by None where the cell has none.
    """
    if not found:
        return Standing(*explain(None))
    judged = {scope: explain(record) for scope, record in found.items()}

    def rank(scope: str) -> tuple[int, int]:
        state = judged[scope][0]
        worst = -1 if state == "failing" else PREFERRED.index(state)
        return worst, -SCOPES.index(scope)

    names = min(judged, key=rank)
    others = tuple((scope, judged[scope][0]) for scope in judged if scope != names)
    return Standing(*judged[names], names, found[names], others)


def find_origin(files: Iterable[str | Path]) -> dict[str, str]:
    """`repository` and `revision` of weight files that lie in one snapshot that the hub's client made.

    Nothing for files from elsewhere, and for stand-ins, whose caches have the same layout without the
    `blobs` that a download leaves.
    """
    snapshots = {find_snapshot(Path(file)) for file in files}
    if len(snapshots) != 1 or (cache := snapshots.pop()) is None or not (cache / "blobs").is_dir():
        return {}
    first = next(iter(files))
    revision = Path(first).parts[len(cache.parts) + 1]
    owner, _, name = cache.name.removeprefix("models--").partition("--")
    return {"repository": f"{owner}/{name}", "revision": revision}


def find_snapshot(file: Path) -> Path | None:
    """The folder `models--owner--name` of a hub cache that a file lies in, or None."""
    for parent in file.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return None
