"""The check `load`: a whole quantized pipeline is held against the model that its row names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quantmatrix.measure.workbench import Workbench
from quantmatrix.suites import test_load as suite
from quantmatrix.suites.conftest import Job
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell

TABLES = read.read()


def find_job(row: str, bench: Workbench) -> tuple[Cell, Job]:
    cell = next(c for c in TABLES.cells if c.row == row and c.backend in ("", "reference"))
    request = bench.request(cell)
    return cell, Job(cell, request, bench.plan(request))


def test_the_rows_own_model_is_the_witness_where_the_request_names_none() -> None:
    """The classes of TI2V are those of the text-to-video model, which a plan takes for its base."""
    bench = Workbench(TABLES)
    cell, job = find_job("msmodelslim-w4a4-dynamic-ti2v", bench)
    row = TABLES.checkpoints[cell.checkpoint]
    assert job.plan.components["transformer"].base.reference != row.base
    found = suite.examine_beside(bench, job, "transformer", row.base)
    assert found.verdict == "agrees"
    assert found.to_json()["base"] == row.base
    assert suite.judge_witness(found, tiny=True)["layers"] == len(found.findings) > 0


class Disagreeing:
    verdict = "disagrees"

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict}


def test_a_witness_that_disagrees_fails_a_stand_in() -> None:
    with pytest.raises(AssertionError):
        suite.judge_witness(Disagreeing(), tiny=True)
    assert suite.judge_witness(Disagreeing(), tiny=False) == {"verdict": "disagrees"}


def test_a_text_encoder_without_quantized_layers_fails_its_row() -> None:
    bench = Workbench(TABLES)
    _, job = find_job("text-encoder-fp8-scaled-flux-1", bench)
    [(name, part)] = job.plan.encoders.items()
    assert (name, len(part.layers) > 0) == ("text_encoder_2", True)
    held = suite.judge_model(job, part, suite.load_encoder(job, part))
    assert held["layers"]["found"] == len(part.layers)
    with pytest.raises(AssertionError, match="no layer of it is quantized"):
        suite.load_encoder(job, replace(part, layers={}))
