"""The plugin's decisions and words, on made-up sessions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import MachineError, UnjudgedError
from quantmatrix.harness import plugin
from quantmatrix.harness.plugin import CellItem, Harness
from quantmatrix.harness.recorder import Proof
from quantmatrix.proof.record import CheckResult, EvidenceError
from quantmatrix.tables import identify


def make_cell(name: str, *checks: str, hardware: str = "cpu", **parts: Any) -> Any:
    words = {
        "model": "m",
        "checkpoint": name,
        "claim": "expected",
        "rule": "",
        "row": name,
        **parts,
    }
    return SimpleNamespace(id=f"{name}@{hardware}", checks=checks, hardware=hardware, **words)


class Recorded:
    """What a recorder is told."""

    def __init__(self, before: CheckResult | None = None) -> None:
        self.before = before
        self.added: list[tuple[str, ...]] = []
        self.finished: list[str] = []
        self.error: Exception | None = None
        self.expected, self.written, self.kept, self.folder = "EXPECTED", [], 0, Path("F")

    def add(self, cell: Any, check: str, verdict: str, message: str, proof: Proof) -> None:
        self.added.append((cell.id, check, verdict, message))

    def expected_result(self, cell: Any, check: str) -> CheckResult | None:
        return self.before

    def finish(self, cell: Any) -> None:
        if self.error:
            raise self.error
        self.finished.append(cell.id)


def make_harness(*cells: Any, recorder: Recorded | None = None, **wanted: tuple[str, ...]) -> Any:
    harness: Any = Harness.__new__(Harness)
    harness.wanted = {"hardware": (), "check": (), **wanted}
    harness.cells = list(cells)
    harness.recorder, harness.worker, harness.pending = recorder or Recorded(), None, {}
    return harness


def make_item(check: str = "load", cell: Any = None) -> Any:
    item: Any = CellItem.__new__(CellItem)
    item.cell, item.check, item.proof = cell or make_cell("r", check), check, Proof()
    item.user_properties, item.name = [], f"test[{item.cell.id}]"
    return item


def make_report(outcome: str = "passed") -> Any:
    return SimpleNamespace(
        outcome=outcome, passed=outcome == "passed", failed=outcome == "failed",
        skipped=outcome == "skipped", longrepr=None, user_properties=[],
    )  # fmt: skip


def make_call(when: str = "call", error: BaseException | None = None) -> Any:
    info = error and SimpleNamespace(value=error, exconly=lambda tryshort: f"{error}{tryshort}")
    return SimpleNamespace(when=when, excinfo=info)


# --- which cells are tests -------------------------------------------------------------------------


CELLS = (
    make_cell("a", "load", "latents", "true-size"),
    make_cell("b", "load", "compile", hardware="h9"),
    make_cell("c", "refuse", hardware="h8"),
)


@pytest.mark.parametrize(
    ("wanted", "checks", "found"),
    [
        ({}, ("load",), ["a@cpu load"]), ({}, ("compile", "refuse"), ["b@h9 compile", "c@h8 refuse"]),
        ({"hardware": ("h9",)}, ("load",), ["a@cpu load", "b@h9 load"]),
        ({"check": ("latents",)}, ("load", "latents"), ["a@cpu latents"]),
        ({"check": ("latents",)}, ("compile",), []), ({}, ("true-size",), []),
        ({"check": ("true-size",)}, ("true-size",), ["a@cpu true-size"]), ({}, ("other",), []),
        ({}, ("latents", "load"), ["a@cpu latents", "a@cpu load"]),
    ],
    ids=list("abcdefghi"),
)  # fmt: skip
def test_checks_of_cells(wanted: dict[str, Any], checks: tuple[str, ...], found: list[str]) -> None:
    harness = make_harness(*CELLS, **wanted)
    assert [f"{cell.id} {check}" for cell, check in harness.cells_for(checks)] == found


def test_what_is_run_where_no_hardware_is_asked_for() -> None:
    harness = make_harness(*CELLS)
    assert [harness.runs_here(cell) for cell in CELLS] == [True, True, True]
    assert not harness.runs_here(make_cell("d", "load", hardware="b200"))
    assert not harness.runs_here(make_cell("d", "load", hardware="z"))
    assert harness.runs_check(CELLS[0], "load")
    assert harness.runs_check(CELLS[1], "compile")
    assert not harness.runs_check(CELLS[1], "load")
    assert make_harness(*CELLS, hardware=("h9",)).runs_check(CELLS[1], "load")


def test_cells_that_nothing_needed_are_none() -> None:
    harness = make_harness(*CELLS)
    assert harness.is_cell("a@cpu")
    assert not harness.is_cell("z@cpu")
    assert list(harness.name_cells()) == ["a@cpu", "b@h9", "c@h8"]
    del harness.cells
    assert not harness.is_cell("a@cpu")
    assert harness.name_cells() == {}


def test_tests_of_a_checkpoint_are_brought_together() -> None:
    cells = [
        make_cell("r1", checkpoint="x"), make_cell("r2", checkpoint="y"), make_cell("r3", checkpoint="x"),
        make_cell("r4", checkpoint="x", model="other"),
    ]  # fmt: skip
    harness = make_harness(*cells)
    plain = SimpleNamespace(name="plain")
    items = [make_item(check, cell) for cell in reversed(cells) for check in ("latents", "load")]
    items.insert(3, plain)
    harness.pytest_collection_modifyitems(items)
    assert items[0] is plain
    assert [f"{item.cell.id} {item.check}" for item in items[1:]] == [
        f"{name}@cpu {check}" for name in ("r1", "r3", "r2", "r4") for check in ("load", "latents")
    ]
    assert harness.pending == {f"r{n}@cpu": 2 for n in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("narrowed", "worker", "ends"), [(True, None, True), (True, 0, False), (False, None, False)]
)
def test_a_selection_without_a_test_ends_the_run(
    narrowed: bool, worker: int | None, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Harness, "narrowed", narrowed)
    harness = make_harness(*CELLS, family=("fp8", "gguf"))
    harness.worker = worker
    if not ends:
        harness.pytest_collection_modifyitems([SimpleNamespace()])
        return
    with pytest.raises(pytest.exit.Exception) as caught:
        harness.pytest_collection_modifyitems([SimpleNamespace()])
    assert caught.value.msg == "--family fp8,gguf: no test was collected for these cells"
    assert caught.value.returncode == 13
    harness.wanted = {}
    with pytest.raises(pytest.exit.Exception, match=r"^this selection: no test was collected"):
        harness.pytest_collection_modifyitems([])


# --- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "call", "added"),
    [
        ("passed", make_call(), ("pass", "")), ("passed", make_call("setup"), None),
        ("passed", make_call("teardown"), None), ("skipped", make_call(), None),
        ("failed", make_call("call", ValueError("x")), ("fail", "xTrue")),
        ("failed", make_call("teardown", ValueError("x")), ("fail", "xTrue")),
        ("failed", make_call("call", ValueError("y" * 3000)), ("fail", "y" * 2000)),
        ("failed", make_call("call", MachineError("no")), None),
    ],
    ids=list("abcdefgh"),
)  # fmt: skip
def test_what_is_kept_of_an_outcome(report: str, call: Any, added: Any) -> None:
    recorder = Recorded()
    harness, item, made = make_harness(recorder=recorder), make_item(), make_report(report)
    harness.note_outcome(item, call, made)
    assert recorder.added == ([("r@cpu", "load", *added)] if added else [])
    blamed = isinstance(getattr(call.excinfo, "value", None), MachineError)
    assert made.user_properties == ([("problem", "environment unusable")] if blamed else [])
    assert made.outcome == report


class Unjudged(UnjudgedError, Exception):
    """A check without a limit."""


def test_a_check_without_a_limit_is_told_so() -> None:
    recorder = Recorded()
    item, made = make_item(), make_report("failed")
    item.path = Path("suite.py")
    error = Unjudged("no limit")
    harness = make_harness(recorder=recorder)
    harness.note_outcome(item, make_call("call", error), made)
    assert recorder.added == [("r@cpu", "load", "unjudged", "no limit")]
    assert made.outcome == "skipped"


@pytest.mark.parametrize(
    ("claim", "rule", "when", "report", "outcome"),
    [
        ("failing", "load", "call", "failed", "passed"), ("failing", "load", "call", "passed", "failed"),
        ("failing", "latents", "call", "passed", "passed"), ("failing", "zz", "call", "passed", "passed"),
        ("expected", "load", "call", "failed", "failed"), ("planned", "load", "call", "failed", "failed"),
        ("failing", "load", "teardown", "failed", "failed"),
    ],
)  # fmt: skip
def test_a_claimed_failure(claim: str, rule: str, when: str, report: str, outcome: str) -> None:
    made = make_report(report)
    error = None if report == "passed" else ValueError("x")
    item = make_item(cell=make_cell("r", "load", claim=claim, rule=rule))
    make_harness().note_outcome(item, make_call(when, error), made)
    assert made.outcome == outcome


AGAIN = "run the cell again with --evidence-dir and commit its record"


@pytest.mark.parametrize(
    ("before", "limits", "verdict", "said", "problem"),
    [
        (None, {}, "pass", "", False), (CheckResult("pass"), {}, "pass", "", False),
        (CheckResult("fail"), {}, "pass",
         f"r@cpu: load fails in the evidence in EXPECTED, but passes now: {AGAIN}", False),
        (CheckResult("fail"), {}, "unjudged", "", False), (CheckResult("unjudged"), {}, "pass", "", False),
        (CheckResult("pass", limits={"a": {"at_most": 1.0}, "b": {"at_least": 3.0}}),
         {"a": {"at_most": 2.0}, "b": {"at_least": 2.0}}, "pass",
         "r@cpu: load was held to tighter limits in the evidence in EXPECTED: a: at_most 1 became 2; "
         f"b: at_least 3 became 2; {AGAIN}", True),
        (CheckResult("pass", limits={"a": {"at_most": 1.0}}), {"a": {"at_most": 0.5}}, "pass", "", False),
    ],
    ids=list("abcdefg"),
)  # fmt: skip
def test_verdicts_beside_the_committed_ones(
    before: CheckResult | None, limits: Any, verdict: str, said: str, problem: bool
) -> None:
    harness, item, made = make_harness(recorder=Recorded(before)), make_item(), make_report()
    item.proof.limits = limits
    harness.compare_with_committed(item, made, verdict)
    assert made.outcome == ("failed" if said else "passed")
    assert made.longrepr == (said or None)
    assert made.user_properties == ([("problem", "gate loosened")] if problem else [])


def report_on(harness: Any, item: Any, when: str, report: Any) -> Any:
    hook: Iterator[Any] = harness.pytest_runtest_makereport(item, make_call(when))
    next(hook)
    with pytest.raises(StopIteration) as caught:
        hook.send(report)  # type: ignore[attr-defined]
    return caught.value.value


def test_a_record_is_written_after_the_last_check() -> None:
    recorder = Recorded()
    harness, cell = make_harness(recorder=recorder), make_cell("r", "load", "latents")
    items = [make_item(check, cell) for check in ("load", "latents")]
    harness.pending = {cell.id: 2}
    for item in items:
        for when in ("setup", "call", "teardown"):
            assert recorder.finished == []
            report_on(harness, item, when, make_report())
    assert recorder.finished == [cell.id]
    assert [one[1:3] for one in recorder.added] == [("load", "pass"), ("latents", "pass")]
    plain = make_report()
    assert report_on(harness, SimpleNamespace(), "call", plain) is plain


@pytest.mark.parametrize(
    ("error", "said", "problems"),
    [
        (EvidenceError("bad"), "r@cpu: no evidence is kept of it: bad", []),
        (OSError("full"), "r@cpu: its evidence cannot be written: full",
         [("problem", "environment unusable")]),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_written(error: Exception, said: str, problems: Any) -> None:
    recorder = Recorded()
    recorder.error = error
    made = make_report()
    make_harness(recorder=recorder).write_record(make_item(), made)
    assert (made.outcome, made.longrepr, made.user_properties) == ("failed", said, problems)


def test_a_cell_is_named_in_reports() -> None:
    item = make_item("trace")
    make_harness().pytest_runtest_protocol(item)
    assert item.user_properties == [
        ("row", "r"), ("cell", "r@cpu"), ("check", "trace"), ("evidence", "cpu/r.json")
    ]  # fmt: skip
    make_harness().pytest_runtest_protocol(SimpleNamespace())


@pytest.mark.parametrize(
    ("asked", "written", "kept", "line"),
    [
        (None, 0, 0, None), ("F", 0, 0, "evidence: records in F"),
        (None, 3, 0, "evidence: 3 records in F"), ("F", 1, 2, "evidence: 1 records in F, 2 say nothing new"),
        ("F", 0, 1, "evidence: records in F, 1 say nothing new"), (None, 0, 5, None),
    ],
)  # fmt: skip
def test_where_the_records_are(
    asked: str | None, written: int, kept: int, line: str | None
) -> None:
    recorder, lines = Recorded(), list[str]()
    recorder.written, recorder.kept = ["x"] * written, kept
    harness = make_harness(recorder=recorder)
    harness.config = SimpleNamespace(getoption=lambda _: asked)
    harness.source = "SOURCE"
    reporter: Any = SimpleNamespace(write_line=lines.append)
    harness.pytest_terminal_summary(reporter)
    assert lines == ([line] if line else [])
    harness.tables = "read"
    harness.pytest_terminal_summary(reporter)
    assert lines[bool(line)] == "tables: SOURCE"


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "option", "found"),
    [
        ([], None, None), (["--tables", "a"], None, "a"), (["--tables=b", "x"], None, "b"),
        (["--tables"], None, None), (["--tables="], None, None), (["x", "--tables=b", "--tables", "c"], None, "c"),
        ([], "d", "d"), (["--table", "e"], None, None), (["--tables", "file"], None, None),
        (["--tables", "foreign"], None, None), (["--tables", "own"], None, "own"),
    ],
    ids=list("abcdefghijk"),
)  # fmt: skip
def test_the_folder_of_tables_before_options_are_parsed(
    arguments: list[str], option: str | None, found: str | None, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cases.csv").touch()
    config: Any = SimpleNamespace(
        option=SimpleNamespace(tables=option),
        invocation_params=SimpleNamespace(args=arguments, dir=tmp_path),
    )
    assert plugin.read_flag(config) == found


def test_a_file_is_no_folder_of_evidence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    words = f"--evidence-dir {path}: this is a file; name a folder"
    with pytest.raises(pytest.UsageError, match=f"^{re.escape(words)}$"):
        plugin.check_evidence_folder(path)
    plugin.check_evidence_folder(tmp_path)
    plugin.check_evidence_folder(tmp_path / "new")


@pytest.mark.parametrize(
    ("asked", "folder", "beside", "found"),
    [
        ("none", None, True, None), ("x", None, True, "x"), ("x", "f", True, "x"), (None, None, True, "beside"),
        (None, "f", True, None), (None, None, False, None), ("zzz", None, False, "zzz"), ("a", None, False, "a"),
    ],
)  # fmt: skip
def test_the_verdicts_that_are_expected(
    asked: str | None, folder: str | None, beside: bool, found: str | None, tmp_path: Path
) -> None:
    harness = make_harness()
    harness.reports = tmp_path
    if beside:
        (tmp_path / "evidence").mkdir()
    expected = tmp_path / "evidence" if found == "beside" else found and Path(found).absolute()
    assert harness._find_expected(asked, folder and Path(folder)) == expected


@pytest.mark.parametrize(
    ("vendor", "checks", "asked", "worker", "collect", "ends"),
    [
        ("nvidia", ("load",), (), None, False, True), ("cpu", ("load",), (), None, False, False),
        ("amd", ("load",), (), None, False, True), ("nvidia", ("compile", "refuse"), (), None, False, False),
        ("nvidia", ("load", "compile"), ("compile",), None, False, False),
        ("nvidia", ("load", "compile"), ("load",), None, False, True),
        ("nvidia", ("load",), (), 0, False, False), ("nvidia", ("load",), (), None, True, False),
        ("nvidia", ("load",), ("latents",), None, False, False),
    ],
)  # fmt: skip
def test_a_machine_that_is_another_ends_the_run(
    vendor: str, checks: tuple[str, ...], asked: tuple[str, ...], worker: int | None, collect: bool,
    ends: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(identify, "ask", lambda name, folder: f"no {name} in {folder}")
    harness = make_harness(make_cell("r", *checks, hardware="h9"), hardware=("h9",), check=asked)
    harness.worker, harness.tables_folder = worker, "T"
    harness.tables = SimpleNamespace(hardware={"h9": SimpleNamespace(vendor=vendor)})
    config = SimpleNamespace(option=SimpleNamespace(collectonly=collect))
    session: Any = SimpleNamespace(config=config)
    if not ends:
        harness.pytest_runtestloop(session)
        return
    with pytest.raises(pytest.exit.Exception) as caught:
        harness.pytest_runtestloop(session)
    assert (caught.value.msg, caught.value.returncode) == ("no h9 in T", 14)
