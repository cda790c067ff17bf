"""Two sides of a comparison: saved runs, or checkpoints that are run here, one after the other.

A side is named by

| argument | meaning |
| ---- | ------- |
| a file of `saved_runs` | the trajectory in it |
| the value of `--model-path`, or another pipeline | that model, as it is |
| a weight file, folder or hub id | its transformer on `--model-path` |
| any of them `@BACKEND` | by this backend: `X@reference` against `X@decode` |

Everything else (prompt, seed, size, steps) is shared by both sides. Limits bound the worst step, as
everywhere; the final latents and the picture are reported beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantmatrix import kernels
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.checkpoints.opening import enter_component
from quantmatrix.errors import UsageError
from quantmatrix.measure.latents import StepMetrics, compare_trajectories, find_worst, summarize
from quantmatrix.measure.pictures import measure_frames
from quantmatrix.measure.saved_runs import SavedRun, from_run, is_saved_run, read
from quantmatrix.request import Request
from quantmatrix.tiny.hub import open_tiny_hub


@dataclass(frozen=True)
class Bounds:
    """What a comparison may be at its worst; None is not asked for."""

    min_psnr: float | None = None
    max_rel_l2: float | None = None
    min_cosine: float | None = None
    min_image_psnr: float | None = None
    min_ssim: float | None = None


def read_side(side: str, request: Request) -> SavedRun:
    """The trajectory of one side, computed here unless it is a saved run."""
    if is_saved_run(Path(side)):
        return read(Path(side))
    from quantmatrix.api import generate

    return from_run(generate(make_request(side, request)), side)


def make_request(side: str, request: Request) -> Request:
    """The request of a side that has to be run.

    Raises UsageError without a base model, and where flags and the side name a transformer twice.
    """
    reference, backend = split_backend(side)
    if backend:
        request = replace(request, backend=backend)
    if not request.model_path:
        raise UsageError(f"{side} is not a saved run: name its base model with --model-path")
    if reference == request.model_path:
        return request
    given = {**request.component_paths, **request.weights_paths}
    if any(name.startswith("transformer") for name in given):
        raise UsageError(f"{side} and --transformer-path or -weights-path: name each side once")
    hub = open_tiny_hub([reference]) if request.tiny else request.hub
    folder, name = open_folder(reference, hub)
    if not name and folder.has("model_index.json"):
        return replace(request, model_path=reference)
    if name or not enter_component(folder, "").has("config.json"):
        weights = {**request.weights_paths, "transformer": reference}
        return replace(request, weights_paths=weights)
    components = {**request.component_paths, "transformer": reference}
    return replace(request, component_paths=components)


def split_backend(side: str) -> tuple[str, str | None]:
    """(`X`, backend) of `X@backend`; UsageError for a backend that nothing is computed by."""
    reference, mark, backend = side.rpartition("@")
    if not mark or Path(side).exists():
        return side, None
    known = sorted({name for op in kernels.OPS for name in kernels.backends_of(op)})
    if backend not in known:
        raise UsageError(f"{side}: {backend} is not a backend; known: {', '.join(known)}")
    return reference, backend


def compare_sides(reference: SavedRun, candidate: SavedRun, bounds: Bounds) -> dict[str, Any]:
    """Plain data: distances, both sides as text, and `problems`: what is out of bounds."""
    steps = compare_trajectories(reference.latents, candidate.latents)
    media = None
    if reference.frames is not None and candidate.frames is not None:
        media = measure_frames(reference.frames, candidate.frames)
    problems = judge(find_worst(steps), media, bounds)
    return {
        "ok": not problems,
        "problems": problems,
        "reference": {**reference.about, "name": reference.name},
        "candidate": {**candidate.about, "name": candidate.name},
        "latents": {**summarize(steps), "identical": find_worst(steps).identical},
        "media": media,
        "limits": {name: value for name, value in vars(bounds).items() if value is not None},
    }


def judge(worst: StepMetrics, media: Mapping[str, Any] | None, bounds: Bounds) -> list[str]:
    """What is out of bounds, as text; PSNR is in dB.

    Raises UsageError for a bound on pictures where a side has none.
    """
    if worst.nonfinite:
        return [f"{worst.nonfinite} elements of the latents are NaN or infinite"]
    image = media or {}
    image_psnr = math.inf if media and image["psnr_db"] is None else image.get("psnr_db")
    at_least = (
        ("PSNR of the latents at the worst step", worst.psnr_db, bounds.min_psnr, "--min-psnr"),
        ("cosine at the worst step", worst.cosine, bounds.min_cosine, "--min-cosine"),
        ("PSNR of the picture", image_psnr, bounds.min_image_psnr, "--min-image-psnr"),
        ("SSIM of the picture", image.get("ssim"), bounds.min_ssim, "--min-ssim"),
    )
    problems = []
    for what, value, bound, flag in at_least:
        if bound is None:
            continue
        if value is None:
            raise UsageError(f"{flag}: a side has no frames; save it with `generate`")
        if not value >= bound:
            problems.append(f"{what} is {value:.6g}, {flag} is {bound:g}")
    if bounds.max_rel_l2 is not None and not worst.relative_l2 <= bounds.max_rel_l2:
        problems.append(
            f"relative L2 at the worst step is {worst.relative_l2:.6g}, "
            f"--max-rel-l2 is {bounds.max_rel_l2:g}"
        )
    return problems
