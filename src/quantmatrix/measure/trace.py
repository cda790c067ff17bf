"""Trace: a profiled run as a Chrome trace, with named stages and a census of its quantized layers.

`quantmatrix.measure.trace_census` says what the named ranges are, and what is read from them. The trace is
gzipped JSON for any viewer of Chrome traces. Ranges stand in the trace of an ordinary run only:
compiled blocks and CUDA graphs do not call the layers one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from quantmatrix.api import require_plan
from quantmatrix.errors import UsageError
from quantmatrix.files import whole
from quantmatrix.measure.trace_census import LAYER, Census, take_census
from quantmatrix.measure.trace_events import read_events
from quantmatrix.request import Request
from quantmatrix.runtime.generate import STAGE, generate
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.quantized_linear import QuantizedLinear

ENDING = ".json.gz"


def trace(request: Request, path: Path) -> Census:
    """Profile one generation of a request into a gzipped Chrome trace.

    Raises UsageError for another ending than `.json.gz`, RefusedError where the plan is a refusal.
    """
    if not path.name.endswith(ENDING):
        raise UsageError(f"--output-path {path}: expected a file ending in {ENDING}")
    plan = require_plan(request)
    refuse_acceleration(request)
    return trace_pipeline(request, plan, build_pipeline(plan), path)


def refuse_acceleration(request: Request) -> None:
    """Raise UsageError for runs that do not call the layers one by one."""
    for flag, given in (("--compile", request.compile), ("--cuda-graph", request.cuda_graph)):
        if given:
            raise UsageError(f"{flag}: a trace names the layers of an ordinary run; leave it out")


def trace_pipeline(request: Request, plan: Plan, pipeline: Any, path: Path | None = None) -> Census:
    """Profile one generation with the pipeline of a plan; the trace is written where `path` is.

    Of a plan for several processes only this one is there: it generates alone.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if plan.machine.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    with named_ranges(pipeline, plan), profiler:
        generate(request, plan=replace(plan, processes=1), pipeline=pipeline)
    census = take_census(list_events(profiler, activities), plan)
    if path is not None:
        write_trace(profiler, path)
    return census


def list_events(profiler: Any, activities: Collection[Any]) -> list[Any]:
    """What a census needs of a profile's events; all of them where a device took part."""
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None or len(activities) > 1:
        return list(profiler.events() or [])
    return list(read_events(results.events(), STAGE, LAYER))


@contextmanager
def named_ranges(pipeline: Any, plan: Plan) -> Iterator[None]:
    """Name the forwards of a pipeline's transformers and of quantized layers, text encoders' too,
    meanwhile."""
    with ExitStack() as stack:
        for component in plan.components:
            stack.enter_context(name_calls(getattr(pipeline, component), f"{STAGE}{component}"))
        for component in (*plan.components, *plan.encoders):
            for name, module in getattr(pipeline, component).named_modules():
                if isinstance(module, QuantizedLinear):
                    label = f"{LAYER}{component}|{name}|{module.kernel.backend}"
                    stack.enter_context(name_calls(module, label))
        yield


@contextmanager
def name_calls(module: torch.nn.Module, label: str) -> Iterator[None]:
    """Put a named range around every forward of a module."""
    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(label))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_trace(profiler: Any, path: Path) -> None:
    """Write the Chrome trace; the file appears whole or not at all."""
    with whole(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
