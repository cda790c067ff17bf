"""Plain functions of the harness at their edges, and what they say, whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.harness import (
    completeness,
    dry_run,
    forecast,
    outcomes,
    packets,
    selection,
    sessions,
    shards,
    workers,
)
from quantmatrix.harness.completeness import Comparison

# --- forecast --------------------------------------------------------------------------------------


def make_forecast(
    lines: list[str], clock: Callable[[], float], count: int = 0, **given: Any
) -> forecast.Forecast:
    cells = {f"c{n}": SimpleNamespace(id=f"c{n}") for n in range(3000)}
    run = forecast.Forecast(lambda: cells, Path("none"), lines.append, clock=clock, **given)  # type: ignore[arg-type]
    if count:
        run.begin(f"test_a.py::test_a[c{n}]" for n in range(count))
    return run


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell takes 90 s."""
    monkeypatch.setattr(forecast, "estimate_cells", lambda cells, _: {c.id: 90.0 for c in cells})


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize(
    ("count", "workers", "said"),
    [
        (19, 1, []),
        (20, 1, ["20 checks of 20 cells: about 30 min, as long as their last records took"]),
        (2000, 0, ["2,000 checks of 2,000 cells: about 3000 min, as long as their last records took"]),
        (21, 3, ["21 checks of 21 cells: about 10 min with 3 workers, "
                 "as long as their last records took"]),
    ],
)  # fmt: skip
def test_a_forecast_is_for_twenty_checks_or_more(count: int, workers: int, said: list[str]) -> None:
    lines: list[str] = []
    make_forecast(lines, lambda: 7.0, count, workers=workers)
    assert lines == said


@pytest.mark.usefixtures("times")
def test_cells_that_are_only_planned_take_a_third_of_a_second() -> None:
    lines: list[str] = []
    run = make_forecast(lines, lambda: 7.0, 30, only_planned=lambda cell: cell.id != "c5")
    assert run.whole == pytest.approx(90 + 29 * 0.3)
    assert run.seconds["test_a.py::test_a[c5]"] == 90
    assert lines == ["30 checks of 30 cells: about 2 min, as long as their last records took"]


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize(
    ("elapsed", "done", "said"),
    [
        (59.9, 10, []),
        (60.0, 10, ["10 of 40 checks after 1 min, about 3 min left"]),
        (600.0, 1, []),
        (600.0, 2, ["2 of 40 checks after 10 min, about 190 min left"]),
        (600.0, 39, ["39 of 40 checks after 10 min, less than a minute left"]),
    ],
)
def test_a_line_a_minute(elapsed: float, done: int, said: list[str]) -> None:
    """Less than a twentieth of the whole tells nothing of the rest."""
    lines: list[str] = []
    now = [1000.0]
    run = make_forecast(lines, lambda: now[0], 40)
    lines.clear()
    for n in range(done - 1):
        run.take(f"test_a.py::test_a[c{n}]")
    now[0] += elapsed
    run.take(f"test_a.py::test_a[c{done - 1}]")
    assert lines == said


@pytest.mark.usefixtures("times")
def test_the_last_check_needs_no_line() -> None:
    lines: list[str] = []
    now = [1000.0]
    run = make_forecast(lines, lambda: now[0], 20)
    for n in range(19):
        run.take(f"test_a.py::test_a[c{n}]")
    lines.clear()
    now[0] += 999
    run.take("test_a.py::test_a[c19]")
    run.take("test_a.py::test_a[c19]")
    run.take("test_a.py::test_a[c2999]")
    assert lines == []


def test_a_check_counts_when_it_is_torn_down(monkeypatch: pytest.MonkeyPatch) -> None:
    run, taken, begun = make_forecast([], lambda: 7.0), [], []
    monkeypatch.setattr(run, "take", taken.append)
    for when in ("setup", "call", "teardown", "zzz"):
        run.pytest_runtest_logreport(SimpleNamespace(nodeid=when, when=when))  # type: ignore[arg-type]
    assert taken == ["teardown"]
    monkeypatch.setattr(run, "begin", lambda names: begun.append(list(names)))
    for collectonly in (True, False):
        config = SimpleNamespace(option=SimpleNamespace(collectonly=collectonly))
        session: Any = SimpleNamespace(config=config, items=[SimpleNamespace(nodeid="a")])
        run.pytest_collection_finish(session)
    assert begun == [["a"]]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59.99, "less than a minute"), (60.0, "about 1 min"), (90.1, "about 2 min"), (0, "less than a minute")],
)  # fmt: skip
def test_a_minute_is_the_least_that_is_told(seconds: float, words: str) -> None:
    assert forecast.tell_time(seconds) == words


@pytest.mark.parametrize(
    ("option", "count"), [({}, 1), ({"tx": None}, 1), ({"tx": []}, 1), ({"tx": ["p"] * 3}, 3)]
)
def test_workers_are_counted(option: dict[str, Any], count: int) -> None:
    assert forecast.count_workers(SimpleNamespace(option=SimpleNamespace(**option))) == count


# --- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "units", "parts"),
    [
        (1800.0, 50, 1), (1800.1, 50, 2), (3600.0, 50, 2), (3601.0, 50, 3), (17999.0, 50, 10),
        (19000.0, 50, 10), (5400.0, 2, 2), (0.0, 0, 1),
    ],
)  # fmt: skip
def test_parts_of_half_an_hour(seconds: float, units: int, parts: int) -> None:
    assert shards.count_parts(seconds, units) == parts


def test_parts_of_another_length() -> None:
    assert shards.count_parts(1000.0, 50, 300.0) == 4


@pytest.mark.parametrize(
    ("text", "found"), [("1/1", (1, 1)), ("2/5", (2, 5)), ("5/5", (5, 5)), ("10/12", (10, 12))]
)
def test_parts_by_number(text: str, found: tuple[int, int]) -> None:
    assert shards.read_shard(text) == found


@pytest.mark.parametrize("text", ["0/3", "4/3", "0/0", "2/5 ", "x2/5", ""])
def test_a_part_that_is_none_in_words(text: str) -> None:
    words = f"--shard {text}: expected i/n with 1 <= i <= n, for instance 2/5"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        shards.read_shard(text)


@pytest.mark.parametrize(
    ("checks", "timings", "seconds"),
    [
        (("refuse",), {"load": 50.0}, 1.0),
        (("load", "refuse"), {"load": 50.0}, 50.0),
        (("load",), {}, 77.0),
        (("load",), {"load a": 2.5, "load b": 3.0, "reload": 9.0, "command": 7.0}, 12.5),
        (("load",), {"generate": 11.0, "sload": 5.0}, 22.0),
    ],
)
def test_seconds_of_a_cell(
    checks: tuple[str, ...], timings: dict[str, float], seconds: float
) -> None:
    cell: Any = SimpleNamespace(checks=checks)
    record: Any = SimpleNamespace(timings=timings)
    assert shards.estimate(cell, record, 77.0) == seconds
    assert shards.estimate(cell, None) == (1.0 if checks == ("refuse",) else 300.0)


def test_an_unknown_cell_takes_the_median_of_those_that_ran() -> None:
    def cell(name: str, *checks: str) -> Any:
        return SimpleNamespace(id=name, checks=checks or ("load",))

    cells = [cell("a"), cell("b"), cell("c"), cell("r", "refuse"), cell("x"), cell("empty")]
    evidence: Any = {
        name: SimpleNamespace(timings=timings)
        for name, timings in {
            "a": {"load": 10.0}, "b": {"load": 31.0}, "c": {"load": 90.0}, "r": {"load": 500.0},
            "empty": {},
        }.items()
    }  # fmt: skip
    assert shards.estimate_all(iter(cells), evidence) == {
        "a": 10, "b": 31, "c": 90, "r": 1, "x": 31, "empty": 31
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "named"),
    [(1, "n0"), (5, "n0, n1, n2, n3, n4"), (6, "n0, n1, n2, n3, n4 ..."), (7, "n0, n1, n2, n3, n4 ...")],
)  # fmt: skip
def test_five_unknown_rows_are_named(count: int, named: str) -> None:
    words = f"--rows f: {named}: no such row or cell is claimed"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        shards.select_rows([], [f"n{n}" for n in range(count)], "--rows f")


def test_long_names_are_cut() -> None:
    words = f"--rows f: {'n' * 400}: no such row or cell is claimed"
    with pytest.raises(UsageError, match=f"^{words}$"):
        shards.select_rows([], ["n" * 999], "--rows f")


def test_rows_in_every_form_of_line(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes("\ufeffa#b\r\n  b # c # d\n#e\n\n b\nc\n".encode())
    assert shards.read_rows(path) == ("a", "b", "c")
    path.write_bytes(b"\xff\xfe")
    words = "--planned f: not UTF-8 text (invalid start byte); write one row or cell per line"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        shards.read_rows(path, "--planned f")
    words = f"--rows {tmp_path / 'none'}: cannot be read: No such file or directory"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        shards.read_rows(tmp_path / "none")


# --- selection -------------------------------------------------------------------------------------


def test_words_of_options() -> None:
    assert selection.split_values(["a, b", "c d,e,,", ""]) == ("a", "b", "c", "d", "e")
    wanted: dict[str, tuple[str, ...]] = {
        "family": ("fp8", "gguf"),
        "model": (),
        "check": ("load",),
    }
    assert selection.show_options(wanted) == "--family fp8,gguf --check load"
    assert selection.show_options({}) == ""


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, True),
        ({"family": ("fp8",)}, True),
        ({"family": ("fp9", "fp8")}, True),
        ({"family": ("fp9",)}, False),
        ({"family": ("fp8",), "model": ("m2",)}, False),
        ({"family": ("fp8",), "model": ("m1",), "backend": ("decode",)}, True),
        ({"check": ("load",)}, True),
        ({"check": ("trace", "latents")}, True),
        ({"check": ("trace",)}, False),
        ({"check": ("load",), "hardware": ("b200",)}, False),
        ({"check": ("trace",), "hardware": ("cpu",)}, False),
        ({"check": (), "model": ()}, True),
    ],
)
def test_filters(wanted: dict[str, tuple[str, ...]], found: bool) -> None:
    cell: Any = SimpleNamespace(
        family="fp8", model="m1", hardware="cpu", backend="decode", checks=("load", "latents")
    )
    assert selection.fits(cell, wanted) is found


def test_rows_that_run_elsewhere_only(tmp_path: Path) -> None:
    def cell(name: str, hardware: str) -> Any:
        return SimpleNamespace(id=f"{name}@{hardware}", row=name, hardware=hardware)

    cells = [cell("a", "cpu"), cell("a", "h200"), cell("b", "h200"), cell("b", "b200"),
             cell("b", "h200")]  # fmt: skip
    rows = tmp_path / "rows"
    rows.write_text("a\na@cpu\n")
    selection.check_reach(cells, rows, lambda cell: cell.hardware == "cpu")
    rows.write_text("a\nb\n")
    words = f"--rows {rows}: b runs on h200,b200 only: add --hardware h200,b200"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        selection.check_reach(iter(cells), rows, lambda cell: cell.hardware == "cpu")


# --- outcomes --------------------------------------------------------------------------------------


def report_of(when: str, outcome: str, test: str = "t[c1]", **properties: object) -> Any:
    return SimpleNamespace(
        nodeid=test, when=when, user_properties=list(properties.items()),
        failed=outcome == "failed", skipped=outcome == "skipped",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "code", "lines"),
    [
        ([], 12, ["row not executed (exit code 12): c1"]),
        ([("setup", "passed")], 12, ["row not executed (exit code 12): c1"]),
        ([("setup", "passed"), ("call", "passed"), ("teardown", "passed")], 0, []),
        ([("call", "passed"), ("teardown", "failed")], 11, ["claim violated (exit code 11): c1"]),
        ([("call", "failed")], 11, ["claim violated (exit code 11): c1"]),
        ([("call", "failed", "environment unusable"), ("teardown", "failed")], 14,
         ["environment unusable (exit code 14): c1"]),
        ([("call", "failed"), ("teardown", "failed", "gate loosened")], 11,
         ["claim violated (exit code 11): c1"]),
        ([("call", "failed", "gate loosened")], 10, ["gate loosened (exit code 10): c1"]),
        ([("setup", "skipped")], 12, ["row not executed (exit code 12): c1"]),
    ],
)  # fmt: skip
def test_reports_of_a_test(reports: list[tuple[str, ...]], code: int, lines: list[str]) -> None:
    found = outcomes.Outcomes(lambda name: name == "c1")
    found.plan(["t[c1]", "t[c2]", "other", "u[x]"])
    assert found.planned == {"t[c1]"}
    for when, outcome, *problem in reports:
        properties = {"cell": "c1", **({"problem": problem[0]} if problem else {})}
        found.take(report_of(when, outcome, **properties))
    assert found.decide(0) == code
    assert found.decide(1) == max(code, 1)
    assert found.decide(5) == 13
    assert [found.decide(other) for other in (2, 3, 4)] == [2, 3, 4]
    assert found.describe() == lines


def test_checks_without_a_limit_are_told_first() -> None:
    found = outcomes.Outcomes(lambda name: name.startswith("c"))
    tests = ["b[c2]", "a[c2]", "a[c1]", "d[c3]"]
    found.plan(tests)
    for test in tests[:3]:
        found.take(report_of("call", "skipped", test, cell="c", unjudged=True))
    assert found.done == found.unjudged == set(tests[:3])
    assert found.describe() == [
        "unjudged, for want of a limit: c1, c2",
        "row not executed (exit code 12): c3",
    ]


def test_a_test_that_is_no_cells_is_not_waited_for() -> None:
    found = outcomes.Outcomes(lambda name: name == "c1")
    found.plan(["t[c1]"])
    found.take(report_of("setup", "failed"))
    assert (found.planned, found.problems) == (set(), {})
    found.take(report_of("???", "failed"))
    assert found.problems == {"t[c1]": 12}
    found.take(report_of("call", "failed", "t[c9]", cell="c9"))
    assert list(found.problems) == ["t[c1]"]


@pytest.mark.parametrize(
    ("test", "found"),
    [("f.py::t[a@cpu+b]", "a@cpu+b"), ("t", ""), ("t[a[0]]", "a[0]"), ("t[]", "")],
)
def test_the_cell_of_a_test(test: str, found: str) -> None:
    assert outcomes.name_cell(test) == found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"at_least": 10.0}, {"at_least": 9.99998}, ["x: at_least 10 became 9.99998"]),
        ({"at_least": 10.0}, {"at_least": 9.999995}, []),
        ({"at_most": 10.0}, {"at_most": 10.000005}, []),
        ({"at_most": 10.0}, {"at_most": 10.00002}, ["x: at_most 10 became 10"]),
        ({"at_most": -10.0}, {"at_most": -9.5}, ["x: at_most -10 became -9.5"]),
        ({"at_least": 1.0, "at_most": 2.0}, {"at_least": 0.5, "at_most": 2.5},
         ["x: at_least 1 became 0.5", "x: at_most 2 became 2.5"]),
        ({"at_least": 1.0, "at_most": 2.0}, {"at_least": 1.5}, ["x: at_most 2 became None"]),
        ({"at_least": 1.0}, 7, ["x: at_least 1 became None"]),
        ({"other": 1.0}, {}, []),
        (True, False, []),
    ],
)  # fmt: skip
def test_what_makes_a_limit_looser(old: Any, new: Any, said: list[str]) -> None:
    assert outcomes.find_loosened({"y": 1, "x": old}, {"x": new}) == said


def test_a_claimed_failure_turns_the_outcome_around() -> None:
    item: Any = SimpleNamespace(name="t[c1]")
    report: Any = SimpleNamespace(failed=True, outcome="failed", longrepr="far")
    outcomes.expect_failure(item, report)
    assert (report.outcome, report.longrepr) == ("passed", None)
    report = SimpleNamespace(failed=False, outcome="passed", longrepr=None)
    outcomes.expect_failure(item, report)
    words = "t[c1]: claimed to fail, but it passes: change the claim"
    assert (report.outcome, report.longrepr) == ("failed", words)


def test_marks_in_both_reports() -> None:
    item: Any = SimpleNamespace(user_properties=[], path=Path("a.py"))
    report: Any = SimpleNamespace(user_properties=[("cell", "c")])
    outcomes.mark_problem(item, report, 12)
    outcomes.mark_unjudged(item, report, "no limit")
    assert item.user_properties == [("problem", "row not executed"), ("unjudged", True)]
    assert report.user_properties == [("cell", "c"), *item.user_properties]
    assert report.outcome == "skipped"
    assert report.longrepr == ("a.py", 0, "unjudged: no limit")


# --- completeness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "failed", "unplanned", "nothing", "code", "lines"),
    [
        ({}, {}, {}, False, 0, []),
        ({}, {}, {"c": ("load",)}, False, 1, ["not planned: c (load)"]),
        ({}, {"b": ("load", "trace")}, {"c": ("x",)}, False, 11,
         ["claim violated: b (load, trace)", "not planned: c (x)"]),
        ({"a": ("load",)}, {"b": ("x",)}, {}, False, 12,
         ["row not executed: a (load)", "claim violated: b (x)"]),
        ({"a": ("load",)}, {}, {}, True, 13, ["nothing collected", "row not executed: a (load)"]),
    ],
)  # fmt: skip
def test_what_a_comparison_ends_with(
    missing: Any, failed: Any, unplanned: Any, nothing: bool, code: int, lines: list[str]
) -> None:
    found = Comparison(7, missing, failed, unplanned, nothing)
    assert found.code == code
    assert found.describe() == lines
    assert found.to_json() == {
        "ok": code == 0, "exit_code": code, "planned": 7, "missing": missing, "failed": failed,
        "unplanned": unplanned,
    }  # fmt: skip


def plan_cell(name: str, *checks: str) -> Any:
    return SimpleNamespace(id=name, checks=checks)


def test_planned_beside_executed() -> None:
    planned = [
        plan_cell("a@cpu", "load", "latents"), plan_cell("b@cpu+x", "load"),
        plan_cell("c@cpu", "true-size"),
    ]  # fmt: skip
    verdicts = {
        "a@cpu": {"load": "fail", "trace": "pass"},
        "d@cpu+y": {"load": "pass", "true-size": "pass"},
        "e@b200": {"load": "pass"},
        "c@cpu": {"true-size": "pass"},
    }
    found = completeness.compare(planned, verdicts)
    assert found == Comparison(
        2,
        missing={"a@cpu": ("latents",), "b@cpu+x": ("load",)},
        failed={"a@cpu": ("load",)},
        unplanned={"a@cpu": ("trace",), "d@cpu+y": ("load",)},
        nothing=False,
    )
    only = completeness.compare(planned, verdicts, ("latents",))
    assert only == Comparison(1, {"a@cpu": ("latents",)}, {}, {}, nothing=False)
    none = completeness.compare(planned[1:2], {"b@cpu+x": {}, **verdicts})
    assert none.nothing
    assert none.code == 13


@pytest.mark.parametrize(
    ("verdicts", "found"),
    [
        (("pass", "pass"), "pass"), (("pass", "fail"), "fail"), (("fail", "pass"), "fail"),
        (("fail",), "fail"), (("pass",), "pass"),
    ],
)  # fmt: skip
def test_a_failure_stays(verdicts: tuple[str, ...], found: str) -> None:
    assert completeness.combine({"c": {"load": v}} for v in verdicts) == {"c": {"load": found}}


@pytest.mark.parametrize(
    ("jobs", "why"),
    [
        ({"include": [{"rows": "abc"}]}, "rows: 'abc'"),
        ({"include": [{}]}, "'rows'"),
        ({}, "'include'"),
    ],
)
def test_jobs_without_rows(jobs: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    path.write_text(json.dumps(jobs))
    words = (
        f"--planned {path}: expected rows, one per line, or what `quantmatrix matrix jobs --json` "
        f"prints; found JSON without include[].rows ({why})"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        completeness.read_rows_or_jobs(path)


def test_rows_of_jobs(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    path.write_text('{"include": [{"rows": ["b", "a"]}, {"rows": ["c"]}]}')
    assert completeness.read_rows_or_jobs(path) == ("b", "a", "c")
    path.write_text("")
    assert completeness.read_rows_or_jobs(path) == ()


# --- sessions, packets, workers, dry runs ----------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ([], True), (["--shard", "1/3"], True), (["--shard=1/3"], True), (["--shard", "2/3"], False),
        (["--shard=10/12"], False), (["--shard=0/3"], False), (["--full-size"], True),
    ],
)  # fmt: skip
def test_the_first_part_alone_has_benchmarks(words: list[str], first: bool) -> None:
    assert sessions.is_first(words) is first


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["nox", "-l", "--json"], True), (["nox", "-l"], False), (["nox", "--json", "--", "x"], True),
        (["nox", "--", "--json"], False),
    ],
)  # fmt: skip
def test_json_of_nox(words: list[str], asked: bool) -> None:
    assert sessions.asks_for_json(words) is asked


def test_commands_of_a_session(tmp_path: Path) -> None:
    row: Any = SimpleNamespace(
        id="h9", job="gpu-h9", packages=("a", "b"), wanted="an H9", vendor="x"
    )
    assert sessions.suites_command(row, tmp_path, ["--shard", "1/2"]) == [
        "pytest", "--pyargs", "quantmatrix.suites", "-q", "-p", "no:cacheprovider", "--hardware",
        "h9", "--timeout=900", "-o", "faulthandler_timeout=960", "-o",
        "faulthandler_exit_on_timeout=true", "--evidence-dir", str(tmp_path / "evidence"),
        f"--junitxml={tmp_path / 'junit.xml'}", "--shard", "1/2",
    ]  # fmt: skip
    full = sessions.suites_command(row, tmp_path, ["--full-size"])
    assert ("--timeout=3600" in full, "faulthandler_timeout=3660" in full) == (True, True)
    assert sessions.bench_command(tmp_path) == [
        "pytest", "benchmarks", "-q", "-p", "no:xdist", "--benchmark-only", "--hardware", "auto",
        f"--bench-dir={tmp_path / 'benchmarks'}", f"--benchmark-json={tmp_path / 'bench.json'}",
    ]  # fmt: skip
    traces = ["quantmatrix", "trace", "--hardware", "h9", "--output-path", str(tmp_path / "traces")]
    assert sessions.trace_command(row, tmp_path, []) == [*traces, "--tiny"]
    assert sessions.trace_command(row, tmp_path, ["--full-size"]) == traces
    tail = "suites, benchmarks, traces, an archive of it all; `-- --dry-run` anywhere."
    session = sessions.Session(row)
    assert session.name == "gpu-h9"
    assert session.description == f"On an H9, with a and b: {tail}"
    row.packages = ()
    assert session.description == f"On an H9: {tail}"


@pytest.mark.parametrize(
    ("vendor", "packages", "variables", "found"),
    [
        ("nvidia", (), {}, [("torch==2",)]),
        ("nvidia", (), {"TORCH_INDEX_URL": "i"}, [("--index-url", "i", "torch==2")]),
        ("amd", ("triton",), {"TORCH_INDEX_URL": "i"},
         [("--index-url", "i", "torch==2"), ("torch==2", "triton")]),
        ("nvidia", ("flashinfer", "nunchaku"), {"NUNCHAKU_WHEEL": "w"},
         [("torch==2",), ("torch==2", "flashinfer-python"), ("w",)]),
        ("amd", (), {}, "j wants torch's ROCm build: set TORCH_INDEX_URL to the index that has "
         "torch==2"),
        ("nvidia", ("nunchaku",), {"NUNCHAKU_WHEEL": ""},
         "j wants the nunchaku engine, which no public index has: set NUNCHAKU_WHEEL to the wheel "
         "for your Python, torch and CUDA from its project's releases"),
    ],
)  # fmt: skip
def test_what_a_row_has_installed(
    vendor: str, packages: tuple[str, ...], variables: dict[str, str], found: Any
) -> None:
    row: Any = SimpleNamespace(vendor=vendor, packages=packages, job="j")
    if isinstance(found, list):
        assert sessions.list_requirements(row, "torch==2", variables) == found
        return
    with pytest.raises(UsageError, match=f"^{re.escape(found)}$"):
        sessions.list_requirements(row, "torch==2", variables)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "exit code 1 (a test failed or could not run)"),
        (11, "exit code 11 (claim violated)"),
        (15, "exit code 15 (a test failed or could not run)"),
    ],
)
def test_codes_of_steps(code: int, words: str) -> None:
    assert sessions.explain_code(code) == words


def test_gaps_of_a_part_that_is_not_the_first(tmp_path: Path) -> None:
    assert sessions.list_gaps(tmp_path, first=False) == [f"{tmp_path / 'evidence'} has no record"]
    assert len(sessions.list_gaps(tmp_path)) == 3
    (tmp_path / "evidence" / "h9").mkdir(parents=True)
    (tmp_path / "evidence" / "h9" / "row.json").touch()
    assert sessions.list_gaps(tmp_path, first=False) == []


@pytest.mark.parametrize(
    ("recorded", "found", "near"),
    [
        (1000.0, 1000.0019, True), (1000.0, 1000.0021, False), (0.0, 9e-10, True),
        (0.0, 1.1e-9, False), (-1000.0, -1000.0019, True), (1.0, "1", False), ("1", 1.0, False),
        (None, None, False),
    ],
)  # fmt: skip
def test_numbers_of_six_digits(recorded: Any, found: Any, near: bool) -> None:
    assert packets.is_near(recorded, found) is near


def test_metrics_that_differ_are_named_by_their_place() -> None:
    found = {"b": [1.0, {"c": 2.0}], "a": 3.0, "d": [1, 2]}
    assert packets.compare_metrics(found, found) == []
    recorded = {"b": [1.5, {"c": 2.5}], "a": 3.0, "d": [1]}
    assert packets.compare_metrics(recorded, found) == [
        "metrics.b[0] is 1.5, the latents give 1.0",
        "metrics.b[1].c is 2.5, the latents give 2.0",
        "metrics.d is [1], the latents give [1, 2]",
    ]
    assert packets.compare_metrics({"a": 3.0}, {"a": 3.0, "b": 1}, "m") == [
        "m is {'a': 3.0}, the latents give {'a': 3.0, 'b': 1}"
    ]
    assert packets.compare_metrics("x" * 99, "y" * 99) == [
        f"metrics is '{'x' * 79}, the latents give '{'y' * 79}"
    ]


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", (3, 5), 60), ("BF16", (7,), 14), ("U8", (3, 5, 7), 105), ("F64", (), 8)],
)
def test_bytes_on_disk(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert dry_run.measure(dtype, shape) == size


def test_bytes_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized layer has its own bytes, everything else two for each number."""
    parameters = (
        ("a.weight", (3, 5), True), ("a.bias", (3,), True), ("b.weight", (7, 11), True),
        ("norm.weight", (13,), False), ("conv.weight", (2, 3, 5), False),
    )  # fmt: skip
    monkeypatch.setattr(dry_run, "list_parameters", lambda model: parameters)
    asked = []

    def stored(name: str, shape: tuple[int, int]) -> int | None:
        asked.append((name, shape))
        return 1000 if name == "a" else None

    assert dry_run.count_bytes("m", stored) == 1000 + 2 * (3 + 77 + 13 + 30)
    assert asked == [("a", (3, 5)), ("b", (7, 11))]


def test_layers_by_kernel() -> None:
    def piece(op: str, backend: str) -> Any:
        return SimpleNamespace(scheme=SimpleNamespace(op=op), backend=backend)

    pieces = [piece("fp8", "decode"), piece("fp8", "torch"), piece("fp8", "decode"),
              piece("int8", "decode"), piece("fp8", "decode")]  # fmt: skip
    plan = SimpleNamespace(
        components={
            "one": SimpleNamespace(pieces=lambda: pieces),
            "two": SimpleNamespace(pieces=list),
        }
    )
    assert dry_run.count_kernels(plan) == {
        "one": {("fp8", "decode"): 3, ("fp8", "torch"): 1, ("int8", "decode"): 1}, "two": {}
    }  # fmt: skip


def test_groups_of_tests() -> None:
    groups = {"a@cpu+x": "m c"}
    assert workers.find_group("f.py::t[a@cpu+x]", groups) == "m c"
    assert workers.find_group("f.py::t[b]", groups) == "f.py"
    assert workers.find_group("f.py::C::t", groups) == "f.py"


def test_the_first_test_that_is_not_done_is_dropped() -> None:
    units = [{"a": True, "b": True}, {"c": True, "d": False, "e": False}, {"f": False}]
    assert workers.drop_first(units) == "d"
    assert units == [{"a": True, "b": True}, {"c": True, "d": True, "e": False}, {"f": False}]
    assert [workers.drop_first(units) for _ in range(3)] == ["e", "f", None]


@pytest.mark.parametrize(("taken", "slot"), [([], 0), ([0, 1], 2), ([0, 2], 1), ([1, 2], 0)])
def test_the_first_free_device(taken: list[int], slot: int) -> None:
    hooks = workers.Workers(lambda: [SimpleNamespace(id="c1"), SimpleNamespace(id="c2")])  # type: ignore[list-item]
    hooks.slots = {f"old{number}": number for number in taken}
    node: Any = SimpleNamespace(gateway=SimpleNamespace(id="gw9"), workerinput={})
    hooks.pytest_configure_node(node)
    assert node.workerinput == {
        "quantmatrix_slot": slot, "quantmatrix_cells": ["c1", "c2"]
    }  # fmt: skip
    config: Any = SimpleNamespace(workerinput=node.workerinput)
    assert workers.read_worker(config) == slot
    hooks.pytest_testnodedown(node)
    hooks.pytest_testnodedown(node)
    assert "gw9" not in hooks.slots
