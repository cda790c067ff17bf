"""Plans of checkpoints: the committed table says what is planned now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix.measure.plans import SHOWN, list_requests, plan_cell, plan_checkpoint
from quantmatrix.measure.workbench import Workbench
from quantmatrix.proof.plans import COMMAND, FILE, read_plans
from quantmatrix.tables import read

ROOT = Path(__file__).parents[3]
TABLES = read.read(ROOT / "matrix")
SAMPLE = ("fp8-flux-1-tensor-dynamic", "msmodelslim-w8a8", "gguf-flux-1-q4-k")
"""A checkpoint each of one transformer, of two, and of weights in blocks."""


@pytest.mark.parametrize("checkpoint", SAMPLE)
def test_the_committed_table_says_what_is_planned_now(checkpoint: str) -> None:
    known = read_plans(ROOT / "reports" / FILE)
    for line in plan_checkpoint(TABLES, checkpoint):
        [hardware] = line.hardware
        found = known[checkpoint, hardware, line.backend]
        assert replace(found, hardware=line.hardware) == line, f"run {COMMAND}"


def test_a_refusal_has_its_rule_and_a_short_message() -> None:
    cell = next(c for c in TABLES.cells if c.row == "modelopt-nvfp4-flux-1-no-units")
    line = plan_cell(Workbench(TABLES, tiny=True), cell)
    assert line.rule == cell.rule
    assert 20 < len(line.message) <= SHOWN
    assert (line.kernels, line.whole_mib) == ((), 0)


def test_an_offload_of_a_row_is_another_question() -> None:
    row = next(c for c in TABLES.cells if "--dit-layerwise-offload" in c.flags)
    asked = list(list_requests(TABLES, row.checkpoint))
    assert {cell.hardware for cell in asked} == set(TABLES.hardware)
    assert not any("--dit-layerwise-offload" in cell.flags for cell in asked)


def test_settings_that_a_checkpoint_needs_are_kept() -> None:
    asked = list(list_requests(TABLES, "svdq-qwen-image-custom"))
    assert all("--enable-svdquant" in cell.flags for cell in asked)
