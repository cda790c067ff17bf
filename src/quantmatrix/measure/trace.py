"""Trace: a profiled run as a Chrome trace, with named stages and a census of its quantized layers.

`quantmatrix.measure.trace_census` says what the named ranges are, and what is read from them. The trace is
gzipped JSON for any viewer of Chrome traces. Ranges stand in the trace of an ordinary run only:
compiled blocks and CUDA graphs do not call the layers one by one.

Where only the census is wanted, the profiler of a processor records what runs inside of quantized layers
and no other operation of the models: nine of ten operations are none of a census.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
    whole_run = path is not None or len(activities) > 1  # torch ties kernels to what launched them
    with named_ranges(pipeline, plan, whole_run=whole_run), profiler:
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


class Recording:
    """Whether a profiler sees the operations of this thread; it does at first."""

    def __init__(self) -> None:
        """Nothing is changed yet."""
        self.on = True
        self.outer: list[bool] = []

    def begin(self, on: bool) -> None:
        """Let operations be seen or not, until `end` is called as often as `begin`."""
        self.outer.append(self.on)
        self._switch(on)

    def end(self) -> None:
        """Go back to what was before the last `begin`."""
        self._switch(self.outer.pop())

    def _switch(self, on: bool) -> None:
        self.on = on
        torch._C._autograd._enable_record_function(on)


@contextmanager
def named_ranges(pipeline: Any, plan: Plan, *, whole_run: bool = True) -> Iterator[None]:
    """Name the forwards of a pipeline's transformers and of quantized layers, text encoders' too,
    meanwhile.

    Without `whole_run`, a profiler sees no operation of the pipeline's models but those inside of
    quantized layers.
    """
    recording = Recording()
    with ExitStack() as stack:
        stack.callback(torch._C._autograd._enable_record_function, True)
        for component in plan.components:
            label = f"{STAGE}{component}"
            transformer = getattr(pipeline, component)
            stack.enter_context(name_calls(transformer, label, recording, inside=whole_run))
        for component in (*plan.components, *plan.encoders):
            for name, module in getattr(pipeline, component).named_modules():
                if isinstance(module, QuantizedLinear):
                    label = f"{LAYER}{component}|{name}|{module.kernel.backend}"
                    stack.enter_context(name_calls(module, label, recording))
        for module in () if whole_run else list_others(pipeline, plan):
            stack.enter_context(hide_calls(module, recording))
        yield


def list_others(pipeline: Any, plan: Plan) -> Iterator[torch.nn.Module]:
    """What the models beside the transformers consist of: encoders are called whole, decoders by parts."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name not in plan.components:
            yield from (one for one in part.children() if not isinstance(one, QuantizedLinear))


@contextmanager
def name_calls(
    module: torch.nn.Module, label: str, recording: Recording, *, inside: bool = True
) -> Iterator[None]:
    """Put a named range around every forward of a module, whose operations are seen if `inside`."""
    ranges: list[Any] = []

    def enter() -> None:
        recording.begin(True)
        ranges.append(record_function(label))
        ranges[-1].__enter__()
        recording.begin(inside)

    def leave() -> None:
        recording.end()
        ranges.pop().__exit__(None, None, None)
        recording.end()

    with around_calls(module, enter, leave):
        yield


@contextmanager
def hide_calls(module: torch.nn.Module, recording: Recording) -> Iterator[None]:
    """Let no operation of a module's forwards be seen, except where another range says so."""
    with around_calls(module, lambda: recording.begin(False), recording.end):
        yield


@contextmanager
def around_calls(
    module: torch.nn.Module, enter: Callable[[], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Call both around every forward of a module, the second one also where it raises."""
    handles = [
        module.register_forward_pre_hook(lambda *_: enter()),
        module.register_forward_hook(lambda *_: leave(), always_call=True),
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
