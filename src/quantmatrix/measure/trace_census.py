"""Trace census: what ran inside each quantized layer of a profiled run, and whether that was planned.

While a run is profiled, a range `quantized|component|layer|backend` spans every call of a quantized
layer, and a range `stage|name` every text encoding, every forward of a transformer and the decoding
of the latents. From the events inside the ranges comes, per layer: the backend, the calls, the
operations and the kernels of the device. Three things are problems:

* a planned layer without a range: it did not run;
* a layer without any of the matmuls that its kernel declares (`Kernel.matmul`): something else ran;
* where the kernel multiplies codes, a plain matmul with a weight as large as the layer's: the weight
  was decoded, and the layer only claims to be computed natively. Low-rank branches are smaller.

Seconds are those of the device where it has kernels, else of the processor. What is not spent in
matmuls is quantizing, scaling and copying.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quantmatrix import kernels
from quantmatrix.runtime.generate import STAGE
from quantmatrix.runtime.plan.types import Piece, Plan

LAYER = "quantized|"
PLAIN = {"aten::linear": 1, "aten::mm": 1, "aten::addmm": 2, "aten::bmm": 1, "aten::baddbmm": 2}
"""Matmuls of plain numbers, each with the position of the weight among its arguments."""


@dataclass
class LayerTrace:
    """What ran inside the calls of one quantized layer."""

    backend: str
    calls: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    """Kernels of the device, none on a CPU."""
    matmuls: Counter[str] = field(default_factory=Counter)
    """The outermost operations, and the kernels, that are matmuls."""
    plain: set[tuple[int, ...]] = field(default_factory=set)
    """Shapes of the weights of plain matmuls."""
    seconds: float = 0.0
    matmul_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "backend": self.backend,
            "calls": self.calls,
            "operations": dict(sorted(self.operations.items())),
            "kernels": dict(sorted(self.kernels.items())),
            "seconds": self.seconds,
            "matmul_seconds": self.matmul_seconds,
        }


@dataclass
class Census:
    """Stages and layers of a profiled run, and what is wrong with them."""

    stages: dict[str, dict[str, float]]
    """Calls and seconds of each stage."""
    layers: dict[str, LayerTrace]
    """By component and module."""
    problems: list[str]

    @property
    def overhead(self) -> float:
        """Share of the quantized layers' time that is not spent in matmuls."""
        total = sum(layer.seconds for layer in self.layers.values())
        matmul = sum(layer.matmul_seconds for layer in self.layers.values())
        return (total - matmul) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, every layer included."""
        layers = {name: layer.to_json() for name, layer in sorted(self.layers.items())}
        return {**self.summarize(), "problems": self.problems, "layers": layers}

    def summarize(self) -> dict[str, Any]:
        """Plain data: stages, and per backend its layers and the matmuls that they ran."""
        backends: dict[str, dict[str, Any]] = {}
        for layer in self.layers.values():
            found = backends.setdefault(
                layer.backend, {"layers": 0, "calls": 0, "matmuls": Counter(), "kernels": Counter()}
            )
            found["layers"] += 1
            found["calls"] += layer.calls
            found["matmuls"].update(layer.matmuls)
            found["kernels"].update(layer.kernels)
        for found in backends.values():
            for kind in ("matmuls", "kernels"):
                found[kind] = dict(sorted(found[kind].items()))
        return {
            "stages": {name: dict(stage) for name, stage in sorted(self.stages.items())},
            "backends": backends,
            "quantize_and_scale_share": round(self.overhead, 4),
        }


def take_census(events: Iterable[Any], plan: Plan) -> Census:
    """The census of a profiler's events (`torch.profiler.profile(...).events()`)."""
    events = list(events)
    pieces, timeline = dict(list_pieces(plan)), Timeline(events)
    stages: dict[str, dict[str, float]] = {}
    layers: dict[str, LayerTrace] = {}
    for event in events:
        if event.device_type.name != "CPU":
            continue
        if event.name.startswith(STAGE):
            stage = stages.setdefault(event.name.removeprefix(STAGE), {"calls": 0, "seconds": 0.0})
            stage["calls"] += 1
            stage["seconds"] += timeline.measure(event)
        elif event.name.startswith(LAYER):
            _, component, module, backend = event.name.split("|")
            name = f"{component}.{module}"
            layer = layers.setdefault(name, LayerTrace(backend))
            matmuls = matmuls_of(pieces[name]) if name in pieces else ()
            read_call(event, layer, matmuls, timeline)
    return Census(stages, layers, judge(pieces, layers))


def list_pieces(plan: Plan) -> Iterator[tuple[str, Piece]]:
    """(component and module, piece) of every planned layer, as the modules are named in the model.

    Text encoders that are quantized come after the transformers.
    """
    for component, part in [*plan.components.items(), *plan.encoders.items()]:
        for module, pieces in part.layers.items():
            for number, piece in enumerate(pieces):
                inside = f".parts.{number}" if len(pieces) > 1 else ""
                yield f"{component}.{module}{inside}", piece


def matmuls_of(piece: Piece) -> tuple[str, ...]:
    """The matmuls that the kernel of a piece declares."""
    found = {kernel.backend: kernel for kernel in kernels.kernels_of(piece.scheme.op)}
    return found[piece.backend].matmul


class Timeline:
    """The kernels of the device by the moment at which the processor launched them.

    Kernels that no operation of torch started (Triton's) belong to no operation in a profile, so a
    range has those that were launched while it was open. A launch and its kernel have one number.
    """

    def __init__(self, events: list[Any]) -> None:
        """Sort the launches of a profiler's events."""
        kernels = {
            event.id: event
            for event in events
            if event.device_type.name != "CPU" and not event.name.startswith((LAYER, STAGE))
        }
        launched = sorted(
            (event.time_range.start, event.id)
            for event in events
            if event.device_type.name == "CPU"
            and event.id in kernels
            and event.name.startswith(("cu", "hip"))
        )
        self.starts = [start for start, _ in launched]
        self.kernels = [kernels[number] for _, number in launched]

    def within(self, event: Any) -> list[Any]:
        """Kernels that were launched while a range was open."""
        first = bisect_left(self.starts, event.time_range.start)
        return self.kernels[first : bisect_right(self.starts, event.time_range.end)]

    def measure(self, event: Any) -> float:
        """Seconds of the kernels launched in a range; without any, of the processor."""
        found = self.within(event)
        if not found:
            return float(event.cpu_time_total) / 1e6
        return float(sum(kernel.time_range.elapsed_us() for kernel in found)) / 1e6


def read_call(event: Any, layer: LayerTrace, matmuls: tuple[str, ...], timeline: Timeline) -> None:
    """Add what ran inside one call of a layer."""
    layer.calls += 1
    layer.seconds += timeline.measure(event)
    for kernel in timeline.within(event):
        layer.kernels[kernel.name] += 1
        if kernel.name in matmuls:
            layer.matmuls[kernel.name] += 1
            layer.matmul_seconds += kernel.time_range.elapsed_us() / 1e6
    for operation in find_operations(event, {*matmuls, *PLAIN}):
        layer.matmuls[operation.name] += 1
        layer.matmul_seconds += timeline.measure(operation)
    layer.operations.update(child.name for child in list_operations(event))
    for child in list_operations(event, closed=matmuls):
        shapes = child.input_shapes or []
        position = PLAIN.get(child.name)
        if position is not None and len(shapes) > position:
            layer.plain.add(tuple(shapes[position]))


def list_operations(event: Any, closed: tuple[str, ...] = ()) -> Iterator[Any]:
    """Everything that ran inside an event, at any depth, but not inside `closed` operations."""
    for child in event.cpu_children:
        yield child
        if child.name not in closed:
            yield from list_operations(child, closed)


def find_operations(event: Any, names: set[str]) -> Iterator[Any]:
    """The outermost operations inside an event that bear one of the names."""
    for child in event.cpu_children:
        if child.name in names:
            yield child
        else:
            yield from find_operations(child, names)


def judge(pieces: dict[str, Piece], layers: dict[str, LayerTrace]) -> list[str]:
    """Planned layers that did not run, or not by the planned kernel; see the module's list."""
    problems = []
    for name, piece in pieces.items():
        layer = layers.get(name)
        if layer is None:
            problems.append(f"{name} is planned and did not run")
        elif layer.backend != piece.backend:
            problems.append(f"{name} ran by {layer.backend}, not {piece.backend}")
        else:
            problems += [f"{name} ({piece.backend}) {why}" for why in judge_layer(piece, layer)]
    problems += [f"{name} ran quantized and is not planned" for name in layers.keys() - pieces]
    return problems


def judge_layer(piece: Piece, layer: LayerTrace) -> list[str]:
    """What a layer that ran by the planned backend shows against it."""
    matmuls = matmuls_of(piece)
    ran = {*layer.operations, *layer.kernels}
    problems = []
    if matmuls and ran.isdisjoint(matmuls):
        problems.append(f"ran none of {', '.join(matmuls)}, but {', '.join(sorted(ran))}")
    whole = sorted((piece.in_features, piece.out_features))
    decoded = any(sorted(shape[-2:]) == whole for shape in layer.plain)
    if decoded and not set(matmuls) & set(PLAIN):
        problems.append(
            f"multiplied plain numbers by a weight of {piece.out_features} x {piece.in_features}: "
            "the weight was decoded, although the kernel takes codes"
        )
    return problems
