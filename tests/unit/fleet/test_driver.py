"""The driver on a pretended cluster: what it hands over, keeps, refuses, gives up, and goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fleets
import pytest
import tqdm
from fleets import PretendedCluster, make_record

from quantmatrix.cli import fleet as command
from quantmatrix.cli import main
from quantmatrix.exit_codes import CLAIM_VIOLATED, ENVIRONMENT_UNUSABLE, NOT_EXECUTED
from quantmatrix.fleet import answers, cluster, driver, engine
from quantmatrix.fleet.answers import Note, Problem
from quantmatrix.fleet.cluster import Node, Site
from quantmatrix.fleet.driver import Driver, Outcome
from quantmatrix.fleet.engine import Failure
from quantmatrix.fleet.groups import Group, make_groups
from quantmatrix.fleet.intake import Intake
from quantmatrix.fleet.progress import Progress
from quantmatrix.harness.completeness import Comparison
from quantmatrix.proof import freshness, merge, store
from quantmatrix.proof.record import CheckResult
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell, Matrix

CPU = Node("1" * 8, "10.0.0.2", {"CPU": 4.0, "quantmatrix/cpu": 4.0})
HOPPER = Node("2" * 8, "10.0.0.3", {"CPU": 4.0, "quantmatrix/h100": 1.0})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    fleets.make_project(folder)
    return folder


@pytest.fixture(scope="module")
def tables(project: Path) -> Matrix:
    return read.read(project / "matrix")


def respond(tables: Matrix, **given: object) -> Callable[[dict[str, Any]], bytes | Failure]:
    """Nodes on which everything passes."""
    by_id = {cell.id: cell for cell in tables.cells}
    return lambda order: fleets.answer(
        [make_record(by_id[cell], tables) for cell in order["cells"]], **given
    )


def run(
    tables: Matrix, ray: PretendedCluster, evidence: Path, only: tuple[str, ...] = ()
) -> tuple[Outcome, Progress, int]:
    """(outcome, progress, exit code) of all cells of the tables."""
    one = make_driver(tables, ray, evidence, only)
    one.run()
    outcome = one.outcome
    return outcome, one.progress, driver.exit_code(outcome, outcome.compare(tables.cells, only))


def make_driver(
    tables: Matrix, ray: PretendedCluster, evidence: Path, only: tuple[str, ...] = ()
) -> Driver:
    """A driver that has planned all cells of the tables."""
    sites = {
        name: Site(tables.hardware[name], [node for node in ray.nodes if name in node.named])
        for node in ray.nodes
        for name in node.named
    }
    progress = Progress(evidence.with_name("evidence.fleet"), {"address": "here"})
    outcome = Outcome({})
    intake = Intake(tables, freshness.Now(), only)
    one = Driver(ray, intake, evidence, progress, outcome, limit=900)
    one.plan(make_groups(tables.cells, {}, only), sites)
    return one


def test_every_cell_is_run_once_and_cells_without_hardware_are_named(
    tables: Matrix, tmp_path: Path
) -> None:
    ray = PretendedCluster(respond(tables), [CPU, HOPPER])
    outcome, progress, code = run(tables, ray, tmp_path / "evidence")
    asked = [cell for order in ray.orders for cell in order["cells"]]  # type: ignore[attr-defined]
    assert sorted(asked) == sorted(cell.id for cell in tables.cells if cell.hardware != "b200")
    assert set(store.read_folder(tmp_path / "evidence")) == set(asked)
    assert outcome.reasons == {"svdq-b-blackwell@b200": "no node of the cluster is b200"}
    assert code == NOT_EXECUTED
    lane = progress.lanes["cpu"]
    assert (lane.done, lane.failed, lane.not_executed) == (5, 0, 0)
    assert progress.lanes["b200"].not_executed == 1
    demand = ray.demands["cpu/flux-1/fp8-a"]
    assert demand == cluster.Demand({"CPU": 1.0, "quantmatrix/cpu": 1.0})
    [order] = [order for order in ray.orders if order["group"] == "cpu/flux-1/fp8-a"]
    assert order["cells"] == ["fp8-a@cpu+reference", "fp8-a@cpu+decode"]
    assert (order["limit"], order["most_seconds"]) == (900, 900 * 4 + 900)


def test_the_longest_go_first(tables: Matrix) -> None:
    seconds = {"fp8-a": 1.0, "fp8-b": 9.0, "svdq-a": 4.0, "svdq-b": 4.0}
    found = {
        cell.id: make_record(cell, tables, timings={"load": seconds[cell.checkpoint]})
        for cell in tables.cells
    }
    groups = [g for g in make_groups(tables.cells, found) if g.hardware == "cpu"]
    assert [group.checkpoint for group in groups] == ["fp8-b", "svdq-a", "svdq-b", "fp8-a"]
    assert [group.seconds for group in groups] == [9.0, 4.0, 4.0, 2.0]
    assert [group.needs_device for group in groups] == [True] * 4
    [refusal] = [g for g in make_groups(tables.cells, found) if g.hardware == "h100"]
    assert not refusal.needs_device


def test_ray_has_a_window_of_groups(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "WINDOW", 2)
    ray = PretendedCluster(respond(tables), [CPU])
    run(tables, ray, tmp_path / "evidence")
    assert len(ray.orders) == 4
    assert ray.most == 2


def test_cells_with_the_same_verdicts_share_them(tables: Matrix, tmp_path: Path) -> None:
    """Memory stays flat however many cells there are; a verdict that is added later is the cell's alone."""
    outcome, _, _ = run(tables, PretendedCluster(respond(tables), [CPU, HOPPER]), tmp_path / "e")
    passed = {cell: found for cell, found in outcome.verdicts.items() if "@cpu" in cell}
    assert len(passed) == 5
    assert len({id(found) for found in passed.values()}) == 1
    outcome.add("fp8-b@cpu", {"latents": "fail"})
    assert outcome.verdicts["fp8-b@cpu"] == {"load": "pass", "latents": "fail"}
    assert outcome.verdicts["svdq-a@cpu"] == {"load": "pass", "latents": "pass"}


def test_answers_that_come_together_are_kept_with_one_journey_of_the_disk(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is a failure, another contradicts what lies there: each costs its own cells."""
    [cell] = [cell for cell in tables.cells if cell.id == "fp8-b@cpu"]
    store.write(make_record(cell, tables, latents_digest="sha256:1"), tmp_path / "evidence")
    usual, writes = respond(tables, junit=["<testsuites/>"]), []
    merged = merge.write
    monkeypatch.setattr(merge, "write", lambda *given: writes.append(1) or merged(*given))

    def some_fail(order: dict[str, Any]) -> bytes | Failure:
        if order["group"] == "cpu/flux-1/svdq-a":
            return Failure("its node died")
        if order["group"] == "cpu/flux-1/fp8-b":
            return fleets.answer([make_record(cell, tables, latents_digest="sha256:2")])
        return usual(order)

    ray = PretendedCluster(some_fail, [CPU, HOPPER])
    monkeypatch.setattr(
        ray,
        "wait",
        lambda seconds: [(n, ray.respond(ray.pending.pop(n))) for n in list(ray.pending)],
    )
    outcome, progress, code = run(tables, ray, tmp_path / "evidence")
    assert len(writes) == 1
    assert outcome.reasons["svdq-a@cpu"] == "its node died"
    assert "one program gave two results" in outcome.reasons["fp8-b@cpu"]
    found = store.read_folder(tmp_path / "evidence")
    assert found["fp8-b@cpu"].latents_digest == "sha256:1"
    assert {"fp8-a@cpu+reference", "fp8-a@cpu+decode", "svdq-a-hopper@h100"} < set(found)
    lane = progress.lanes["cpu"]
    assert (lane.done, lane.not_executed) == (3, 2)
    files = {path.name for path in (tmp_path / "evidence.fleet" / "junit").iterdir()}
    assert files == {"cpu--flux-1--fp8-a.xml", "cpu--flux-1--svdq-b.xml"} | {
        name for name in files if name.startswith("h100--")
    }
    assert code == NOT_EXECUTED


@pytest.mark.parametrize(
    ("failure", "why", "code"),
    [
        ("out of memory: Ray stopped its worker", "out of memory", NOT_EXECUTED),
        (Problem(NOT_EXECUTED, ["fp8-b@cpu"], "killed by signal 9"), "signal 9", NOT_EXECUTED),
        (Problem(ENVIRONMENT_UNUSABLE, ["fp8-b@cpu"], "no hub"), "no hub", ENVIRONMENT_UNUSABLE),
    ],
)
def test_what_goes_wrong_is_told_with_the_cell(
    tables: Matrix, tmp_path: Path, failure: str | Problem, why: str, code: int
) -> None:
    usual = respond(tables)

    def fail(order: dict[str, Any]) -> bytes | Failure:
        if order["group"] != "cpu/flux-1/fp8-b":
            return usual(order)
        return (
            Failure(failure) if isinstance(failure, str) else fleets.answer([], problems=[failure])
        )

    cells = [cell for cell in tables.cells if cell.hardware == "cpu"]
    some = replace(tables, cells=tuple(cells))
    outcome, progress, found = run(some, PretendedCluster(fail, [CPU]), tmp_path / "evidence")
    assert list(outcome.reasons) == ["fp8-b@cpu"]
    assert why in outcome.reasons["fp8-b@cpu"]
    assert found == code
    assert progress.lanes["cpu"].not_executed == 1
    lines = driver.describe(outcome, outcome.compare(cells, ()), {"10.0.0.9": "too old"})
    assert lines[0] == "not used: 10.0.0.9: too old"
    assert lines[1].startswith("row not executed: fp8-b@cpu: ")


def spoil_cell(record: Any, **given: object) -> Any:
    return replace(record, cell={**record.cell, **given})


BAD: dict[str, tuple[Callable[[Any, Cell], Any], str]] = {
    "another cell": (
        lambda r, c: spoil_cell(r, id="svdq-a@cpu", row="svdq-a"),
        "of svdq-a@cpu, which was not asked for",
    ),
    "a path": (
        lambda r, c: spoil_cell(r, id="../../x@cpu", row="../../x"),
        "of ../../x@cpu, which was not",
    ),
    "an older row": (lambda r, c: spoil_cell(r, row_digest="sha256:0"), "row_digest are not those"),
    "another family": (lambda r, c: spoil_cell(r, family="msmodelslim"), "family are not those"),
    "other checks": (
        lambda r, c: replace(r, checks={**r.checks, "trace": CheckResult("pass")}),
        "checks that were not asked for: trace",
    ),
    "no machine": (lambda r, c: replace(r, machine={}), "does not name the machine"),
    "another architecture": (
        lambda r, c: replace(r, plan={"machine": {"vendor": "nvidia", "arch": "sm90"}}),
        "stale: made on nvidia sm90",
    ),
    "published": (
        lambda r, c: replace(
            r, checkpoint={"digest": "sha256:0", "repository": "some/x", "revision": "a" * 40}
        ),
        "stand-ins were asked for",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_is_not_what_was_asked_for_is_not_kept(
    tables: Matrix, tmp_path: Path, name: str
) -> None:
    spoil, why = BAD[name]
    [cell] = [cell for cell in tables.cells if cell.id == "fp8-b@cpu"]
    text = json.dumps(spoil(make_record(cell, tables), cell).to_json())
    sent = answers.write(answers.GroupAnswer("a\x1b[2J", [text], [], [], 1.0))
    taken = Intake(tables, freshness.Now()).take(sent, ["fp8-b@cpu"])
    assert taken.records == []
    assert why in taken.reasons["fp8-b@cpu"]
    assert taken.code == NOT_EXECUTED
    assert "\x1b" not in taken.reasons["fp8-b@cpu"]


def test_a_pass_that_exceeds_the_limits_here_is_not_kept(tables: Matrix) -> None:
    [cell] = [cell for cell in tables.cells if cell.id == "fp8-b@cpu"]
    now = freshness.Now(list_exceeded=lambda record: ["latents: psnr_db 3 is below 30"])
    taken = Intake(tables, now).take(fleets.answer([make_record(cell, tables)]), [cell.id])
    assert taken.records == []
    assert "psnr_db 3 is below 30" in taken.reasons[cell.id]


def test_a_record_that_is_sent_twice_is_kept_once(tables: Matrix) -> None:
    [cell] = [cell for cell in tables.cells if cell.id == "fp8-b@cpu"]
    record = make_record(cell, tables)
    taken = Intake(tables, freshness.Now()).take(fleets.answer([record, record]), [cell.id])
    assert len(taken.records) == 1
    assert "sent twice" in taken.reasons[cell.id]


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\x80\x04\x95", "no answer"),  # a pickle
        (b'{"node": "a"}', "missing required field"),
        (b'{"node":"a","records":[],"junit":[],"problems":[],"seconds":0,"x":1}', "unknown field"),
        (b'{"node":"a","records":["{}"],"junit":[],"problems":[],"seconds":0}', "schema"),
        (b"[" * 10_000_000, "limit"),
    ],
    ids=["pickle", "too little", "too much", "no record", "nested"],
)
def test_what_is_no_answer_is_refused(tables: Matrix, sent: bytes, why: str) -> None:
    taken = Intake(tables, freshness.Now()).take(sent, ["fp8-b@cpu"])
    assert taken.records == []
    assert why in taken.reasons["fp8-b@cpu"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('<!DOCTYPE x [<!ENTITY a "b">]><testsuites/>', "document type"),
        ("<testsuites>", "no element found"),
        (
            '<testsuites><testcase name="test_load[fp8-a@cpu+decode]"/></testsuites>',
            "fp8-a@cpu+decode",
        ),
    ],
    ids=["dtd", "cut off", "another cell"],
)
def test_a_junit_file_that_is_not_what_was_asked_for_is_not_kept(
    tables: Matrix, text: str, why: str
) -> None:
    taken = Intake(tables, freshness.Now()).take(fleets.answer([], junit=[text]), ["fp8-b@cpu"])
    assert taken.junit == []
    assert why in taken.reasons["fp8-b@cpu"]
    good = '<testsuites><testcase name="test_load[fp8-b@cpu]"/></testsuites>'
    taken = Intake(tables, freshness.Now()).take(fleets.answer([], junit=[good]), ["fp8-b@cpu"])
    assert (taken.junit, taken.reasons) == ([good.encode()], {})


def test_a_result_that_contradicts_the_folder_is_not_kept(tables: Matrix, tmp_path: Path) -> None:
    [cell] = [cell for cell in tables.cells if cell.id == "fp8-b@cpu"]
    store.write(make_record(cell, tables, latents_digest="sha256:1"), tmp_path / "evidence")
    before = (tmp_path / "evidence/cpu/fp8-b.json").read_bytes()
    some = replace(tables, cells=(cell,))
    ray = PretendedCluster(
        lambda order: fleets.answer([make_record(cell, tables, latents_digest="sha256:2")]), [CPU]
    )
    outcome, _, code = run(some, ray, tmp_path / "evidence")
    assert "one program gave two results" in outcome.reasons[cell.id]
    assert code == NOT_EXECUTED
    assert (tmp_path / "evidence/cpu/fp8-b.json").read_bytes() == before


def test_hardware_whose_last_node_died_is_given_up(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LOOK", 0.0)
    monkeypatch.setattr(driver, "PATIENCE", 0.0)
    ray = PretendedCluster(respond(tables), [CPU, HOPPER])
    waits: list[int] = []

    def wait(seconds: float) -> list[tuple[str, bytes | Failure]]:
        waits.append(1)
        ray.nodes = [HOPPER]  # and the tasks of the other wait for ever
        name = next((name for name in ray.pending if name.startswith("h100")), None)
        return [(name, ray.respond(ray.pending.pop(name)))] if name else []

    monkeypatch.setattr(ray, "wait", wait)
    outcome, progress, code = run(tables, ray, tmp_path / "evidence")
    assert len(waits) < 10
    assert {why for cell, why in outcome.reasons.items() if "@cpu" in cell} == {
        "every node of cpu died"
    }
    assert set(store.read_folder(tmp_path / "evidence")) == {"svdq-a-hopper@h100"}
    assert progress.lanes["cpu"].not_executed == 5
    assert ray.pending == {}
    assert code == NOT_EXECUTED


@pytest.mark.parametrize(("passed", "given_up"), [(59.0, False), (60.0, False), (60.5, True)])
def test_hardware_without_a_node_is_waited_for_until_its_patience_ends(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: float, given_up: bool
) -> None:
    now = [1000.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(driver, "PATIENCE", 60.0)
    ray = PretendedCluster(respond(tables), [CPU])
    one = make_driver(tables, ray, tmp_path / "evidence")
    cells = sum(len(group.cells) for group in one.waiting["cpu"])
    assert one.look() == 0
    ray.nodes = []
    assert one.look() == 0  # from here on it has no node
    now[0] += passed
    assert one.look() == (cells if given_up else 0)
    assert ("cpu" in one.waiting) is not given_up


def test_a_node_that_comes_back_ends_the_waiting(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(driver, "PATIENCE", 60.0)
    ray = PretendedCluster(respond(tables), [CPU])
    one = make_driver(tables, ray, tmp_path / "evidence")
    for nodes in ([], [CPU], []):
        ray.nodes = nodes
        assert one.look() == 0
        now[0] += 40.0
    assert one.look() == 0  # 40 s since it left again, not 120 since it left first


@pytest.mark.parametrize(("passed", "looks"), [(19.0, 0), (20.0, 0), (21.0, 1)])
def test_nodes_are_looked_at_after_a_while_and_not_each_turn(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: float, looks: int
) -> None:
    now = [1000.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(driver, "LOOK", 20.0)
    ray = PretendedCluster(respond(tables), [CPU])
    one = make_driver(tables, ray, tmp_path / "evidence")
    one.looked = now[0]
    seen: list[float] = []
    wait = ray.wait

    def look() -> int:
        seen.append(now[0])
        return 0

    monkeypatch.setattr(one, "look", look)

    def last(seconds: float) -> list[tuple[str, bytes | Failure]]:
        while found := wait(seconds):
            one.take(found)
            one.hand_over()
        now[0] += passed
        return []

    monkeypatch.setattr(ray, "wait", last)
    one.run()
    assert len(seen) == looks


class Command:
    """`quantmatrix fleet` on a pretended cluster."""

    def __init__(
        self, project: Path, tables: Matrix, evidence: Path, patch: pytest.MonkeyPatch
    ) -> None:
        self.project, self.tables, self.evidence = project, tables, evidence
        self.ray = PretendedCluster(respond(tables), [CPU, HOPPER])
        patch.setattr(read, "tables_folder", lambda: project / "matrix")
        patch.setattr(engine, "RayEngine", lambda address, data: self)
        patch.setattr(command, "read_now", lambda root: freshness.Now())
        patch.setattr(command, "SETTINGS", {})
        sites = {
            name: Site(tables.hardware[name], [node])
            for name, node in (("cpu", CPU), ("h100", HOPPER))
        }
        patch.setattr(command, "look_around", lambda ray, tables: (sites, {}))

    def __enter__(self) -> PretendedCluster:
        return self.ray

    def __exit__(self, *error: object) -> None:
        self.ray.pending.clear()

    def __call__(self, *words: str) -> int:
        given = ["fleet", "run", "--suites", str(self.project / "test_suites.py")]
        self.ray.orders.clear()
        return main.main([*given, "--evidence-dir", str(self.evidence), *words])

    def cells(self) -> list[str]:
        return [cell for order in self.ray.orders for cell in order["cells"]]  # type: ignore[attr-defined]


@pytest.fixture
def fleet(
    project: Path, tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    return Command(project, tables, tmp_path / "evidence", monkeypatch)


def test_a_run_that_is_killed_goes_on_from_what_is_written(
    fleet: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = fleet.ray.respond

    def interrupt(order: dict[str, Any]) -> bytes | Failure:
        if len(list(fleet.evidence.glob("*/*.json"))) >= 3:
            raise KeyboardInterrupt
        return usual(order)

    fleet.ray.respond = interrupt
    assert fleet("--hardware", "cpu") == 130
    done = set(store.read_folder(fleet.evidence))
    assert 3 <= len(done) < 5
    assert main.main(["fleet", "status", "--evidence-dir", str(fleet.evidence), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["hardware"]["cpu"]["done"] == len(done)
    assert not status["finished"]
    fleet.ray.respond = usual
    assert fleet("--hardware", "cpu", "--json") == 0
    assert done.isdisjoint(fleet.cells())
    assert len(done) + len(fleet.cells()) == 5
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit_code"], said["planned"]) == (True, 0, 5)
    assert said["written"] == 5 - len(done)
    assert fleet("--hardware", "cpu") == 0  # nothing is left to do
    assert fleet.cells() == []
    assert "5 cells planned, 5 of them before, 0 records written" in capsys.readouterr().out


def test_a_driver_that_is_killed_while_it_writes_loses_no_record_and_goes_on(
    fleet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGKILL, when one of the two records of a group lies at its place, and the other does not yet."""
    put, moved = merge.put, []

    def kill(*given: Any) -> None:
        put(*given)
        moved.append(given)
        os.kill(os.getpid(), signal.SIGKILL)

    if not (pid := os.fork()):
        monkeypatch.setattr(merge, "put", kill)
        with contextlib.suppress(BaseException):
            fleet("--hardware", "cpu")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    [done] = store.read_folder(fleet.evidence)  # each file is whole
    assert fleet("--hardware", "cpu") == 0
    assert done not in fleet.cells()
    assert len(fleet.cells()) == 4
    assert len(store.read_folder(fleet.evidence)) == 5


def test_exit_codes_and_lines_of_a_run(fleet: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet() == NOT_EXECUTED
    said = capsys.readouterr().out
    assert "row not executed: svdq-b-blackwell@b200: no node of the cluster is b200" in said
    by_id = {cell.id: cell for cell in fleet.tables.cells}
    fleet.ray.respond = lambda order: fleets.answer(
        [make_record(by_id[cell], fleet.tables, "fail") for cell in order["cells"]]  # type: ignore[attr-defined]
    )
    fleet.evidence = fleet.evidence.with_name("other")
    assert fleet("--family", "fp8", "--checks", "load", "latents") == CLAIM_VIOLATED
    assert "failed: fp8-a@cpu+decode (load, latents)" in capsys.readouterr().out
    assert fleet.cells() == ["fp8-a@cpu+reference", "fp8-a@cpu+decode", "fp8-b@cpu"]
    assert {tuple(order["checks"]) for order in fleet.ray.orders} == {("latents", "load")}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--hardware", "b201"], 2, "--hardware b201: not in the tables"),
        (["--timeout", "0"], 2, "--timeout 0: expected 1 second or more"),
        (["--suites", "none"], 2, "--suites none: no suites there"),
        (["--family", "msmodelslim"], 13, "no claimed cell of the matrix matches"),
    ],
)
def test_flags_that_are_wrong(
    fleet: Command, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert fleet(*words) == code
    assert message in capsys.readouterr().err
    assert not fleet.evidence.exists()


def test_without_ray_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.setattr(command, "read_now", lambda reports: freshness.Now())
    monkeypatch.setattr(read, "tables_folder", lambda: project / "matrix")
    words = ["--suites", str(project), "--evidence-dir", str(tmp_path / "e")]
    assert main.main(["fleet", "run", *words]) == ENVIRONMENT_UNUSABLE
    expected = "quantmatrix: quantmatrix fleet needs Ray: pip install 'quantmatrix[ray]'\n"
    assert capsys.readouterr().err == expected


def test_status_for_people(
    tables: Matrix,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evidence = tmp_path / "evidence"
    flags = ["fleet", "status", "--evidence-dir", str(evidence)]
    assert main.main(flags) == 2
    assert "no run of a fleet writes into" in capsys.readouterr().err
    progress = Progress(
        tmp_path / "evidence.fleet", {"address": "a:1", "dashboard": "127.0.0.1:8265"}
    )
    groups = [Group("cpu", "m", f"c{n}", ("a", "b"), 2, 100.0, True) for n in range(4)]
    progress.lane("cpu").planned = 8
    progress.expect(groups)
    progress.take_note(Note("cpu/m/c1", "node-7", 1))
    progress.take_note(Note("cpu/m/c2", "node-8", 99))  # at most as many as it has
    progress.take_note(Note("h100/m/c2", "node-8", 1))  # nobody's
    progress.close("cpu/m/c0", 150.0, {"done": 1, "failed": 1})
    lane = progress.lanes["cpu"]
    assert lane.seconds_left == (300 - 50 - 100) * 1.5 / 2
    progress.write(at_once=True)
    assert main.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("running: a:1, started ")
    assert lines[1] == "Ray's dashboard: http://127.0.0.1:8265"
    assert lines[3].split() == ["cpu", "0", "8", "0", "1", "1", "0", "112", "s"]
    assert lines[4].startswith("  cpu/m/c1 on node-7: 1 of 2 cells")
    assert lines[6] == "  0 more running, 1 groups waiting"
    monkeypatch.setattr("quantmatrix.fleet.progress.DEAD", -1.0)
    assert main.main(flags) == 0
    assert "again to resume" in capsys.readouterr().out
    progress.finished = True
    progress.write(at_once=True)
    assert main.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


@pytest.mark.parametrize(
    ("cells", "text"),
    [(("a@cpu",), "a@cpu: lost"), (("a@cpu", "b@cpu", "c@cpu"), "a@cpu and 2 more: lost")],
)
def test_cells_with_one_reason_stand_on_one_line(cells: tuple[str, ...], text: str) -> None:
    missing = dict.fromkeys(cells, ("load",))
    outcome = Outcome({}, reasons=dict.fromkeys(cells, "lost"))
    compared = Comparison(len(cells), missing, {}, {}, nothing=False)
    [line] = driver.describe(outcome, compared, {})
    assert line.endswith(text)


def test_a_group_may_send_several_junit_files(tables: Matrix, tmp_path: Path) -> None:
    ray = PretendedCluster(respond(tables, junit=["<testsuites/>"] * 3), [HOPPER])
    run(tables, ray, tmp_path / "evidence")
    folder = tmp_path / "evidence.fleet" / "junit"
    [first] = [path.stem for path in folder.iterdir() if path.stem[-2:] not in ("-2", "-3")]
    assert {path.name for path in folder.iterdir()} == {
        f"{first}.xml", f"{first}-2.xml", f"{first}-3.xml",
    }  # fmt: skip


def test_the_bar_begins_with_the_cells_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            moved.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, cells: int) -> None:
            moved.append(cells)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    held = {"cpu": [SimpleNamespace(cells=[1, 2, 3])], "h100": [SimpleNamespace(cells=[1, 2])]}
    one = SimpleNamespace(waiting=held, run=lambda say: say(4))
    command.run_with_bar(one, 7)
    assert moved == [7, 2, 4]
