"""What a profiler saw in the quantized layers is held against the plan: each way to cheat is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processors import skip_without_scaled_product

from quantmatrix.families import fp8, msmodelslim
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import Kernel, kernels_of, linear_fp8
from quantmatrix.kernels.portable import run_decoded
from quantmatrix.measure import trace
from quantmatrix.measure.trace import named_ranges
from quantmatrix.measure.trace_census import Census, LayerTrace, take_census
from quantmatrix.runtime.generate import STAGE
from quantmatrix.runtime.quantized_linear import QuantizedLinear

WIDE, NARROW = 96, 64
SCHEME = fp8.SCHEMES["tensor-dynamic"]


def find_kernel(op: str, backend: str) -> Kernel:
    return next(kernel for kernel in kernels_of(op) if kernel.backend == backend)


def make_layer(kernel: Kernel, family: Any = fp8, scheme: Any = SCHEME) -> QuantizedLinear:
    weight = torch.randn(NARROW, WIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    limit = torch.full((WIDE,), 4.0)
    made = family.quantize(weight, scheme, calibration=Calibration(-limit, limit))
    canonical = family.canonical(made, scheme)
    return QuantizedLinear(WIDE, NARROW, kernel, scheme, canonical, torch.bfloat16)


def fake_plan(part: Any, *, encoder: bool = False) -> Any:
    """A plan of one component, which is a transformer or a text encoder."""
    components, encoders = {"transformer": part}, {}
    if encoder:
        components, encoders = {}, {"text_encoder": part}
    return SimpleNamespace(components=components, encoders=encoders)


def trace_layer(
    layer: QuantizedLinear, backend: str, *, calls: int = 2, encoder: bool = False
) -> Census:
    """The census of a model with one layer, which is planned to run by a backend."""
    piece = SimpleNamespace(
        scheme=layer.scheme, backend=backend, in_features=WIDE, out_features=NARROW
    )
    part = SimpleNamespace(layers={"block.to_q": [piece]})
    made = fake_plan(part, encoder=encoder)
    model = torch.nn.Module()
    model.block = torch.nn.Module()
    model.block.to_q = layer
    model.forward = lambda x: model.block.to_q(x)  # type: ignore[method-assign]
    pipeline = SimpleNamespace(**dict.fromkeys((*made.components, *made.encoders), model))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.no_grad(),
        named_ranges(pipeline, made),
        torch.profiler.profile(activities=activities, record_shapes=True) as profiler,
    ):
        for _ in range(calls):
            model(torch.ones(32, WIDE, dtype=torch.bfloat16))
    return take_census(profiler.events(), made)


class Mixed(torch.nn.Module):
    """Plain operations around a quantized layer, as in every transformer and encoder."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.to_q = layer
        self.plain = torch.nn.Linear(NARROW, NARROW, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("no numbers")
        return self.plain(self.to_q(x)).softmax(-1)


@pytest.mark.parametrize("whole_run", [True, False], ids=["whole", "census"])
def test_a_census_alone_sees_what_runs_inside_of_layers_and_no_more(
    whole_run: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The census is that of the whole run; what a file shall hold, or a call that failed, hides nothing."""
    kernel = find_kernel("linear.fp8", "decode")
    transformer, encoder = Mixed(make_layer(kernel)), torch.nn.Sequential(Mixed(make_layer(kernel)))
    vae = torch.nn.Sequential(torch.nn.Linear(NARROW, NARROW), torch.nn.GELU())
    parts = {"transformer": transformer, "text_encoder": encoder, "vae": vae, "tokenizer": None}
    pipeline = SimpleNamespace(**parts, components=parts)
    piece = SimpleNamespace(scheme=SCHEME, backend="decode", in_features=WIDE, out_features=NARROW)
    made = MadePlan(
        {"transformer": SimpleNamespace(layers={"to_q": [piece]})},
        {"text_encoder": SimpleNamespace(layers={"0.to_q": [piece]})},
    )
    x = torch.ones(4, WIDE, dtype=torch.bfloat16)

    def generate(request: Any, *, plan: Any, pipeline: Any) -> None:
        with torch.no_grad():
            for model in (pipeline.transformer, pipeline.text_encoder):
                with pytest.raises(ValueError, match="no numbers"):
                    model(x * float("nan"))
            pipeline.vae(
                pipeline.transformer(pipeline.text_encoder(x).repeat(1, 2)[:, :WIDE]).float()
            )
            torch.erf(x)

    seen: list[Counter[str]] = []

    def list_events(profiler: Any, activities: Any) -> Any:
        seen.append(Counter(event.name for event in profiler.events()))
        return read(profiler, activities)

    read = trace.list_events
    monkeypatch.setattr(trace, "generate", generate)
    monkeypatch.setattr(trace, "list_events", list_events)
    path = tmp_path / "trace.json.gz" if whole_run else None
    census = trace.trace_pipeline(None, made, pipeline, path)  # type: ignore[arg-type]
    assert census.problems == []
    assert census.stages["transformer"]["calls"] == 2
    names = ("transformer.to_q", "text_encoder.0.to_q")
    assert {name: layer.calls for name, layer in census.layers.items()} == dict.fromkeys(names, 1)
    for layer in census.layers.values():
        assert layer.matmuls == {"aten::linear": 1}
        assert layer.plain == {(NARROW, WIDE)}
    [found] = seen
    assert found["aten::linear"] == (5 if whole_run else 2)
    assert ("aten::softmax" in found, "aten::gelu" in found) == (whole_run, whole_run)
    assert "aten::erf" in found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as after:
        transformer(x)
    assert "aten::softmax" in {event.name for event in after.events()}


@dataclass(frozen=True)
class MadePlan:
    """What a trace reads of a plan."""

    components: dict[str, Any]
    encoders: dict[str, Any]
    processes: int = 1
    machine: Any = field(default_factory=lambda: SimpleNamespace(device="cpu"))


def test_layers_of_a_text_encoder_are_held_to_the_plan_too() -> None:
    layer, name = make_layer(find_kernel("linear.fp8", "decode")), "text_encoder.block.to_q"
    census = trace_layer(layer, "decode", calls=3, encoder=True)
    assert census.problems == []
    assert {key: one.calls for key, one in census.layers.items()} == {name: 3}
    assert census.stages == {}
    missed = trace_layer(layer, "decode", calls=0, encoder=True)
    assert missed.problems == [f"{name} is planned and did not run"]
    other = trace_layer(layer, "reference", encoder=True)
    assert other.problems == [f"{name} ran by decode, not reference"]


@pytest.mark.parametrize("backend", ["torch", "decode", "reference"])
def test_a_layer_that_ran_as_planned(backend: str) -> None:
    if backend == "torch":
        skip_without_scaled_product()
    census = trace_layer(make_layer(find_kernel("linear.fp8", backend)), backend, calls=3)
    assert census.problems == []
    [layer] = census.layers.values()
    assert layer.calls == 3
    matmul = "aten::_scaled_mm" if backend == "torch" else "aten::linear"
    assert layer.matmuls == {matmul: 3}
    assert census.stages["transformer"]["calls"] == 3
    assert 0 < layer.matmul_seconds < layer.seconds
    assert layer.seconds <= census.stages["transformer"]["seconds"] < layer.seconds + 0.5
    assert 0 < census.overhead < 1


def test_a_weight_that_is_decoded_under_a_native_name() -> None:
    kernel = replace(
        find_kernel("linear.fp8", "torch"),
        prepare=linear_fp8.prepare_decode, run=run_decoded, encode=None, multiply=None,
    )  # fmt: skip
    [missing, decoded] = trace_layer(make_layer(kernel), "torch").problems
    assert "ran none of aten::_scaled_mm, but aten::" in missing
    assert "multiplied plain numbers by a weight of 64 x 96" in decoded


def test_a_decoded_weight_beside_the_native_matmul() -> None:
    skip_without_scaled_product()
    torch_kernel = find_kernel("linear.fp8", "torch")

    def run(x: Any, tensors: Any, bias: Any, scheme: Any) -> torch.Tensor:
        plain = tensors["columns"].float().bfloat16()
        return torch_kernel.run(x, tensors, bias, scheme) + 0 * (x @ plain)

    kernel = replace(torch_kernel, run=run, encode=None, multiply=None)
    [problem] = trace_layer(make_layer(kernel), "torch").problems
    assert "the weight was decoded" in problem


def test_the_small_matmuls_of_a_low_rank_branch_are_no_decoding() -> None:
    skip_without_scaled_product()
    torch_kernel = find_kernel("linear.fp8", "torch")

    def run(x: Any, tensors: Any, bias: Any, scheme: Any) -> torch.Tensor:
        low = torch.nn.functional.linear(x, torch.ones(16, WIDE, dtype=x.dtype))
        low = torch.nn.functional.linear(low, torch.ones(NARROW, 16, dtype=x.dtype))
        return torch_kernel.run(x, tensors, bias, scheme) + low

    kernel = replace(torch_kernel, run=run, encode=None, multiply=None)
    census = trace_layer(make_layer(kernel), "torch")
    assert census.problems == []
    assert census.layers["transformer.block.to_q"].matmuls["aten::linear"] == 4


def test_another_backend_than_planned_and_a_layer_that_did_not_run() -> None:
    layer = make_layer(find_kernel("linear.fp8", "decode"))
    name = "transformer.block.to_q"
    assert trace_layer(layer, "reference").problems == [f"{name} ran by decode, not reference"]
    assert trace_layer(layer, "decode", calls=0).problems == [f"{name} is planned and did not run"]


def make_event(
    name: str, start: float, end: float, *children: Any, number: int = 0, device: str = "CPU"
) -> Any:
    """An event as a profiler tells it; times are microseconds."""
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        device_type=SimpleNamespace(name=device), name=name, cpu_children=list(children),
        cpu_time_total=end - start, time_range=span, id=number, input_shapes=[],
    )  # fmt: skip


def plan_layer() -> Any:
    piece = SimpleNamespace(scheme=SCHEME, backend="torch", in_features=WIDE, out_features=NARROW)
    return fake_plan(SimpleNamespace(layers={"to_q": [piece]}))


def test_a_layer_that_nobody_planned() -> None:
    empty = fake_plan(SimpleNamespace(layers={}))
    census = take_census([make_event("quantized|transformer|extra|decode", 0, 5)], empty)
    assert census.problems == ["transformer.extra ran quantized and is not planned"]


def test_a_census_is_summed_up_by_backend() -> None:
    def layer(backend: str, calls: int, seconds: float, matmul: float, **ran: int) -> LayerTrace:
        return LayerTrace(
            backend, calls, Counter(view=1), Counter(ran), Counter(ran), set(), seconds, matmul
        )

    layers = {
        "t.b": layer("torch", 3, 5.0, 4.0, mm=3),
        "t.a": layer("torch", 2, 3.0, 2.5, mm=1, bmm=2),
        "t.c": layer("decode", 7, 2.0, 0.5, linear=7),
    }
    stages = {"vae": {"calls": 1, "seconds": 0.5}, "transformer": {"calls": 2, "seconds": 9.0}}
    census = Census(stages, layers, ["a problem"])
    assert census.overhead == pytest.approx(0.3)
    summary = census.summarize()
    assert summary == {
        "stages": stages,
        "backends": {
            "torch": {
                "layers": 2, "calls": 5, "matmuls": {"bmm": 2, "mm": 4},
                "kernels": {"bmm": 2, "mm": 4},
            },
            "decode": {"layers": 1, "calls": 7, "matmuls": {"linear": 7}, "kernels": {"linear": 7}},
        },
        "quantize_and_scale_share": 0.3,
    }  # fmt: skip
    assert list(summary["stages"]) == ["transformer", "vae"]
    found = census.to_json()
    assert (found["problems"], list(found["layers"])) == (["a problem"], ["t.a", "t.b", "t.c"])
    assert found["layers"]["t.a"] == {
        "backend": "torch", "calls": 2, "operations": {"view": 1}, "kernels": {"bmm": 2, "mm": 1},
        "seconds": 3.0, "matmul_seconds": 2.5,
    }  # fmt: skip
    assert Census({}, {}, []).overhead == 0


def test_a_stage_without_kernels_takes_the_processors_time() -> None:
    plan: Any = SimpleNamespace(components={}, encoders={})
    event = make_event(f"{STAGE}vae", 10, 2_500_010)
    assert take_census([event, event], plan).stages == {"vae": {"calls": 2, "seconds": 5.0}}


def test_kernels_of_a_device_are_those_launched_meanwhile() -> None:
    """Triton's kernels belong to no operation; a kernel outside of the range is another layer's."""
    label = "quantized|transformer|to_q|torch"
    launches = [
        make_event("cuLaunchKernelEx", 12, 14, number=1),
        make_event("cudaLaunchKernelExC", 22, 24, number=2),
        make_event("cudaLaunchKernel", 90, 92, number=3),
        make_event("aten::view", 13, 14, number=3),
    ]
    kernels = [
        make_event("divide", 100, 110, number=1, device="CUDA"),
        make_event("nvjet_qqtst", 110, 140, number=2, device="CUDA"),
        make_event("other", 140, 990, number=3, device="CUDA"),
        make_event(label, 100, 140, number=7, device="CUDA"),
    ]
    event = make_event(label, 10, 30, make_event("aten::_scaled_mm", 20, 28))
    census = take_census([event, *launches, *kernels], plan_layer())
    assert census.problems == []
    [layer] = census.layers.values()
    assert layer.kernels == {"divide": 1, "nvjet_qqtst": 1}
    assert layer.matmuls == {"aten::_scaled_mm": 1}
    assert layer.seconds == pytest.approx(40e-6)
    assert layer.matmul_seconds == pytest.approx(30e-6)
    assert census.overhead == pytest.approx(0.25)


def test_a_kernel_of_the_device_can_be_the_matmul() -> None:
    """`int8` on a GPU multiplies by a Triton kernel of our own, which no operation starts."""
    label = "quantized|transformer|to_q|int8"
    scheme = msmodelslim.SCHEMES["W8A8"]
    piece = SimpleNamespace(scheme=scheme, backend="int8", in_features=WIDE, out_features=NARROW)
    made = fake_plan(SimpleNamespace(layers={"to_q": [piece]}))
    events = [make_event(label, 10, 30)]
    assert "ran none of aten::_int_mm, multiply" in take_census(events, made).problems[0]
    events.append(make_event("cuLaunchKernelEx", 12, 14, number=1))
    events.append(make_event("multiply", 100, 130, number=1, device="CUDA"))
    census = take_census(events, made)
    assert census.problems == []
    assert census.overhead == 0


def test_every_kernel_says_what_multiplies() -> None:
    """Kernels of 16-bit inputs decode and say so; what takes codes names no plain matmul."""
    for op in ("linear.fp8", "linear.nvfp4", "linear.svdq", "linear.w4a16", "linear.int8"):
        for kernel in kernels_of(op):
            plain = "aten::linear" in kernel.matmul
            engine = kernel.backend in ("nunchaku", "comfy-kitchen")
            wide = kernel.numerics.endswith("A16") or kernel.backend == "reference"
            assert plain == (wide and not engine), f"{op} {kernel.backend}"
