"""Bench gate: a new measurement held against a kept one, of the same thing, at the same size, on
the same device.

Absolute times of two days differ by more than any change worth finding; the ratio to BF16, taken in
one process, does not. A timing is *worse* when its whole interval lies outside

    max(tolerance x kept ratio, upper end of the kept interval)

and *better* when its whole interval lies below what the kept one allows in the other direction. A
single layer is allowed more than a step: where its tensors come to lie in memory and cache differs
from process to process, and the rounds of one process do not show that. Bytes are compared without an
interval. A key that the kept results lack, or have for another device only, a
kept key that was not measured, or a timing that only one side has, is an error and not a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantmatrix.proof.bench_results import BenchmarkError, Key, Result, key_of, list_comparisons

TOLERANCE, LAYER_TOLERANCE = 1.10, 1.35
"""How much worse than the kept ratio a ratio may be, and that of a layer alone."""
WORSE, BETTER, EQUAL = "worse", "better", "no measurable change"


@dataclass(frozen=True)
class Finding:
    """One number of two measurements."""

    key: Key
    name: str
    kept: float
    found: float
    low: float
    high: float
    bound: float
    """Largest ratio that is allowed."""
    verdict: str

    def tell(self) -> str:
        """As text."""
        return (
            f"{self.key[0]}: {self.name}: ratio to BF16 was {self.kept:.4g}, is {self.found:.4g} "
            f"({self.low:.4g} to {self.high:.4g}), allowed {self.bound:.4g}: {self.verdict}"
        )


def compare_results(
    kept: Sequence[Result], measured: Sequence[Result], tolerance: float | None = None
) -> list[Finding]:
    """Every number of the measured results beside the kept one; `worse` is a regression.

    `tolerance` replaces both that of a layer and that of everything else.

    Raises BenchmarkError with every reason for which the two cannot be compared.
    """
    if tolerance is not None and not 1 <= tolerance < math.inf:
        raise BenchmarkError(f"--tolerance {tolerance}: expected 1 or more; 1.1 allows 10 % more")
    old = {key_of(result): result for result in kept}
    new = {key_of(result): result for result in measured}
    if not new:
        raise BenchmarkError("nothing was measured, so there is nothing to compare")
    problems = list_unmatched(old, new)
    for key in new.keys() & old.keys():
        problems += list_gaps(key, collect(old[key]), collect(new[key]))
    if problems:
        raise BenchmarkError("\n".join(sorted(problems)))
    return [
        judge(key, name, collect(old[key])[name], numbers, tolerance or choose_tolerance(name))
        for key, result in new.items()
        for name, numbers in collect(result).items()
    ]


def choose_tolerance(name: str) -> float:
    """The usual tolerance of a number, by its name (`transformer step`)."""
    return LAYER_TOLERANCE if " layer " in name else TOLERANCE


def list_unmatched(old: Mapping[Key, Result], new: Mapping[Key, Result]) -> list[str]:
    """Keys that only one side has; of the kept ones those of the devices that were measured."""
    problems = []
    for what, device in new.keys() - old.keys():
        others = sorted(machine for name, machine in old if name == what)
        problems.append(
            f"{what}: kept for {', '.join(others)}, measured on {device}: ratios of two devices "
            "cannot be compared; keep a result of this one"
            if others
            else f"{what} on {device}: the kept results do not have it; measure and keep it first"
        )
    devices = {device for _, device in new}
    for what, device in old.keys() - new.keys():
        if device in devices:
            problems.append(f"{what}: kept for {device} and not measured now: partial")
    return problems


def list_gaps(key: Key, old: Iterable[str], new: Iterable[str]) -> list[str]:
    """Timings that only one of two results has."""
    return [
        f"{key[0]}: {name}: only the {'kept' if name in set(old) else 'new'} result has it"
        for name in set(old) ^ set(new)
    ]


Numbers = tuple[float, float, float]


def collect(result: Result) -> dict[str, Numbers]:
    """(ratio, low, high) of everything that a result compares with BF16."""
    found = {
        name: (timing["ratio"], timing["low"], timing["high"])
        for name, timing in list_comparisons(result)
    }
    for component, part in result["components"].items():
        for what in ("weights", "peak"):
            ratio = part["memory"][f"{what}_ratio"]
            found[f"{component} {what}"] = (ratio, ratio, ratio)
    return found


def judge(key: Key, name: str, kept: Numbers, found: Numbers, tolerance: float) -> Finding:
    """Whether a number got worse than the kept one allows."""
    bound = max(kept[0] * tolerance, kept[2])
    floor = min(kept[0] / tolerance, kept[1])
    verdict = WORSE if found[1] > bound else BETTER if found[2] < floor else EQUAL
    return Finding(key, name, kept[0], *found, bound, verdict)


def count_verdicts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many numbers are worse, better and unchanged."""
    return {
        verdict: sum(f.verdict == verdict for f in findings) for verdict in (WORSE, BETTER, EQUAL)
    }


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as plain data."""
    return [{**vars(finding), "key": list(finding.key)} for finding in findings]
