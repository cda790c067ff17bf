"""Facts: whether a run says anything that its record did not say before.

A record is written again when a fact changed, and left alone otherwise, so that running the suites on
a clean clone leaves the tree clean. Facts are verdicts, limits, metrics, the plan, versions of packages
and every digest. No facts are times, dates, the commit and what else the machine tells of itself; a
metric that is a time or a share of time (`seconds`, `..._share`) is none either.

Metrics are stored with six digits and repeat bit for bit on one machine, so they are compared to that
digit; a peak of memory, which an allocator rounds, to one part in fifty.

A record that is too old to count (`freshness.MAX_AGE_DAYS`) is written again whatever it says: that it
was seen again is the fact then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import date
from typing import TYPE_CHECKING, Any

from quantmatrix.proof.freshness import MAX_AGE_DAYS, find_age_problem

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence

NOISE = ("timings", "made", "commit", "machine")
"""Parts of a record that are no facts."""
UNCOUNTED = ("checks", "code_digest")
"""Columns of the row that may grow without touching what was shown, and a digest of a former rule."""
TIMES = ("seconds", "_share")
"""Endings of names of metrics that are times, or shares of them."""
REPEATS = 2e-6
"""Relative difference of two metrics that are stored with six digits and the same."""
PEAKS = {"peak": 0.02}
"""Relative difference of metrics below such a name that are the same."""


def is_news(older: Evidence, newer: Evidence, today: date) -> bool:
    """Whether the newer record has to be written, the older one lying there."""
    too_old = find_age_problem(older, today, MAX_AGE_DAYS) is not None
    return too_old or next(list_changes(older, newer), None) is not None


def list_changes(older: Evidence, newer: Evidence) -> Iterator[str]:
    """Names of facts that differ; what the newer record does not tell is left out.

    A run of some checks is compared with the same checks of the older record.
    """
    for name in (field.name for field in fields(older)):
        then, now = getattr(older, name), getattr(newer, name)
        if name in NOISE or not now:
            continue
        if name == "checks":
            yield from list_changed_checks(then, now)
        elif name == "cell":
            keep = [key for key in {**then, **now} if key not in UNCOUNTED]
            yield from (f"cell.{key}" for key in keep if then.get(key) != now.get(key))
        elif not is_same(then, now):
            yield name


def list_changed_checks(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Names of facts in checks that differ."""
    for name, check in now.items():
        if name not in then:
            yield f"checks.{name}"
            continue
        for part in ("verdict", "message", "limits", "metrics"):
            if not is_same(getattr(then[name], part), getattr(check, part)):
                yield f"checks.{name}.{part}"


def is_same(then: Any, now: Any, tolerance: float = REPEATS) -> bool:
    """Whether two values tell the same; lists and tuples are, and names of times are not looked at."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        compared = [{k: v for k, v in one.items() if not k.endswith(TIMES)} for one in (then, now)]
        return compared[0].keys() == compared[1].keys() and all(
            is_same(compared[0][key], compared[1][key], PEAKS.get(key, tolerance))
            for key in compared[0]
        )
    if isinstance(then, (list, tuple)) and isinstance(now, (list, tuple)):
        pairs = zip(then, now, strict=False)
        return len(then) == len(now) and all(is_same(a, b, tolerance) for a, b in pairs)
    if is_number(then) and is_number(now):
        return bool(abs(then - now) <= tolerance * max(abs(then), abs(now)))
    return bool(then == now)


def is_number(value: Any) -> bool:
    """Whether a value is a number; `true` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
