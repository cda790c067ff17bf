"""Figures of `trace`, `bench`, `speed` and `agreement`, by value and direction, on made-up inputs.

Nothing is symmetric here: a ratio that was turned over, a first for a last, seconds for milliseconds
or the wrong side of a comparison is another number.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benched import make_memory, make_result

from quantmatrix.cli import agreement as agreement_command
from quantmatrix.cli import bench as bench_command
from quantmatrix.cli import main, thresholds, trace
from quantmatrix.errors import UsageError
from quantmatrix.measure.bench import speed, working_memory
from quantmatrix.measure.bench import timing as bench
from quantmatrix.measure.trace_census import Census, LayerTrace, Timeline, read_call
from quantmatrix.proof import bench_gate, ratios
from quantmatrix.proof.agreement import COLOURS, Share, show_scopes
from quantmatrix.proof.bench_results import describe_sizes, summarize
from quantmatrix.report import bench_pages

# --- trace -----------------------------------------------------------------------------------


def make_event(name: str, start: float, end: float, device: str = "CPU", **more: Any) -> Any:
    """An event of a profiler: microseconds, and what ran inside it."""
    children = more.pop("children", [])
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    about = {"id": more.pop("id", 0), "input_shapes": [], "cpu_time_total": end - start}
    return SimpleNamespace(name=name, time_range=span, cpu_children=children,
                           device_type=SimpleNamespace(name=device), **{**about, **more})  # fmt: skip


def test_seconds_of_a_profile() -> None:
    """A profiler counts microseconds. Of a call of 400 of these 300 went into the matmul."""
    matmul = make_event("aten::linear", 150.0, 450.0)
    call = make_event("quantized|transformer|a|decode", 100.0, 500.0, children=[matmul])
    layer = LayerTrace("decode")
    read_call(call, layer, ("aten::linear",), Timeline([call, matmul]))
    assert layer.seconds == pytest.approx(400e-6)
    assert layer.matmul_seconds == pytest.approx(300e-6)
    assert (layer.calls, layer.matmuls) == (1, Counter({"aten::linear": 1}))


def test_seconds_of_a_profile_with_kernels() -> None:
    """Where the device has kernels theirs count, by launch: three inside the range, one after it."""
    kernels = [make_event("gemm", 0.0, 30.0, "CUDA", id=1), make_event("cast", 0.0, 10.0, "CUDA", id=2),
               make_event("other", 0.0, 99.0, "CUDA", id=3)]  # fmt: skip
    launches = [make_event("cudaLaunchKernel", at, at + 1, id=number)
                for number, at in ((1, 120.0), (2, 130.0), (3, 900.0))]  # fmt: skip
    call = make_event("quantized|transformer|a|torch", 100.0, 500.0)
    layer = LayerTrace("torch")
    read_call(call, layer, ("gemm",), Timeline([call, *kernels, *launches]))
    assert layer.kernels == Counter({"gemm": 1, "cast": 1})
    assert layer.seconds == pytest.approx(40e-6)
    assert layer.matmul_seconds == pytest.approx(30e-6)


def make_census() -> Census:
    layers = {
        "transformer.b": LayerTrace("torch", 3, seconds=3.0, matmul_seconds=1.0),
        "transformer.a": LayerTrace("torch", 2, seconds=1.0, matmul_seconds=0.5),
        "transformer.c": LayerTrace("decode", 5, seconds=4.0, matmul_seconds=4.0),
    }
    stages = {"transformer": {"calls": 4, "seconds": 0.25}, "encode": {"calls": 1, "seconds": 2.0}}
    return Census(stages, layers, [])


def test_shares_and_sums_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    found = make_census().to_json()
    assert found["quantize_and_scale_share"] == 0.3125  # (8 - 5.5) / 8
    assert {name: (one["layers"], one["calls"]) for name, one in found["backends"].items()} == {
        "torch": (2, 5), "decode": (1, 5),
    }  # fmt: skip
    assert list(found["layers"]) == ["transformer.a", "transformer.b", "transformer.c"]
    assert Census({}, {}, []).overhead == 0.0
    trace.show(make_census(), "place")
    assert capsys.readouterr().out.splitlines() == [
        f"{'encode':14}     1 calls    2000.00 ms",
        f"{'transformer':14}     4 calls     250.00 ms",
        "2 quantized layers ran by torch, 5 calls",
        "1 quantized layers ran by decode, 5 calls",
        "31.2% of their time went into quantizing and scaling",
        "place",
    ]


# --- bench and speed -------------------------------------------------------------------------


def test_milliseconds_of_one_call_of_a_burst() -> None:
    ticks = iter([10.0, 10.6])
    assert speed.time_calls(lambda: None, "cpu", 3, lambda: next(ticks)) == pytest.approx(200.0)


def test_each_way_has_its_own_median() -> None:
    clock = iter([0.0, 1.0, 0.0, 5.0, 0.0, 2.0, 0.0, 7.0, 0.0, 9.0, 0.0, 6.0])

    def fake(way: Any, device: str, burst: int) -> float:
        return -(next(clock) - next(clock))

    ways = {"bf16": lambda: None, "quantized": lambda: None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "time_calls", fake)
        assert speed.measure_ways(ways, "cpu", 3) == {"bf16": 2.0, "quantized": 6.0}


def test_a_burst_takes_its_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for once, burst in ((0.5, 4), (0.3, 7), (2.0, 1), (2.5, 1), (1e-9, bench.MOST_CALLS)):
        monkeypatch.setattr(bench, "time_calls", lambda *_, once=once: once)
        assert bench.find_burst(lambda: None, "cpu") == burst


def test_the_form_that_begins_changes_from_round_to_round() -> None:
    order: list[str] = []
    times = {"bf16": 1.23456789, "quantized": 9.87654321}
    found = bench.take_turns(lambda form: (order.append(form), times[form])[1], 3)
    assert order == ["bf16", "quantized", "quantized", "bf16", "bf16", "quantized"]
    assert found == {"bf16": [1.2346] * 3, "quantized": [9.8765] * 3}


def test_a_ratio_is_quantized_over_bf16() -> None:
    slow, quick = [10.0, 11.0, 12.0, 10.0, 11.0, 12.0], [5.0, 5.5, 6.0, 5.0, 5.5, 6.0]
    found = ratios.compare_pairs(slow, quick)
    assert (found.ratio, found.low, found.high, found.verdict) == (0.5, 0.5, 0.5, "faster")
    turned = ratios.compare_pairs(quick, slow)
    assert (turned.ratio, turned.verdict) == (2.0, "slower")
    assert summarize({"bf16": slow, "quantized": quick})["median"] == {
        "bf16": 11.0,
        "quantized": 5.5,
    }
    assert describe_sizes(8, 2) == (0.25, "smaller")
    assert describe_sizes(2, 8) == (4.0, "larger")
    assert describe_sizes(3, 3) == (1.0, "same")


@pytest.mark.parametrize(
    ("ratio", "low", "high", "word"),
    [
        (0.9, 0.8, math.nextafter(1, 0), "faster"),
        (0.9, 0.8, 1.0, "no measurable gain"),
        (1.0, 0.9, 1.1, "no measurable gain"),
        (1.1, 1.0, 1.2, "no measurable loss"),
        (1.1, math.nextafter(1, 2), 1.2, "slower"),
    ],
)
def test_verdicts_at_their_edges(ratio: float, low: float, high: float, word: str) -> None:
    assert ratios.name_verdict(ratio, low, high) == word


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ((1.1, math.nextafter(1.0, 2), 1.2), "worse"),
        ((1.1, 1.0, 1.2), "no measurable change"),
        ((0.6, 0.5, 0.64), "no measurable change"),
        ((0.6, 0.5, math.nextafter(0.64, 0)), "better"),
    ],
)
def test_the_gate_at_its_edges(found: tuple[float, float, float], word: str) -> None:
    """Kept at 0.8 (0.78 to 0.82): a quarter more is 1.0, a quarter less 0.64."""
    key = ("x", "cpu")
    finding = bench_gate.judge(key, "transformer step", (0.8, 0.78, 0.82), found, 1.25)
    assert (finding.bound, finding.verdict) == (1.0, word)
    assert (finding.kept, finding.found, finding.low, finding.high) == (0.8, *found)
    wide = bench_gate.judge(key, "transformer step", (0.8, 0.5, 1.3), found, 1.25)
    assert (wide.bound, wide.verdict) == (1.3, "no measurable change")


def test_memory_is_counted_by_form(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quantized = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(16, 32, bias=False)
    part: Any = bench.Part("transformer", "cpu", plain, quantized, (), {})
    working = {plain: 5000, quantized: 7000}
    calls: list[str] = []

    def fake(call: Any, device: str) -> tuple[int, str]:
        calls.append(call.args[0])
        return (working[plain] if call.args[0] == "bf16" else working[quantized]), "counter"

    monkeypatch.setattr(bench, "measure_working", fake)
    assert bench.measure_memory(part) == {
        "bf16": {"weights": 8192, "working": 5000, "peak": 13192},
        "quantized": {"weights": 2048, "working": 7000, "peak": 9048},
        "counted_by": "counter",
        "weights_ratio": 0.25, "weights_verdict": "smaller",
        "peak_ratio": 0.685870, "peak_verdict": "smaller",
    }  # fmt: skip
    assert calls == ["bf16", "quantized"]


def test_working_memory_is_the_peak_of_what_a_call_makes() -> None:
    """Two tensors of 4000 bytes live at once, a third only after the first is gone."""
    x = torch.ones(1000)

    def call() -> None:
        first = x + 1
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert working_memory.measure_working(call, "cpu") == (8000, "live tensors")
    assert working_memory.measure_working(lambda: x.view(10, 100), "cpu")[0] == 0


def test_the_table_of_a_bench(capsys: pytest.CaptureFixture[str]) -> None:
    result = make_result(step=0.5, weights=2**23)
    result["components"]["transformer"]["memory"] = make_memory(2**25, 2**23, 2**21)
    bench_command.print_result(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "some-row@cpu, tiny, on Some CPU, 1 thread (wall clock)"
    step = next(line for line in lines if " step " in line).split()
    assert step[:5] == ["transformer", "step", "10", "5", "0.500"]
    assert step[-1] == "faster"
    [layer] = [line for line in lines if "layer" in line]
    assert "layer 16x256->512 FP8 decode (4 such)" in layer
    assert "  transformer weights: 8.00 MiB, BF16 32.00 MiB: 0.250, smaller" in lines
    assert (
        "  transformer weights and working memory: 10.00 MiB, BF16 34.00 MiB: 0.294, smaller"
        in lines
    )


def test_the_words_of_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"model": "flux-1", "size": "full", "machine": {"name": "Some GPU"},
             "backends": {"torch": 3}, "milliseconds": {"bf16": 40.0, "quantized": 30.0},
             "ratio": 0.75, "bytes": {"bf16": 4 * 2**30, "quantized": 2**30},
             "repeats_bit_identical": True, "finite": True}  # fmt: skip
    monkeypatch.setattr(speed, "compare_forms", lambda *_, **__: found)
    words = ["speed", "--model-id", "flux-1", "--family", "fp8", "--device", "cpu"]
    assert main.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "flux-1 (full) on Some GPU",
        "  layers   3 torch",
        "  time     30.00 ms, BF16 40.00 ms: 0.750x",
        "  weights  1.00 GiB: 0.250x of BF16",
        "  repeats  bit-identical",
    ]
    found["repeats_bit_identical"] = False
    main.main(words)
    assert capsys.readouterr().out.endswith("  repeats  differ\n")


# --- agreement -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fresh", "claims", "percent"),
    [(0, 0, 0.0), (0, 7, 0.0), (7, 7, 100.0), (1, 3, 33.3), (2, 3, 66.6), (1999, 2000, 99.9)],
)
def test_percentages(fresh: int, claims: int, percent: float) -> None:
    share = Share(claims, {"fresh": fresh, "missing": claims - fresh})
    assert share.percent == percent
    assert share.to_json() == {
        "claims": claims, "percent": percent, "fresh": fresh, "missing": claims - fresh,
    }  # fmt: skip


def test_colours_fall_with_the_percentage() -> None:
    bounds = [bound for bound, _ in COLOURS]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == 0.0


def test_a_share_in_words() -> None:
    share = Share(26, {"fresh": 24, "contradicting": 0, "stale": 1, "missing": 1})
    found = agreement_command.describe_share("fp8", share)
    assert found.split() == ["fp8", "92.3", "%", "of", "26", "1", "stale,", "1", "missing"]
    assert show_scopes({}) == ""
    assert show_scopes({"stand-in": 4}) == " · stand-in"
    assert show_scopes({"stand-in": 400, "true size": 9}) == " · 400 stand-in, 9 true size"


@pytest.mark.parametrize(
    ("days", "percent", "text"),
    [
        (0, 0.0, ""), (90, None, ""), (0, 100.0, ""),
        (-1, None, "--max-age-days -1"), (0, -0.1, "--fail-under -0.1"),
        (0, 100.1, "--fail-under 100.1"),
    ],
)  # fmt: skip
def test_numbers_of_agreement_at_their_edges(days: int, percent: float | None, text: str) -> None:
    if not text:
        agreement_command.check_numbers(days, percent)
        return
    with pytest.raises(UsageError, match=text):
        agreement_command.check_numbers(days, percent)


# --- command lines ---------------------------------------------------------------------------


def make_bench_words(**changes: Any) -> argparse.Namespace:
    plain = {"model_path": "x", "row": None, "synthetic": None, "compare": None, "repeats": 6,
             "baseline": None, "output_path": None, "tolerance": None}  # fmt: skip
    return argparse.Namespace(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, ""),
        ({"repeats": 5}, "--repeats 5: expected 6 or more"),
        ({"model_path": None}, "found none of them"),
        ({"row": ["a"]}, "both --model-path and --row"),
        ({"tolerance": 1.2}, "--tolerance is for"),
        ({"tolerance": 1.2, "baseline": "x"}, ""),
        ({"model_path": None, "compare": ["a", "b"], "tolerance": 1.2}, ""),
        (
            {"model_path": None, "compare": ["a", "b"], "baseline": "x"},
            "--compare measures nothing",
        ),
        ({"model_path": None, "compare": ["a", "b"], "output_path": "x"}, "--compare measures"),
    ],
)
def test_what_bench_is_asked_for(changes: dict[str, Any], text: str) -> None:
    if not text:
        bench_command.check_arguments(make_bench_words(**changes))
        return
    with pytest.raises(UsageError, match=text):
        bench_command.check_arguments(make_bench_words(**changes))


@pytest.mark.parametrize("tolerance", [1.0, 1.5])
def test_the_smallest_tolerance_is_one(tolerance: float) -> None:
    result = make_result()
    assert bench_gate.compare_results([result], [result], tolerance)
    with pytest.raises(UsageError, match="expected 1 or more"):
        bench_gate.compare_results([result], [result], math.nextafter(1.0, 0))
    with pytest.raises(UsageError, match="expected 1 or more"):
        bench_gate.compare_results([result], [result], math.inf)


def test_loosenings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert thresholds.tell_loosened([], "HEAD", True) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert thresholds.tell_loosened(["a"], "HEAD", True) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_page_keeps_both_sides_of_working_memory() -> None:
    result = make_result()
    part = result["components"]["transformer"]
    part["memory"] = {**make_memory(2**25, 2**24, 2**20), "counted_by": "allocator"}
    part["memory"]["quantized"]["working"] = 2**19
    found = bench_pages.describe_result(result, SimpleNamespace(id="row@cpu"), "")  # type: ignore[arg-type]
    assert found["memory"] == [
        ["transformer weights", 2**25, 2**24], ["transformer step memory", 2**20, 2**19],
    ]  # fmt: skip
    step = next(timing for timing in found["timings"] if timing[0] == "transformer step")
    assert step[1:3] == [10.0, 8.0]
    assert step[4] < step[3] < step[5]
    assert step[6:] == [part["step"]["detectable"], "faster"]
    assert (found["counted"], found["clock"]) == ("allocator", "wall clock")


def test_each_unmatched_result_is_told_once_and_on_its_side() -> None:
    one, two = make_result("one@cpu"), make_result("two@cpu")
    elsewhere = make_result("two@cpu", "Another CPU")

    def compare(kept: list[Any], measured: list[Any]) -> list[str]:
        with pytest.raises(UsageError) as caught:
            bench_gate.compare_results(kept, measured)
        return str(caught.value).splitlines()

    [line] = compare([one], [one, two])
    assert line.endswith("the kept results do not have it; measure and keep it first")
    [line] = compare([one, two], [one])
    assert line == "two@cpu (tiny): kept for Some CPU, 1 thread and not measured now: partial"
    [line] = compare([one, elsewhere], [one, two])
    assert "kept for Another CPU, measured on Some CPU, 1 thread" in line
    assert bench_gate.compare_results([one, elsewhere], [one])
    with pytest.raises(UsageError, match="nothing was measured"):
        bench_gate.compare_results([one], [])
