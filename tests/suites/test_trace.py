"""Trace: a profiler saw the planned kernel run in every quantized layer, and nothing instead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Job

    from quantmatrix.recorder import Proof
    from quantmatrix.workbench import Workbench


@pytest.mark.check("trace")
def test_trace(job: Job, workbench: Workbench, proof: Proof) -> None:
    from quantmatrix.trace import trace_pipeline

    pipeline = workbench.pipeline(job.request, job.plan)
    census = trace_pipeline(job.request, job.plan, pipeline)
    summary = census.summarize()
    proof.metrics.update({**summary, "layers": len(census.layers)})
    proof.limits.update(
        {"layers": sum(len(list(part.pieces())) for part in job.quantized.values())}
    )
    assert not census.problems, "; ".join(census.problems)
    assert proof.metrics["layers"] == proof.limits["layers"]
    stages = {"encode", "decode", *job.plan.components}
    assert set(summary["stages"]) == stages, "stages of the run"
