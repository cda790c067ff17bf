"""Trace events: what a profile of a processor holds of the named ranges, read without the rest of it.

torch turns each event of a profile into an object of fifty attributes, a second for a clip whose decoding
alone has ten thousands, and a census asks for those inside of quantized layers only. Here these are read
from the profile itself, and nested as torch nests them:

    stage|transformer ......................................
        quantized|transformer|to_q|decode ....
            aten::linear ...
                aten::addmm ..

An event lies in another of its thread that spans it, and one that is the only child of a namesake is
left out. A profile with events of a device is read by torch, which ties kernels to what launched them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

UNSEEN = frozenset(
    {
        *("[memory]", "[OutOfMemory]", "aten::is_leaf", "aten::output_nr", "aten::_version"),
        *("profiler::_record_function_enter", "profiler::_record_function_enter_new"),
        "profiler::_record_function_exit",
    }
)
"""Events that torch leaves out, too."""


@dataclass(frozen=True)
class Device:
    """Where an event happened."""

    name: str = "CPU"


PROCESSOR = Device()


@dataclass
class Event:
    """A range, with the names that torch's events have; times are microseconds."""

    name: str
    start: float
    end: float
    input_shapes: Sequence[Sequence[int]] = ()
    cpu_children: list[Event] = field(default_factory=list)
    id: int = 0
    device_type = PROCESSOR

    @property
    def time_range(self) -> Event:
        """The event itself, which knows its start and end."""
        return self

    def elapsed_us(self) -> float:
        """Microseconds from start to end."""
        return self.end - self.start

    @property
    def cpu_time_total(self) -> float:
        """The same."""
        return self.elapsed_us()


def read_events(found: Iterable[Any], stages: str, layers: str) -> list[Event]:
    """The events whose names begin with `stages`, and those with `layers`, which hold what ran inside.

    `found` are the events of `torch.profiler.profile(...).profiler.kineto_results`.
    """
    spans = sorted(
        ((one.start_ns(), -one.end_ns(), one) for one in found), key=lambda span: span[:2]
    )
    chosen: list[Event] = []
    opened: dict[int, list[tuple[int, Event]]] = {}
    for start, negative, one in spans:
        end, name = -negative, one.name()
        parents = opened.setdefault(one.start_thread_id(), [])
        while parents and (start >= parents[-1][0] or end > parents[-1][0]):
            parents.pop()
        named = name.startswith((stages, layers))
        if not (named or parents) or name in UNSEEN or is_elsewhere(one):
            continue
        event = Event(name, (start - spans[0][0]) / 1000, (end - spans[0][0]) / 1000, one.shapes())
        if parents:
            parents[-1][1].cpu_children.append(event)
        if parents or name.startswith(layers):
            parents.append((end, event))
        if named:
            chosen.append(event)
    for event in chosen:
        join_namesakes(event)
    return chosen


def is_elsewhere(one: Any) -> bool:
    """Whether an event is hidden, or began in one thread and ended in another."""
    hidden = getattr(one, "is_hidden_event", None)
    if hidden is not None and hidden():
        return True
    return bool(one.is_async()) or one.start_thread_id() != one.end_thread_id()


def join_namesakes(event: Event) -> None:
    """Leave out, at any depth, an only child that bears its parent's name: its children take its place."""
    while len(event.cpu_children) == 1 and event.cpu_children[0].name == event.name:
        event.cpu_children = event.cpu_children[0].cpu_children
    for child in event.cpu_children:
        join_namesakes(child)
