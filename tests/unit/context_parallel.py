"""What each process of tests/unit/test_parallel.py does: generate, and keep what rank 0 saw."""

from __future__ import annotations

import sys
from typing import Any

import torch

from quantmatrix import parallel
from quantmatrix.layers import QuantizedLinear
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


if __name__ == "__main__":
    asked = read(sys.argv[2:])
    with parallel.join(asked) as (rank, found, pipe):
        seen = watch(asked, found, pipe)
        if rank == 0:
            torch.save(seen, sys.argv[1])
