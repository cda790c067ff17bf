"""A model in full precision through our loader beside the same files through diffusers.

The same bits come out, and the time of a forward is the same within 2 %: the harness does not tax its
baseline. Both run in turn in one process, on one thread (or on the GPU that is there); the ratio is
that of `quantmatrix.proof.ratios`, and its interval must reach the bar, so noise cannot fail it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix import load_transformer
from quantmatrix.measure.bench.synthetic import make_inputs
from quantmatrix.proof.ratios import compare_pairs
from quantmatrix.request import Request

LIMIT = 1.02
ROUNDS = 40
MODELS = {"flux-1": "black-forest-labs/FLUX.1-dev", "z-image": "Tongyi-MAI/Z-Image-Turbo"}


@pytest.mark.parametrize("model", MODELS)
def test_full_precision_costs_nothing(benchmark: Any, model: str) -> None:
    import diffusers

    from quantmatrix import api
    from quantmatrix.runtime.plan import types

    device = "cuda" if torch.cuda.is_available() else "cpu"
    request = Request(model_path=MODELS[model], tiny=True)
    plan = api.plan(request)
    assert isinstance(plan, types.Plan)
    ours = load_transformer(MODELS[model], tiny=True, device=device, dtype=torch.bfloat16)
    theirs = getattr(diffusers, type(ours).__name__).from_pretrained(
        Path(plan.components["transformer"].checkpoint.files[0]).parent, dtype=torch.bfloat16
    )
    theirs.to(device).eval()
    inputs = make_inputs(model, ours, device, torch.bfloat16, size="tiny")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            one, other = (flatten(m(**inputs)[0]) for m in (ours, theirs))
            assert torch.equal(one, other)
            pairs = [time_pair(ours, theirs, inputs, turn) for turn in range(ROUNDS)]
            benchmark.pedantic(lambda: ours(**inputs), rounds=5)
    finally:
        torch.set_num_threads(threads)
    found = compare_pairs([b for _, b in pairs], [a for a, _ in pairs])
    benchmark.extra_info |= {"ratio": found.ratio, "low": found.low, "high": found.high}
    assert found.low <= LIMIT, found


def flatten(output: Any) -> torch.Tensor:
    """The first tensor of a transformer's output."""
    first: torch.Tensor = output[0] if isinstance(output, list) else output
    return first


def time_pair(ours: Any, theirs: Any, inputs: dict[str, Any], turn: int) -> tuple[float, float]:
    """(our, their) seconds of a forward; who begins changes from round to round.

    CPU time, or with a GPU, which a processor may wait for asleep, the clock's.
    """
    seconds = {}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for model in (ours, theirs) if turn % 2 else (theirs, ours):
        start = clock()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[id(model)] = clock() - start
    return seconds[id(ours)], seconds[id(theirs)]
