"""History: what a cell's records said over time, and since when it is better or worse.

A record is one file that runs write over. Its versions are held against each other, those of one scope:

| trend    | since the version before |
| -------- | ------------------------ |
| `first`  | there was none |
| `better`, `worse` | what failed is refused or passes, what was refused passes, or the reverse; else the error at the |
|          | worst step moved by half a decibel or more, or the step, of BF16's, by three percent or more |
| `same`   | nothing of this |

There are two sources. `quantmatrix matrix history` asks git for every version. The page shows
`reports/history.csv`, which is committed: `quantmatrix report` adds a line when a record says otherwise than the last
line of its cell and scope, and never changes one. So rendering asks no git, and a clone without history renders the
same. The day and the commit of a line are the record's own. Whether a record is stale is no part of it: that is
the state of the code, and not what a run showed.

    python -m quantmatrix.report.history reports   # from all that git has, where lines were lost

Versions of another form than today's are left out, counted, and named with the reason.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import QuantmatrixError
from quantmatrix.files import write_whole
from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.record import EvidenceError
from quantmatrix.proof.revisions import EVIDENCE, ask_git, read_files
from quantmatrix.proof.scopes import SCOPES, make_key, read_scope
from quantmatrix.report.answers import read_error

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell

DECIBELS, SHARE = 0.5, 0.03
"""Differences of error and of step that are no noise."""
FILE = "history.csv"
PASS, REFUSED = "pass", "refused"
TRENDS = ("first", "better", "worse")
"""Of a line; what is the same has none."""


class HistoryError(QuantmatrixError):
    """A table of lines that cannot be read."""


@dataclass(frozen=True)
class Version:
    """What a record said at one time."""

    scope: str
    date: str
    """Day of the commit, or of the run: `2026-11-29`."""
    commit: str
    verdict: str
    """`pass`, `refused`, or the checks that failed."""
    psnr_db: float | None
    step: float | None
    """Seconds of a step over those of BF16."""
    trend: str = TRENDS[0]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


Lines = dict[str, list[Version]]
"""By the id of the cell, the oldest first."""
COLUMNS = ("cell", *(field.name for field in fields(Version)))


def describe(record: Evidence) -> Version:
    """What a record says, with its own day and commit."""
    failed = [f"{name}: {c.verdict}" for name, c in record.checks.items() if c.verdict != "pass"]
    passed = REFUSED if "refuse" in record.checks else PASS
    error = read_error(record).get("psnr_db")
    day, verdict = record.made[:10], ", ".join(failed) or passed
    return Version(read_scope(record), day, record.commit, verdict, error, read_step(record))


def read_step(record: Evidence) -> float | None:
    """Seconds of a quantized step over those of BF16, where both were timed; a CPU's differ from run to run, and
    are left out."""
    if record.cell.get("hardware") == "cpu":
        return None
    times = [record.timings.get(f"step {form}") for form in ("quantized", "bf16")]
    return round(times[0] / times[1], 3) if times[0] and times[1] else None


def find_trend(before: Version | None, now: Version) -> str:
    """How a version is compared with the one before it; see the module's table."""
    if before is None:
        return "first"
    gained: float = rank_verdict(now.verdict) - rank_verdict(before.verdict)
    if not gained and before.psnr_db is not None and now.psnr_db is not None:
        gained = now.psnr_db - before.psnr_db
        gained = gained if abs(gained) >= DECIBELS else 0
    if not gained and before.step and now.step:
        gained = 1 - now.step / before.step
        gained = gained if abs(gained) >= SHARE else 0
    return "better" if gained > 0 else "worse" if gained < 0 else "same"


def rank_verdict(verdict: str) -> int:
    """More is better: what failed, what was refused, what passed."""
    return {REFUSED: 1, PASS: 2}.get(verdict, 0)


def say_since(versions: Sequence[Version]) -> str:
    """Since when the cell is as it is: the last version that was not the same, of the strongest scope."""
    if not versions:
        return "no record was ever committed"
    scope = max((one.scope for one in versions), key=SCOPES.index)
    changed = [one for one in versions if one.scope == scope and one.trend != "same"][-1]
    text = {"first": "as it was first seen,"}.get(changed.trend, f"{changed.trend} since")
    return f"{scope}: {text} {changed.date} ({changed.commit[:12]})"


def update(lines: Mapping[str, Sequence[Version]], found: Iterable[Evidence]) -> Lines:
    """The lines, and one more for each record that says otherwise than the last of its cell and scope."""
    updated = {cell: list(known) for cell, known in lines.items()}
    for record in found:
        known = updated.setdefault(record.cell["id"], [])
        now = describe(record)
        before = next((one for one in reversed(known) if one.scope == now.scope), None)
        if (trend := find_trend(before, now)) != "same":
            known.append(replace(now, trend=trend))
    return updated


def read_lines(path: Path) -> Lines:
    """The lines of a table, nothing where there is none; HistoryError, which names file and line, for another form."""
    found: Lines = {}
    if not path.is_file():
        return found
    remedy = f"take it from git, or write it again with `python -m {MODULE} {path.parent}`"
    with path.open(newline="", encoding="utf-8") as stream:
        try:
            rows = list(csv.reader(stream, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise HistoryError(f"{path}: {error}; {remedy}") from error
    if not rows or tuple(rows[0]) != COLUMNS:
        head = rows[0] if rows else []
        raise HistoryError(f"{path}: columns are {head}, expected {list(COLUMNS)}; {remedy}")
    for number, row in enumerate(rows[1:], 2):
        try:
            cell, *texts = row
            version = read_version(texts)
        except ValueError as error:
            raise HistoryError(f"{path}:{number}: {error}; {remedy}") from error
        found.setdefault(cell, []).append(version)
    return found


def read_version(texts: Sequence[str]) -> Version:
    """The version of a line without its cell; raises ValueError for other texts."""
    scope, date, commit, verdict, psnr_db, step, trend = texts
    if scope not in SCOPES or trend not in TRENDS:
        raise ValueError(f"{scope!r} and {trend!r} are no scope and trend")
    error, seconds = (float(text) if text else None for text in (psnr_db, step))
    return Version(scope, date, commit, verdict, error, seconds, trend)


def write_lines(lines: Mapping[str, Sequence[Version]]) -> str:
    """The table as text, in the order of cell ids, each cell's lines as they are."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in sorted(lines):
        for one in lines[cell]:
            values = asdict(one).values()
            writer.writerow([cell, *("" if value is None else value for value in values)])
    return stream.getvalue()


@dataclass(frozen=True)
class Skipped:
    """A version that could not be read."""

    date: str
    commit: str
    why: str


def tell_skipped(skipped: Iterable[Skipped]) -> list[str]:
    """A line for each reason, with how many versions it holds for, and their days."""
    days: dict[str, list[str]] = {}
    for one in skipped:
        days.setdefault(one.why, []).append(one.date)
    return [
        f"skipped {len(found)} version{'s' * (len(found) > 1)} "
        f"({' to '.join(sorted({min(found), max(found)}))}): {why}"
        for why, found in days.items()
    ]


def read_history(cell: Cell, root: Path) -> tuple[list[Version], list[Skipped]]:
    """(versions of a cell's records in git, the oldest first, those that could not be read).

    Day and commit are those of the commit. Raises QuantmatrixError where git cannot tell.
    """
    found: list[Version] = []
    skipped: list[Skipped] = []
    for scope in SCOPES:
        path = f"{EVIDENCE}/{records.path_of(make_key(cell.id, scope))}"
        before: Version | None = None
        for commit, day in list_commits(path, root):
            try:
                record = decode(read_files(commit, root, [path])[path])
            except EvidenceError as error:
                skipped.append(Skipped(day, commit, str(error)))
                continue
            version = replace(describe(record), commit=commit, date=day)
            before = replace(version, trend=find_trend(before, version))
            found.append(before)
    return sorted(found, key=lambda one: one.date), skipped


def decode(data: bytes) -> Evidence:
    """A record; EvidenceError whose text is the first problem alone, without a file's name."""
    try:
        return store.decode(data, "")
    except EvidenceError as error:
        first = str(error).strip().removeprefix(":").strip().splitlines()[0].strip(" -")
        raise EvidenceError(first) from error


def list_commits(path: str, root: Path) -> Iterator[tuple[str, str]]:
    """(commit, day) of what touched a path, the oldest first; QuantmatrixError where git fails."""
    done = ask_git(root, "log", "--reverse", "--diff-filter=AM", "--format=%H %cs", "--", path)
    if done.returncode:
        raise QuantmatrixError(f"git log {path}: {done.stderr.decode().strip()}")
    for line in done.stdout.decode().splitlines():
        commit, _, day = line.partition(" ")
        yield commit, day


def is_shallow(root: Path) -> bool:
    """Whether a clone lacks older commits."""
    return ask_git(root, "rev-parse", "--is-shallow-repository").stdout.decode().strip() == "true"


def rebuild(root: Path) -> tuple[Lines, list[Skipped]]:
    """(lines as they would have been added commit by commit, versions that could not be read)."""
    lines: Lines = {}
    skipped: list[Skipped] = []
    for commit, day in list_commits(EVIDENCE, root):
        listed = ask_git(
            root, "show", "--format=", "--name-only", "--diff-filter=AM", commit, "--", EVIDENCE
        )
        paths = [p for p in listed.stdout.decode().splitlines() if PurePath(p).match(RECORD_FILES)]
        found = []
        for data in read_files(commit, root, sorted(paths)).values():
            try:
                found.append(decode(data))
            except EvidenceError as error:
                skipped.append(Skipped(day, commit, str(error)))
        lines = update(lines, found)
    return lines, skipped


MODULE = "quantmatrix.report.history"
RECORD_FILES = f"{EVIDENCE}/*/*.json"
"""Measurements lie deeper, and are no records."""


def main(arguments: list[str]) -> int:
    """Write history.csv below a reports folder of a checkout, from all that git has."""
    from quantmatrix.report.changes import find_checkout

    [reports] = arguments
    lines, skipped = rebuild(find_checkout(f"python -m {MODULE}"))
    write_whole(Path(reports) / FILE, write_lines(lines).encode())
    count = sum(map(len, lines.values()))
    print("\n".join([f"{Path(reports) / FILE}: {count} lines", *tell_skipped(skipped)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
