"""Run: generate with a planned pipeline, and keep what proves it.

The latents of every denoising step are kept, the seconds of every stage and step, the peak memory,
and the census of quantized layers that stood in the model. Same seed, same machine, same bits: the
noise comes from a fresh CPU generator for every image.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import distributed

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.quoting import quote
from quantmatrix.request import Request
from quantmatrix.runtime import peer_memory
from quantmatrix.runtime.load import count_quantized
from quantmatrix.runtime.media import find_degeneration, stack_frames
from quantmatrix.runtime.pictures import call_arguments
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.run import Run
from quantmatrix.runtime.steps import watched_steps

STAGE = "stage|"
"""What the names of stages begin with in a profiler's trace."""


def generate(
    request: Request,
    *,
    plan: Plan,
    pipeline: Any = None,
    progress: bool = False,
) -> Run:
    """Generate for the first prompt and seed of a request; see `generate_all` for every one.

    Raises what `generate_all` raises: UsageError, CheckpointError, WitnessError and BrokenRunError.
    """
    return next(iter(generate_all(request, plan=plan, pipeline=pipeline, progress=progress)))


def generate_all(
    request: Request,
    *,
    plan: Plan,
    pipeline: Any = None,
    progress: bool = False,
    save: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Generate for every prompt and seed of a request, calling `save` after each.

    `plan` is the request's plan, `pipeline` what was built of it; it is built where there is none.
    Raises UsageError for a flag that the model does not take and for a plan of several processes
    outside of them, CheckpointError and WitnessError for weights that cannot be loaded, and
    BrokenRunError for latents that are not finite.
    """
    if plan.processes > 1 and not distributed.is_initialized():
        raise UsageError(
            f"the plan has {plan.processes} processes, this is one of none: "
            "see `quantmatrix.runtime.parallel.generate_together`"
        )
    model = models.load(plan.model)
    request = replace(request, hub=plan.request.hub)
    call_arguments(model, request)  # a wrong flag is an error before the loading
    seconds = {}
    if pipeline is None:
        start = time.perf_counter()
        pipeline = build_pipeline(plan, progress=progress)
        seconds["load"] = time.perf_counter() - start
    runs = []
    for prompt in request.prompt:
        for seed in request.seed:
            run = generate_one(request, plan, pipeline, prompt, seed)
            run.seconds.update(seconds)
            seconds = {}
            if save is not None:
                save(run)
            runs.append(run)
    return runs


def generate_one(request: Request, plan: Plan, pipeline: Any, prompt: str, seed: int) -> Run:
    """One prompt, one seed."""
    model = models.load(plan.model)
    calls: Counter[str] = Counter()
    handles = [
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name in plan.components
    ]

    arguments = call_arguments(model, request)
    defaults = model.TINY_DEFAULTS if request.tiny else model.DEFAULTS
    reset_peak(plan.machine.device)
    stages: dict[str, float] = {}
    start = time.perf_counter()
    try:
        with (
            torch.no_grad(),
            timed_stages(pipeline, stages),
            watched_steps(pipeline) as steps,
            readable_call(plan, steps.latents),
        ):
            result = pipeline(
                prompt=prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                **steps.arguments,
                output_type="pil",
                **arguments,
            )
    finally:
        for handle in handles:
            handle.remove()
    total = time.perf_counter() - start
    is_video = hasattr(result, "frames")
    media = list(result.frames[0] if is_video else result.images)
    return Run(
        plan=plan,
        prompt=prompt,
        seed=seed,
        latents=steps.latents,
        media=media,
        is_video=is_video,
        fps=defaults.fps,
        seconds={
            **stages,
            "denoise": total - sum(stages.values()),
            "generate": total,
        },
        step_seconds=[after - before for before, after in pairwise(steps.marks)],
        peak_bytes=read_peak(plan.machine.device),
        census=take_census(pipeline, plan.components),
        encoders=take_census(pipeline, plan.encoders),
        calls=dict(calls),
        witness=read_reports(pipeline, plan),
        degenerate=find_degeneration(stack_frames(media)),
    )


def take_census(pipeline: Any, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Quantized layers that stand in components of a pipeline, per backend."""
    return {
        name: dict(Counter(count_quantized(getattr(pipeline, name)).values())) for name in names
    }


def read_reports(pipeline: Any, plan: Plan) -> dict[str, Any]:
    """What the witness found when the components of a pipeline were loaded, as plain data."""
    found = {
        name: getattr(getattr(pipeline, name), "witness", None)
        for name in (*plan.components, *plan.encoders)
    }
    return {name: report.to_json() for name, report in found.items() if report is not None}


@contextmanager
def timed_stages(pipeline: Any, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of text encoding and of decoding while a pipeline runs."""

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                with torch.profiler.record_function(f"{STAGE}{stage}"):
                    return function(*args, **kwargs)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

        return call

    owners = ((pipeline, "encode_prompt", "encode"), (find_vae(pipeline), "decode", "decode"))
    there = [(owner, name, stage) for owner, name, stage in owners if hasattr(owner, name)]
    for owner, name, stage in there:
        setattr(owner, name, timed(stage, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, _ in there:
            delattr(owner, name)


def find_vae(pipeline: Any) -> Any:
    """The part of a pipeline that turns latents into pictures, or None; some call it otherwise."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


@contextmanager
def readable_call(plan: Plan, latents: Sequence[Any]) -> Iterator[None]:
    """What a pipeline without a model file says of its arguments, before a step, as UsageError.

    Such a pipeline may want what no flag gives, or a picture, although its signature has a default for
    it. `latents` are those of the steps taken.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if latents or "/" not in plan.model:
            raise
        raise UsageError(
            f"{plan.pipeline_class} did not take its arguments ({type(error).__name__}: "
            f"{quote(str(error))}): flags give it a prompt, pictures, sizes, steps and guidance; it may "
            "want a picture (--image-path), or what no flag gives"
        ) from error


def reset_peak(device: str) -> None:
    """Start a new peak-memory measurement where the device has a counter."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def read_peak(device: str) -> int:
    """Peak memory in bytes (accelerator counter, else the process's largest resident size)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) + peer_memory.count_bytes()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
