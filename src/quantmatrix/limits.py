"""Limits: how far a quantized run may be from the BF16 run, and the measurement behind each number.

`reports/limits.csv` holds one sample per class of arithmetic and model: the worst step of the worst
cell that was measured, with the cell's id. A run may have `MARGIN` times the error of its sample:
1.5 times the amplitude is 3.5 dB of PSNR, 1.5 times the relative L2 and 2.25 times `1 - cosine`.
The margin is for other instruction sets, whose BF16 runs differ by 50 to 64 dB among themselves.

The *class* of a run names the weight format and the arithmetic of its layers (`e4m3 W8A8`; several
are joined by ` + `). A class that was measured on other models only borrows the worst of those
samples, and says so; a class that was never measured has no limit, and its cells fail until
somebody measures it from their evidence: `python -m quantmatrix.limits reports/evidence
reports/limits.csv`. Where stand-ins or arithmetic changed on purpose, `--anew` takes what failed,
too. What is loosened is printed, and the file is reviewed like any other claim.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantmatrix import evidence as records
from quantmatrix.errors import QuantmatrixError
from quantmatrix.evidence import Evidence

MARGIN = 1.5
"""Accepted error, as a multiple of the sample's."""


class LimitsError(QuantmatrixError, LookupError):
    """No limit is known, or the file of samples is damaged."""


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
    """Where the numbers come from."""

    def to_json(self) -> dict[str, Any]:
        """The bounds as evidence keeps them."""
        return {
            "psnr_db": {"at_least": round(self.psnr_db, 4)},
            "cosine": {"at_least": round(self.cosine, 8)},
            "relative_l2": {"at_most": round(self.relative_l2, 6)},
            "layer_error": {"at_most": round(self.layer_error, 6)},
            "identical": False,
            "source": self.source,
        }


@dataclass(frozen=True)
class Sample:
    """The worst values that were measured for one class on one model."""

    kind: str
    """The class of arithmetic."""
    model: str
    psnr_db: float
    cosine: float
    relative_l2: float
    layer_error: float
    cell: str
    """Id of the cell with the lowest PSNR."""
    cells: int
    """How many cells were looked at."""
    torch: str

    def to_limits(self, note: str = "") -> Limits:
        """The limits that follow from the sample."""
        return Limits(
            psnr_db=self.psnr_db - 20.0 * math.log10(MARGIN),
            cosine=1.0 - MARGIN**2 * (1.0 - self.cosine),
            relative_l2=self.relative_l2 * MARGIN,
            layer_error=self.layer_error * MARGIN,
            source=f"{MARGIN:g} x the error of {self.cell} (torch {self.torch}){note}",
        )


def name_class(layers: Iterable[tuple[str, str]]) -> str:
    """The class of a run whose quantized layers have these (weight format, arithmetic)."""
    return " + ".join(sorted({f"{weight} {numerics}" for weight, numerics in layers}))


def find_limits(samples: Sequence[Sample], kind: str, model: str) -> Limits:
    """The limits of a class on a model; LimitsError when the class was never measured."""
    of_kind = [sample for sample in samples if sample.kind == kind]
    if not of_kind:
        raise LimitsError(
            f"no limits for {kind or 'a run without quantized layers'} on {model}: measure first, "
            "`python -m quantmatrix.limits reports/evidence reports/limits.csv`"
        )
    own = next((sample for sample in of_kind if sample.model == model), None)
    if own is not None:
        return own.to_limits()
    worst = min(of_kind, key=lambda sample: sample.psnr_db)
    return worst.to_limits(f", borrowed from {worst.model}")


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, none when there is no file; LimitsError names a damaged line."""
    return parse_samples(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else []


def parse_samples(text: str, name: str) -> list[Sample]:
    """The samples of a file's text; LimitsError names a damaged line of `name`."""
    kinds = {"float": float, "int": int, "str": str}
    columns = {column.name: kinds[str(column.type)] for column in fields(Sample)}
    found = []
    rows = csv.DictReader(io.StringIO(text))
    if rows.fieldnames != list(columns):
        raise LimitsError(f"{name}:1: expected the columns {','.join(columns)}")
    for row in rows:
        try:
            found.append(Sample(**{key: kind(row[key]) for key, kind in columns.items()}))
        except (TypeError, ValueError) as error:
            raise LimitsError(f"{name}:{rows.line_num}: {error}") from error
    return found


def write_samples(samples: Iterable[Sample]) -> str:
    """The text of a file of samples, sorted."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [column.name for column in fields(Sample)]
    writer.writerow(names)
    for sample in sorted(samples, key=lambda s: (s.kind, s.model)):
        writer.writerow([getattr(sample, name) for name in names])
    return stream.getvalue()


def collect_samples(evidence: Mapping[str, Evidence], *, anew: bool = False) -> list[Sample]:
    """One sample per class and model, from records that passed or that had no limit yet.

    With `anew` those that failed count, too.
    """
    groups: dict[tuple[str, str], list[tuple[Evidence, dict[str, Any]]]] = {}
    for record in evidence.values():
        check = record.checks.get("latents")
        if check is None:
            continue
        if check.verdict != "pass" and "psnr_db" in check.limits and not anew:
            continue
        layers = [part["worst"] for part in check.metrics.get("layers", {}).values()]
        worst = dict(check.metrics.get("worst", {}))
        if layers and worst.get("psnr_db") is not None and check.metrics.get("class"):
            worst["layer"] = max(layers)
            place = (check.metrics["class"], record.cell["model"])
            groups.setdefault(place, []).append((record, worst))
    samples = []
    for (kind, model), found in groups.items():
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


def list_loosened(older: Iterable[Sample], newer: Iterable[Sample]) -> list[str]:
    """Limits that became wider or vanished, in words."""
    now = {(sample.kind, sample.model): sample for sample in newer}
    lines = []
    for old in older:
        new = now.get((old.kind, old.model))
        if new is None:
            lines.append(f"{old.kind} on {old.model}: no longer measured")
            continue
        changes = []
        if new.psnr_db < old.psnr_db:
            changes.append(
                f"{old.psnr_db:.2f} dB ({old.cell}) -> {new.psnr_db:.2f} dB ({new.cell})"
            )
        if new.cosine < old.cosine:
            changes.append(f"cosine {old.cosine:g} -> {new.cosine:g}")
        for name in ("relative_l2", "layer_error"):
            before, after = getattr(old, name), getattr(new, name)
            if after > before:
                changes.append(f"{name} {before:g} -> {after:g}")
        if changes:
            lines.append(f"{old.kind} on {old.model}: {', '.join(changes)}")
    return lines


def main(words: Sequence[str]) -> int:
    """Measure: write the samples of an evidence folder into a file, naming what is loosened."""
    parser = argparse.ArgumentParser(prog="python -m quantmatrix.limits")
    parser.add_argument("evidence", type=Path, help="folder of records")
    parser.add_argument("samples", type=Path, help="CSV file to write")
    parser.add_argument("--anew", action="store_true", help="count cells that failed, too")
    given = parser.parse_args(words)
    samples = collect_samples(records.read_folder(given.evidence), anew=given.anew)
    for line in list_loosened(read_samples(given.samples), samples):
        print(f"loosened: {line}")
    given.samples.write_text(write_samples(samples), encoding="utf-8")
    print(f"{given.samples}: {len(samples)} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
