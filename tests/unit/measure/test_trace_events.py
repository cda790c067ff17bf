"""Events that are read from a profile directly are those that torch makes of it, with less work."""

from __future__ import annotations

from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from quantmatrix.measure import trace
from quantmatrix.measure.trace_census import LAYER, list_operations
from quantmatrix.measure.trace_events import read_events
from quantmatrix.runtime.generate import STAGE


def run_model() -> None:
    """Ranges inside one another, beside one another and in another thread; operations everywhere."""
    a, b = torch.ones(4, 6), torch.ones(6, 5)
    with record_function(f"{STAGE}encode"):
        torch.softmax(a @ b, dim=-1)
    with record_function(f"{STAGE}transformer"):
        a.sum()
        for number in range(3):
            with record_function(f"{LAYER}transformer|to_q.{number}|decode"):
                torch.nn.functional.linear(a, b.T, torch.ones(5))
                torch.cat([a.to(torch.float64), a]).contiguous().repeat(2, 2)
                with record_function("inner"):
                    torch.nn.functional.layer_norm(a, [6])

    def work() -> None:
        with record_function(f"{LAYER}transformer|other|decode"):
            torch.einsum("ij,jk->ik", a, b)

    thread = Thread(target=work)
    thread.start()
    thread.join()


def profile_model() -> Any:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run_model()
    return profiler


def outline(event: Any) -> Any:
    """(name, shapes, nanoseconds, children) of an event, at every depth."""
    shapes = [list(shape) for shape in event.input_shapes or []]
    children = [outline(child) for child in event.cpu_children]
    return event.name, shapes, round(event.cpu_time_total * 1000), children


def test_layers_hold_what_torch_finds_in_them() -> None:
    profiler = profile_model()
    read = trace.list_events(profiler, [ProfilerActivity.CPU])
    whole = [event for event in profiler.events() if event.name.startswith((STAGE, LAYER))]
    assert [event.name for event in read] == [event.name for event in whole]
    layers = [event.name.startswith(LAYER) for event in read]
    assert layers.count(True) >= 3
    for ours, theirs, layer in zip(read, whole, layers, strict=True):
        if layer:
            assert outline(ours) == outline(theirs)
            assert len(list(list_operations(ours))) > 5
        else:
            assert round(ours.cpu_time_total * 1000) == round(theirs.cpu_time_total * 1000)


def test_events_of_a_device_are_read_by_torch() -> None:
    whole = [SimpleNamespace(name="kernel")]
    results = SimpleNamespace(events=list)
    profiler = SimpleNamespace(
        profiler=SimpleNamespace(kineto_results=results), events=lambda: whole
    )
    assert trace.list_events(profiler, [ProfilerActivity.CPU]) == []
    assert trace.list_events(profiler, [ProfilerActivity.CPU, ProfilerActivity.CUDA]) == whole


def make_event(
    name: str,
    start: int,
    end: int,
    *,
    thread: int = 1,
    last: int | None = None,
    hidden: bool = False,
) -> Any:
    """An event as a profile holds it; times are microseconds."""
    return SimpleNamespace(
        name=lambda: name, start_ns=lambda: start * 1000, end_ns=lambda: end * 1000,
        start_thread_id=lambda: thread, end_thread_id=lambda: last or thread, shapes=list,
        is_async=lambda: False, is_hidden_event=lambda: hidden,
    )  # fmt: skip


def test_what_lies_in_a_layer() -> None:
    events = [
        make_event("aten::to", 12, 20),
        make_event("quantized|t|a|decode", 10, 100),
        make_event("aten::before", 1, 9),
        make_event("aten::to", 12, 19),
        make_event("aten::copy_", 13, 18),
        make_event("aten::is_leaf", 21, 22),
        make_event("of another thread", 30, 40, thread=2),
        make_event("ends in another thread", 41, 42, last=2),
        make_event("hidden", 43, 44, hidden=True),
        make_event("ends after it", 90, 110),
        make_event("aten::after", 101, 105),
    ]
    [layer] = read_events(events, STAGE, LAYER)
    [child] = layer.cpu_children
    assert (layer.elapsed_us(), layer.time_range.start) == (90.0, 9.0)
    assert (child.name, child.cpu_time_total) == ("aten::to", 8.0)
    assert [inner.name for inner in child.cpu_children] == ["aten::copy_"]
