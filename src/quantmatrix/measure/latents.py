"""Compare: how far a quantized run is from the BF16 run of the same seed, and how far it may be.

Everything is computed in float64. For every denoising step, reference `r` against candidate `c`:

| metric        | definition | equal inputs |
| ------------- | ---------- | ------------ |
| `cosine`      | r.c / (|r| |c|); 1 when both norms are 0, 0 when one is | 1 |
| `relative_l2` | |c - r| / |r| | 0 |
| `psnr_db`     | 20 log10(peak / rms(c - r)), peak = max r - min r | infinite |
| `max_abs`     | max |c - r| | 0 |

A candidate with NaN or infinite elements gets the worst value of each. Limits bound the worst step.
A quantized run that equals the BF16 run bit for bit is a failure, too: the quantized weights were
not used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantmatrix.errors import QuantmatrixError
from quantmatrix.proof.limits import Limits


class ShapeError(QuantmatrixError, ValueError):
    """Two runs that cannot be compared element by element."""


@dataclass(frozen=True)
class StepMetrics:
    """Distance of one step's latents; the worst values are NaN-free (0, infinity)."""

    cosine: float
    relative_l2: float
    psnr_db: float
    max_abs: float
    nonfinite: int = 0
    """Elements of the candidate that are NaN or infinite."""
    identical: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data with six digits; what is infinite is left out as null."""
        numbers = ("cosine", "relative_l2", "psnr_db", "max_abs")
        rounded = {name: _round(getattr(self, name)) for name in numbers}
        return {**rounded, "nonfinite": self.nonfinite, "identical": self.identical}


def _round(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def compare_tensors(reference: torch.Tensor, candidate: torch.Tensor) -> StepMetrics:
    """Metrics of one pair of tensors of equal shape, any shape and any dtype; PSNR in dB.

    Raises ShapeError for shapes that differ, and for a reference that is not finite.
    """
    if reference.shape != candidate.shape:
        raise ShapeError(
            f"reference has shape {list(reference.shape)}, candidate {list(candidate.shape)}: "
            "compare runs of one size, frame count and batch"
        )
    r = reference.detach().to("cpu", torch.float64).flatten()
    c = candidate.detach().to("cpu", torch.float64).flatten()
    if not torch.isfinite(r).all():
        raise ShapeError("the reference holds NaN or infinite elements: it is not a reference")
    nonfinite = int((~torch.isfinite(c)).sum())
    if nonfinite:
        return StepMetrics(0.0, math.inf, -math.inf, math.inf, nonfinite)
    difference = c - r
    distance, size_r, size_c = (float(x.norm()) for x in (difference, r, c))
    if size_r and size_c:
        cosine = max(-1.0, min(1.0, float(torch.dot(r / size_r, c / size_c))))
    else:
        cosine = 1.0 if size_r == size_c else 0.0
    peak = float(r.max() - r.min()) if r.numel() else 0.0
    rms = distance / math.sqrt(max(r.numel(), 1))
    return StepMetrics(
        cosine=cosine,
        relative_l2=distance / size_r if size_r else (math.inf if distance else 0.0),
        psnr_db=_decibels(peak, rms),
        max_abs=float(difference.abs().max()) if r.numel() else 0.0,
        identical=torch.equal(r, c),
    )


def _decibels(peak: float, rms: float) -> float:
    if rms == 0.0:
        return math.inf
    return 20.0 * math.log10(peak / rms) if peak else -math.inf


def compare_trajectories(
    reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]
) -> list[StepMetrics]:
    """Metrics of every denoising step, in order; tensors of any shape and dtype, one per step.

    Raises ShapeError when the runs are of different form.
    """
    if len(reference) != len(candidate):
        raise ShapeError(
            f"reference has {len(reference)} steps, candidate {len(candidate)}: "
            "compare runs with one --num-inference-steps"
        )
    return [compare_tensors(r, c) for r, c in zip(reference, candidate, strict=True)]


def summarize(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """Plain data for evidence: every step, the worst values, and the PSNR lost per step in dB.

    Raises ShapeError for a run without steps.
    """
    if not steps:
        raise ShapeError("a run without steps: nothing to compare")
    worst = find_worst(steps)
    first, last = steps[0].psnr_db, steps[-1].psnr_db
    drift = (first - last) / max(len(steps) - 1, 1)
    return {
        "steps": [step.to_json() for step in steps],
        "worst": worst.to_json(),
        "final": steps[-1].to_json(),
        "drift_db_per_step": _round(drift),
    }


def find_worst(steps: Sequence[StepMetrics]) -> StepMetrics:
    """The worst value of each metric over the steps; `identical` only if every step is."""
    return StepMetrics(
        cosine=min(step.cosine for step in steps),
        relative_l2=max(step.relative_l2 for step in steps),
        psnr_db=min(step.psnr_db for step in steps),
        max_abs=max(step.max_abs for step in steps),
        nonfinite=sum(step.nonfinite for step in steps),
        identical=all(step.identical for step in steps),
    )


def judge(steps: Sequence[StepMetrics], limits: Limits) -> list[str]:
    """What a trajectory violates, as text; empty when it passes."""
    worst = find_worst(steps)
    if worst.nonfinite:
        return [f"{worst.nonfinite} elements of the latents are NaN or infinite"]
    if worst.identical:
        return [
            "every step equals the BF16 run bit for bit: the quantized weights were not used "
            "(BF16 was loaded under a quantized label)"
        ]
    problems = []
    for name in ("psnr_db", "cosine"):
        value, bound = getattr(worst, name), getattr(limits, name)
        if value < bound:
            problems.append(f"{name} {value:.6g} at the worst step, the limit is at least {bound}")
    if worst.relative_l2 > limits.relative_l2:
        problems.append(
            f"relative_l2 {worst.relative_l2:.6g} at the worst step, "
            f"the limit is at most {limits.relative_l2}"
        )
    return problems


def compare_frames(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, float | None]:
    """Distance of two uint8 images or clips, in steps of 0..255; PSNR in dB, against a peak of 255.

    Both have one shape, [frames, height, width, 3] or any other. Raises ShapeError for another
    dtype and for shapes that differ.
    """
    if reference.dtype != torch.uint8 or candidate.dtype != torch.uint8:
        raise ShapeError(f"frames are uint8, found {reference.dtype} and {candidate.dtype}")
    if reference.shape != candidate.shape:
        raise ShapeError(f"frames of {list(reference.shape)} and {list(candidate.shape)} elements")
    difference = candidate.to(torch.float64) - reference.to(torch.float64)
    rms = float(difference.square().mean().sqrt())
    return {
        "psnr_db": _round(_decibels(255.0, rms)),
        "mean_abs": _round(float(difference.abs().mean())),
        "max_abs": float(difference.abs().max()),
    }


def digest_latents(latents: Sequence[torch.Tensor]) -> str:
    """`sha256:...` over dtype, shape and bytes of every step: equal digests are equal bits.

    Steps may have any shape and dtype.
    """
    digest = hashlib.sha256()
    for tensor in latents:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
