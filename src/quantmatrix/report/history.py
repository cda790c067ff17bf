"""History: what a cell's records said over time, from git, and since when it is better or worse.

A record is one file that runs write over, so its versions are the commits that touched it. Each version is
held against the one before of the same scope:

| trend    | since the version before |
| -------- | ------------------------ |
| `first`  | there was none |
| `better`, `worse` | a check that failed passes, or the reverse; else the error at the worst step moved by |
|          | half a decibel or more, or the step beside BF16 by three percent or more |
| `same`   | nothing of this |

Versions of another form than today's are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import QuantmatrixError
from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.record import EvidenceError
from quantmatrix.proof.revisions import EVIDENCE, ask_git
from quantmatrix.proof.scopes import SCOPES, make_key
from quantmatrix.report.answers import read_error

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell

DECIBELS, SHARE = 0.5, 0.03
"""Differences of error and of step that are no noise."""


@dataclass(frozen=True)
class Version:
    """A record as one commit left it."""

    commit: str
    date: str
    """Day of the commit, `2026-11-29`."""
    scope: str
    verdict: str
    """`pass`, or the checks that did not."""
    psnr_db: float | None
    step: float | None
    """Seconds of a step over those of BF16."""
    trend: str = "first"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def read_history(cell: Cell, root: Path) -> tuple[list[Version], int]:
    """(versions of a cell's records, the oldest first, how many could not be read).

    Raises QuantmatrixError where git cannot tell.
    """
    found: list[Version] = []
    unread = 0
    for scope in SCOPES:
        path = f"{EVIDENCE}/{records.path_of(make_key(cell.id, scope))}"
        before: Version | None = None
        for commit, day in list_commits(path, root):
            version = read_version(commit, day, path, scope, root)
            if version is None:
                unread += 1
                continue
            before = replace(version, trend=find_trend(before, version))
            found.append(before)
    return sorted(found, key=lambda one: one.date), unread


def list_commits(path: str, root: Path) -> Iterator[tuple[str, str]]:
    """(commit, day) of what touched a file, the oldest first; QuantmatrixError where git fails."""
    done = ask_git(root, "log", "--reverse", "--diff-filter=AM", "--format=%H %cs", "--", path)
    if done.returncode:
        raise QuantmatrixError(f"git log {path}: {done.stderr.decode().strip()}")
    for line in done.stdout.decode().splitlines():
        commit, _, day = line.partition(" ")
        yield commit, day


def read_version(commit: str, day: str, path: str, scope: str, root: Path) -> Version | None:
    """A record at a commit; None for one of another form."""
    try:
        record = store.decode(ask_git(root, "show", f"{commit}:{path}").stdout, path)
    except EvidenceError:
        return None
    failed = [f"{name}: {c.verdict}" for name, c in record.checks.items() if c.verdict != "pass"]
    verdict = ", ".join(failed) or "pass"
    return Version(
        commit, day, scope, verdict, read_error(record).get("psnr_db"), read_step(record)
    )


def read_step(record: Evidence) -> float | None:
    """Seconds of a quantized step over those of BF16, where both were timed."""
    times = [record.timings.get(f"step {form}") for form in ("quantized", "bf16")]
    return round(times[0] / times[1], 3) if times[0] and times[1] else None


def find_trend(before: Version | None, now: Version) -> str:
    """How a version is beside the one before it; see the module's table."""
    if before is None:
        return "first"
    if (before.verdict == "pass") != (now.verdict == "pass"):
        return "better" if now.verdict == "pass" else "worse"
    if before.psnr_db is not None and now.psnr_db is not None:
        gained = now.psnr_db - before.psnr_db
        if abs(gained) >= DECIBELS:
            return "better" if gained > 0 else "worse"
    if before.step and now.step:
        longer = now.step / before.step - 1
        if abs(longer) >= SHARE:
            return "worse" if longer > 0 else "better"
    return "same"


def say_since(versions: list[Version]) -> str:
    """Since when the cell is as it is: the last version that was not the same, of the strongest scope."""
    if not versions:
        return "no record was ever committed"
    scope = max((one.scope for one in versions), key=SCOPES.index)
    changed = [one for one in versions if one.scope == scope and one.trend != "same"][-1]
    text = {"first": "as it was first seen", "better": "better", "worse": "worse"}[changed.trend]
    return f"{scope}: {text} since {changed.date} ({changed.commit[:12]})"
