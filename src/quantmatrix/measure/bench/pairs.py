"""Bench sources: what can be benchmarked, opened as pairs of transformers.

A *request* (the flags of `generate`, or a cell of the matrix) loads its components and those of the
base model; the base pipeline runs until it calls its transformer for the first time, and what it
passes is what both forms get. A *synthetic* form has random weights at the model's true or tiny size
and needs no files, so its loading is not timed.

Both forms of a component are in memory together, one component after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantmatrix.api import require_plan
from quantmatrix.errors import MachineError, UsageError
from quantmatrix.hardware import probe
from quantmatrix.measure.bench.speed import count_backends
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.measure.bench.timing import Part, Say, choose_clock, measure_part
from quantmatrix.proof import bench_results
from quantmatrix.proof import record as records
from quantmatrix.proof.bench_results import SCHEMA
from quantmatrix.proof.ratios import CONFIDENCE, POWER
from quantmatrix.request import Request, strip_quantization
from quantmatrix.runtime import acceleration
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import ComponentPlan, Plan

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.tables.rows import Cell

Watch = Callable[[Part], None]
UNNAMED = ("hub", "device", "hardware")
"""Fields of a request that are not part of what is measured; the device has a key of its own."""


class FirstCall(Exception):
    """Ends a generation at the first call of a transformer; holds what was passed."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("the transformer was called")
        self.passed_args = args
        self.passed_kwargs = kwargs


def bench_cell(
    workbench: Workbench,
    cell: Cell,
    repeats: int,
    say: Say = lambda _: None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The result of one cell of the matrix on this machine."""
    request = workbench.request(cell)
    base = workbench.tables.models[cell.model].repo
    result = bench_request(request, base, repeats, say, watch)
    command = f"quantmatrix bench --row {cell.id}{' --tiny' if workbench.tiny else ''}"
    signed = bench_results.sign(
        records.describe_cell(cell, workbench.tables), result, workbench.tables
    )
    return {"what": cell.id, "cell": signed, "command": command, **result}


def bench_request(
    request: Request, base: str, repeats: int, say: Say = lambda _: None, watch: Watch | None = None
) -> dict[str, Any]:
    """The result of a request, without what names it; `base` is the model in full precision.

    Raises RefusedError where the plan refuses, UsageError where there is nothing to compare or a
    flag offloads, and MachineError where the device cannot hold both forms.
    """
    if request.dit_layerwise_offload or request.dit_cpu_offload:
        raise UsageError(
            "bench measures transformers that lie on their device: leave out the offload flags"
        )
    plan = require_plan(request)
    plain = require_plan(strip_quantization(request, base))
    say("inputs")
    args, kwargs = capture_inputs(plain)
    release()
    measured = {}
    try:
        for part in open_parts(plan, plain, args, kwargs):
            measured[part.name] = measure_part(part, repeats, say)
            if watch is not None:
                watch(part)
            del part
            release()
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{plan.machine.name} cannot hold BF16 and the quantized form together, which timing them "
            f"in turn needs: {str(error).partition('.')[0]}; try a smaller --height and --width"
        ) from error
    backends = {name: plan.components[name].backends for name in measured}
    size = "tiny" if request.tiny else "full"
    return {"size": size, "backends": backends, **describe(measured, plan.machine, repeats)}


def open_parts(
    plan: Plan, plain: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Part]:
    """Each component that has quantized layers, in both forms; raises UsageError where none has."""
    if not any(component.layers for component in plan.components.values()):
        raise UsageError(
            f"{plan.request.model_path}: no transformer component is quantized, so there is nothing "
            "to compare with BF16; name a checkpoint with --transformer-path"
        )
    for name, component in plan.components.items():
        if not component.layers:
            continue
        load = {
            "bf16": make_loader(plain.components[name], plain),
            "quantized": make_loader(component, plan),
        }
        yield Part(
            name=name,
            device=plan.machine.device,
            bf16=load["bf16"](),
            quantized=load["quantized"](),
            args=args,
            kwargs=kwargs,
            load=load,
            finish=make_finish(plan.request),
        )


def make_loader(component: ComponentPlan, plan: Plan) -> Callable[[], nn.Module]:
    """A call that loads one component again."""
    return lambda: load_component(component, plan.request, device=plan.machine.device)


def make_finish(request: Request) -> Callable[[nn.Module], None]:
    """`--compile` and `--cuda-graph` as they are applied to both forms."""

    def finish(module: nn.Module) -> None:
        if request.compile:
            acceleration.compile_blocks(module)
        if request.cuda_graph:
            acceleration.graph_forward(module)

    return finish


def capture_inputs(plain: Plan) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the base pipeline passes to its transformer in the first step: (args, kwargs).

    Raises UsageError where a generation never calls it.
    """

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise FirstCall(args, kwargs)

    pipeline = build_pipeline(plain)
    for name in plain.components:
        getattr(pipeline, name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        generate(plain.request, plan=plain, pipeline=pipeline)
    except FirstCall as call:
        return call.passed_args, call.passed_kwargs
    raise UsageError(f"{plain.base}: a generation never called its transformer")


def release() -> None:
    """Give back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench_synthetic(
    model: str,
    machine: Machine,
    *,
    family: str,
    scheme: str,
    size: str,
    backend: str | None,
    repeats: int,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """The result of a form with random weights, without what names it."""
    say("random weights")
    plain = synthesize(model, machine, size=size)
    quantized = synthesize(model, machine, family=family, scheme=scheme, backend=backend, size=size)
    inputs = make_inputs(model, plain, machine.device, torch.bfloat16, size=size)
    part = Part("transformer", machine.device, plain, quantized, (), inputs)
    measured = {part.name: measure_part(part, repeats, say)}
    return {
        "size": size,
        "backends": {part.name: count_backends(quantized)},
        **describe(measured, machine, repeats),
    }


def describe(measured: dict[str, Any], machine: Machine, repeats: int) -> dict[str, Any]:
    """What every result says beside its numbers."""
    return {
        "schema": SCHEMA,
        "device": name_device(machine),
        "settings": {
            "repeats": repeats,
            "confidence": CONFIDENCE,
            "power": POWER,
            "clock": choose_clock(machine.device)[1],
        },
        "components": measured,
        "machine": probe.fingerprint(),
        "commit": records.find_commit(),
        "made": records.tell_time(),
    }


def name_device(machine: Machine) -> str:
    """The device's name; of a CPU its model and the threads that take part."""
    if machine.vendor != "cpu":
        return machine.name
    threads = torch.get_num_threads()
    return f"{probe.read_processor()}, {threads} thread{'s' * (threads > 1)}"


def name_request(request: Request) -> str:
    """A request as text that is equal for equal requests: every field that is not as usual."""
    usual = Request()
    settings = {
        field.name: getattr(request, field.name)
        for field in fields(Request)
        if field.name not in UNNAMED and getattr(request, field.name) != getattr(usual, field.name)
    }
    return ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))
