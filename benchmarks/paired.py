"""Two ways to compute one thing, timed in turn, and the bar on their ratio.

The bars of int8 and 4-bit layers are on a BF16 product by vector units, as on the processor that they
were set on. Matrix units for BF16 (AMX) make that product quicker, and nothing that stands beside it.
There the ratio is told and not judged; with `ONEDNN_MAX_CPU_ISA=AVX10_1_512`, which leaves those units
alone, it is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from quantmatrix.hardware.probe import read_instruction_sets

Pairs = list[tuple[float, float]]


def time_pairs(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Pairs:
    """(our, their) CPU seconds, in turn, after one warm-up of each."""
    pairs = []
    for _ in range(rounds + 1):
        seconds = []
        for run in (ours, theirs):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        pairs.append((seconds[0], seconds[1]))
    return pairs[1:]


def judge(benchmark: Any, pairs: Pairs, limit: float) -> None:
    """Note ratios and the time of BF16, and hold the least of each side to the limit."""
    best = [min(side) for side in zip(*pairs, strict=True)]
    ratio = best[0] / best[1]
    benchmark.extra_info["ratio_to_bf16"] = round(ratio, 3)
    benchmark.extra_info["median_of_pairs"] = round(statistics.median(a / b for a, b in pairs), 3)
    benchmark.extra_info["bf16_ms"] = round(best[1] * 1e3, 1)
    if "amx_bf16" in read_instruction_sets() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        pytest.skip(
            f"{ratio:.3f} of BF16 by matrix units (AMX): the bar of {limit} is without them"
        )
    assert ratio <= limit, pairs
