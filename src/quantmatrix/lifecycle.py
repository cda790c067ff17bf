"""Life cycle of evidence: what a record is still worth, judged from outside it.

| life            | meaning |
| --------------- | ------- |
| `fresh`         | every check of the claim passed (of a `failing` one: its check failed), and nothing below |
|                 | has changed since |
| `contradicting` | fresh, and a check failed: claim and run differ, in whichever direction |
| `stale`         | the rows, the code path, a library, a limit or the calendar went on: to be run |
|                 | again |
| `missing`       | no record, or not every check was run |

A claimed refusal or failure that starts to work contradicts as much as a working row that gets
worse. Old
failures are stale, not contradicting: nobody knows whether they still hold.

Everything is a function of its arguments. `Now` carries what changes by itself, so whoever renders
a page decides what the date is: a page that must not change over night takes the date of the newest
record (`newest_date`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING

from quantmatrix.states import explain_state, fails_as_claimed

if TYPE_CHECKING:
    from quantmatrix.evidence import Evidence
    from quantmatrix.matrix import Cell, Matrix

LIVES = ("fresh", "contradicting", "stale", "missing")
MAX_AGE_DAYS = 90
"""Records older than this are stale."""


@dataclass(frozen=True)
class Now:
    """What a record is judged against; each part that is left out is not looked at."""

    today: date | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of packages; major and minor count, `2.13.0+cpu` is `2.13`."""
    digest_code: Callable[[str, str], str] | None = None
    """Digest of the code path of (family, model); records without one are not held to it."""
    max_age_days: int = MAX_AGE_DAYS
    list_beyond: Callable[[Evidence], list[str]] | None = None
    """Where a record that passed is beyond the limits as they are now, in words."""


@dataclass(frozen=True)
class Judgement:
    """The life of a record, and the reasons in words (none when fresh)."""

    life: str
    reasons: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """The reasons on one line."""
        return "; ".join(reason.partition("\n")[0] for reason in self.reasons)


def judge(cell: Cell, evidence: Evidence | None, tables: Matrix, now: Now) -> Judgement:
    """What the record of a cell is worth; see the module's table."""
    return judge_explained(explain_state(cell, evidence, tables), evidence, now)


def judge_explained(explained: tuple[str, str], evidence: Evidence | None, now: Now) -> Judgement:
    """The same, where state and reason of the cell are known already."""
    state, reason = explained
    if evidence is None:
        return Judgement("missing", ("no run yet",))
    changes = [reason] if state == "stale" else []
    changes += list_changes(evidence, now)
    if changes:
        return Judgement("stale", tuple(changes))
    if state == "failing" and not fails_as_claimed(evidence):
        return Judgement("contradicting", (reason,))
    if state == "unproven":
        return Judgement("missing", (reason,))
    return Judgement("fresh")


def list_changes(evidence: Evidence, now: Now) -> list[str]:
    """What went on since a record was made, the tables left out."""
    changes = []
    if now.today is not None and (why := find_age_problem(evidence, now.today, now.max_age_days)):
        changes.append(why)
    for package, version in sorted(now.versions.items()):
        then = evidence.versions.get(package)
        if then is not None and shorten_version(then) != shorten_version(version):
            changes.append(f"{package} was {then}, is {version}")
    told = evidence.cell.get("code_digest")
    if now.digest_code is not None and told:
        family, model = evidence.cell["family"], evidence.cell["model"]
        if now.digest_code(family, model) != told:
            changes.append(f"the code of {family} on {model} changed")
    return changes + (now.list_beyond(evidence) if now.list_beyond is not None else [])


def find_age_problem(evidence: Evidence, today: date, max_age_days: int) -> str | None:
    """Why the date of a record is not acceptable, or None."""
    made = read_date(evidence)
    if made is None:
        return f"made {evidence.made or 'at no known time'}: not a date"
    age = (today - made).days
    if age < -1:  # a day of grace for time zones
        return f"made {made}, which is after {today}"
    return f"{age} days old, the limit is {max_age_days}" if age > max_age_days else None


def read_date(evidence: Evidence) -> date | None:
    """Day on which a record was made (UTC), or None when it does not say."""
    try:
        return date.fromisoformat(evidence.made[:10])
    except ValueError:
        return None


def newest_date(evidence: Iterable[Evidence]) -> date | None:
    """Day of the newest record, or None when there is none: a today that stands still."""
    return max((day for record in evidence if (day := read_date(record))), default=None)


def shorten_version(version: str) -> str:
    """Major and minor of a version: builds and patches do not change what is computed."""
    return ".".join(version.partition("+")[0].split(".")[:2])
