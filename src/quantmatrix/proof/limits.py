"""Limits: how far a quantized run may be from the BF16 run, and the measurements behind each number.

Every limit is the loosest of three sources, metric by metric, and says which of them decided:

| source     | psnr, cosine, relative L2 of the worst step | relative L2 of a layer on its own input |
| ---------- | ------------------------------------------- | --------------------------------------- |
| `rounding` | no bound that says anything                 | what the number format alone may give   |
| `spread`   | the model's BF16 run against its FP32 run   | the worst BF16 layer against FP32       |
| `measured` | `MARGIN` times the error of the sample      | the same                                |

`rounding_model` derives the first, `spread` measures the second: a quantized run is not asked to be
nearer to BF16 than rounding lets it, nor than BF16 is to the exact run. The sample is the worst
step of the worst cell that was measured, with the cell's id: 1.5 times the amplitude is 3.5 dB of
PSNR, 1.5 times the relative L2 and 2.25 times `1 - cosine`. The margin is for other instruction
sets, whose BF16 runs differ by 50 to 64 dB among themselves.

A run is judged by the limits of its class (see `limit_classes`). CPUs and accelerators have samples of
their own. A class that was measured on the other side, or on other models only, borrows the worst of
those samples, and says so. One that was never measured is judged as the same arithmetic in the other
number of components, and says that, too; what fails by such limits is a sample like what passes.
Arithmetic that was never measured has no limit, and its cells fail until somebody measures it from
their evidence: `python -m quantmatrix.proof.limits reports/evidence reports/limits.csv`, of one class
alone with `--only "e4m3 W8A8 both"`. Where stand-ins or arithmetic changed on purpose, `--anew` counts
what failed, too. What is loosened is printed, and the files (see `limit_samples`) are reviewed like any
claim.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantmatrix.errors import QuantmatrixError, UnjudgedError
from quantmatrix.files import write_whole
from quantmatrix.proof import store as records
from quantmatrix.proof import witness_limits
from quantmatrix.proof.limit_classes import read_class, swap_count
from quantmatrix.proof.limit_samples import (
    SPREADS,
    LimitsError,
    Sample,
    Spread,
    name_side,
    read_samples,
    read_spreads,
    write_rows,
)
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.proof.rounding_model import bound_class
from quantmatrix.proof.scopes import STAND_IN, read_scope

MARGIN = 1.5
"""Accepted error, as a multiple of the sample's."""
ROUNDED = 1e-5
"""Share by which a metric may miss a limit because both were rounded."""
SIGNS = {"psnr_db": -1, "cosine": -1, "relative_l2": 1, "layer_error": 1}
"""Metrics, and whether a larger value is looser (1) or tighter (-1)."""


BORROWED = "from the limits that come with quantmatrix: this project has none for this class"


class UnmeasuredError(LimitsError, UnjudgedError):
    """A class of arithmetic that nobody has measured, so that there is no limit to judge by."""


@dataclass(frozen=True)
class Limits:
    """Bounds on the worst step of a trajectory."""

    psnr_db: float
    """Smallest accepted value."""
    cosine: float
    """Smallest accepted value."""
    relative_l2: float
    """Largest accepted value."""
    layer_error: float = math.inf
    """Largest accepted relative L2 error of one layer on its own input."""
    source: str = ""
    """Where the numbers come from: the three sources, and which of them decided."""
    decided: str = ""
    """`measured`, and what else decided which metric."""
    kind: str = ""
    """The class that was measured, where the run's own never was."""

    def to_json(self) -> dict[str, Any]:
        """The bounds as evidence keeps them."""
        stood_in = {"class": self.kind} if self.kind else {}
        return {
            **stood_in,
            "psnr_db": {"at_least": round(self.psnr_db, 4)},
            "cosine": {"at_least": round(self.cosine, 8)},
            "relative_l2": {"at_most": round(self.relative_l2, 6)},
            "layer_error": {"at_most": round(self.layer_error, 6)},
            "identical": False,
            "source": self.source,
            "decided": self.decided,
        }


@dataclass(frozen=True)
class Ledger:
    """Every sample and spread of a project; what limits are found in."""

    samples: Sequence[Sample]
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    fallback: Ledger | None = None
    """Asked for a class that this one never measured (see `known_limits`)."""

    def find(self, kind: str, model: str, hardware: str = "cpu") -> Limits:
        """The limits of a class on a model and a device.

        UnmeasuredError for arithmetic never measured, LimitsError for none: nothing was quantized.
        """
        if not kind:
            raise LimitsError(f"no limits for a run without quantized layers on {model}")
        if found := self.find_measured(kind, model, hardware):
            return found
        near = swap_count(kind)
        if found := self.find_measured(near, model, hardware):
            return replace(
                found, kind=near, source=f"{found.source}; of {near}: {kind} has no sample"
            )
        raise UnmeasuredError(
            f"no limits for {kind} on {model}: measure "
            "first, `python -m quantmatrix.proof.limits reports/evidence reports/limits.csv`"
        )

    def find_measured(self, kind: str, model: str, hardware: str) -> Limits | None:
        """The limits of a class that has samples, here or in the fallback; None where it has none."""
        of_kind = [sample for sample in self.samples if sample.kind == kind]
        if not of_kind and self.fallback is not None:
            found = self.fallback.find_measured(kind, model, hardware)
            return replace(found, source=f"{found.source}; {BORROWED}") if found else None
        if not of_kind:
            return None
        side = name_side(hardware)
        near = [sample for sample in of_kind if sample.model == model]
        here = [sample for sample in of_kind if sample.side == side]
        own = [sample for sample in near if sample.side == side]
        worst = min(own or near or here or of_kind, key=lambda sample: sample.psnr_db)
        borrowed = [worst.model] if worst.model != model else []
        borrowed += [worst.side] if worst.side != side else []
        note = f", borrowed from {' on '.join(borrowed)}" if borrowed else ""
        return join_sources(worst, self.spreads.get(model), note)

    def list_limits(self) -> list[tuple[Sample, Limits]]:
        """Every sample with the limits that follow from it."""
        return [(s, join_sources(s, self.spreads.get(s.model))) for s in self.samples]

    def settle(self) -> Ledger:
        """The same with the columns that follow: the margin and `rounding`, then `decided`."""
        known = [
            replace(s, margin=MARGIN, rounding=float(f"{bound_class(s.kind):.6g}"))
            for s in self.samples
        ]
        joined = replace(self, samples=known).list_limits()
        return replace(self, samples=[replace(s, decided=found.decided) for s, found in joined])


def read(path: Path, fallback: Ledger | None = None) -> Ledger:
    """The ledger of a limits.csv and the spread.csv beside it; empty when there is neither.

    What it lacks is looked up in `fallback`, classes and spreads alike.

    LimitsError for a damaged line, for one that was edited by hand (what follows from the sample no
    longer does), and for a model whose spread nobody measured.
    """
    behind = fallback.spreads if fallback else {}
    spreads = {**behind, **read_spreads(path.with_name(SPREADS))}
    ledger = Ledger(read_samples(path), spreads, fallback)
    remedy = "measure with `quantmatrix thresholds --measure-spread` and `python -m "
    remedy += "quantmatrix.proof.limits reports/evidence reports/limits.csv`"
    for sample, due in zip(ledger.samples, ledger.settle().samples, strict=True):
        if sample.model not in ledger.spreads:
            raise LimitsError(f"{path}: no spread of {sample.model} in {SPREADS}; {remedy}")
        if sample != due:
            names = [name for name in vars(due) if getattr(sample, name) != getattr(due, name)]
            wrong = [f"{n} is {getattr(sample, n)!r}, not {getattr(due, n)!r}" for n in names]
            raise LimitsError(
                f"{path}: {sample.kind} on {sample.model}: {', '.join(wrong)}; {remedy}"
            )
    return ledger


def list_sources(sample: Sample, spread: Spread | None) -> dict[str, dict[str, float]]:
    """What each source gives for each metric, by the source's name; `measured` comes first."""
    sources = {
        "measured": {
            "psnr_db": sample.psnr_db - 20.0 * math.log10(sample.margin),
            "cosine": 1.0 - sample.margin**2 * (1.0 - sample.cosine),
            "relative_l2": sample.relative_l2 * sample.margin,
            "layer_error": sample.layer_error * sample.margin,
        }
    }
    if spread is not None:
        sources["spread"] = {name: getattr(spread, name) for name in SIGNS}
    if sample.rounding:
        sources["rounding"] = {"layer_error": sample.rounding}
    return sources


def join_sources(sample: Sample, spread: Spread | None, note: str = "") -> Limits:
    """The loosest of the sources, metric by metric; the first named of equal ones decides.

    What the witness measured (`witness_limits`) has bounds of its own.
    """
    if witness_limits.is_witness(sample.kind):
        return join_witness(sample, note)
    sources = list_sources(sample, spread)
    decided = {}
    for metric, sign in SIGNS.items():
        known = [source for source, values in sources.items() if metric in values]
        decided[metric] = max(known, key=lambda name: sign * sources[name][metric])
    others = [f"{metric} by {name}" for metric, name in decided.items() if name != "measured"]
    named = ", ".join(["measured", *others] if len(others) < len(decided) else others)
    reasons = [
        f"measured: {sample.margin:g} x the error of {sample.cell} (torch {sample.torch}){note}"
    ]
    if spread is not None:
        reasons.append(
            f"spread: BF16 is {spread.psnr_db:g} dB, cosine {spread.cosine:g}, relative L2 "
            f"{spread.relative_l2:g} and in a layer {spread.layer_error:g} away from FP32 "
            f"(torch {spread.torch}, {spread.made[:10]})"
        )
    if sample.rounding:
        reasons.append(f"rounding: {sample.rounding:g} in a layer")
    return Limits(
        **{metric: sources[name][metric] for metric, name in decided.items()},
        source="; ".join(reasons),
        decided=named,
        kind="",
    )


def join_witness(sample: Sample, note: str) -> Limits:
    """The bounds of a kind of storage as limits; `layer_error` is that of the lengths of groups."""
    bounds = witness_limits.derive(sample, note)
    return Limits(
        psnr_db=-20.0 * math.log10(bounds.relative_l2),
        cosine=bounds.cosine,
        relative_l2=bounds.relative_l2,
        layer_error=bounds.scale_error,
        source=bounds.source,
        decided="measured",
    )


def is_judged(check: CheckResult) -> bool:
    """Whether a latents check had limits that were measured for its own class."""
    return "psnr_db" in check.limits and "class" not in check.limits


def collect_samples(evidence: Mapping[str, Evidence], *, again: bool = False) -> list[Sample]:
    """One sample per class, model and side, from records that passed or that had no limit yet.

    With `again` those that failed count, too.
    """
    groups: dict[tuple[str, str, str], list[tuple[Evidence, dict[str, Any]]]] = {}
    for record in (one for one in evidence.values() if read_scope(one) == STAND_IN):
        check = record.checks.get("latents")
        if check is None:
            continue
        if check.verdict != "pass" and is_judged(check) and not again:
            continue
        layers = [part["worst"] for part in check.metrics.get("layers", {}).values()]
        worst = dict(check.metrics.get("worst", {}))
        complete = all(worst.get(name) is not None for name in ("psnr_db", "cosine", "relative_l2"))
        if layers and complete and (kind := read_class(check)):
            worst["layer"] = max(layers)
            key = (
                kind,
                record.cell["model"],
                name_side(record.cell["hardware"]),
            )
            groups.setdefault(key, []).append((record, worst))
    samples = []
    for (kind, model, _), found in groups.items():
        record, _ = min(found, key=lambda pair: (pair[1]["psnr_db"], pair[0].cell["id"]))
        samples.append(
            Sample(
                kind=kind,
                model=model,
                psnr_db=min(worst["psnr_db"] for _, worst in found),
                cosine=min(worst["cosine"] for _, worst in found),
                relative_l2=max(worst["relative_l2"] for _, worst in found),
                layer_error=max(worst["layer"] for _, worst in found),
                cell=record.cell["id"],
                cells=len(found),
                torch=record.versions.get("torch", ""),
            )
        )
    return samples


def list_exceeded(record: Evidence, ledger: Ledger) -> list[str]:
    """Where a latents check that passed exceeds the limits of a ledger, as text.

    Its own limits it met; those of the ledger may have been tightened since.
    """
    check = record.checks.get("latents")
    if check is None or check.verdict != "pass" or not (kind := read_class(check)):
        return []
    try:
        allowed = ledger.find(kind, record.cell["model"], record.cell["hardware"])
    except LimitsError as error:
        return [str(error)]
    layers = [part["worst"] for part in check.metrics.get("layers", {}).values()]
    measured = {**check.metrics.get("worst", {}), "layer_error": max(layers, default=None)}
    lines = []
    for name, sign in SIGNS.items():
        found, bound = measured.get(name), getattr(allowed, name)
        if found is not None and sign * (found - bound) > ROUNDED * abs(bound):
            lines.append(f"{name} is {found:g}, the limit is {bound:g} now")
    return lines


def list_loosened(older: Ledger, newer: Ledger) -> list[str]:
    """Limits that became wider or vanished, from whichever source, as text."""
    lines = [
        f"{sample.kind} on {sample.model} ({sample.side}): no longer measured"
        for sample in older.samples
        if not any(is_same_key(sample, other) for other in newer.samples)
    ]
    for sample, new in newer.list_limits():
        try:
            old = older.find(sample.kind, sample.model, sample.side)  # what it had borrowed before
        except LimitsError:
            continue
        where = f"{sample.kind} on {sample.model} ({sample.side})"
        changes = [
            f"{metric} {getattr(old, metric):.6g} -> {getattr(new, metric):.6g}"
            for metric, sign in SIGNS.items()
            if sign * (getattr(new, metric) - getattr(old, metric)) > 0
        ]
        if changes:
            lines.append(f"{where}: {', '.join(changes)} (was {old.source}; is {new.source})")
    return lines


def is_same_key(one: Sample, other: Sample) -> bool:
    """Whether two samples are of one class, model and side."""
    return (one.kind, one.model, one.side) == (other.kind, other.model, other.side)


def write(ledger: Ledger, path: Path) -> list[str]:
    """Settle a ledger and write limits.csv and spread.csv; returns what is looser than before."""
    before = Ledger(read_samples(path), read_spreads(path.with_name(SPREADS)))
    settled = ledger.settle()
    texts = {path: write_rows(Sample, settled.samples)}
    texts[path.with_name(SPREADS)] = write_rows(Spread, settled.spreads.values())
    for target, text in texts.items():
        write_whole(target, text.encode())
    return list_loosened(before, settled)


def main(argv: Sequence[str]) -> int:
    """Measure: write the samples of an evidence folder into a file, naming what is loosened."""
    parser = argparse.ArgumentParser(prog="python -m quantmatrix.proof.limits")
    parser.add_argument("evidence", type=Path, help="folder of records")
    parser.add_argument("samples", type=Path, help="CSV file to write")
    parser.add_argument("--anew", action="store_true", help="count cells that failed, too")
    what = "measure this class alone, and keep all other lines; may be given again"
    parser.add_argument("--only", action="append", default=[], metavar="CLASS", help=what)
    given = parser.parse_args(argv)
    try:
        ledger = measure(given.evidence, given.samples, again=given.anew, only=given.only)
        loosened = write(ledger, given.samples)
    except (QuantmatrixError, OSError) as error:
        print(f"quantmatrix: {error}", file=sys.stderr)
        return 1
    for line in loosened:
        print(f"loosened: {line}")
    print(f"{given.samples}: {len(ledger.samples)} samples")
    return 0


def measure(
    evidence: Path, path: Path, *, again: bool = False, only: Collection[str] = ()
) -> Ledger:
    """The ledger that the records of a folder give, with the spreads beside `path`.

    With `only` the lines of these classes alone, and all others as `path` has them. LimitsError where
    the records give no sample at all, or none of such a class: limits would be gone.
    """
    found = records.read_folder(evidence)
    samples = collect_samples(found, again=again)
    if not samples:
        raise LimitsError(
            f"{evidence}: no record of a latents check that passed, so {path} stays as it is; "
            "name the folder that has one folder per hardware, such as reports/evidence"
        )
    if only:
        samples = replace_classes(read_samples(path), samples, only)
    else:
        samples += collect_witness(found, path)
    return Ledger(samples, read_spreads(path.with_name(SPREADS)))


def replace_classes(
    older: Iterable[Sample], newer: Sequence[Sample], kinds: Collection[str]
) -> list[Sample]:
    """The older samples, with those of some classes replaced; LimitsError for a class without any."""
    known = {sample.kind for sample in newer}
    if unknown := [kind for kind in kinds if kind not in known]:
        raise LimitsError(
            f"--only {unknown[0]!r}: no record has a sample of it; known: {', '.join(sorted(known))}"
        )
    return [
        *(sample for sample in older if sample.kind not in kinds),
        *(sample for sample in newer if sample.kind in kinds),
    ]


def collect_witness(evidence: Mapping[str, Evidence], path: Path) -> list[Sample]:
    """What the records' witnesses measured, and what `path` has of kinds that no record tells of."""
    witnessed = ((r.cell, r.versions.get("torch", ""), r.witness) for r in evidence.values())
    samples = witness_limits.collect(witnessed)
    known = {(sample.kind, sample.model) for sample in samples}
    older = [s for s in read_samples(path) if witness_limits.is_witness(s.kind)]
    return [*samples, *(s for s in older if (s.kind, s.model) not in known)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
