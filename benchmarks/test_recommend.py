"""`quantmatrix recommend` as a process of its own: Python's start, imports, tables, answers.

The bar is on processor time, the least of eight runs: others of a busy machine do not count, and the command waits
for nothing but files.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import pytest

LIMIT = 0.5
"""Seconds."""
QUESTIONS = [("h200", "flux-1"), ("rtx-4090", "wan-2-2"), ("cpu", "qwen-image")]


def take() -> float:
    """Processor time of all children until now, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("hardware", "model"), QUESTIONS)
def test_an_answer_takes_half_a_second(benchmark: Any, hardware: str, model: str) -> None:
    command = [sys.executable, "-m", "quantmatrix", "recommend", "--hardware", hardware]
    seconds = []

    def ask() -> None:
        before = take()
        subprocess.run([*command, "--model", model], check=True, capture_output=True)
        seconds.append(take() - before)

    benchmark.pedantic(ask, rounds=8)
    benchmark.extra_info["cpu_seconds"] = round(min(seconds), 3)
    assert min(seconds) <= LIMIT, seconds
