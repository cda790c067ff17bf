"""Witness limits: how near a decoded layer must be to the base model's, and what that rests on.

They stand in `reports/limits.csv` like every other limit, with the worst layer that was measured of
each kind of storage on each model. The kind of such a line is `witness` and how weights are stored
(`witness e2m1 group 16`; `low-rank` beside a branch); its `cosine` and `relative_l2` are the worst
layer's, `psnr_db` is the latter in decibels, and `layer_error` the worst `scale_error` (see
`witness_measure`).

A checkpoint is allowed the measured error times the line's margin, as everywhere. Beside it, it may
be quantized from a finetune of the base model, whose layers have a cosine of at least `FINETUNE`
with the base's: its rounding is independent of what finetuning changed, so the two cosines
multiply. Such a finetune may lengthen a layer by 1 / `FINETUNE`, and the length of a group of n
weights by a share of `DELTA` / sqrt(n) more or less than others; `SHIFT` is left to what it does
beside that. Wrong nibbles, tiles and experts are far below that cosine, scales in another order
past that length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantmatrix.proof.limit_samples import LimitsError, Sample, read_samples
from quantmatrix.scheme import Scheme

PREFIX = "witness"
"""How the kind of these lines begins."""
FINETUNE = 0.9
"""Cosine between a finetune's layer and the base model's that is always accepted."""
DELTA = math.sqrt(1.0 / FINETUNE**2 - 1.0)
"""Distance of such a finetune from the base model, as a share of the weights."""
SHIFT = 0.05
"""Distance of the lengths of groups that is left to a finetune, whatever their size."""
LONGEST, SHORTEST = 1.18, 0.85
"""Bounds of a layer's length, as a share of the base model's."""
NARROWEST = 256
"""Columns of a layer that has one scale a row, at least."""
CODED = 2 / 3
"""Share of a cosine that is asked of the codes alone, where a low-rank branch stands beside them."""
FILE = "limits.csv"
MEASURED = ("agrees", "not judged")
"""Verdicts whose numbers count: a kind of storage that has no limit yet gets its first one so."""


@dataclass(frozen=True)
class Bounds:
    """What a decoded layer is held to."""

    cosine: float
    """Smallest accepted value."""
    scale_error: float
    """Largest accepted value."""
    source: str
    """The measurement behind it."""

    @property
    def coded_cosine(self) -> float:
        """Smallest accepted cosine of codes beside a branch, which holds most of what is shared."""
        return self.cosine * CODED

    @property
    def gain(self) -> tuple[float, float]:
        """Smallest and largest accepted length; coarse codes shorten a layer as they turn it."""
        return min(SHORTEST, self.cosine), LONGEST

    @property
    def relative_l2(self) -> float:
        """The largest distance that the bounds together leave."""
        return math.sqrt(1.0 + LONGEST**2 - 2.0 * LONGEST * self.cosine)


def name_kind(scheme: Scheme) -> str:
    """The kind of storage of a layer, `witness e4m3 channel`."""
    size = {"block": "x".join(map(str, scheme.block)), "group": str(scheme.group_size)}
    branch = "low-rank" if scheme.rank else ""
    parts = (PREFIX, scheme.weight, scheme.scale, size.get(scheme.scale, ""), branch)
    return " ".join(filter(None, parts))


def count_group(kind: str) -> float:
    """Weights that share a scale in a kind of storage; infinitely many have one in a whole layer."""
    parts = kind.split()
    if parts[2] == "tensor":
        return math.inf
    if parts[2] == "channel" or len(parts) < 4:
        return NARROWEST
    return math.prod(int(number) for number in parts[3].split("x"))


def is_witness(kind: str) -> bool:
    """Whether a line of limits.csv is one of the witness's."""
    return kind.partition(" ")[0] == PREFIX


def derive(sample: Sample, note: str = "") -> Bounds:
    """The bounds that follow from a measurement."""
    return Bounds(
        cosine=FINETUNE * (1.0 - sample.margin**2 * (1.0 - sample.cosine)),
        scale_error=sample.margin * sample.layer_error
        + SHIFT
        + DELTA / math.sqrt(count_group(sample.kind)),
        source=f"{sample.margin:g} x the error of {sample.cell}, and a finetune's {FINETUNE:g}{note}",
    )


def find(samples: Sequence[Sample], scheme: Scheme, model: str) -> Bounds | None:
    """The bounds of a layer; None where nothing like it is measured.

    What was not measured on the model, or in blocks of another size, borrows the worst of the others.
    """
    kind = name_kind(scheme)
    alike = " ".join(kind.split()[:3])
    of_kind = [sample for sample in samples if sample.kind == kind]
    of_kind = of_kind or [sample for sample in samples if sample.kind.startswith(alike)]
    if not of_kind:
        return None
    own = [sample for sample in of_kind if sample.model == model]
    worst = min(own or of_kind, key=lambda sample: sample.cosine)
    note = "" if own and worst.kind == kind else f", borrowed from {worst.kind} on {worst.model}"
    return derive(replace(worst, kind=kind), note)


@lru_cache(maxsize=1)
def read() -> tuple[Sample, ...]:
    """The witness's lines of limits.csv: of the checkout, else of the copy in the package.

    Raises LimitsError where neither is there.
    """
    package = Path(__file__).parents[1]
    paths = (package.parents[1] / "reports" / FILE, package / "tables" / FILE)
    path = next((one for one in paths if one.is_file()), None)
    if path is None:
        raise LimitsError(f"{paths[0]}: not there; the package is incomplete, install it again")
    return tuple(sample for sample in read_samples(path) if is_witness(sample.kind))


def collect(records: Iterable[tuple[Mapping[str, Any], str, Mapping[str, Any]]]) -> list[Sample]:
    """One sample per kind, model and side, from the (cell, torch, witness section) of records."""
    groups: dict[tuple[str, str], list[tuple[str, str, Mapping[str, Any]]]] = {}
    for cell, torch, section in records:
        for part in section.values():
            for found in part.get("kinds", ()):
                if found["verdict"] in MEASURED:
                    key = (found["limit"], cell["model"])
                    groups.setdefault(key, []).append((cell["id"], torch, found))
    return [make_sample(kind, model, found) for (kind, model), found in sorted(groups.items())]


def make_sample(
    kind: str, model: str, found: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> Sample:
    """The worst numbers of one kind on one model."""
    cell, torch, _ = min(found, key=lambda one: (one[2]["cosine"], one[0]))
    furthest = max(one["relative_l2"] for _, _, one in found)
    return Sample(
        kind=kind,
        model=model,
        psnr_db=round(-20.0 * math.log10(max(furthest, 1e-9)), 4),
        cosine=min(one["cosine"] for _, _, one in found),
        relative_l2=furthest,
        layer_error=max(one["scale_error"] for _, _, one in found),
        cell=cell,
        cells=len({name for name, _, _ in found}),
        torch=torch,
    )
