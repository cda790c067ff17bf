"""Measuring: turns are taken, every kind of layer is timed on its own input, memory is counted."""

from __future__ import annotations

import gc
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantmatrix.errors import CheckpointError, MachineError, UsageError
from quantmatrix.hardware import probe
from quantmatrix.measure.bench import pairs, speed, timing
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.measure.bench.timing import Part
from quantmatrix.measure.bench.working_memory import ALLOCATOR, LIVE_TENSORS, measure_working
from quantmatrix.proof.ratios import FEWEST
from quantmatrix.request import Request
from quantmatrix.runtime.quantized_linear import QuantizedLinear, SharedInput

FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"


@pytest.fixture(scope="module")
def part() -> Part:
    """A tiny FLUX.1 in BF16 and with FP8 layers that may share codes of their inputs."""
    machine = probe.probe("cpu")
    plain = synthesize("flux-1", machine, size="tiny")
    made = synthesize(
        "flux-1", machine, family="modelopt-fp8", scheme="FP8", backend="reference", size="tiny"
    )
    inputs = make_inputs("flux-1", plain, "cpu", torch.bfloat16, size="tiny")
    return Part("transformer", "cpu", plain, made, (), inputs)


def test_who_begins_changes_from_round_to_round() -> None:
    calls: list[str] = []

    def time_one(form: str) -> float:
        calls.append(form[0])
        return float(len(calls))

    found = timing.take_turns(time_one, 4)
    assert "".join(calls) == "bqqbbqqb"
    assert found == {"bf16": [1.0, 4.0, 5.0, 8.0], "quantized": [2.0, 3.0, 6.0, 7.0]}


def test_both_forms_run_in_turn_in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[str, int]] = []
    costs = {"b": 0.5, "q": 4.0}  # milliseconds

    def pretend(way: Any, device: str, burst: int, clock: Any) -> float:
        timed.append((way(), burst))
        return costs[timed[-1][0]]

    monkeypatch.setattr(timing, "time_calls", pretend)
    found = timing.time_pair({"bf16": lambda: "b", "quantized": lambda: "q"}, "cpu", 6)
    assert found["burst"] == {"bf16": 4, "quantized": 1}  # 4 x 0.5 ms are a burst of 2 ms
    measured = timed[2 * timing.TRIALS :]
    assert measured == [("b", 4), ("q", 1), ("q", 1), ("b", 4)] * 3
    assert found["ratio"] == found["low"] == found["high"] == 8.0
    assert found["milliseconds"] == {"bf16": [0.5] * 6, "quantized": [4.0] * 6}


def test_the_clock_of_one_thread_does_not_count_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    clock, name = timing.choose_clock("cpu")
    assert clock is timing.time.process_time
    assert "CPU time" in name
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert timing.choose_clock("cpu") == (timing.time.perf_counter, "wall clock")
    assert "events" in timing.choose_clock("cuda:0")[1]


def test_the_clock_that_is_given_counts() -> None:
    ticks = iter([1.0, 1.5])
    assert speed.time_calls(lambda: None, "cpu", 10, lambda: next(ticks)) == pytest.approx(50.0)


def test_every_quantized_layer_is_of_one_of_the_kinds(part: Part) -> None:
    with torch.no_grad():
        found = timing.find_layers(part)
    names = [name for name, _ in timing.list_quantized(part.quantized)]
    assert sum(facts["count"] for facts, _, _ in found) == len(names)
    assert len({str({**facts, "count": 0}) for facts, _, _ in found}) == len(found) < len(names)
    for facts, name, x in found:
        layer = part.quantized.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert (facts["in"], facts["out"]) == (layer.in_features, layer.out_features)
        assert x.shape[-1] == layer.in_features
        assert x.numel() == facts["rows"] * facts["in"]
        twin = part.bf16.get_submodule(name)
        assert isinstance(twin, nn.Linear)
    assert not part.quantized._forward_pre_hooks
    assert not any(m._forward_pre_hooks for m in part.quantized.modules())


def test_a_timed_layer_quantizes_its_input_on_every_call(part: Part) -> None:
    first = next(module for _, module in timing.list_quantized(part.quantized))
    assert isinstance(first, QuantizedLinear)
    kernel, done = first.kernel, []

    def encode(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        done.append("encode")
        return (x,)

    def multiply(codes: tuple[torch.Tensor, ...], x: Any, *rest: Any) -> torch.Tensor:
        done.append("multiply")
        return kernel.run(codes[0], *rest)

    def run(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return multiply(encode(x), x, *rest)

    layer = deepcopy(first)
    layer.kernel = replace(kernel, run=run, encode=encode, multiply=multiply)
    layer.shared = shared = SharedInput()
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    for _ in range(3):
        layer(x)
    assert done == ["encode", "multiply", "multiply", "multiply"]  # codes of x were kept
    done.clear()
    with timing.unshared(layer):
        for _ in range(3):
            layer(x)
    assert done == ["encode", "multiply"] * 3
    assert layer.shared is shared


def test_all_parts_of_a_component(part: Part) -> None:
    said: list[str] = []
    found = timing.measure_part(part, FEWEST, said.append)
    assert said == [f"transformer: {what}" for what in ("layers", "step", "memory")]
    assert "load" not in found  # random weights have no files
    assert {layer["backend"] for layer in found["layers"]} == {"reference"}
    assert len(found["step"]["milliseconds"]["bf16"]) == FEWEST
    memory = found["memory"]
    assert memory["bf16"]["weights"] == speed.count_bytes(part.bf16)
    assert memory["quantized"]["weights"] == speed.count_bytes(part.quantized)
    assert memory["weights_verdict"] == "smaller"
    assert memory["counted_by"] == LIVE_TENSORS
    assert memory["bf16"]["peak"] > memory["bf16"]["weights"]


def test_an_output_that_is_no_number_is_not_timed(part: Part) -> None:
    kwargs = {**part.kwargs, "hidden_states": part.kwargs["hidden_states"] * float("nan")}
    broken = Part("transformer", "cpu", part.bf16, part.quantized, (), kwargs)
    with pytest.raises(CheckpointError, match="bf16 output has NaN"):
        timing.check_finite(broken, "bf16")


def test_live_tensors_are_counted_while_they_live() -> None:
    kept = torch.zeros(1000)  # 4000 bytes that were there before

    def call() -> torch.Tensor:
        shadow = torch.empty(1000, 1000, device="meta")  # no bytes
        part = kept.view(10, 100)[:5]  # none of its own
        first = kept + 1  # 4000 bytes
        second = first * 2  # 4000 more
        del first
        third = second.view(10, 100)[:5] + 0  # 2000 more; the view is none
        return third.sum() + part.sum() + shadow.shape[0]

    gc.collect()
    assert measure_working(call, "cpu") == (8000, LIVE_TENSORS)


def test_an_accelerator_says_what_a_call_held_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before does not count, nor a peak of before the call; work is waited for."""
    done: list[str] = []
    found = SimpleNamespace(
        synchronize=lambda: done.append("wait"),
        reset_peak_memory_stats=lambda: done.append("reset"),
        memory_allocated=lambda: 3000,
        max_memory_allocated=lambda: 7096 if done[-1] == "wait" else 0,
    )
    monkeypatch.setattr(torch, "pretended", found, raising=False)
    call = partial(done.append, "call")
    assert measure_working(call, "pretended:1") == (4096, ALLOCATOR)
    assert done == ["wait", "reset", "call", "wait"]


def test_every_page_is_touched() -> None:
    model = nn.Linear(64, 128, bias=False)
    model.weight.data = torch.ones(64, 128).t()  # as FP8 weights are kept for their matmul
    model.register_buffer("codes", torch.full((3 * 4096,), 2, dtype=torch.uint8))
    assert timing.touch(model) == 3 * 2 + 8 * 0  # 1.0 in float32 begins with a zero byte
    model.weight.data = (
        torch.full((8, 1024), 1.0).view(torch.int32).bitwise_or(1).view(torch.float32)
    )  # and with a one
    assert timing.touch(model) == 3 * 2 + 8 * 1


def test_loads_are_fresh_and_take_turns() -> None:
    loaded: list[str] = []

    def load(form: str) -> nn.Module:
        loaded.append(form[0])
        return nn.Linear(64, 64)

    forms = {form: lambda form=form: load(form) for form in ("bf16", "quantized")}
    found = timing.time_loads(forms, "cpu", 2 * FEWEST)
    assert "".join(loaded) == "bq" + "bqqb" * (FEWEST // 2)
    assert len(found["milliseconds"]["bf16"]) == FEWEST


def test_inputs_are_those_of_the_first_step() -> None:
    request = Request(model_path="black-forest-labs/FLUX.1-dev", tiny=True, device="cpu",
                      prompt=("a",), height=64, width=96)  # fmt: skip
    args, kwargs = pairs.capture_inputs(pairs.require_plan(request))
    assert args == ()
    assert kwargs["hidden_states"].shape[1] == (64 // 16) * (96 // 16)
    assert {"timestep", "encoder_hidden_states", "img_ids"} <= set(kwargs)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "nothing to compare with BF16"),
        ({"dit_layerwise_offload": True}, "leave out the offload flags"),
    ],
)
def test_requests_that_cannot_be_measured(fields: Any, said: str) -> None:
    base = "black-forest-labs/FLUX.1-dev"
    request = Request(model_path=base, tiny=True, device="cpu", **fields)
    with pytest.raises(UsageError, match=said):
        pairs.bench_request(request, base, FEWEST)


def test_two_forms_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(pairs, "measure_part", fill)
    base = "black-forest-labs/FLUX.1-dev"
    request = Request(
        model_path=base, component_paths={"transformer": FP8}, tiny=True, device="cpu"
    )
    with pytest.raises(MachineError, match="cannot hold BF16 and the quantized form together"):
        pairs.bench_request(request, base, FEWEST)


def test_requests_are_named_by_what_they_say() -> None:
    one = Request(model_path="a", component_paths={"transformer": FP8}, device="cpu", seed=(0,))
    other = Request(component_paths={"transformer": FP8}, model_path="a", device="cuda:1")
    assert pairs.name_request(one) == pairs.name_request(other)
    assert FP8 in pairs.name_request(one)
    assert pairs.name_request(Request(model_path="b")) == "model_path=b"
