"""Trace: a profiled run, in which every quantized layer is a named range.

A range `quantized|component|layer|backend` spans every call of a quantized layer, only while
tracing. From the ranges comes the census: per layer the backend, the calls, and the operations that
it started. A planned layer without a range did not run, one by another backend ran otherwise than
planned; both are problems.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantmatrix.errors import RefusedError, UsageError
from quantmatrix.layers import QuantizedLinear
from quantmatrix.pipeline import build_pipeline
from quantmatrix.planning import Plan, Refusal, plan
from quantmatrix.request import Request
from quantmatrix.run import generate

PREFIX = "quantized|"


def trace(request: Request, path: Path) -> dict[str, Any]:
    """Profile one generation into a gzipped Chrome trace; the census as plain data."""
    if not path.name.endswith(".json.gz"):
        raise UsageError(f"--output-path {path}: expected a file ending in .json.gz")
    made = plan(request)
    if isinstance(made, Refusal):
        raise RefusedError(made.rule, made.message)
    pipeline = build_pipeline(made)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if made.machine.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with named_layers(pipeline, made), torch.profiler.profile(activities=activities) as profile:
        generate(request, made=made, pipeline=pipeline)
    layers = take_census(profile.events() or [])
    write_trace(profile, path)
    problems = judge(made, layers)
    return {"ok": not problems, "problems": problems, "output": str(path), "layers": layers}


@contextmanager
def named_layers(pipeline: Any, made: Plan) -> Iterator[None]:
    """Put a named range around every quantized layer of a pipeline."""
    handles: list[Any] = []
    for component in made.components:
        for name, module in getattr(pipeline, component).named_modules():
            if isinstance(module, QuantizedLinear):
                label = f"{PREFIX}{component}|{name}|{module.kernel.backend}"
                handles += _name_calls(module, label)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name_calls(module: torch.nn.Module, label: str) -> list[Any]:
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(torch.profiler.record_function(label))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def take_census(events: Any) -> dict[str, dict[str, Any]]:
    """Backend, calls and operations of every layer, by component and name."""
    layers: dict[str, dict[str, Any]] = {}
    for event in events:
        if not event.name.startswith(PREFIX) or event.device_type.name != "CPU":
            continue
        _, component, name, backend = event.name.split("|")
        layer = layers.setdefault(
            f"{component}.{name}", {"backend": backend, "calls": 0, "operations": Counter()}
        )
        layer["calls"] += 1
        layer["operations"].update(list_operations(event))
    return layers


def list_operations(event: Any) -> Iterator[str]:
    """Names of everything that ran inside an event."""
    for child in event.cpu_children:
        yield child.name
        yield from list_operations(child)


def judge(made: Plan, layers: dict[str, dict[str, Any]]) -> list[str]:
    """Planned layers that did not run, or not by the planned kernel."""
    problems = []
    for component, part in made.components.items():
        for module, pieces in part.layers.items():
            names = [f"{component}.{module}"]
            if len(pieces) > 1:
                names = [f"{names[0]}.parts.{n}" for n in range(len(pieces))]
            for name, piece in zip(names, pieces, strict=True):
                found = layers.get(name)
                if found is None:
                    problems.append(f"{name} is planned and did not run")
                elif found["backend"] != piece.backend:
                    problems.append(f"{name} ran by {found['backend']}, not {piece.backend}")
    return problems


def write_trace(profile: Any, path: Path) -> None:
    """Write the Chrome trace; the file appears whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
