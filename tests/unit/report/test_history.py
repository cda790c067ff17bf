"""History of a cell from a repository of three commits: first, better, worse."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from observed import PROVEN, find, observe_run
from tables import write_tables

from quantmatrix.proof import store
from quantmatrix.proof.record import CheckResult
from quantmatrix.report import history
from quantmatrix.report.history import Version
from quantmatrix.tables import read


def version(**fields: Any) -> Version:
    known = {"commit": "c", "date": "d", "scope": "true size", "verdict": "pass"}
    return Version(**{**known, "psnr_db": 40.0, "step": 0.8, **fields})


@pytest.mark.parametrize(
    ("fields", "trend"),
    [
        ({}, "same"),
        ({"psnr_db": 40.49}, "same"),
        ({"psnr_db": 40.5}, "better"),
        ({"psnr_db": 39.5}, "worse"),
        ({"step": 0.823}, "same"),
        ({"step": 0.825}, "worse"),
        ({"step": 0.775}, "better"),
        ({"step": None, "psnr_db": None}, "same"),
        ({"verdict": "latents: fail", "psnr_db": 60.0}, "worse"),
    ],
)
def test_trend(fields: dict[str, Any], trend: str) -> None:
    assert history.find_trend(version(), version(**fields)) == trend
    assert history.find_trend(None, version(**fields)) == "first"


def test_a_check_that_passes_again_is_better() -> None:
    assert history.find_trend(version(verdict="load: fail"), version(psnr_db=1.0)) == "better"


def commit(root: Path, day: str) -> None:
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "add", "."], check=True)
    when = {"GIT_COMMITTER_DATE": f"{day}T12:00:00Z", "PATH": "/usr/bin:/bin"}
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True, env=when)


def test_versions_of_a_record(tmp_path: Path) -> None:
    tables = read.read(write_tables(tmp_path / "matrix"))
    cell = find(tables, PROVEN)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    record = observe_run(tables, cell)
    evidence = tmp_path / "reports" / "evidence"
    store.write(record, evidence)
    commit(tmp_path, "2026-11-01")
    latents = record.checks["latents"]
    for day, psnr in (("2026-11-02", 49.0), ("2026-11-03", 49.1), ("2026-11-04", 45.0)):
        worst = {**latents.metrics["worst"], "psnr_db": psnr}
        check = CheckResult("pass", {**latents.metrics, "worst": worst}, latents.limits)
        store.write(replace(record, checks={**record.checks, "latents": check}), evidence)
        commit(tmp_path, day)
    path = evidence / "cpu" / "fp8-flux-1+decode.json"
    path.write_text("{}")
    commit(tmp_path, "2026-11-05")
    found, unread = history.read_history(cell, tmp_path)
    assert [(one.date, one.psnr_db, one.trend) for one in found] == [
        ("2026-11-01", 47.0, "first"),
        ("2026-11-02", 49.0, "better"),
        ("2026-11-03", 49.1, "same"),
        ("2026-11-04", 45.0, "worse"),
    ]
    assert unread == 1
    assert {one.scope for one in found} == {"stand-in"}
    since = f"stand-in: worse since 2026-11-04 ({found[-1].commit[:12]})"
    assert history.say_since(found) == since
    other = find(tables, "fp8-flux-1@cpu+reference")
    assert history.read_history(other, tmp_path) == ([], 0)
    assert history.say_since([]) == "no record was ever committed"
