"""History of a cell from a repository of three commits: first, better, worse."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from observed import PROVEN, REFUSED, find, observe, observe_run
from tables import write_tables

from quantmatrix.cli.main import main
from quantmatrix.proof import store
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.report import history, render
from quantmatrix.report.history import Version
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix


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
        ({"verdict": "refused", "psnr_db": None}, "worse"),
        ({"psnr_db": 39.5, "step": 0.1}, "worse"),
    ],
)
def test_trend(fields: dict[str, Any], trend: str) -> None:
    assert history.find_trend(version(), version(**fields)) == trend
    assert history.find_trend(None, version(**fields)) == "first"


def test_a_check_that_passes_again_is_better() -> None:
    failed = version(verdict="load: fail")
    assert history.find_trend(failed, version(psnr_db=1.0)) == "better"
    assert history.find_trend(failed, version(verdict="refused")) == "better"
    assert history.find_trend(version(verdict="refused"), version()) == "better"


def commit(root: Path, day: str) -> None:
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "add", "."], check=True)
    when = {"GIT_COMMITTER_DATE": f"{day}T12:00:00Z", "PATH": "/usr/bin:/bin"}
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True, env=when)


def test_versions_of_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    found, skipped = history.read_history(cell, tmp_path)
    assert [(one.date, one.psnr_db, one.trend) for one in found] == [
        ("2026-11-01", 47.0, "first"),
        ("2026-11-02", 49.0, "better"),
        ("2026-11-03", 49.1, "same"),
        ("2026-11-04", 45.0, "worse"),
    ]
    [line] = history.tell_skipped(skipped)
    assert line == "skipped 1 version (2026-11-05): schema: found None, expected 1"
    assert {one.scope for one in found} == {"stand-in"}
    since = f"stand-in: worse since 2026-11-04 ({found[-1].commit[:12]})"
    assert history.say_since(found) == since
    other = find(tables, "fp8-flux-1@cpu+reference")
    assert history.read_history(other, tmp_path) == ([], [])
    assert history.say_since([]) == "no record was ever committed"
    lines, left_out = history.rebuild(tmp_path)
    assert [(one.psnr_db, one.trend) for one in lines[PROVEN]] == [
        (47.0, "first"),
        (49.0, "better"),
        (45.0, "worse"),
    ]
    assert (list(lines), left_out) == ([PROVEN], skipped)
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    assert main(["matrix", "history", PROVEN, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["trend"] for one in told["versions"]] == ["first", "better", "same", "worse"]
    assert (told["notes"], told["skipped"]) == ([line], [vars(one) for one in skipped])
    assert main(["matrix", "history", PROVEN]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_step_of_a_cpu_is_left_out(tables: Matrix) -> None:
    record = observe_at(
        tables, "2026-11-01", 47.0, timings={"step quantized": 1.0, "step bf16": 2.0}
    )
    assert history.read_step(record) is None
    elsewhere = replace(record, cell={**record.cell, "hardware": "h100"})
    assert history.read_step(elsewhere) == 0.5


def observe_at(tables: Matrix, day: str, psnr: float, **fields: Any) -> Evidence:
    """The proven record, made on a day, with an error at the worst step."""
    record = observe_run(tables, find(tables, PROVEN))
    latents = record.checks["latents"]
    worst = {**latents.metrics["worst"], "psnr_db": psnr}
    check = CheckResult("pass", {**latents.metrics, "worst": worst}, latents.limits)
    checks = {**record.checks, "latents": check}
    return replace(record, checks=checks, made=f"{day}T10:00:00Z", commit=f"made-{day}", **fields)


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


def test_a_line_is_added_when_a_record_says_otherwise(tables: Matrix) -> None:
    lines: history.Lines = {}
    for day, psnr in (("2026-11-01", 47.0), ("2026-11-02", 47.3), ("2026-11-03", 47.6)):
        lines = history.update(lines, [observe_at(tables, day, psnr)])
    # held against the last line, so that small steps in one direction are seen, too
    assert [(v.date, v.commit, v.psnr_db, v.trend) for v in lines[PROVEN]] == [
        ("2026-11-01", "made-2026-11-01", 47.0, "first"),
        ("2026-11-03", "made-2026-11-03", 47.6, "better"),
    ]
    again = history.update(lines, [observe_at(tables, "2026-11-04", 47.6)])
    assert again == lines
    assert history.update(lines, []) == lines  # a record that is gone takes no line with it


def test_scopes_are_held_against_themselves(tables: Matrix) -> None:
    known = {PROVEN: [version(scope="true size", psnr_db=60.0)]}
    lines = history.update(known, [observe_at(tables, "2026-11-01", 47.0)])
    assert [(v.scope, v.trend) for v in lines[PROVEN]] == [
        ("true size", "first"),
        ("stand-in", "first"),
    ]


def test_a_table_survives_its_file(tables: Matrix, tmp_path: Path) -> None:
    found = [observe_at(tables, "2026-11-01", 47.0), observe(tables, REFUSED)]
    lines = history.update({}, found)
    path = tmp_path / history.FILE
    path.write_text(history.write_lines(lines))
    assert history.read_lines(path) == lines
    assert lines[REFUSED][0].verdict == "refused"
    assert history.read_lines(tmp_path / "none.csv") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["columns are []", "python -m quantmatrix.report.history"]),
        ("cell,scope\n", ["columns are"]),
        ("HEAD\na@cpu,stand-in,d,c,pass,much,,first\n", [":2:", "much"]),
        ("HEAD\na@cpu,stand-in,d,c,pass,1,,same\n", [":2:", "'same'"]),
        ("HEAD\na@cpu,elsewhere,d,c,pass,1,,first\n", [":2:", "'elsewhere'"]),
        ("HEAD\na@cpu,stand-in\n", [":2:"]),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / history.FILE
    path.write_text(text.replace("HEAD", ",".join(history.COLUMNS)))
    with pytest.raises(history.HistoryError) as caught:
        history.read_lines(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_the_report_keeps_the_table_and_the_page_shows_it(tables: Matrix) -> None:
    past = {PROVEN: [version(scope="stand-in", psnr_db=40.0, date="2026-10-01")]}
    record = observe_at(tables, "2026-11-01", 47.0)
    pages = render.render(tables, {PROVEN: record}, past=past)
    path_lines = pages[history.FILE].decode().splitlines()
    assert path_lines[1:] == [
        f"{PROVEN},stand-in,2026-10-01,c,pass,40.0,0.8,first",
        f"{PROVEN},stand-in,2026-11-01,made-2026-11-01,pass,47.0,,better",
    ]
    script = pages["index.html"].decode().split('<script id="details" type="application/json">')[1]
    shown = json.loads(script.split("</script>")[0])["history"]
    number = [cell.id for cell in tables.cells].index(PROVEN)
    assert shown == {
        str(number): [
            "stand-in: better since 2026-11-01 (made-2026-11)",
            ["2026-11-01", "made-2026-11", 1, "better", "pass", 47.0, None],
            ["2026-10-01", "c", 1, "first", "pass", 40.0, 0.8],
        ]
    }


def test_a_report_that_lacks_a_line_is_told_of(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    reports = tmp_path / "reports"
    store.write(observe_at(tables, "2026-11-01", 47.0), reports / "evidence")
    render.write(reports)
    assert render.check(reports) == []
    first = (reports / history.FILE).read_text()
    store.write(observe_at(tables, "2026-11-02", 42.0), reports / "evidence")
    assert any(
        line.startswith(f"{reports / history.FILE}: differs") for line in render.check(reports)
    )
    render.write(reports)
    assert render.check(reports) == []
    assert (reports / history.FILE).read_text().startswith(first)
