"""Rows of the matrix, quantized beside BF16: layers, step, load, memory (see `quantmatrix.measure.bench.timing`).

    python -m nox -s bench -- benchmarks/test_rows.py --bench-dir reports/benchmarks

pytest-benchmark times the quantized step once more, by its own clock and alone; the comparison with
BF16 is in `extra_info`, and whole, with its samples, in the cell's file below `--bench-dir`. There is
no bar here: "slower" is a result. What got worse is found by `quantmatrix bench --compare`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from quantmatrix.measure.bench.pairs import bench_cell
from quantmatrix.measure.bench.timing import Part
from quantmatrix.measure.workbench import Workbench
from quantmatrix.proof.bench_results import list_comparisons
from quantmatrix.tables.rows import Cell


def test_row(
    row: Cell, benchmark: Any, workbench: Workbench, keep_result: Any, request: Any
) -> None:
    timed = []

    def watch(part: Part) -> None:
        if not timed:  # pytest-benchmark times one thing per test: the first component's step
            timed.append(part.name)
            with torch.no_grad():
                benchmark.pedantic(partial(call_and_wait, part), rounds=5, warmup_rounds=1)

    repeats = request.config.getoption("bench_repeats")
    result = bench_cell(workbench, row, repeats, watch=watch)
    keep_result(result)
    benchmark.extra_info |= {
        "what": result["what"],
        "device": result["device"],
        "clock": result["settings"]["clock"],
    }
    for name, timing in list_comparisons(result):
        said = {key: timing[key] for key in ("ratio", "low", "high", "detectable", "verdict")}
        benchmark.extra_info[name] = said
    for name, part in result["components"].items():
        benchmark.extra_info[f"{name} memory"] = part["memory"]


def call_and_wait(part: Part) -> None:
    """One quantized step, until the device is done."""
    part.step("quantized")
    if part.device != "cpu":
        torch.get_device_module(part.device.partition(":")[0]).synchronize()
