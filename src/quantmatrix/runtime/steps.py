"""Steps: the latents after every denoising step of a pipeline, whichever way it tells of them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

CALLBACK = "callback_on_step_end"


@dataclass
class Steps:
    """What was seen of the steps of one generation."""

    latents: list[torch.Tensor] = field(default_factory=list)
    """After each step, on the CPU, in the dtype of the pipeline."""
    marks: list[float] = field(default_factory=list)
    """When each step ended, seconds of `time.perf_counter`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the pipeline's call is given so that they are seen."""

    def keep(self, latents: torch.Tensor) -> None:
        """Note the latents [batch, ...] of a step, of any float dtype."""
        self.latents.append(latents.detach().to("cpu", copy=True))
        self.marks.append(time.perf_counter())

    def call_back(
        self, _: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """What a pipeline calls after a step, with the tensors that it was asked for."""
        self.keep(tensors["latents"])
        return tensors


@contextmanager
def watched_steps(pipeline: Any) -> Iterator[Steps]:
    """Watch a pipeline's steps: by its callback, or by its scheduler where the call has none."""
    steps = Steps()
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    if any(one.name == CALLBACK or one.kind is one.VAR_KEYWORD for one in parameters):
        steps.arguments = {CALLBACK: steps.call_back, f"{CALLBACK}_tensor_inputs": ["latents"]}
        yield steps
        return
    step = pipeline.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        steps.keep(result[0])
        return result

    pipeline.scheduler.step = watched
    try:
        yield steps
    finally:
        del pipeline.scheduler.step
