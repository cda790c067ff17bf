"""Trace: a profiler saw the planned kernel run in every quantized layer, and nothing instead of it.

One denoising step calls every layer of a transformer, and of the text encoders before it, so one is
profiled; where two experts share the steps, the third is the first of the second's. A layer that no step
called is an error, so too few steps would not go unnoticed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.suites.conftest import Job

STEPS = {1: 1, 2: 3}
"""Denoising steps by number of transformers."""


@pytest.mark.check("trace")
def test_trace(job: Job, workbench: Workbench, proof: Proof) -> None:
    from quantmatrix.measure.trace import trace_pipeline

    short = replace(job.request, num_inference_steps=STEPS[len(job.plan.components)])
    pipeline = workbench.pipeline(job.request, job.plan)
    census = trace_pipeline(short, job.plan, pipeline)
    summary = census.summarize()
    proof.metrics.update({**summary, "layers": len(census.layers)})
    parts = [*job.quantized.values(), *job.plan.encoders.values()]
    proof.limits.update({"layers": sum(len(list(part.pieces())) for part in parts)})
    assert not census.problems, "; ".join(census.problems)
    assert proof.metrics["layers"] == proof.limits["layers"]
    stages = {"encode", "decode", *job.plan.components}
    assert set(summary["stages"]) == stages, "stages of the run"
