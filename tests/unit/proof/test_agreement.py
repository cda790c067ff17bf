"""Agreement of claims and evidence: shares, badge, burn-down list, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from observed import PROVEN, REFUSED, observe
from tables import CASES, write_tables

from quantmatrix.cli.main import main
from quantmatrix.proof import states
from quantmatrix.proof import store as records
from quantmatrix.proof.agreement import Share, count_lives, measure, write_badge
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.proof.scopes import Standing
from quantmatrix.report import render
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

FAILING = "fp8-flux-2@cpu"


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


@pytest.fixture
def evidence(tables: Matrix) -> dict[str, Evidence]:
    found = {name: observe(tables, name) for name in (PROVEN, REFUSED)}
    return {**found, FAILING: observe(tables, FAILING, fails="generate")}


def test_shares(tables: Matrix, evidence: dict[str, Evidence]) -> None:
    found = measure(tables, evidence)
    assert len(tables.cells) == 8  # two of them only planned
    assert found.overall == Share(6, {"fresh": 2, "contradicting": 1, "stale": 0, "missing": 3})
    assert found.overall.percent == 33.3
    assert found.by_family["nunchaku-svdq"].percent == 100.0
    assert found.by_family["fp8"].to_json() == {
        "claims": 5, "percent": 20.0, "fresh": 1, "contradicting": 1, "stale": 0, "missing": 3,
    }  # fmt: skip
    assert found.by_hardware["b200"] == Share(0, dict.fromkeys(found.overall.lives, 0))
    assert found.by_hardware["b200"].percent == 0.0
    assert sum(share.claims for share in found.by_hardware.values()) == found.overall.claims


def test_kernels_that_were_compiled_and_never_run_prove_no_claim(tables: Matrix) -> None:
    compiled = {c.id: Standing("proven", "", "compiled") for c in tables.cells}
    found = measure(tables, {}, standings=compiled)
    assert (found.overall.percent, found.by_scope) == (0.0, {"compiled": 6})
    assert {task.life for task in found.tasks} == {"missing"}
    assert found.tasks[0].reason == "its kernels were compiled, nothing was run"
    ran = {c.id: Standing("proven", "", "stand-in") for c in tables.cells}
    assert measure(tables, {}, standings=ran).overall.percent == 100.0


def test_a_percentage_is_never_rounded_up() -> None:
    assert count_lives(["fresh"] * 1999 + ["missing"]).percent == 99.9


def test_burn_down_names_contradictions_first(
    tables: Matrix, evidence: dict[str, Evidence]
) -> None:
    found = measure(tables, evidence)
    assert [task.life for task in found.tasks] == ["contradicting", *["missing"] * 3]
    assert (found.tasks[0].cell, found.tasks[0].reason) == (FAILING, "generate: too far")


def test_old_evidence_is_due_and_keeps_its_state(
    tables: Matrix, evidence: dict[str, Evidence]
) -> None:
    young, old = (
        measure(tables, evidence, today=day) for day in (date(2026, 11, 24), date(2027, 11, 24))
    )
    assert not young.due
    assert old.due == dict.fromkeys((PROVEN, REFUSED), "366 days old, the limit is 90")
    assert (old.overall, old.tasks) == (young.overall, young.tasks)


def test_a_claimed_failure_agrees_until_it_works(tmp_path: Path) -> None:
    words = {"claim": "failing", "rule": "latents", "notes": "codes are read wrongly"}
    tables = read.read(write_tables(tmp_path / "failing", [{**CASES[0], **words}]))

    def life(record: Evidence | None) -> tuple[str, str]:
        found = measure(tables, {PROVEN: record} if record else {})
        task = next((task for task in found.tasks if task.cell == PROVEN), None)
        return (task.life, task.reason) if task else ("fresh", "")

    outdated = "latents: claimed to fail, but it passes: change the claim"
    assert life(observe(tables, PROVEN, fails="latents")) == ("fresh", "")
    assert life(observe(tables, PROVEN)) == ("contradicting", outdated)
    assert life(observe(tables, PROVEN, fails="load")) == ("contradicting", outdated)
    record = observe(tables, PROVEN, fails="latents")
    both = replace(record, checks={**record.checks, "load": CheckResult("fail", message="torn")})
    assert life(both) == ("contradicting", "load: torn; latents: too far")
    less = replace(record, checks={"load": record.checks["load"]})
    assert life(less)[0] == life(None)[0] == "missing"


@pytest.mark.parametrize("claim", ["failing", "expected", "planned", "refused", "works"])
def test_a_failed_check_is_claimed_by_a_failing_row_alone(tables: Matrix, claim: str) -> None:
    record = observe(tables, PROVEN, fails="latents")
    claimed = replace(record, cell={**record.cell, "claim": claim, "rule": "latents"})
    assert states.fails_as_claimed(claimed) == (claim == "failing")


def test_badge_stands_still(tables: Matrix, evidence: dict[str, Evidence]) -> None:
    badge = json.loads(write_badge(tables, evidence))
    assert badge == {
        "schemaVersion": 1,
        "label": "claims proven",
        "message": "33.3 % · stand-in",
        "color": "orange",
    }
    assert json.loads(write_badge(tables, {}))["color"] == "red"
    assert render.render(tables, evidence)["badge.json"] == write_badge(tables, evidence)


def test_command(
    tables: Matrix,
    evidence: dict[str, Evidence],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    folder = tmp_path / "reports" / "evidence"
    for name in (PROVEN, REFUSED):
        records.write(evidence[name], folder)
    words = ["agreement", "--today", "2026-11-24"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overall"]["percent"] == 33.3
    assert found["scopes"] == {"stand-in": 2}
    assert found["judged_against"]["today"] == "2026-11-24"
    assert found["runs"]["h100"].startswith("pytest --pyargs quantmatrix.suites --hardware h100 ")
    assert main([*words, "--fail-under", "33.3"]) == 0
    assert main([*words, "--fail-under", "33.4"]) == 1
    capsys.readouterr()
    assert main(["agreement", "--today", "2027-11-24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["overall"]["stale"], sorted(found["due"])) == (0, sorted([PROVEN, REFUSED]))
    assert main(["agreement", "--today", "2027-11-24"]) == 0
    assert "2 fresh records are older than 90 days" in capsys.readouterr().out
    (tmp_path / "reports" / "limits.csv").write_text("kind,model\n")
    assert main(words) == 1
    assert "limits.csv:1: expected the columns" in capsys.readouterr().err
    (tmp_path / "reports" / "limits.csv").unlink()
    assert main(["agreement", "--today", "soon"]) == 2
    for wrong in (["--fail-under", "nan"], ["--fail-under", "101"], ["--max-age-days", "-1"]):
        assert main([*words, *wrong]) == 2, wrong
    records.write(evidence[FAILING], folder)
    capsys.readouterr()
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "contradicting on cpu: 1" in text
    assert f"  {FAILING} · stand-in: generate: too far" in text
    assert "  stand-in             2 with random weights at a tiny size" in text


def test_the_command_lists_a_few_cells_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**CASES[1], "id": f"row-{number}", "flags": f"--seed {number}"} for number in range(12)
    ]
    write_tables(tmp_path / "matrix", rows)
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    assert main(["agreement"]) == 0
    assert "and 2 more: --all" in capsys.readouterr().out
    assert main(["agreement", "--all"]) == 0
    assert "row-11@cpu: no run yet" in capsys.readouterr().out
