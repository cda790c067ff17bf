"""Executed equals planned, told from records and from JUnit files, with a code for each difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import shards
from tables import write_tables

from quantmatrix.cli import main
from quantmatrix.exit_codes import CLAIM_VIOLATED, NOT_EXECUTED, NOTHING_COLLECTED
from quantmatrix.harness import completeness
from quantmatrix.proof import store
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence, describe_cell
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

GOOD = "row-1@cpu+reference"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project."""
    folder = tmp_path_factory.mktemp("project")
    shards.make_project(folder)
    return folder


@pytest.fixture
def tables(project: Path) -> Matrix:
    """Its tables."""
    return read.read(project / "matrix")


@pytest.fixture
def check(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`quantmatrix evidence check`, on the project's tables."""
    monkeypatch.setattr(read, "tables_folder", lambda: project / "matrix")
    return lambda *words: main.main(["evidence", "check", *map(str, words)])


def fill(tables: Matrix, folder: Path, **verdicts: str) -> Path:
    """Records of every cell; a keyword `row_check` changes a verdict, or leaves it out."""
    for cell in tables.cells:
        results = {}
        for name in cell.checks:
            verdict = verdicts.get(f"{cell.row.replace('-', '')}_{name}", "pass")
            if verdict:
                results[name] = CheckResult(verdict, message="no" if verdict == "fail" else "")
        if results:
            record = Evidence(describe_cell(cell, tables), results)
            store.write(sign(record, tables.hardware[cell.hardware]), folder)
    return folder


@pytest.mark.parametrize(
    ("verdicts", "code", "lines"),
    [
        ({}, 0, []),
        (
            {"row2_latents": "fail"},
            CLAIM_VIOLATED,
            [f"claim violated: row-2@cpu+{name} (latents)" for name in ("reference", "decode")],
        ),
        (
            {"row2_latents": ""},
            NOT_EXECUTED,
            [f"row not executed: row-2@cpu+{name} (latents)" for name in ("reference", "decode")],
        ),
        (
            {"row2_latents": "", "row2_load": "", "row3_load": "fail"},
            NOT_EXECUTED,
            [
                "row not executed: row-2@cpu+reference (load, latents)",
                "row not executed: row-2@cpu+decode (load, latents)",
                "claim violated: row-3@cpu+reference (load)",
                "claim violated: row-3@cpu+decode (load)",
            ],
        ),
    ],
)
def test_records(
    verdicts: dict[str, str],
    code: int,
    lines: list[str],
    tables: Matrix,
    tmp_path: Path,
    check: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = fill(tables, tmp_path, **verdicts)
    assert check(folder, "--planned", "cpu") == code
    assert capsys.readouterr().out.splitlines() == [*lines, "12 cells were planned"]
    assert check(folder, "--planned", "cpu", "--json") == code
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["exit_code"], found["planned"]) == (code == 0, code, 12)


def test_checks_that_are_not_looked_at_may_be_missing(
    tables: Matrix, tmp_path: Path, check: Callable[..., int]
) -> None:
    folder = fill(tables, tmp_path, row2_latents="")
    assert check(folder, "--planned", "cpu", "--check", "load") == 0
    assert check(folder, "--planned", "cpu", "--check", "latents") == NOT_EXECUTED
    assert check(folder, "--planned", "cpu", "--check", "lattens") == 2


def test_what_nobody_planned_is_named(
    tables: Matrix, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows"
    rows.write_text("\n".join(cell.id for cell in tables.cells[:-1]))
    assert check(fill(tables, tmp_path / "found"), "--planned", rows) == 1
    assert "not planned: row-5@cpu+decode (latents, load)" in capsys.readouterr().out


def test_nothing_executed_is_no_success(
    tables: Matrix, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "empty", "--planned", "cpu") == NOTHING_COLLECTED
    assert "nothing collected" in capsys.readouterr().out
    # nor is a plan of nothing
    assert check(fill(tables, tmp_path / "found"), "--planned", "b200") == NOTHING_COLLECTED
    assert check(tmp_path / "none", "--planned", "cpu") == 2
    assert check(tmp_path / "empty", "--planned", "b201") == 2


@pytest.mark.parametrize(
    ("fault", "missing", "failed"),
    [
        ("", [], []),
        ("wrong", [], [GOOD]),
        ("skip", [GOOD], []),
        ("media", [GOOD], []),
    ],
)
def test_junit_of_a_run(
    fault: str,
    missing: list[str],
    failed: list[str],
    project: Path,
    tmp_path: Path,
    check: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, rows = tmp_path / "junit.xml", tmp_path / "rows"
    words = ["-p", "no:xdist", "--backend", "reference", f"--junit-xml={path}"]
    code, _ = shards.run(project, None, *words, fault=f"{fault} {GOOD}")
    rows.write_text("\n".join(f"row-{i}@cpu+reference" for i in range(shards.COUNT)))
    found = check(path, "--planned", rows, "--json")
    said = json.loads(capsys.readouterr().out)
    assert (found != 0) == (code != 0)
    assert said["missing"] == {cell: ["latents"] for cell in missing}
    assert said["failed"] == {cell: ["latents"] for cell in failed}


CASE = '<testcase name="test_latents[{cell}]"><properties>{told}</properties>{end}</testcase>'
TOLD = f'<property name="cell" value="{GOOD}"/><property name="check" value="latents"/>'


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [
        ([(TOLD, "")], "pass"),
        ([(TOLD, "<failure/>")], "fail"),
        ([(TOLD, "<error/>")], "fail"),
        ([(TOLD, "<skipped/>")], None),
        ([("", "<error/>")], None),  # its process died
        ([(TOLD + '<property name="problem" value="row not executed"/>', "<failure/>")], None),
        ([(TOLD + '<property name="problem" value="gate loosened"/>', "<failure/>")], "fail"),
        ([("", "<error/>"), (TOLD, "")], "pass"),
        ([(TOLD, "<failure/>"), (TOLD, "")], "fail"),
        ([(TOLD, ""), (TOLD, "<failure/>")], "fail"),
    ],
)
def test_junit_cases(cases: list[tuple[str, str]], verdict: str | None, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    text = "".join(CASE.format(cell=GOOD, told=said, end=end) for said, end in cases)
    path.write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    wanted = {} if verdict is None else {GOOD: {"latents": verdict}}
    assert completeness.read_junit(path) == wanted


def test_a_failure_in_any_file_is_a_failure() -> None:
    good, bad = {GOOD: {"load": "pass", "latents": "pass"}}, {GOOD: {"latents": "fail"}}
    for order in ((good, bad), (bad, good)):
        assert completeness.combine(order) == {GOOD: {"load": "pass", "latents": "fail"}}


def test_a_file_that_is_no_junit_is_named(tmp_path: Path, check: Callable[..., int]) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("<testsuites>")
    assert check(path, "--planned", "cpu") == 1
    with pytest.raises(completeness.ExecutedError, match=r"junit\.xml: not a JUnit report"):
        completeness.read_junit(path)


def test_the_record_of_a_changed_row_was_not_executed(
    tables: Matrix, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tables, tmp_path / "found")
    for path in folder.glob("cpu/row-1*.json"):
        record = json.loads(path.read_text())
        record["cell"] |= {"flags": ["--seed", "7"], "row_digest": "sha256:other"}
        path.write_text(json.dumps(record))
    assert check(folder, "--planned", "cpu") == NOT_EXECUTED
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "stale: row-1@cpu+reference: flags was ['--seed', '7'], is []"
    assert "row not executed: row-1@cpu+reference (load, latents)" in out
    words = ["evidence", "merge", str(folder), "--output-path", str(tmp_path / "merged")]
    assert main.main([*words, "--planned", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found["stale"]) == set(found["missing"]) == {GOOD, "row-1@cpu+decode"}


@pytest.mark.parametrize(("verdict", "code"), [("fail", 0), ("pass", CLAIM_VIOLATED)])
def test_a_claimed_failure_holds_while_it_fails(
    verdict: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {**shards.CASES[0], "checkpoint": "flux-1-fp8", "claim": "failing"}
    case |= {"rule": "latents", "notes": "white pictures"}
    tables = read.read(write_tables(tmp_path / "matrix", [case]))
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    folder = fill(tables, tmp_path / "found", row0_latents=verdict)
    assert main.main(["evidence", "check", str(folder), "--planned", "cpu"]) == code


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b'{"include": [{"rows": [3]}]}', "3: no such row or cell is claimed"),
        (b'{"include": [{"rows": "row-1"}]}', "found JSON without include"),
        (b'{"include":' + b"[" * 100_000, "found JSON without include"),
    ],
)
def test_a_plan_that_is_none_is_told_in_words(
    data: bytes,
    words: str,
    tmp_path: Path,
    check: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "plan").write_bytes(data)
    assert check(tmp_path, "--planned", tmp_path / "plan", "--json") == 2
    said = capsys.readouterr()
    assert f"--planned {tmp_path / 'plan'}: " in said.err
    assert words in said.err
    assert json.loads(said.out)["ok"] is False


def test_a_check_on_request_is_planned_where_it_is_named(tables: Matrix) -> None:
    cells = [replace(cell, checks=("load", "true-size")) for cell in tables.cells[:1]]
    name = cells[0].id
    done = {name: {"load": "pass"}}
    assert completeness.compare(cells, done).code == 0
    asked = completeness.compare(cells, done, ["true-size"])
    assert (asked.code, asked.missing) == (NOT_EXECUTED, {name: ("true-size",)})
    both = {name: {"load": "pass", "true-size": "pass"}}
    assert (
        completeness.compare(cells, both).code
        == completeness.compare(cells, both, ["true-size"]).code
        == 0
    )
