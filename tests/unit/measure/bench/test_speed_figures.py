"""Timings, sizes and made-up inputs by value: a pretended clock, pretended models, numbers that differ."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantmatrix.hardware.machine import Machine
from quantmatrix.measure.bench import pairs, rows, speed, synthetic, timing
from quantmatrix.measure.bench.synthetic import TorchDraw, draw
from quantmatrix.proof.ratios import FEWEST
from quantmatrix.request import Request
from quantmatrix.scheme import TensorSpec


class Clock:
    """Seconds that pass by calls of what is timed; after each reading it stands at an eighth again."""

    def __init__(self) -> None:
        self.now = 0.125

    def __call__(self) -> float:
        now, self.now = self.now, 0.125
        return now


@pytest.mark.parametrize(("burst", "each"), [(1, 0.25), (3, 0.5), (8, 2.5)])
def test_one_call_of_a_burst_in_milliseconds(burst: int, each: float) -> None:
    clock = Clock()

    def way() -> None:
        clock.now += each

    assert speed.time_calls(way, "cpu", burst, clock) == each * 1000
    assert clock.now == 0.125


def test_an_accelerator_counts_the_calls_of_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 7.5

    found = SimpleNamespace(Event=Event, synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch, "pretended", found, raising=False)
    assert speed.time_calls(lambda: done.append("call"), "pretended:1", 3) == 2.5
    assert done == ["wait", "record", "call", "call", "call", "record", "wait"]


def test_the_median_of_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 40.0, 9.0, 20.0, 5.0, 90.0])
    asked: list[tuple[str, int]] = []

    def time_calls(way: Any, device: str, burst: int) -> float:
        asked.append((device, burst))
        return next(times)

    monkeypatch.setattr(speed, "time_calls", time_calls)
    called: list[str] = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    assert speed.measure_ways(ways, "cpu", 3) == {"a": 5.0, "b": 40.0}
    assert asked == [("cpu", 1)] * 6
    assert called == ["a", "a", "b", "b"]  # the warm-up


def test_bytes_of_parameters_and_buffers() -> None:
    model = nn.Linear(5, 3, dtype=torch.bfloat16)
    model.register_buffer("codes", torch.zeros(7, dtype=torch.uint8))
    model.register_buffer("scale", torch.zeros(11))
    assert speed.count_bytes(model) == 2 * 15 + 2 * 3 + 7 + 44


def test_the_first_output() -> None:
    value = torch.tensor([1.5], dtype=torch.bfloat16)
    for output in ((value, None), [value, 1], ([value, 2], 3)):
        found = speed.flatten_output(output)
        assert (found.dtype, found.tolist()) == (torch.float32, [1.5])


MACHINE = Machine("a GPU", "nvidia", "sm90", 1 << 30, device="cuda:3")


def test_what_is_told_of_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    outputs = iter([[1.0, 2.0], [1.0, 2.0], [1.0, math.inf], [1.0, 3.0]])

    def synthesize(model: str, machine: Machine, **given: Any) -> nn.Module:
        made.append({"model": model, **given})
        return nn.Linear(3, 2 if "family" in given else 5, bias=False)

    def prepare(module: nn.Module, inputs: Any, **given: bool) -> Any:
        made.append({"rows": module.weight.shape[0], "inputs": inputs, **given})
        return lambda: (torch.tensor(next(outputs)),)

    def make_inputs(model: str, module: nn.Module, device: str, dtype: Any, *, size: str) -> Any:
        return (model, module.weight.shape[0], device, dtype, size)

    def measure(ways: Any, device: str, repeats: int) -> dict[str, float]:
        made.append({"device": device, "repeats": repeats, "ways": list(ways)})
        return {"bf16": 8.0, "quantized": 2.0}

    monkeypatch.setattr(speed, "synthesize", synthesize)
    monkeypatch.setattr(speed, "prepare_forward", prepare)
    monkeypatch.setattr(speed, "make_inputs", make_inputs)
    monkeypatch.setattr(speed, "measure_ways", measure)
    found = speed.compare_forms("m", MACHINE, family="f", scheme="s")
    inputs = ("m", 5, "cuda:3", torch.bfloat16, "full")
    assert made == [
        {"model": "m", "family": "f", "scheme": "s", "backend": None, "size": "full"},
        {"model": "m", "size": "full"},
        {"rows": 5, "inputs": inputs, "compiled": False, "graph": False},
        {"rows": 2, "inputs": inputs, "compiled": False, "graph": False},
        {"device": "cuda:3", "repeats": 10, "ways": ["bf16", "quantized"]},
    ]
    assert found == {
        "model": "m",
        "size": "full",
        "family": "f",
        "scheme": "s",
        "backends": {},
        "milliseconds": {"bf16": 8.0, "quantized": 2.0},
        "bytes": {"bf16": 60, "quantized": 24},
        "ratio": 0.25,
        "repeats_bit_identical": True,
        "finite": True,
        "machine": {"name": "a GPU", "arch": "sm90"},
    }
    made.clear()
    found = speed.compare_forms(
        "m", MACHINE, family="f", scheme="s", size="tiny", compiled=True, graph=True, repeats=3
    )
    assert (found["repeats_bit_identical"], found["finite"]) == (False, False)
    assert (made[2]["compiled"], made[2]["graph"], made[4]["repeats"]) == (True, True, 3)


def test_how_a_forward_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(speed.acceleration, "compile_blocks", lambda _: done.append("compile"))
    monkeypatch.setattr(speed.acceleration, "graph_forward", lambda _: done.append("graph"))
    module: Any = lambda **given: given  # noqa: E731
    assert speed.prepare_forward(module, {"x": 3})() == {"x": 3}
    assert done == []
    speed.prepare_forward(module, {}, compiled=True)
    speed.prepare_forward(module, {}, graph=True)
    assert done == ["compile", "graph"]


# --- random weights and inputs -----------------------------------------------------------------


def spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(shapes=(shape,), dtypes=(dtype,))


def make_draw(suffix: str, dtype: str, *shape: int, inputs: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return draw(suffix, spec(dtype, *shape), (shape[0], inputs), generator)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("U8", 0, 255), ("I8", -127, 127), ("I32", -(2**20), 2**20 - 1)],
)
def test_codes_fill_their_range(dtype: str, low: int, high: int) -> None:
    found = make_draw("weight", dtype, 512, 512).to(torch.int64)
    assert int(found.min()) >= low
    assert int(found.max()) <= high
    width = high - low
    assert int(found.min()) <= low + width // 1000
    assert int(found.max()) >= high - width // 1000


def test_scales_give_weights_of_gain_one() -> None:
    found = make_draw("weight_scale", "F32", 3, 2, inputs=49)
    assert found.tolist() == [[pytest.approx(1 / (224 * 7))] * 2] * 3
    assert make_draw("weight_scale", "BF16", 3, 2).tolist() == [[1.0] * 2] * 3
    assert make_draw("smooth", "BF16", 4).tolist() == [1.0] * 4
    assert make_draw("weight_offset", "F32", 4).tolist() == [0.0] * 4
    assert make_draw("weight_scale", "F8_E4M3", 2, 2).float().tolist() == [[1.0] * 2] * 2


def test_numbers_that_are_drawn_have_their_spread() -> None:
    codes = make_draw("weight", "F8_E4M3", 300, 300).float()
    assert float(codes.std()) == pytest.approx(64, rel=0.02)
    plain = make_draw("lora_down", "BF16", 300, 300, inputs=49).float()
    assert float(plain.std()) == pytest.approx(1 / 7, rel=0.02)


def make_torch_draw(dtype: torch.dtype = torch.bfloat16) -> TorchDraw:
    return TorchDraw(torch.Generator().manual_seed(0), "cpu", dtype)


def test_arguments_of_a_forward() -> None:
    own = make_torch_draw()
    number, whole = own.number(0.75), own.whole_number(7)
    assert (number.tolist(), number.dtype) == ([0.75], torch.bfloat16)
    assert (whole.tolist(), whole.dtype) == ([7], torch.int64)
    assert own.normal(2, 3).shape == (2, 3)
    assert own.normal(2, 3).dtype == torch.bfloat16
    assert (own.side(tiny=True), own.side(tiny=False)) == (4, 64)
    assert (own.text(tiny=True), own.text(tiny=False)) == (16, 512)
    config = SimpleNamespace(in_channels=5, joint_attention_dim=3, axes_dims_rope=(1, 2, 3, 4))
    small = own.packed(config, tiny=True)
    assert small["hidden_states"].shape == (1, 16, 5)
    assert small["encoder_hidden_states"].shape == (1, 16, 3)
    assert small["timestep"].tolist() == [0.5]
    assert small["return_dict"] is False
    large = own.packed(config, tiny=False)
    assert large["hidden_states"].shape == (1, 4096, 5)
    assert large["encoder_hidden_states"].shape == (1, 512, 3)


def test_positions_count_rows_and_columns() -> None:
    config = SimpleNamespace(axes_dims_rope=(16, 8, 8, 4))
    found = make_torch_draw().positions(config, tiny=True)
    ids = found["img_ids"]
    assert (ids.dtype, ids.shape) == (torch.float32, (16, 4))
    expected = [[0.0, row, column, 0.0] for row in range(4) for column in range(4)]
    assert ids.tolist() == expected
    assert found["txt_ids"].tolist() == [[0.0] * 4] * 16
    assert make_torch_draw().positions(config, tiny=False)["txt_ids"].shape == (512, 4)
    with pytest.raises(FrozenInstanceError):
        make_torch_draw().device = "cuda"  # type: ignore[misc]


def test_inputs_are_those_of_the_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def forward_inputs(config: Any, own: TorchDraw, *, tiny: bool) -> dict[str, Any]:
        asked.append((config, own.generator and own.generator.initial_seed(), own.device, tiny))
        return {}

    monkeypatch.setattr(
        synthetic.models, "load", lambda name: SimpleNamespace(forward_inputs=forward_inputs)
    )
    module: Any = SimpleNamespace(config="c")
    synthetic.make_inputs("m", module, "cpu", torch.float32, seed=9)
    synthetic.make_inputs("m", module, "cpu", torch.float32, size="tiny", seed=3)
    synthetic.make_inputs("m", module, "cpu", torch.float32, size="zeta", seed=3)
    synthetic.make_inputs("m", module, "cpu", torch.float32, size="full", seed=3)
    synthetic.make_inputs("m", module, "meta", torch.float32)
    assert asked == [
        ("c", 9, "cpu", False),
        ("c", 3, "cpu", True),
        ("c", 3, "cpu", False),
        ("c", 3, "cpu", False),
        ("c", None, "meta", False),
    ]


# --- what is measured of a part -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("once", "burst"),
    [
        (0.0, 20_000),
        (0.00009, 20_000),
        (0.0001, 20_000),
        (0.00016, 12_500),
        (0.3, 7),
        (1.999, 2),
        (2.0, 1),
        (30.0, 1),
    ],
)
def test_calls_of_a_burst(once: float, burst: int, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([once + 5.0, once + 1.0, once, once + 2.0, once + 0.5])
    called: list[int] = []
    monkeypatch.setattr(timing, "time_calls", lambda call, device, burst, clock: next(times))
    assert timing.find_burst(lambda: called.append(1), "cpu") == burst
    assert len(called) == 2
    assert next(times, None) is None


def test_times_keep_five_digits() -> None:
    values = iter([1.2345678, 0.00098765432, 123456.78, 7.0])
    found = timing.take_turns(lambda form: next(values), 2)
    assert found == {"bf16": [1.2346, 7.0], "quantized": [0.00098765, 123460.0]}


@pytest.mark.parametrize(
    ("repeats", "rounds"),
    [
        (1, FEWEST),
        (2 * FEWEST, FEWEST),
        (2 * FEWEST + 3, FEWEST + 1),
        (4 * FEWEST + 2, 2 * FEWEST + 1),
    ],
)
def test_half_as_many_loads(repeats: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def load(seconds: float) -> nn.Module:
        clock.now += seconds
        return nn.Linear(2, 2)

    monkeypatch.setattr(timing, "choose_clock", lambda device: (clock, "a clock"))
    forms = {"bf16": lambda: load(0.5), "quantized": lambda: load(0.125)}
    found = timing.time_loads(forms, "cpu", repeats)
    assert found["milliseconds"] == {"bf16": [500.0] * rounds, "quantized": [125.0] * rounds}


def test_the_names_of_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert timing.choose_clock("cpu")[1] == "CPU time of the process, one thread"
    assert timing.choose_clock("cuda") == (
        timing.time.perf_counter,
        "device events; loading: wall clock",
    )
    assert timing.choose_clock("abc")[1] == "device events; loading: wall clock"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.choose_clock("cpu")[1] == "wall clock"


def test_memory_of_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    working = iter([(700, "a"), (300, "b")])
    monkeypatch.setattr(timing, "measure_working", lambda call, device: next(working))
    part = timing.Part(
        "t",
        "cpu",
        nn.Linear(100, 10, bias=False),
        nn.Linear(100, 10, bias=False, dtype=torch.bfloat16),
        (),
        {},
    )
    found = timing.measure_memory(part)
    assert found["bf16"] == {"weights": 4000, "working": 700, "peak": 4700}
    assert found["quantized"] == {"weights": 2000, "working": 300, "peak": 2300}
    assert found["counted_by"] == "b"
    assert found["weights_ratio"] == pytest.approx(0.5)
    assert found["peak_ratio"] == pytest.approx(2300 / 4700, rel=1e-3)
    assert (found["weights_verdict"], found["peak_verdict"]) == ("smaller", "smaller")


def test_parts_of_a_split_layer_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantized(nn.Module):
        pass

    class Split(nn.Module):
        pass

    monkeypatch.setattr(timing, "QuantizedLinear", Quantized)
    monkeypatch.setattr(timing, "SplitInputLinear", Split)
    model = nn.Module()
    model.parts = nn.ModuleList([Quantized()])
    model.a, model.b, model.c = Quantized(), Split(), nn.Linear(2, 2)
    model.b.parts = nn.ModuleList([Quantized(), Quantized()])
    assert [name for name, _ in timing.list_quantized(model)] == ["a", "b"]


class Layer(nn.Module):
    """In place of a quantized layer."""

    def __init__(self, backend: str, scheme: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.scheme = SimpleNamespace(name=scheme)
        self.kernel = SimpleNamespace(backend=backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_kinds_of_layers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantmatrix.runtime import quantized_linear

    monkeypatch.setattr(timing, "QuantizedLinear", Layer)
    monkeypatch.setattr(quantized_linear, "QuantizedLinear", Layer)
    model = nn.Module()
    model.a, model.b, model.c = (Layer("int8", "W8", 6, 4) for _ in range(3))
    model.d, model.e = Layer("decode", "W8", 6, 4), Layer("int8", "W8", 6, 4)
    model.uncalled = Layer("int8", "W8", 6, 4)
    x, other = torch.ones(2, 5, 6), torch.ones(7, 6)

    def forward() -> None:
        for layer in (model.a, model.b, model.c, model.d):
            layer(x)
        model.a(other)  # the first call counts
        model.e(other)

    model.forward = forward  # type: ignore[method-assign]
    part = timing.Part("t", "cpu", model, model, (), {})
    found = timing.find_layers(part)
    usual = {"in": 6, "out": 4, "scheme": "W8"}
    assert [(facts, name, tuple(given.shape)) for facts, name, given in found] == [
        ({**usual, "rows": 10, "backend": "int8", "count": 3}, "a", (2, 5, 6)),
        ({**usual, "rows": 10, "backend": "decode", "count": 1}, "d", (2, 5, 6)),
        ({**usual, "rows": 7, "backend": "int8", "count": 1}, "e", (7, 6)),
    ]
    assert found[0][2] is not x
    assert speed.count_backends(model) == {"int8": 5, "decode": 1}
    assert not model.a._forward_pre_hooks


# --- what a result says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "threads", "text"),
    [
        ("cpu", 1, "a processor, 1 thread"),
        ("cpu", 2, "a processor, 2 threads"),
        ("nvidia", 4, "a device"),
        ("amd", 4, "a device"),
    ],
)
def test_a_device_by_its_name(
    vendor: str, threads: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(pairs.probe, "read_processor", lambda: "a processor")
    assert pairs.name_device(Machine("a device", vendor, "x", 1)) == text


def test_requests_that_differ_have_other_names() -> None:
    request = Request(model_path="b", height=48, seed=(3,), backend="decode", device="cuda:1")
    assert pairs.name_request(request) == "backend=decode, height=48, model_path=b, seed=(3,)"
    assert pairs.name_request(Request()) == ""


def test_what_every_result_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs.probe, "fingerprint", lambda: {"processor": "p"})
    monkeypatch.setattr(pairs.records, "find_commit", lambda: "c")
    monkeypatch.setattr(pairs.records, "tell_time", lambda: "then")
    found = pairs.describe({"transformer": 1}, MACHINE, 17)
    assert found["settings"] == {
        "repeats": 17,
        "confidence": pairs.CONFIDENCE,
        "power": pairs.POWER,
        "clock": "device events; loading: wall clock",
    }
    assert (found["device"], found["components"]) == ("a GPU", {"transformer": 1})
    assert (found["machine"], found["commit"], found["made"]) == ({"processor": "p"}, "c", "then")


def test_random_forms_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    said: list[str] = []

    def synthesize(model: str, machine: Machine, **given: Any) -> str:
        made.append((model, given))
        return "quantized" if "family" in given else "plain"

    def measure_part(part: timing.Part, repeats: int, say: Any) -> dict[str, int]:
        made.append((part.name, part.device, part.bf16, part.quantized, part.kwargs, repeats))
        return {"step": 3}

    monkeypatch.setattr(pairs, "synthesize", synthesize)
    monkeypatch.setattr(pairs, "make_inputs", lambda *_, size: {"size": size})
    monkeypatch.setattr(pairs, "measure_part", measure_part)
    monkeypatch.setattr(pairs, "count_backends", lambda module: {f"of {module}": 2})
    monkeypatch.setattr(pairs, "describe", lambda measured, *_: {"measured": measured})
    found = pairs.bench_synthetic(
        "m",
        MACHINE,
        family="f",
        scheme="s",
        size="tiny",
        backend="b",
        repeats=9,
        say=said.append,
    )
    assert found == {
        "size": "tiny",
        "backends": {"transformer": {"of quantized": 2}},
        "measured": {"transformer": {"step": 3}},
    }
    assert made == [
        ("m", {"size": "tiny"}),
        ("m", {"family": "f", "scheme": "s", "backend": "b", "size": "tiny"}),
        ("transformer", "cuda:3", "plain", "quantized", {"size": "tiny"}, 9),
    ]
    assert said == ["random weights"]


@pytest.mark.parametrize(
    ("claim", "flags", "why"),
    [
        ("validated", (), ""),
        ("expected", ("--prompt", "x"), ""),
        ("refused", (), "it is claimed to be refused"),
        ("planned", (), "it is claimed to be planned"),
        (
            "expected",
            ("--dit_cpu_offload", "--dit-layerwise-offload"),
            "it has --dit-layerwise-offload, and would time the transfers",
        ),
        (
            "expected",
            ("--dit-cpu-offload",),
            "it has --dit-cpu-offload, and would time the transfers",
        ),
    ],
)
def test_why_a_cell_is_not_benchmarked(claim: str, flags: tuple[str, ...], why: str) -> None:
    cell: Any = SimpleNamespace(claim=claim, flags=flags)
    assert rows.why_not(cell) == why
