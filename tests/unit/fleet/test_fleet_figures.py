"""What the fleet prints, counts and refuses, whole: made-up runs at the edges of every number."""

from __future__ import annotations

import json
import signal
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from quantmatrix import strict_json
from quantmatrix.errors import MissingPackageError, UnusableError, UsageError
from quantmatrix.exit_codes import (
    CLAIM_VIOLATED,
    ENVIRONMENT_UNUSABLE,
    NOT_EXECUTED,
    NOTHING_COLLECTED,
)
from quantmatrix.fleet import answers, bundle, child, driver, engine, intake, on_node, progress
from quantmatrix.fleet.answers import AnswerError, GroupAnswer, Note, Probe, Problem
from quantmatrix.fleet.cluster import Demand, Node, Site, find_several, find_sites
from quantmatrix.fleet.driver import Outcome
from quantmatrix.fleet.engine import Board, Failure
from quantmatrix.fleet.groups import Group, make_group
from quantmatrix.fleet.intake import Taken, explain_junit
from quantmatrix.fleet.on_node import Ended, explain_death, explain_end
from quantmatrix.fleet.progress import Lane, Progress, Running, show_seconds
from quantmatrix.harness.completeness import Comparison
from quantmatrix.tables import read

STATUS: dict[str, Any] = {
    "state": "running",
    "address": "10.0.0.1:6379",
    "dashboard": "10.0.0.1:8265",
    "started": "2026-11-24T10:00:00Z",
    "hardware": {
        "h200": {
            "nodes": 3,
            "planned": 1234,
            "kept": 17,
            "done": 205,
            "failed": 4,
            "not_executed": 11,
            "seconds_left": 7321.0,
            "running": [
                {"group": f"h200/m/c{n}", "node": f"n{n}", "done": n, "cells": 12, "seconds": 61.4}
                for n in range(10)
            ],
            "waiting_groups": 6,
        },
        "a-long-name-of-hardware": {
            "nodes": 0,
            "planned": 5,
            "kept": 0,
            "done": 5,
            "failed": 0,
            "not_executed": 0,
            "seconds_left": 0.0,
            "running": [],
            "waiting_groups": 0,
        },
    },
}
HEAD = (
    "hardware       nodes      planned         kept         done       failed not_executed    "
    "time left"
)


def test_a_status_whole() -> None:
    assert progress.describe(STATUS) == [
        "running: 10.0.0.1:6379, started 2026-11-24T10:00:00Z",
        "Ray's dashboard: http://10.0.0.1:8265",
        HEAD,
        "h200               3         1234           17          205            4           11   "
        "2 h 02 min",
        *(f"  h200/m/c{n} on n{n}: {n} of 12 cells, 61 s" for n in range(8)),
        "  2 more running, 6 groups waiting",
        "a-long-name-of-hardware     0            5            0            5            0"
        "            0          0 s",
    ]


@pytest.mark.parametrize(
    ("running", "waiting", "last"),
    [
        (8, 0, "  h200/m/c7 on n7: 7 of 12 cells, 61 s"),
        (9, 0, "  1 more running, 0 groups waiting"),
        (7, 1, "  0 more running, 1 groups waiting"),
    ],
)
def test_the_last_line_of_a_hardware(running: int, waiting: int, last: str) -> None:
    lane = STATUS["hardware"]["h200"]
    lane = {**lane, "running": lane["running"][:running], "waiting_groups": waiting}
    found = progress.describe({**STATUS, "dashboard": "", "hardware": {"h200": lane}})
    assert found[1] == HEAD
    assert found[-1] == last


@pytest.mark.parametrize("state", ["finished", "zero"])
def test_who_runs_or_has_ended_is_not_told_to_resume(state: str) -> None:
    told = {"state": state, "started": "then", "hardware": {}}
    assert progress.describe(told) == [f"{state}: , started then", HEAD]


def test_a_stopped_run_is_told_to_resume() -> None:
    told = {"state": "stopped", "started": "then", "hardware": {}}
    assert progress.describe(told) == [
        "stopped: , started then",
        HEAD,
        "nobody runs it: start the same `quantmatrix fleet run` again to resume",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119.4, "119 s"),
        (120.0, "2 min"),
        (169.0, "3 min"),
        (7139.0, "119 min"),
        (7200.0, "2 h 00 min"),
        (7321.0, "2 h 02 min"),
        (40_000.0, "11 h 07 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, 0.0),
        ({"waiting": {"a": 70.0, "b": 41.25}}, 111.2),
        ({"waiting": {"a": 70.0}, "estimated": 50.0, "spent": 35.0}, 49.0),
        ({"waiting": {"a": 70.0}, "estimated": 50.0}, 70.0),
        ({"waiting": {"a": 70.0}, "spent": 35.0}, 70.0),
        (
            {
                "waiting": {"a": 70.0, "b": 30.0, "c": 11.0},
                "running": {"a": Running("n", 0.0, 7, 3), "b": Running("n", 0.0, 0, 0)},
                "estimated": 20.0,
                "spent": 30.0,
            },
            60.8,
        ),
        ({"waiting": {"a": 7.0}, "running": {"a": Running("n", 0.0, 1, 3)}}, 0.0),
        ({"running": {"a": Running("n", 0.0, 4, 1)}, "waiting": {"b": 7.0}}, 7.0),
    ],
)
def test_seconds_that_are_left(given: dict[str, Any], left: float) -> None:
    assert Lane(**given).seconds_left == left


def test_a_lane_as_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "time", lambda: 1000.0)
    lane = Lane(3, 40, 5, 7, 2, 1, {"a": 9.0, "b": 4.0, "c": 1.0})
    lane.running = {"b": Running("n2", 900.04, 6, 2), "a": Running("n1", 899.96, 4, 1)}
    assert lane.to_json() == {
        "nodes": 3,
        "planned": 40,
        "kept": 5,
        "done": 7,
        "failed": 2,
        "not_executed": 1,
        "seconds_left": round((14 - 9 / 4 - 4 * 2 / 6) / 2, 1),
        "running": [
            {"group": "a", "node": "n1", "seconds": 100.0, "cells": 4, "done": 1},
            {"group": "b", "node": "n2", "seconds": 100.0, "cells": 6, "done": 2},
        ],
        "waiting_groups": 1,
    }
    assert [one["group"] for one in lane.to_json()["running"]] == ["a", "b"]
    empty = Lane()
    assert (empty.nodes, empty.planned, empty.kept, empty.done) == (0, 0, 0, 0)
    assert (empty.failed, empty.not_executed, empty.estimated, empty.spent) == (0, 0, 0.0, 0.0)


def make(name: str, seconds: float = 50.0, cells: int = 3) -> Group:
    return Group("cpu", "m", name, tuple("abcdefg"[:cells]), 5, seconds, needs_device=True)


def test_what_a_note_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    found = Progress(tmp_path, {})
    found.expect([make("c1"), make("c2")])
    lane = found.lanes["cpu"]
    assert lane.waiting == {"cpu/m/c1": 50.0, "cpu/m/c2": 50.0}
    found.take_note(Note("cpu/m/c1", "n", -4))
    assert lane.running == {"cpu/m/c1": Running("n", 100.0, 3, 0)}
    now[0] = 130.0
    found.take_note(Note("cpu/m/c1", "n", 2))
    assert lane.running["cpu/m/c1"] == Running("n", 100.0, 3, 2)
    found.take_note(Note("cpu/m/c1", "m", 4))  # it was begun again elsewhere
    assert lane.running["cpu/m/c1"] == Running("m", 130.0, 3, 3)
    now[0] = 140.0
    found.take_note(Note("cpu/m/c1", "o", 1))
    assert lane.running["cpu/m/c1"] == Running("o", 140.0, 3, 1)
    found.close("cpu/m/c1", 70.0, {"done": 2, "not_executed": 1})
    found.close("cpu/m/c2", 0.0, {"failed": 3})
    assert (lane.waiting, lane.running) == ({}, {})
    assert (lane.spent, lane.estimated) == (70.0, 50.0)
    assert (lane.done, lane.failed, lane.not_executed) == (2, 3, 1)
    found.take_note(Note("cpu/m/c1", "n", 2))
    assert lane.running == {}


def test_the_file_is_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [500.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.time, "time", lambda: 1000.0 + now[0])
    monkeypatch.setattr(progress, "tell_time", lambda: "then")
    found = Progress(tmp_path / "e.fleet", {"address": "a:1"})
    path = tmp_path / "e.fleet" / "status.json"
    assert progress.fleet_folder(tmp_path / "e") == tmp_path / "e.fleet"

    def written() -> float:
        return float(json.loads(path.read_text())["written"])

    found.write()
    assert path.read_text() == (
        '{\n "address": "a:1",\n "finished": false,\n "hardware": {},\n "schema": 1,\n '
        '"started": "then",\n "written": 1500.0\n}\n'
    )
    now[0] = 500.9
    found.write()
    assert written() == 1500.0
    now[0] = 501.0
    found.write()
    assert written() == 1501.0
    now[0] = 501.5
    found.write(at_once=True)
    assert written() == 1501.5


@pytest.mark.parametrize(
    ("finished", "age", "state"),
    [
        (True, 3.0, "finished"),
        (True, 300.0, "finished"),
        (False, 29.9, "running"),
        (False, 30.0, "stopped"),
        (False, 31.0, "stopped"),
    ],
)
def test_the_state_of_a_run(
    finished: bool, age: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "e.fleet"
    folder.mkdir()
    told = {"schema": 1, "finished": finished, "written": 1000.0}
    (folder / "status.json").write_text(json.dumps(told))
    monkeypatch.setattr(progress.time, "time", lambda: 1000.0 + age)
    assert progress.read(tmp_path / "e") == {**told, "state": state}


@pytest.mark.parametrize("text", ["[1]", '{"schema": 0}', '{"schema": 2}', "{}"])
def test_a_status_of_another_kind(text: str, tmp_path: Path) -> None:
    path = tmp_path / "e.fleet" / "status.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        progress.read(tmp_path / "e")
    assert str(caught.value) == f"{path}: not the status of a run, or of another version"


def test_a_status_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "e.fleet" / "status.json"
    with pytest.raises(UsageError) as caught:
        progress.read(tmp_path / "e")
    assert str(caught.value) == (
        f"{path}: no run of a fleet writes into {tmp_path / 'e'}; start one with "
        "`quantmatrix fleet run`"
    )
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(UsageError, match=r"status\.json: cannot be read: "):
        progress.read(tmp_path / "e")


@pytest.mark.parametrize("form", [Probe, Note, Problem, GroupAnswer])
def test_a_field_that_a_form_does_not_have_is_refused(form: Any) -> None:
    full: dict[str, Any] = {
        "source": "s",
        "group": "g",
        "node": "n",
        "done": 1,
        "code": 12,
        "cells": ["c"],
        "why": "w",
        "records": [],
        "junit": [],
        "problems": [],
        "seconds": 1.0,
    }
    own = {name: full[name] for name in form.__struct_fields__ if name in full}
    assert isinstance(answers.read(json.dumps(own).encode(), form), form)
    with pytest.raises(AnswerError, match="unknown field `other`"):
        answers.read(json.dumps({**own, "other": 1}).encode(), form)


def test_answers_of_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = answers.write(Note("g", "n", 3))
    assert data == b'{"group":"g","node":"n","done":3}'
    monkeypatch.setattr(strict_json, "LIMIT", len(data))
    assert answers.read(data, Note) == Note("g", "n", 3)
    with pytest.raises(AnswerError) as caught:
        answers.read(data + b" ", Note)
    assert str(caught.value) == f"it has {len(data) + 1} bytes, but the limit is {len(data)}"
    monkeypatch.undo()
    assert answers.read(answers.write(Probe("s")), Probe) == Probe("s", "", "")
    assert msgspec.json.decode(answers.write(Probe("s"))) == {
        "source": "s",
        "hardware": "",
        "problem": "",
    }


def test_which_hardware_a_node_names() -> None:
    given = {"quantmatrix/a": 1.0, "quantmatrix/b": 0.5, "GPU": 4.0, "quantmatrix/c": 3.0}
    assert Node("1", "n", given).named == ("a", "c")
    for cpus, runs in ((0.0, False), (0.5, False), (1.0, True), (6.0, True)):
        assert Node("1", "n", {"CPU": cpus}).runs_tasks is runs
    assert not Node("1", "n", {}).runs_tasks


def test_rows_of_several_devices_of_a_kind() -> None:
    tables = read.read()
    row = tables.hardware["h200"]
    others = {
        "h200": row,
        "h200-x2": replace(row, id="h200-x2", devices=2),
        "h200-x4": replace(row, id="h200-x4", devices=4),
        "h200-x5": replace(row, id="h200-x5", devices=5),
        "small-x2": replace(row, id="small-x2", devices=2, memory_gib=row.memory_gib / 2),
        "other-x2": replace(row, id="other-x2", devices=2, arch="sm91"),
        "amd-x2": replace(row, id="amd-x2", devices=2, vendor="amd"),
        "none": replace(row, id="none", devices=0),
        "one": replace(row, id="one", devices=1),
    }
    found = find_several(Node("1", "n", {"GPU": 4.0}), row, replace(tables, hardware=others))
    assert [one.id for one in found] == ["h200-x2", "h200-x4"]
    assert find_several(Node("1", "n", {"NPU": 4.0}), row, replace(tables, hardware=others)) == []


def test_a_node_that_was_not_asked_is_not_used() -> None:
    node = Node("0123456789", "10.0.0.1", {"CPU": 2.0})
    assert find_sites([node], {}, read.read(), "s") == (
        {},
        {"10.0.0.1 (01234567)": "it was not asked"},
    )


def test_what_is_wrong_with_a_node_is_cut() -> None:
    node = Node("0123456789", "n", {"CPU": 2.0})
    for length in (500, 501):
        found = find_sites([node], {node.id: Probe("s", problem="x" * length)}, read.read(), "s")[1]
        assert len(found["n (01234567)"]) == 500
        assert (found["n (01234567)"] == "x" * 500) is (length == 500)


def test_why_no_node_could_run_a_task() -> None:
    row = replace(read.read().hardware["h200"], id="h200-x4", devices=4)
    nodes = [Node("1", "n1", {"CPU": 8.0, "GPU": 3.0}), Node("2", "n2", {"CPU": 8.0, "GPU": 2.0})]
    site = Site(row, nodes)
    assert site.explain_lack(Demand({"CPU": 1.0, "GPU": 4.0})) == (
        "no node of h200-x4 has 4 GPU for Ray (n1, n2)"
    )
    assert site.explain_lack(Demand({"CPU": 1.0, "GPU": 3.0})) is None
    assert site.explain_lack(Demand({"other": 0.0})) is None
    assert site.explain_lack(Demand({"CPU": 8.5})) == (
        "no node of h200-x4 has 8.5 CPU for Ray (n1, n2)"
    )


def test_an_order_as_a_node_gets_it() -> None:
    group = Group("h200", "m", "c", ("x", "y"), 7, 3.0, needs_device=True)
    assert json.loads(group.order({"load", "compile"}, 31, full_size=True)) == {
        "group": "h200/m/c",
        "hardware": "h200",
        "cells": ["x", "y"],
        "checks": ["compile", "load"],
        "limit": 31,
        "most_seconds": 31 * 7 + 900,
        "full_size": True,
    }


@pytest.mark.parametrize(
    ("checks", "only", "count", "needs"),
    [
        (("refuse",), (), 2, False),
        (("refuse", "compile"), (), 4, False),
        (("refuse", "load"), (), 4, True),
        (("compile", "load"), ("compile",), 2, False),
        (("compile", "load"), ("load",), 2, True),
    ],
)
def test_checks_of_a_group(
    checks: tuple[str, ...], only: tuple[str, ...], count: int, needs: bool
) -> None:
    cells: Any = [SimpleNamespace(id=name, checks=checks) for name in ("a", "b")]
    found = make_group("cpu", ("m", "c"), cells, {"a": 2.5, "b": 4.0, "z": 9.0}, only)
    assert found == Group("cpu", "m", "c", ("a", "b"), count, 6.5, needs)


def compared(**given: Any) -> Comparison:
    usual: dict[str, Any] = {
        "planned": 9,
        "missing": {},
        "failed": {},
        "unplanned": {},
        "nothing": False,
    }
    return Comparison(**{**usual, **given})


def test_what_is_wrong_with_a_run_whole() -> None:
    outcome = Outcome({}, {"a": "lost", "b": "lost", "c": "odd", "e": "sent twice"})
    found = compared(
        missing=dict.fromkeys("abcd", ("load",)), failed={"f": ["load", "latents"], "g": ["x"]}
    )
    assert (outcome.written, outcome.code) == (0, 0)
    assert driver.describe(outcome, found, {"n1": "too old", "n2": "busy"}) == [
        "not used: n1: too old",
        "not used: n2: busy",
        "row not executed: a and 1 more: lost",
        "row not executed: c: odd",
        "row not executed: d: its record lacks a check",
        "e: sent twice",
        "failed: f (load, latents)",
        "failed: g (x)",
    ]
    for code, last in (
        (ENVIRONMENT_UNUSABLE, ["environment unusable on some node"]),
        (NOTHING_COLLECTED, []),
        (ENVIRONMENT_UNUSABLE + 1, []),
    ):
        assert driver.describe(Outcome({}, code=code), compared(), {}) == last


def test_a_run_as_plain_data() -> None:
    outcome = Outcome({}, {"a": "lost"}, written=5, code=0)
    found = driver.to_json(outcome, compared(), {"n": "old"})
    assert {name: found[name] for name in ("ok", "exit_code", "written")} == {
        "ok": True,
        "exit_code": 0,
        "written": 5,
    }
    assert (found["reasons"], found["unused_nodes"]) == ({"a": "lost"}, {"n": "old"})
    outcome.code = ENVIRONMENT_UNUSABLE
    told = driver.to_json(outcome, compared(failed={"f": ["load"]}), {})
    assert (told["ok"], told["exit_code"]) == (False, ENVIRONMENT_UNUSABLE)
    outcome.code = 10
    told = driver.to_json(outcome, compared(failed={"f": ["load"]}), {})
    assert told["exit_code"] == CLAIM_VIOLATED


def test_blame_keeps_the_largest_code() -> None:
    taken = Taken("n")
    taken.blame(["a", "b"], "x", ENVIRONMENT_UNUSABLE)
    taken.blame(["b"], "y")
    assert (taken.reasons, taken.code) == ({"a": "x", "b": "y"}, ENVIRONMENT_UNUSABLE)
    usual = Taken("n")
    usual.blame([], "x")
    assert (usual.code, usual.reasons, usual.seconds) == (NOT_EXECUTED, {}, 0.0)
    lost = driver.blame(make("c", cells=2), "gone")
    assert (lost.node, lost.reasons, lost.code) == ("", {"a": "gone", "b": "gone"}, NOT_EXECUTED)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [(10, 10), (14, 14), (9, NOT_EXECUTED), (15, NOT_EXECUTED), (0, NOT_EXECUTED), (11, 11)],
)
def test_a_code_that_a_node_may_say(sent: int, kept: int) -> None:
    problem = Problem(sent, ["a", "other"], "why\x1b")
    data = answers.write(GroupAnswer("n" * 200, [], [], [problem], -3.0))
    judge = intake.Intake(read.read(), SimpleNamespace(), ())  # type: ignore[arg-type]
    found = judge.take(data, ["a", "b"])
    assert (found.reasons, found.code, found.seconds) == ({"a": "why\\x1b"}, kept, 0.0)
    assert len(found.node) == 100


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"<x><testcase name='test_load[a@cpu]'/><testcase/></x>", None),
        (b"<x><testcase name='plain'/></x>", None),
        (
            b"<x><testcase name='test_load[c@cpu]'/><testcase name='test_load[b@cpu]'/></x>",
            "it is about b@cpu, which was not asked for",
        ),
        (b"<x><!ENTITY </x>", "it declares a document type"),
        (b"<!DOCTYPE x><x/>", "it declares a document type"),
    ],
)
def test_junit_texts(data: bytes, why: str | None) -> None:
    assert explain_junit(data, {"a@cpu"}) == why


def end(**given: Any) -> Ended:
    usual: dict[str, Any] = {
        "code": -9,
        "finished": False,
        "begun": {"a"},
        "open": "a",
        "output": "some\nlast line\n",
        "out_of_memory": False,
        "gib": 3.27,
        "too_long": False,
    }
    return Ended(**{**usual, **given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"out_of_memory": True, "too_long": True},
            "out of memory: the system killed the process (it had 3.3 GiB)",
        ),
        ({"too_long": True}, "stopped: the process was not done at the end of its time"),
        ({}, "killed by signal 9, as for want of memory (it had 3.3 GiB), or by somebody"),
        (
            {"code": -signal.SIGTERM},
            "killed by signal 15 (Terminated) (it had 3.3 GiB)",
        ),
        ({"code": -6}, "killed by signal 6 (Aborted) (it had 3.3 GiB)"),
        (
            {"code": 0, "output": "x\nTimeout (0:01:01)!"},
            "stopped: hung where no signal reaches it, past the time limit of a check",
        ),
        ({"code": 1, "output": " \na" + "b" * 299 + "\n"}, "the process ended with 1: a" + "b" * 299),
        ({"code": 0, "output": "ab" + "c" * 299}, "the process ended with 0: b" + "c" * 299),
    ],
)  # fmt: skip
def test_the_death_of_a_process_whole(given: dict[str, Any], expected: str) -> None:
    assert explain_death(end(**given)) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, []),
        (1, []),
        (2, [Problem(ENVIRONMENT_UNUSABLE, ["a", "b"], "pytest ended with 2: last line")]),
        (5, [Problem(ENVIRONMENT_UNUSABLE, ["a", "b"], "pytest ended with 5: last line")]),
        (6, []),
        (11, []),
        (12, []),
        (13, [Problem(NOTHING_COLLECTED, ["a", "b"], "pytest ended with 13: last line")]),
        (14, [Problem(ENVIRONMENT_UNUSABLE, ["a", "b"], "pytest ended with 14: last line")]),
        (15, [Problem(ENVIRONMENT_UNUSABLE, ["a", "b"], "pytest ended with 15: last line")]),
        (-11, [Problem(ENVIRONMENT_UNUSABLE, ["a", "b"], "pytest ended with -11: last line")]),
    ],
)
def test_a_process_that_came_to_its_end(code: int, expected: list[Problem]) -> None:
    assert explain_end(end(code=code, finished=True), ["a", "b"]) == expected


@pytest.mark.parametrize(
    ("begun", "opened", "lost"),
    [(set(), "", ["a", "b"]), ({"a"}, "a", ["a"]), ({"a"}, "", None), (set(), "b", ["b"])],
)
def test_the_cells_that_a_dead_process_loses(
    begun: set[str], opened: str, lost: list[str] | None
) -> None:
    why = "killed by signal 9, as for want of memory (it had 3.3 GiB), or by somebody"
    expected = [Problem(NOT_EXECUTED, lost, why)] if lost else []
    assert explain_end(end(begun=begun, open=opened), ["a", "b"]) == expected


def test_the_command_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "suites.json").write_text('["--pyargs", "x"]')
    wanted = {"limit": 31, "checks": ["load", "trace"], "hardware": "h200", "full_size": True}
    found = on_node.command_of(tmp_path, wanted, 3, 7)
    assert found[1:] == [
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-p", "quantmatrix.fleet.child", "--fleet-leash=7"),
        f"--fleet-steps={tmp_path}/steps-3",
        *("--hardware", "h200", "--rows", f"{tmp_path}/cells", "--check", "load"),
        *("--check", "trace", f"--evidence-dir={tmp_path}/evidence"),
        f"--junit-xml={tmp_path}/junit-0003.xml",
        "--timeout=31",
        *("-o", "faulthandler_timeout=91", "-o", "faulthandler_exit_on_timeout=true"),
        *("--full-size", "--pyargs", "x"),
    ]
    assert "--full-size" not in on_node.command_of(tmp_path, {**wanted, "full_size": False}, 3, 7)


class Process:
    """A process that ends after some looks."""

    pid = 4321

    def __init__(self, looks: int) -> None:
        self.left = looks

    def poll(self) -> int | None:
        self.left -= 1
        return 0 if self.left < 0 else None


def test_a_process_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, now, slept = tmp_path / "steps", [50.0], list[float]()
    texts = iter(["start a\nend a\nstart b\n", "start a\nend a\nstart b\n", "start b\nfinish\n"])
    sizes = iter([5e6, 9e6, 7e6])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += 10.0
        steps.write_text(next(texts, "start b\nfinish\n"))

    monkeypatch.setattr(on_node.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(on_node.time, "sleep", sleep)
    monkeypatch.setattr(on_node, "read_memory", lambda pid: next(sizes, 0.0))
    said: list[int] = []
    process: Any = Process(3)
    assert on_node.watch(process, steps, 30.0, said.append) == (False, 9e6)
    assert (said, slept) == ([0, 1, 1], [0.2] * 3)
    late: Any = Process(9)
    now[0] = 50.0
    assert on_node.watch(late, steps, 29.0, said.append) == (True, 0.0)
    assert late.left == 6


def test_memory_is_read_in_kilobytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"

    def path(text: str) -> Path:
        assert text == "/proc/77/status"
        return status

    monkeypatch.setattr(on_node, "Path", path)
    assert on_node.read_memory(77) == 0.0
    status.write_text("Name:\tx\nVmRSS:\t   12 kB\nVmHWM:\t   345 kB\n")
    assert on_node.read_memory(77) == 353_280.0
    status.write_text("Name:\tx\n")
    assert on_node.read_memory(77) == 0.0


def test_kills_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "vmstat", tmp_path / "events"
    monkeypatch.setattr(on_node, "OOM_COUNTS", (tmp_path / "none", one, other))
    assert on_node.count_oom_kills() == 0
    one.write_text("oom_kill_x 9\noom_kill 3\n")
    other.write_text("low 8\noom_kill 4\noom_group_kill 5\n")
    assert on_node.count_oom_kills() == 7


def test_cells_that_are_left_go_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([end(begun={"a", "b"}, open="b"), end(code=0, finished=True, begun={"c"}, open="")])
    asked: list[list[str]] = []

    def run(folder: Path, wanted: Any, cells: list[str], say: Any) -> Ended:
        asked.append(list(cells))
        say(1)
        return next(ends)

    monkeypatch.setattr(on_node, "run_process", run)
    answer = GroupAnswer("n", [], [], [], 0.0)
    told: list[bytes] = []
    on_node.run_cells(tmp_path, {"group": "g", "cells": ["a", "b", "c"]}, answer, told.append)
    assert asked == [["a", "b", "c"], ["c"]]
    assert [answers.read(note, Note) for note in told] == [Note("g", "n", 1), Note("g", "n", 3)]
    assert [problem.cells for problem in answer.problems] == [["b"]]


def test_nothing_goes_on_where_no_cell_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        on_node, "run_process", lambda *_: asked.append(1) or end(begun=set(), open="")
    )
    answer = GroupAnswer("n", [], [], [], 0.0)
    on_node.run_cells(tmp_path, {"group": "g", "cells": ["a", "b"]}, answer, lambda _: None)
    assert (len(asked), [problem.cells for problem in answer.problems]) == (1, [["a", "b"]])


def test_what_a_node_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_node, "NEEDED", {"no_such_a": "a", "sys": "b", "no_such_c": "c"})
    found = answers.read(on_node.probe(b"{}", named=False), Probe)
    assert found.problem == "without a and c: pip install 'quantmatrix[ray,test]'"
    monkeypatch.setattr(on_node, "NEEDED", {})
    monkeypatch.setattr(on_node, "identify", lambda data: ("h200", f"odd {data!r}"))
    found = answers.read(on_node.probe(b"{}", named=False), Probe)
    assert (found.hardware, found.problem) == ("h200", "odd b'{}'")
    assert answers.read(on_node.probe(b"{}", named=True), Probe).hardware == ""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "OutOfMemoryError",
            "a  b\n" + "c" * 500,
            "out of memory: Ray stopped its worker to save the node: a b " + "c" * 396,
        ),
        ("NodeDiedError", "d" * 301, "its node or worker died, 4 times: " + "d" * 300),
        ("WorkerCrashedError", "x", "its node or worker died, 4 times: x"),
        ("LocalRayletDiedError", "x", "its node or worker died, 4 times: x"),
        ("RayTaskError", "a\n" + "e" * 401 + "\n", "an error on the node: " + "e" * 400),
        ("RayTaskError(ValueError)", "one", "an error on the node: one"),
        ("Other", "f" * 401, "Other: " + "f" * 400),
        ("RayError", "a\nb", "RayError: a b"),
    ],
)
def test_an_error_of_ray_whole(name: str, text: str, expected: str) -> None:
    assert engine.explain(type(name, (Exception,), {})(text)) == expected


@pytest.mark.parametrize(("address", "where"), [("a:1", "--address a:1"), (None, "Ray")])
def test_a_cluster_that_does_not_answer(address: str | None, where: str) -> None:
    def init(**given: Any) -> None:
        assert (given["address"], given["log_to_driver"]) == (address, False)
        raise ConnectionError("x  y\n" + "z" * 600)

    with pytest.raises(UnusableError) as caught:
        engine.connect(SimpleNamespace(init=init), address)
    assert str(caught.value) == f"{where}: x y " + "z" * 496


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingPackageError) as caught:
        engine.import_ray()
    assert str(caught.value) == "quantmatrix fleet needs Ray: pip install 'quantmatrix[ray]'"


def test_a_board_drops_the_oldest_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "KEPT", 3)
    board = Board()
    for number in range(6):
        board.tell(b"%d" % number)
    assert board.take() == [b"2", b"3", b"4", b"5"]
    assert board.take() == []


class Refs:
    """A Ray whose tasks are answers, of which some are not ready."""

    exceptions = SimpleNamespace(RayError=KeyError)

    def __init__(self, ready: int) -> None:
        self.ready, self.waits = ready, list[Any]()
        self.cancelled: list[tuple[Any, bool]] = []

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float = 0) -> Any:
        self.waits.append((len(refs), num_returns, timeout))
        return refs[: min(self.ready, num_returns)], refs[min(self.ready, num_returns) :]

    def get(self, ref: Any) -> Any:
        if ref == "lost":
            raise KeyError("x")
        return ref if isinstance(ref, bytes) else 7

    def cancel(self, ref: Any, *, force: bool) -> None:
        self.cancelled.append((ref, force))


def open_engine(ray: Refs) -> Any:
    found: Any = object.__new__(engine.RayEngine)
    found.ray, found.names, found.notes = ray, {}, None
    return found


def test_answers_that_are_ready() -> None:
    found = open_engine(ray := Refs(ready=2))
    assert found.wait(1.5) == []
    assert ray.waits == []
    found.names = {b"a": "A", b"b": "B", b"c": "C"}
    assert found.wait(1.5) == [("A", b"a"), ("B", b"b")]
    assert ray.waits == [(3, 1, 1.5), (3, 3, 0)]
    assert found.names == {b"c": "C"}
    ray.ready = 0
    assert found.wait(2.5) == []
    assert ray.waits[2:] == [(1, 1, 2.5)]
    assert found.fetch("lost") == Failure("KeyError: 'x'")
    assert found.fetch(1) == Failure("its answer is not bytes")
    found.names = {b"c": "C", b"d": "D", b"e": "C"}
    found.cancel("C")
    assert (found.names, ray.cancelled) == ({b"d": "D"}, [(b"c", True), (b"e", True)])


def test_the_address_of_a_cluster() -> None:
    found = open_engine(Refs(0))
    found.context = SimpleNamespace(address_info={"gcs_address": "a:1"}, dashboard_url=None)
    assert (found.address, found.dashboard) == ("a:1", "")
    found.context = SimpleNamespace(address_info={}, dashboard_url="d:2")
    assert found.dashboard == "d:2"
    assert found.address == engine.socket.gethostname()


def test_the_bundle_of_a_project(tmp_path: Path) -> None:
    matrix, suites = tmp_path / "matrix", tmp_path / "checks"
    with pytest.raises(UsageError) as caught:
        bundle.pack(matrix)
    assert str(caught.value) == f"{matrix}: no tables there"
    for folder in (matrix, suites, tmp_path / "reports"):
        folder.mkdir()
    (matrix / "b.csv").write_text("b")
    (matrix / "a.txt").write_text("no table")
    with pytest.raises(UsageError) as caught:
        bundle.pack(matrix, [suites])
    assert str(caught.value) == f"--suites {suites}: no suites there"
    (tmp_path / "reports" / "limits.csv").write_text("l")
    (tmp_path / "reports" / "other.csv").write_text("o")
    (suites / "test_x.py").write_text("x = 1")
    (suites / "conftest.py").write_text("c = 1")
    ini = bundle.INI
    common = {"matrix/b.csv": "b", "reports/limits.csv": "l", "pytest.ini": ini}
    assert json.loads(bundle.pack(matrix, [suites])) == {
        **common,
        "tests/suites/test_x.py": "x = 1",
        "tests/suites/conftest.py": "c = 1",
        "suites.json": '["tests/suites"]',
    }
    assert json.loads(bundle.pack(matrix, [suites / "test_x.py"])) == {
        **common,
        "test_x.py": "x = 1",
        "conftest.py": "c = 1",
        "suites.json": '["test_x.py"]',
    }
    assert json.loads(bundle.pack(matrix)) == {
        **common,
        "suites.json": '["--pyargs", "quantmatrix.suites"]',
    }


def test_a_bundle_is_laid_out(tmp_path: Path) -> None:
    bundle.unpack(json.dumps({"a/b/c.txt": "x", "a/b/d..e": "y"}).encode(), tmp_path)
    bundle.unpack(json.dumps({"a/b/c.txt": "z"}).encode(), tmp_path)
    assert (tmp_path / "a/b/c.txt").read_text() == "z"
    for name in ("../x", "/x"):
        with pytest.raises(UsageError) as caught:
            bundle.unpack(json.dumps({name: ""}).encode(), tmp_path)
        assert str(caught.value) == f"{name}: a file of a bundle lies in its folder"


def test_steps_are_lines(tmp_path: Path) -> None:
    steps = child.Steps(tmp_path / "steps")
    steps.pytest_runtest_logstart("t.py::test_load[a@cpu]")
    steps.pytest_runtest_logfinish("t.py::test_load[a@cpu]")
    steps.pytest_unconfigure(SimpleNamespace())  # type: ignore[arg-type]
    assert (tmp_path / "steps").read_text() == "start a@cpu\nend a@cpu\nfinish\n"
    manager = pytest.PytestPluginManager()
    later = SimpleNamespace(pytest_unconfigure=lambda config: steps.write("another"))
    manager.register(later, "first")
    manager.register(steps, "steps")
    config: Any = SimpleNamespace()
    manager.hook.pytest_unconfigure(config=config)  # those that were registered last run first
    assert (tmp_path / "steps").read_text().splitlines()[-2:] == ["another", "finish"]


def test_what_the_fleet_says_does_not_change() -> None:
    for value, name in (
        (Node("1", "n", {}), "id"),
        (Demand({}), "nodes"),
        (make("c"), "seconds"),
        (Failure("x"), "why"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, "x")
    assert Demand({}).nodes == ()
