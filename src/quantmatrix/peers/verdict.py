"""Verdict: what a runtime's run of a quantized file shows, beside its own run of the base model.

Where the runtime cannot run the base model, our `decode` of the same file takes its place.

| verdict         | meaning |
| --------------- | ------- |
| `works`         | latents (the picture, where there are none) are within the limit of the checkpoint's rows |
| `wrong numbers` | they are not: noise, or scales that were not applied |
| `not quantized` | BF16 was loaded, without a word: the run equals the base model's bit for bit, or no |
|                 | weight in memory is narrower than 16 bits |
| `refuses`       | it ended before the weights were loaded, and meant to (`quantmatrix.peers.failures`); the |
|                 | reason is its own words, first line |
| `crashes`       | it ended afterwards, by an error that nobody meant, died, or exceeded a limit of time, memory or |
|                 | output |
| `not installed` | the runtime, or a part that this file needs, is not there |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantmatrix.peers.protocol import DONE, KILLED, Answer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from quantmatrix.measure.latents import StepMetrics
    from quantmatrix.proof.limits import Limits

NARROW = ("float4", "float8", "uint8", "int8", "uint4", "int4", "float6")
"""Beginnings of the dtypes in which quantized weights are stored."""


@dataclass(frozen=True)
class Verdict:
    """A verdict with what it rests on."""

    verdict: str
    reason: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


def judge_ending(answer: Answer, message: str) -> Verdict | None:
    """The verdict of a run that gave no picture, or None; `message` is the runtime's own."""
    if answer.ending == DONE:
        return None
    if answer.ending == KILLED:
        limit = answer.kind.startswith("the ")
        return Verdict("crashes", f"exceeds {answer.kind}" if limit else f"died: {answer.kind}")
    if answer.kind.startswith("missing "):
        return Verdict("not installed", message.removeprefix("missing "))
    refused = answer.meant and not answer.loaded
    return Verdict("refuses" if refused else "crashes", message)


def judge_numbers(
    reference: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    weights: Mapping[str, int],
    allowed: Limits,
    *,
    decoded: bool = False,
) -> Verdict:
    """The verdict of a run by its latents, a tensor of any shape and dtype per step, or by its picture.

    `weights` are bytes in memory by dtype, empty where the runtime does not tell. `reference` is the
    runtime's BF16 run, or our run of the same file (`decoded`), which may be met bit for bit.
    """
    from quantmatrix.measure import latents

    try:
        steps = latents.compare_trajectories(reference, found)
    except latents.ShapeError as error:
        return Verdict("wrong numbers", str(error))
    metrics = {"worst": latents.find_worst(steps).to_json(), "steps": len(steps)}
    limits = allowed.to_json()
    identical = latents.find_worst(steps).identical
    if identical and not decoded:
        same = "every step equals its BF16 run bit for bit: the quantized weights were not used"
        return Verdict("not quantized", same, metrics, limits)
    if not identical and (why := exceed(steps, allowed)):
        return Verdict("wrong numbers", why, metrics, limits)
    narrow = sum(size for name, size in weights.items() if name.startswith(NARROW))
    if weights and not narrow:
        held = ", ".join(f"{size} bytes of {name}" for name, size in weights.items())
        return Verdict("not quantized", f"in memory are {held}: nothing narrow", metrics, limits)
    return Verdict("works", "", metrics, limits)


def exceed(steps: Sequence[StepMetrics], allowed: Limits) -> str:
    """What a trajectory violates, as text, or nothing."""
    from quantmatrix.measure import latents

    return "; ".join(latents.judge(steps, allowed))


def read_picture(path: str) -> torch.Tensor:
    """The pixels of a picture, float32 [height, width, 3] in -1..1, a trajectory of one step."""
    import numpy
    import torch
    from PIL import Image

    with Image.open(path) as picture:
        pixels = numpy.array(picture.convert("RGB"), dtype=numpy.float32)
    return torch.from_numpy(pixels) / 127.5 - 1.0
