"""Witness: what a quantized file means, proved by the base model's own weights.

Names, shapes and dtypes cannot tell a nibble order, a scale layout, an expert or a scale that is
off; one decoded layer beside its original can. A few layers of each kind are decoded the loader's
own way (`witness_measure`), compared with the base model's (`witness_base`), and judged by measured
limits (`witness_limits`). The witness speaks at two points:

| where | what it does |
| ----- | ------------ |
| plan | where nothing declares a file's layout, decides among the readings: one agrees, no other |
|      | does; anything else, or no base weights at hand, is an error that names the readings |
| load | confirms what was declared, chosen or decided; a layer that disagrees is an error |

Where the base model is certain (`witness_base` says when), or some layers agree with it, each layer
that disagrees is an error. Where it is a guess and no layer at all agrees, the checkpoint may be of
another finetune: a warning says so. `--witness require` takes no guess: it makes that an error, as it
does where the base weights are not at hand. `--witness off` leaves the comparison out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.opening import fetch
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.checkpoints.row_reader import RowReader
from quantmatrix.errors import CheckpointError, WitnessError
from quantmatrix.proof import witness_limits
from quantmatrix.proof.witness_limits import Bounds
from quantmatrix.request import Request
from quantmatrix.runtime.pieces import read_piece
from quantmatrix.runtime.plan.types import ComponentPlan, Piece, Plan
from quantmatrix.runtime.witness.base import Base, explain_missing
from quantmatrix.runtime.witness.measure import Likeness, Sample, choose_samples, compare_sample

AGREES, DISAGREES, UNJUDGED = "agrees", "disagrees", "not judged"
NEARER = 0.1
"""Cosine by which another expert's layer must be nearer to be called the right one."""


@dataclass(frozen=True)
class Finding:
    """One layer beside the base model's."""

    sample: Sample
    likeness: Likeness
    bounds: Bounds | None
    """None: no limit is measured for this kind of storage."""

    @property
    def verdict(self) -> str:
        """`agrees`, `disagrees`, or `not judged`."""
        if self.bounds is None:
            return UNJUDGED
        found, bounds = self.likeness, self.bounds
        near = found.cosine >= bounds.cosine and found.coded_cosine >= bounds.coded_cosine
        scaled = bounds.gain[0] <= found.gain <= bounds.gain[1]
        scaled = scaled and found.scale_error <= bounds.scale_error
        return AGREES if near and scaled else DISAGREES

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        bounds = self.bounds
        return {
            "layer": self.sample.piece.layer,
            "module": self.sample.module,
            "rows": [self.sample.start, self.sample.stop],
            "reading": describe_reading(self.sample.piece),
            **round_likeness(self.likeness),
            "verdict": self.verdict,
            "limits": bounds
            and {
                "cosine": {"at_least": round(bounds.cosine, 6)},
                "relative_l2": {"at_most": round(bounds.relative_l2, 6)},
                "gain": dict(zip(("at_least", "at_most"), bounds.gain, strict=True)),
                "scale_error": {"at_most": round(bounds.scale_error, 6)},
                "source": bounds.source,
            },
        }


@dataclass(frozen=True)
class Report:
    """What the witness found of one component."""

    component: str
    base: Base
    layout: str
    """What the layout rests on, where there was anything to know."""
    findings: Sequence[Finding] = ()
    seconds: float = 0.0
    total_bytes: int = 0
    """Bytes of the checkpoint."""
    problems: Sequence[str] = field(default_factory=tuple)
    warnings: Sequence[str] = field(default_factory=tuple)

    @property
    def nbytes(self) -> int:
        """Bytes that were looked at, on both sides."""
        return sum(finding.likeness.nbytes for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The worst verdict of a layer; `no base weights` where there was nothing to compare."""
        found = {finding.verdict for finding in self.findings}
        worst = (verdict for verdict in (DISAGREES, UNJUDGED, AGREES) if verdict in found)
        return next(worst, "no base weights")

    def to_json(self) -> dict[str, Any]:
        """The report as evidence keeps it: the worst of each kind and storage."""
        return {
            "base": self.base.reference or None,
            "missing": self.base.missing or None,
            "layout": self.layout or None,
            "verdict": self.verdict,
            "layers": len(self.findings),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 4),
            "kinds": [summarize(kind, list(found)) for kind, found in group(self.findings)],
        }


def group(findings: Sequence[Finding]) -> Iterator[tuple[str, Iterator[Finding]]]:
    """Findings by kind and storage, in the order of the samples."""
    return groupby(findings, lambda f: f"{f.sample.piece.scheme.name}: {f.sample.kind}")


def summarize(kind: str, found: Sequence[Finding]) -> dict[str, Any]:
    """The worst numbers of one kind of layers."""
    worst = {
        "cosine": min(f.likeness.cosine for f in found),
        "coded_cosine": min(f.likeness.coded_cosine for f in found),
        "relative_l2": max(f.likeness.relative_l2 for f in found),
        "gain": max((f.likeness.gain for f in found), key=lambda gain: abs(gain - 1.0)),
        "scale_error": max(f.likeness.scale_error for f in found),
    }
    verdicts = [f.verdict for f in found]
    return {
        "kind": kind,
        "limit": witness_limits.name_kind(found[0].sample.piece.scheme),
        "reading": describe_reading(found[0].sample.piece),
        "layers": len(found),
        **{name: round(min(value, 1e9), 6) for name, value in worst.items()},
        "verdict": next(w for w in (DISAGREES, UNJUDGED, AGREES) if w in verdicts),
    }


def round_likeness(likeness: Likeness) -> dict[str, float]:
    """The numbers of a comparison as plain data; what is infinite is a very large number."""
    names = ("cosine", "coded_cosine", "relative_l2", "gain", "scale_error")
    return {name: round(min(getattr(likeness, name), 1e9), 6) for name in names}


def describe_reading(piece: Piece) -> str:
    """How a layer's codes are read, as text."""
    from quantmatrix.runtime.plan.layouts import describe_layout

    return describe_layout(piece.scheme) or f"{piece.scheme.weight} per {piece.scheme.scale}"


def examine(component: ComponentPlan, request: Request, *, name: str = "") -> Report:
    """Compare a component's layers with those of its base, or of a sibling `name` of it."""
    base = component.base
    if not base.weights:
        return Report(component.name, base, component.layout)
    start = time.perf_counter()
    stored = fetch(component.checkpoint, request.hub)
    findings = tuple(measure(component, stored, base.weights[name or component.name]))
    report = Report(
        component.name, base, component.layout, findings, time.perf_counter() - start, stored.nbytes
    )
    if findings or name:
        return report
    missing = f"{base.reference} has no layer of the names and sizes of this checkpoint"
    return replace(report, base=replace(base, missing=missing))


def measure(
    component: ComponentPlan,
    stored: Checkpoint,
    weights: Checkpoint,
    samples: Sequence[Sample] | None = None,
) -> Iterator[Finding]:
    """A finding per sample whose layer the base has in the same size."""
    chosen = choose_samples(component) if samples is None else samples
    limits = witness_limits.read()
    with TensorReader(stored, "cpu") as reader, RowReader(weights) as base:
        for sample in chosen:
            header = weights.tensors.get(f"{sample.module}.weight")
            widths = sum(piece.in_features for piece in component.layers[sample.module])
            if header is None or header.shape != (sample.piece.out_features, widths):
                continue
            scheme = sample.piece.scheme
            likeness = compare_sample(component, sample, scheme, reader, base)
            bounds = witness_limits.find(limits, scheme, component.model)
            yield Finding(sample, likeness, bounds)


def confirm(component: ComponentPlan, request: Request) -> Report | None:
    """What the witness says of a component about to be loaded; WitnessError where it disagrees."""
    if request.witness == "off" or component.online or component.family is None:
        return None
    report = judge(examine(component, request), component, request)
    if report.problems:
        find_damage(report, component, request)
        raise WitnessError("; ".join(report.problems))
    if not report.findings and request.witness == "require":
        raise WitnessError(explain_missing(component.checkpoint.reference, report.base))
    for text in report.warnings:
        warnings.warn(text, stacklevel=3)
    return report


def examine_plan(plan: Plan) -> list[Report]:
    """What the witness finds of each quantized component of a plan; nothing is raised."""
    parts = [part for part in plan.components.values() if part.layers and not part.online]
    return [judge(examine(part, plan.request), part, plan.request) for part in parts]


def find_damage(report: Report, component: ComponentPlan, request: Request) -> None:
    """Raise what the loader says of the layers that disagree, where it knows what is wrong in them."""
    wrong = [finding.sample.piece for finding in report.findings if finding.verdict == DISAGREES]
    with TensorReader(fetch(component.checkpoint, request.hub), "cpu") as reader:
        for piece in wrong:
            read_piece(component, piece, reader)


def judge(report: Report, component: ComponentPlan, request: Request) -> Report:
    """The report with what is wrong, and why it may be."""
    wrong = [finding for finding in report.findings if finding.verdict == DISAGREES]
    other = find_nearer(report, component, request)
    if not wrong and not other:
        return report
    reading = "" if other or not wrong else find_reading(component, request, wrong)
    text = describe_problem(report, component, wrong or report.findings, other, reading)
    alike = len(wrong) < len(report.findings) or bool(other) or bool(reading)
    if report.base.certain or alike or request.witness == "require":
        return replace(report, problems=(text,))
    guess = (
        f"{text}. This is a warning, because {report.base.reference} is a guess: neither --model-path "
        "nor _name_or_path in the checkpoint's config.json names a base model in full precision; "
        "--witness require makes it an error"
    )
    return replace(report, warnings=(guess,))


def describe_problem(
    report: Report,
    component: ComponentPlan,
    wrong: Sequence[Finding],
    other: str,
    reading: str,
) -> str:
    """File, layer, found, expected, and what to try."""
    first = max(wrong, key=lambda f: (-f.likeness.coded_cosine, f.likeness.scale_error))
    likeness, bounds = first.likeness, first.bounds
    file = component.checkpoint.tensors[find_tensor(component, first.sample.piece.layer)].file
    found = (
        f"{file}: layer {first.sample.piece.layer} decodes to other weights than "
        f"{first.sample.module}.weight of {report.base.reference} ({component.name}): cosine "
        f"{likeness.cosine:.4f} (coded part {likeness.coded_cosine:.4f}), relative L2 "
        f"{likeness.relative_l2:.3g}, {likeness.gain:.3g} times as long, groups "
        f"{likeness.scale_error:.3g} off in length"
    )
    if bounds is not None:
        found += (
            f"; expected a cosine of at least {bounds.cosine:.3f}, {bounds.gain[0]:.3g} to "
            f"{bounds.gain[1]:.3g} times the length, and groups within {bounds.scale_error:.3g}"
        )
    found += f"; {len(wrong)} of {len(report.findings)} layers disagree"
    if other:
        return (
            f"{found}. It agrees with {other} of {report.base.reference}: these are the weights of "
            f"the other expert; give the file with --{other.replace('_', '-')}-weights-path"
        )
    if reading:
        return f"{found}. {reading}"
    hint = "a scale is not the one that its codes were made with, or is read in another order"
    if likeness.cosine < 0.5:
        hint = "these are weights of another model, or codes in another order"
    return (
        f"{found}: {hint}. Name the base model that the checkpoint was made from, quantize again, or "
        "load it unproved with --witness off"
    )


def find_tensor(component: ComponentPlan, layer: str) -> str:
    """The name of a tensor of a layer on disk."""
    return next(n for n in component.checkpoint.tensors if n.startswith(f"{layer}."))


def find_nearer(report: Report, component: ComponentPlan, request: Request) -> str:
    """The sibling whose layers are nearer to the decoded ones than the component's own; or ''."""
    if all(finding.likeness.cosine > 1.0 - NEARER for finding in report.findings):
        return ""  # no other can be nearer by so much
    firsts = [next(iter(found)) for _, found in group(report.findings)]
    samples = [finding.sample for finding in firsts]
    stored = fetch(component.checkpoint, request.hub)
    for name, weights in component.base.weights.items():
        if name == component.name or not samples:
            continue
        others = list(measure(component, stored, weights, samples))
        pairs = zip(others, firsts, strict=False)
        nearer = [o.likeness.cosine > f.likeness.cosine + NEARER for o, f in pairs]
        if len(others) == len(firsts) and sum(nearer) * 2 > len(nearer):
            return name
    return ""


def find_reading(component: ComponentPlan, request: Request, wrong: Sequence[Finding]) -> str:
    """Which other reading of NVFP4 codes agrees where the declared one does not; or ''."""
    if not any(finding.sample.piece.scheme.op == "linear.nvfp4" for finding in wrong):
        return ""
    from quantmatrix.families.layouts import NIBBLES, SCALES

    stored = fetch(component.checkpoint, request.hub)
    weights = component.base.weights[component.name]
    samples = [f.sample for f in wrong if f.sample.piece.scheme.op == "linear.nvfp4"]
    for nibble in NIBBLES:
        for layout in SCALES:
            bits = {"swap_nibbles": nibble == "high", "tiled_scales": layout == "tiles"}
            read = [read_as(sample, bits) for sample in samples]
            try:
                found = list(measure(component, stored, weights, read))
            except (RuntimeError, ValueError):  # shapes that this layout cannot have
                continue
            if found and all(finding.verdict == AGREES for finding in found):
                return (
                    f"It agrees when read with the {describe_reading(read[0].piece)}: the layout was "
                    f"declared or chosen wrongly ({component.layout}); --nibble-order {nibble} "
                    f"--nvfp4-layout {layout} reads it"
                )
    return ""


def read_as(sample: Sample, bits: Mapping[str, bool]) -> Sample:
    """The same rows, read in another layout."""
    scheme = replace(sample.piece.scheme, **bits)  # type: ignore[arg-type]
    return replace(sample, piece=replace(sample.piece, scheme=scheme))


def decide(
    checkpoint: Checkpoint,
    readings: Sequence[Mapping[str, str]],
    plan_reading: Callable[[Checkpoint], ComponentPlan],
    request: Request,
    explain: Callable[[str], str],
) -> Checkpoint:
    """The checkpoint with the one reading that agrees with the base weights.

    `plan_reading` plans the component under a reading; one whose shapes do not fit is left out.
    Raises WitnessError, with the text of `explain`, where not exactly one agrees, and
    CheckpointError where no reading can be planned.
    """
    if request.witness == "off":
        raise WitnessError(explain("--witness off leaves it to you"))
    if checkpoint.remote is not None:
        raise WitnessError(explain("Download the file first, for its tensors to be looked at"))
    agreeing, judged, errors = [], [], []
    for reading in readings:
        try:
            component = plan_reading(replace(checkpoint, chosen=reading))
        except CheckpointError as error:
            errors.append(error)
            continue
        report = examine(component, request)
        coded = [f for f in report.findings if f.sample.piece.scheme.op == "linear.nvfp4"]
        if not coded:
            missing = report.base.missing or "none were named"
            raise WitnessError(explain(f"The base model's weights are not at hand ({missing})"))
        worst = min(f.likeness.cosine for f in coded)
        judged.append(f"{describe_reading(coded[0].sample.piece)}: cosine {worst:.4f}")
        if all(finding.verdict == AGREES for finding in coded):
            agreeing.append((reading, worst, report.base.reference))
    if not judged:
        raise errors[0]
    if len(agreeing) != 1:
        count = "more than one reading agrees" if agreeing else "no reading agrees"
        raise WitnessError(
            explain(f"Beside the base model's weights {count} ({'; '.join(judged)})")
        )
    reading, cosine, reference = agreeing[0]
    why = f"decided by the weights of {reference} (lowest cosine {cosine:.4f})"
    return replace(checkpoint, chosen={**reading, "why": why})
