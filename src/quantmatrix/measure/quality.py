"""Quality: how far two pictures look apart, by metrics that need no network and no download.

| metric    | definition | equal |
| --------- | ---------- | ----- |
| `ms_ssim` | Wang, Simoncelli, Bovik 2003: contrast and structure at five scales, SSIM at the | 1 |
|           | last, each to its power; a scale is the mean of 2 x 2 pixels of the one before | |
| `flip`    | Andersson et al. 2020: mean difference that is seen when the pictures alternate, at | 0 |
|           | 67 pixels per degree, from 0 to 1; it needs the package `flip-evaluator` | |

A metric that cannot be had is null, and `missing` says why: it is never a number of another metric. Of a
clip it is the mean over frames. `psnr_db` and `ssim` are those of `pictures`; `lpips`, `clip` and `clip_bf16`,
which are optional, those of `networks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from quantmatrix.measure.latents import ShapeError
from quantmatrix.measure.networks import SMALLEST as SMALLEST_LPIPS
from quantmatrix.measure.pictures import C1, C2, WINDOW, smooth
from quantmatrix.runtime.media import stack_frames

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quantmatrix.measure.networks import Networks

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Powers of the scales, the finest first."""
SMALLEST = WINDOW * 2 ** (len(SCALES) - 1)
"""Pixels of a side for which the window lies inside the picture at the last scale."""
BETTER = {
    "psnr_db": max, "ssim": max, "ms_ssim": max, "flip": min, "lpips": min, "clip": max, "clip_bf16": max,
}  # fmt: skip
"""Whether more or less of a metric is better."""
NEEDS_FLIP = "the package flip-evaluator is not installed: pip install 'quantmatrix[quality]'"


def measure_quality(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    networks: Networks | None = None,
    prompt: str = "",
) -> dict[str, Any]:
    """`ms_ssim`, `flip` and `missing` of two lists of PIL images or arrays, and what `networks` measure.

    Raises ShapeError for lists of different shapes.
    """
    ours, theirs = stack_frames(reference), stack_frames(candidate)
    if ours.shape != theirs.shape:
        raise ShapeError(
            f"frames of {list(ours.shape)} and {list(theirs.shape)}: expected one shape"
        )
    found: dict[str, Any] = {"missing": {}}
    pairs = list(zip(ours, theirs, strict=True))
    if min(ours.shape[1:3]) < SMALLEST:
        height, width = ours.shape[1:3]
        why = f"pictures of {width} x {height} pixels, five scales need {SMALLEST} x {SMALLEST}"
        found |= {"ms_ssim": None, "missing": {"ms_ssim": why}}
    else:
        found["ms_ssim"] = take_mean([compute_ms_ssim(r, c) for r, c in pairs])
    if not has_flip():
        found |= {"flip": None, "missing": {**found["missing"], "flip": NEEDS_FLIP}}
    else:
        found["flip"] = take_mean([float(draw_flip(r, c).mean()) for r, c in pairs])
    return {**found, **measure_networks(pairs, networks, prompt, found)} if networks else found


def measure_networks(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    networks: Networks,
    prompt: str,
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """`lpips`, `clip` and `clip_bf16` of (reference, candidate) frames, and `missing` with what they lack.

    Frames are as `stack_frames` gives them: uint8 [H, W, 3].
    """
    missing = {**found["missing"], **networks.missing}
    measured: dict[str, Any] = dict.fromkeys(("lpips", "clip", "clip_bf16"))
    height, width = pairs[0][0].shape[:2]
    if networks.lpips and min(height, width) < SMALLEST_LPIPS:
        missing["lpips"] = f"pictures of {width} x {height} pixels, AlexNet needs {SMALLEST_LPIPS}"
    elif networks.lpips:
        measured["lpips"] = take_mean([networks.lpips(r, c) for r, c in pairs])
    if networks.clip:
        measured["clip"] = take_mean([networks.clip(c, prompt) for _, c in pairs])
        measured["clip_bf16"] = take_mean([networks.clip(r, prompt) for r, _ in pairs])
    return {**measured, "missing": missing}


def take_mean(values: Sequence[float]) -> float:
    """The mean, with six digits."""
    return float(f"{sum(values) / len(values):.6g}")


def compute_ms_ssim(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """MS-SSIM of two uint8 pictures [height, width, channels] of one shape, at least 176 pixels a side.

    Raises ShapeError for smaller ones.
    """
    if min(reference.shape[:2]) < SMALLEST:
        raise ShapeError(f"{list(reference.shape)}: MS-SSIM needs {SMALLEST} x {SMALLEST} pixels")
    planes = [x.to("cpu", torch.float64).permute(2, 0, 1) for x in (reference, candidate)]
    product = torch.ones(reference.shape[2], dtype=torch.float64)
    for number, power in enumerate(SCALES):
        whole, contrast = compare_scale(*planes)
        part = whole if number == len(SCALES) - 1 else contrast
        product *= part.clamp(min=0) ** power
        planes = [functional.avg_pool2d(x[None], 2)[0] for x in planes]
    return float(product.mean())


def compare_scale(r: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(SSIM, its contrast and structure alone) per channel of float64 planes [channels, height, width]."""
    mean_r, mean_c, square_r, square_c, product = smooth(torch.stack([r, c, r * r, c * c, r * c]))
    variances = square_r - mean_r**2 + square_c - mean_c**2
    contrast = (2 * (product - mean_r * mean_c) + C2) / (variances + C2)
    light = (2 * mean_r * mean_c + C1) / (mean_r**2 + mean_c**2 + C1)
    return (light * contrast).mean((1, 2)), contrast.mean((1, 2))


def has_flip() -> bool:
    """Whether `flip-evaluator` is installed."""
    from importlib.util import find_spec

    return find_spec("flip_evaluator") is not None


def draw_flip(
    reference: torch.Tensor, candidate: torch.Tensor, *, colour: bool = False
) -> NDArray[np.float32]:
    """The map of FLIP, float32 [height, width, 1] of 0..1, of two uint8 pictures [height, width, 3].

    With `colour` it is [height, width, 3] in the colours of magma: black is equal. Raises ImportError
    without the package.
    """
    import flip_evaluator

    ours, theirs = ((x.to("cpu", torch.float32) / 255).numpy() for x in (reference, candidate))
    found: NDArray[np.float32] = flip_evaluator.evaluate(ours, theirs, "LDR", applyMagma=colour)[0]
    return found


def summarize_quality(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the runs of a report: mean and worst of every metric, whose worst it is, and what is missing.

    Infinite PSNR (null) is left out of the mean and is never the worst; a metric that no run has is null.
    """
    found: dict[str, Any] = {"missing": {}}
    for run in runs:
        found["missing"] |= run["quality"]["missing"]
    for name, better in BETTER.items():
        values = [read_metric(run, name) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            found[name] = None
            continue
        worst = (min if better is max else max)(known)
        run = runs[values.index(worst)]
        mean = float(f"{sum(known) / len(known):.6g}")
        found[name] = {"mean": mean, "worst": worst, "prompt": run["prompt"], "seed": run["seed"]}
    return found


def read_metric(run: Mapping[str, Any], name: str) -> float | None:
    """A metric of a run of a report, or None."""
    value: float | None = {**run["media"], **run["quality"]}.get(name)
    return value
