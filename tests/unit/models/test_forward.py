"""How a model's transformer is called, held against diffusers' own pipeline of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from quantmatrix import load_pipeline, models
from quantmatrix.measure.bench.speed import flatten_output
from quantmatrix.measure.bench.synthetic import make_inputs
from quantmatrix.measure.true_size import set_moment
from quantmatrix.request import Request
from quantmatrix.runtime.empty_model import build_plain

WITHOUT_CFG: Mapping[str, float] = {"z-image": 0.0, "qwen-image": 1.0, "wan-2-2": 1.0}
"""Guidance at which a pipeline calls its transformer once a step and hands its answer on."""


class Watched:
    """The first step of a tiny pipeline: what its transformer took and gave, what its scheduler got."""

    def __init__(self, model: str) -> None:
        module = models.load(model)
        request = Request(
            model_path=module.REPO, tiny=True, device="cpu", num_inference_steps=2,
            guidance_scale=WITHOUT_CFG.get(model), height=64, width=64,
        )  # fmt: skip
        pipeline = load_pipeline(request)
        self.transformer, self.calls, self.steps = pipeline.transformer, [], []
        forward, step = pipeline.transformer.forward, pipeline.scheduler.step

        def watch_forward(*args: Any, **named: Any) -> Any:
            answer = forward(*args, **named)
            taken = inspect.signature(forward).bind(*args, **named).arguments
            self.calls.append((taken, flatten_output(answer)))
            return answer

        def watch_step(guess: torch.Tensor, moment: torch.Tensor, *rest: Any, **named: Any) -> Any:
            self.steps.append((guess, moment))
            return step(guess, moment, *rest, **named)

        pipeline.transformer.forward, pipeline.scheduler.step = watch_forward, watch_step
        arguments = module.call_arguments(request)
        pipeline(prompt="a fox", output_type="latent", generator=torch.manual_seed(0), **arguments)
        pipeline.transformer.forward = forward


@pytest.fixture(scope="module", params=models.IDS)
def watched(request: pytest.FixtureRequest) -> tuple[str, Watched]:
    return request.param, Watched(request.param)


def test_a_timestep_is_passed_as_the_pipeline_passes_it(watched: tuple[str, Watched]) -> None:
    model, seen = watched
    step, inputs = (
        models.load(model).STEP,
        make_inputs(model, seen.transformer, "cpu", torch.float32),
    )
    for (taken, _), (_, moment) in zip(seen.calls, seen.steps, strict=True):
        passed, _ = set_moment(step, inputs, moment)
        ours, theirs = passed[step.time].float(), taken[step.time].flatten()[:1].float()
        assert torch.allclose(ours, theirs, rtol=2**-7), (ours, theirs)
        assert isinstance(taken[step.latents], list) == step.listed


def test_the_scheduler_takes_the_answer_with_its_sign(watched: tuple[str, Watched]) -> None:
    model, seen = watched
    sign = models.load(model).STEP.sign
    for (_, answer), (guess, _) in zip(seen.calls, seen.steps, strict=True):
        assert answer.abs().max() > 0
        assert torch.allclose(sign * answer.float().flatten(), guess.float().flatten(), rtol=2**-7)


def test_a_forward_takes_our_inputs_and_places_pictures_as_the_pipeline_does(
    watched: tuple[str, Watched],
) -> None:
    model, seen = watched
    ours = make_inputs(model, seen.transformer, "cpu", torch.bfloat16, size="tiny")
    assert ours.keys() <= inspect.signature(seen.transformer.forward).parameters.keys()
    theirs, _ = seen.calls[0]
    if "img_ids" in ours:
        assert torch.equal(ours["img_ids"], theirs["img_ids"].float().view(ours["img_ids"].shape))


def test_the_published_flux_1_embeds_its_guidance() -> None:
    """Its class defaults to the model without (FLUX.1-schnell)."""
    assert build_plain("flux-1", "blocks").config.guidance_embeds
