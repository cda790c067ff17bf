"""One generation alone and in two processes: started as a program, this file is one of the two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantmatrix import parallel
from quantmatrix.layers import QuantizedLinear
from quantmatrix.pipeline import build_pipeline
from quantmatrix.request import Request
from quantmatrix.run import generate


def read(words: list[str]) -> Request:
    return Request.from_words(["--device", "cpu", *words, "--tiny", "--prompt", "a fox"])


def watch(request: Request, made: Any, pipeline: Any) -> dict[str, Any]:
    """Latents, and how many rows the quantized layers have seen in how many calls."""
    rows = []
    for name in made.components:
        for module in getattr(pipeline, name).modules():
            if isinstance(module, QuantizedLinear):
                module.register_forward_pre_hook(
                    lambda _, x: rows.append(x[0].numel() // x[0].shape[-1])
                )
    run = generate(request, made=made, pipeline=pipeline)
    return {"latents": run.latents, "rows": sum(rows), "calls": len(rows)}


def run_alone(words: Sequence[str]) -> dict[str, Any]:
    """What this process sees."""
    request = read(list(words))
    made = parallel.find_plan(request)
    return watch(request, made, build_pipeline(made))


def run_together(target: Path, words: Sequence[str]) -> dict[str, Any]:
    """What rank 0 of two processes saw, kept in a file meanwhile."""
    done = subprocess.run(
        [*parallel.name_launcher(2), __file__, str(target), *words, "--nproc-per-node", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(target))


def check_shared(one: dict[str, Any], two: dict[str, Any], most: float) -> None:
    """Both called the same layers, two processes on fewer rows each, and the latents agree."""
    assert two["calls"] == one["calls"] > 0
    assert two["rows"] < 0.8 * one["rows"], "nothing was shared"
    assert len(one["latents"]) > 1
    check_latents(one["latents"], two["latents"], most)


def check_latents(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor], most: float) -> None:
    """The distance of each step's latents, relative to their norm, is at most that."""
    for alone, shared in zip(one, two, strict=True):
        distance = float((alone.float() - shared.float()).norm() / alone.float().norm())
        assert distance <= most, distance


if __name__ == "__main__":
    asked = read(sys.argv[2:])
    with parallel.join(asked) as (rank, found, pipe):
        seen = watch(asked, found, pipe)
        if rank == 0:
            torch.save(seen, sys.argv[1])
