"""Steps of a pipeline are seen by its callback, or by its scheduler where the call has none."""

from __future__ import annotations

from typing import Any

import torch

from quantmatrix.runtime.steps import watched_steps


class Scheduler:
    def step(self, output: torch.Tensor, time: int, sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (sample + output,)


class Telling:
    """Calls back with other latents than those of its scheduler."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()

    def __call__(
        self, callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: Any = None
    ) -> None:
        latents = torch.zeros(1, 2)
        for step in range(3):
            [latents] = self.scheduler.step(torch.ones(1, 2), step, latents)
            given = dict.fromkeys(callback_on_step_end_tensor_inputs, latents * 10)
            latents = callback_on_step_end(self, step, step, given)["latents"] / 10


class Silent:
    def __init__(self) -> None:
        self.scheduler = Scheduler()

    def __call__(self) -> None:
        latents = torch.zeros(1, 2)
        for step in range(3):
            [latents] = self.scheduler.step(torch.ones(1, 2), step, latents)


def test_a_callback_is_given_where_the_call_takes_one() -> None:
    pipeline = Telling()
    with watched_steps(pipeline) as steps:
        pipeline(**steps.arguments)
    assert [float(one[0, 0]) for one in steps.latents] == [10.0, 20.0, 30.0]
    assert len(steps.marks) == 3


def test_the_scheduler_is_watched_where_it_does_not_and_is_itself_again() -> None:
    pipeline = Silent()
    with watched_steps(pipeline) as steps:
        assert steps.arguments == {}
        pipeline(**steps.arguments)
    assert [float(one[0, 0]) for one in steps.latents] == [1.0, 2.0, 3.0]
    assert "step" not in vars(pipeline.scheduler)
    pipeline()
    assert len(steps.latents) == 3
