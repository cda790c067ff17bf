"""Cells of a job as its summary has them, and programs of others that may be used instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from observed import PROVEN, REFUSED, observe
from tables import write_tables

from quantmatrix.proof.record import Evidence
from quantmatrix.report import explain, job_summary
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

FAILING = "fp8-flux-1@h100+decode"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return read.read(write_tables(tmp_path_factory.mktemp("project") / "matrix"))


def test_cells_of_a_job(tables: Matrix) -> None:
    def record(name: str, digest: str = "1", **given: Any) -> Evidence:
        return replace(observe(tables, name, **given), latents_digest=digest)

    before = {PROVEN: record(PROVEN), REFUSED: record(REFUSED), FAILING: record(FAILING)}
    after = {
        PROVEN: record(PROVEN, "2"),
        REFUSED: record(REFUSED),
        FAILING: record(FAILING, fails="latents"),
        "fp8-flux-2@cpu": record("fp8-flux-2@cpu"),
    }
    found = job_summary.list_cells(tables, before, after)
    assert [(one.cell, one.before, one.now, one.reason, one.changed) for one in found] == [
        (PROVEN, "proven · stand-in", "proven · stand-in", "other latents than before", True),
        (FAILING, "proven · stand-in", "failing · stand-in", "latents: too far", True),
        ("fp8-flux-2@cpu", "unproven", "proven · stand-in", "", True),
        (REFUSED, "refused · stand-in", "refused · stand-in", "", False),
    ]
    same = job_summary.list_cells(tables, after, after)
    assert [one.changed for one in same] == [False] * 4
    assert [one.cell for one in same] == [PROVEN, FAILING, "fp8-flux-2@cpu", REFUSED]
    assert job_summary.to_json(same[-1:]) == [
        {
            "cell": REFUSED, "before": "refused · stand-in", "now": "refused · stand-in",
            "reason": "", "changed": False,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("length", [300, 301])
def test_reasons_are_cut(length: int, tables: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    today = SimpleNamespace(reason="x" * length + "\nmore", label="failing")
    monkeypatch.setattr(job_summary, "stand", lambda *_: today)
    [one] = job_summary.list_cells(tables, {}, {PROVEN: observe(tables, PROVEN)})
    assert one.reason == "x" * 300
    assert len(one.line[3]) == 300


def test_other_programs_that_may_be_used(
    tables: Matrix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cell(checkpoint: str, runtime: str) -> Any:
        name = f"{checkpoint}@cpu~{runtime}"
        return SimpleNamespace(id=name, checkpoint=checkpoint, hardware="cpu", runtime=runtime)

    names = ("said", "silent", "refuses", "works", "against")
    cells = [cell("c", name) for name in names] + [cell("d", "works")]
    states = {"works": "works", "refuses": "refuses"}

    def find_statements(runtime: str, checkpoint: str) -> list[Any]:
        one = SimpleNamespace(says="refuses", source="http://no")
        two = SimpleNamespace(says="works", source="http://yes")
        return {"said": [one, two], "against": [one], "refuses": [two]}.get(runtime, [])

    records = {f"c@cpu~{n}": SimpleNamespace(scope="stand-in", command=f"run {n}") for n in states}
    asked = object.__new__(explain.Explainer)
    asked.tables = SimpleNamespace(runtime_cells=cells, find_statements=find_statements)  # type: ignore[assignment]
    asked.others, asked.code = records, None  # type: ignore[assignment]
    monkeypatch.setattr(
        explain.columns,
        "explain_state",
        lambda cell, *_: (states.get(cell.runtime, explain.columns.UNPROVEN), ""),
    )
    found = asked.find_runtimes("c", "cpu")
    assert [(one.cell, one.state, one.scope, one.commands) for one in found] == [
        ("c@cpu~works", "works", "stand-in", ("run works",)),
        (
            "c@cpu~said",
            "documented: http://yes",
            "",
            ("quantmatrix run-column --runtime said --hardware cpu --checkpoint c",),
        ),
    ]
    assert {one.how for one in found} == {"other runtime"}
    assert asked.find_runtimes("c", "h100") == []
