"""Spread: how far a base model's BF16 run is from its FP32 run, with the same seed and size.

Two runs of the tiny stand-in on the CPU, all components in one dtype each. BF16 rounds the initial
noise, too, as it does in every run. What is kept are the metrics of the worst step, and of all linear
layers of the transformers the largest error against FP32 on the inputs that they get: `limits` never
asks a quantized run to be nearer to BF16 than BF16 is to FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from quantmatrix import api, models
from quantmatrix.checkpoints.opening import fetch
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.hardware import probe
from quantmatrix.measure.latents import compare_trajectories, find_worst
from quantmatrix.measure.layers import LayerErrors, make_hook
from quantmatrix.proof import record as records
from quantmatrix.proof.limit_samples import Spread
from quantmatrix.request import Request
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.media import stack_frames
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.run import Run
from quantmatrix.tables.rows import Matrix
from quantmatrix.tiny.hub import PLACEHOLDER
from quantmatrix.tiny.pictures import give_pictures

PROMPT = "a curious pikachu"


def measure_all(tables: Matrix, say: Callable[[str], None]) -> dict[str, Spread]:
    """The spread of every model of the tables, by model."""
    found = {}
    for name, row in tables.models.items():
        say(f"{name}: BF16 against FP32")
        found[name] = measure(name, row.repo)
    return found


def measure(model: str, repository: str) -> Spread:
    """The spread of a model, by its stand-in on this machine's CPU."""
    request = Request(
        model_path=repository,
        tiny=True,
        device="cpu",
        prompt=(PROMPT,),
        dtype="bfloat16",
        **give_pictures(models.load(model), PLACEHOLDER),
    )
    exact = api.generate(replace(request, dtype="float32"))
    plan = api.require_plan(request)
    pipeline = build_pipeline(plan)
    with watch_linear(pipeline, plan) as errors:
        run = generate(request, plan=plan, pipeline=pipeline)
    return describe(model, exact, run, errors)


def describe(model: str, exact: Run, run: Run, errors: LayerErrors) -> Spread:
    """The numbers of two runs, with six digits as evidence keeps them."""
    worst = find_worst(compare_trajectories(exact.latents, run.latents))
    layers = {f"{c}.{n}": error for c, found in errors.found.items() for n, error in found.items()}
    layer = max(layers, key=lambda name: layers[name])
    return Spread(
        model=model,
        psnr_db=round_number(worst.psnr_db),
        cosine=round_number(worst.cosine),
        relative_l2=round_number(worst.relative_l2),
        layer_error=round_number(layers[layer]),
        layer=layer,
        layers=len(layers),
        steps=len(run.latents),
        size="x".join(map(str, stack_frames(run.media).shape[:3])),
        torch=records.list_versions(["torch"])["torch"],
        processor=str(probe.fingerprint()["processor"]),
        commit=records.find_commit(),
        made=records.tell_time(),
    )


def round_number(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")


@contextmanager
def watch_linear(pipeline: Any, plan: Plan) -> Iterator[LayerErrors]:
    """Measure every linear layer of the transformers that is called inside the with block."""
    errors = LayerErrors()
    with ExitStack() as stack:
        for name, part in plan.components.items():
            checkpoint = fetch(part.checkpoint, plan.request.hub)
            reader = stack.enter_context(TensorReader(checkpoint, "cpu"))
            found = errors.found.setdefault(name, {})
            for module, layer in getattr(pipeline, name).named_modules():
                if isinstance(layer, nn.Linear):
                    hook = make_hook(module, reader, checkpoint.tensors, found)
                    stack.callback(layer.register_forward_hook(hook).remove)
        yield errors
