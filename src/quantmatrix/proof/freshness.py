"""Freshness: what went on since a record was made, besides its row.

| what went on | how it is seen |
| ------------ | -------------- |
| the code     | a digest of what the record's cell computes, see `code_digest`, is another one |
| packages     | a newer record of the same machine was made with others; refusals are only planned |
| limits       | a check that passed exceeds the limits as they are now: it would fail |

What is installed where somebody looks at a record says nothing about it, nor does the date: every
machine finds the same. A change of the shared code that was shown to compute nothing else is
*carried*: see `carried`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.proof.carried import CARRIED, Carried
from quantmatrix.proof.scopes import key_of, read_scope

if TYPE_CHECKING:
    from quantmatrix.proof.code_digest import Code
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import HardwareRow

CARRYING = "carried: "
"""What the reason of a carried record begins with."""
MAX_AGE_DAYS = 90
"""Records older than this are due to be made again."""
UNVERSIONED = ("quantmatrix",)
"""Packages whose version says nothing: the digests of the code do."""
MACHINE = ("devices", "memory_bytes", "processor", "processors", "system")
"""What tells one machine from another."""


@dataclass(frozen=True)
class Now:
    """What a record is judged against beside the tables; what is left out is not looked at."""

    code: Code | None = None
    carried: Carried = field(default_factory=Carried)
    list_exceeded: Callable[[Evidence], list[str]] | None = None
    """Where a record that passed exceeds the limits as they are now, as text."""
    upgrades: Mapping[str, str] = field(default_factory=dict)
    """By the key of a record: what the machine of its record has instead of the record's packages."""


def read_now(reports: Path, evidence: Mapping[str, Evidence], code: Code | None = None) -> Now:
    """All that records are judged against: the code here (or another), and a reports folder."""
    from quantmatrix.proof import known_limits, limits
    from quantmatrix.proof.code_digest import own_code

    ledger = known_limits.read(reports)
    return Now(
        code=code or own_code(),
        carried=Carried.read(reports / CARRIED),
        list_exceeded=partial(limits.list_exceeded, ledger=ledger)
        if ledger.samples or ledger.fallback
        else None,
        upgrades=find_upgrades(evidence),
    )


def list_changes(evidence: Evidence, row: HardwareRow, now: Now) -> list[str]:
    """What makes a record stale although the rows stand, as text; `row` is of its hardware."""
    changes = [] if now.code is None else list_code_changes(evidence, row, now.code, now.carried)
    if why := now.upgrades.get(key_of(evidence)):
        changes.append(why)
    return changes


def list_code_changes(
    evidence: Evidence, row: HardwareRow, code: Code, carried: Carried
) -> list[str]:
    """Which of a record's digests the code has no more, as text."""
    then = {name: evidence.cell.get(f"{name}_digest") for name in ("device", "shared")}
    if None in then.values():
        return ["the record has no digests of the code that it was made with"]
    now = describe(evidence, row, code)
    cell, changes = evidence.cell, []
    if then["device"] != now["device_digest"]:
        what = ", ".join(list_backends(evidence.plan)) or cell["backend"] or "the backends"
        changes.append(f"the kernels ({what}) or their order changed")
    shared = str(then["shared"]), now["shared_digest"]
    if shared[0] != shared[1] and not carried.find_way(*shared):
        changes.append(f"the code of {cell['family']} on {cell['model']} changed")
    return changes


def explain_carried(evidence: Evidence, row: HardwareRow, now: Now) -> str:
    """How a fresh record's shared code leads to today's, as text; empty where it is today's."""
    then = evidence.cell.get("shared_digest")
    if now.code is None or then is None:
        return ""
    steps = now.carried.find_way(then, describe(evidence, row, now.code)["shared_digest"])
    if not steps:
        return ""
    last = steps[-1]
    return (
        f"{CARRYING}the code changed, the latents of the cpu twin did not ({CARRIED}: commit "
        f"{last.commit[:12]} on {last.machine})"
    )


def sign(record: Evidence, row: HardwareRow) -> Evidence:
    """A record that was just made, with the digests of the code that runs here in its `cell`."""
    from quantmatrix.proof.code_digest import own_code

    return replace(record, cell={**record.cell, **describe(record, row, own_code())})


def describe(evidence: Evidence, row: HardwareRow, code: Code) -> dict[str, str]:
    """`device_digest` and `shared_digest` that a record's cell has by some code."""
    hardware, scope = (row.vendor, row.arch), read_scope(evidence)
    return code.describe(evidence.cell, evidence.plan, hardware, scope)


def list_backends(plan: Mapping[str, Any]) -> list[str]:
    """The backends that a plan used."""
    parts = plan.get("components", {}).values()
    return sorted({name for part in parts for name in part["backends"]})


def find_upgrades(evidence: Mapping[str, Evidence]) -> dict[str, str]:
    """By the key of a record: which packages a machine changed after it made a record, as newer ones tell."""
    groups: dict[str, list[Evidence]] = {}
    for record in evidence.values():
        if record.machine and record.cell["claim"] != "refused":
            key = repr([record.cell["hardware"], *(record.machine.get(k) for k in MACHINE)])
            groups.setdefault(key, []).append(record)
    found = {}
    for group in groups.values():
        newest = max(group, key=lambda record: record.made)
        for record in group:
            if changed := list_upgrades(record.versions, newest.versions):
                since = f"on its machine since {newest.made[:10]}"
                found[key_of(record)] = f"{', '.join(changed)} {since}"
    return found


def list_upgrades(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Packages of which both versions are known and differ in more than build and patch."""
    return [
        f"{package} was {then[package]}, is {version}"
        for package, version in sorted(now.items())
        if package in then
        and package not in UNVERSIONED
        and shorten_version(then[package]) != shorten_version(version)
    ]


def shorten_version(version: str) -> str:
    """Major and minor of a version: builds and patches do not change what is computed."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def find_age_problem(evidence: Evidence, today: date, max_age_days: int) -> str | None:
    """Why a record is due to be made again by its date, or None; no state depends on it."""
    try:
        day = date.fromisoformat(evidence.made[:10])
    except ValueError:
        return f"made {evidence.made or 'at no known time'}: not a date"
    age = (today - day).days
    if age < -1:  # a day of grace for time zones
        return f"made {day}, which is after {today}"
    return f"{age} days old, the limit is {max_age_days}" if age > max_age_days else None
