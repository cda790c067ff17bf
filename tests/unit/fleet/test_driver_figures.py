"""The driver by its constants, and the judge of answers by its whole texts, without a cluster."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fleets
import pytest

from quantmatrix.fleet import answers, bundle, child, driver, engine, intake, on_node
from quantmatrix.fleet.answers import GroupAnswer, Note, Probe
from quantmatrix.fleet.cluster import Demand, Node
from quantmatrix.fleet.driver import Driver, Outcome
from quantmatrix.fleet.engine import Failure
from quantmatrix.fleet.groups import Group
from quantmatrix.fleet.intake import Intake
from quantmatrix.fleet.progress import Progress
from quantmatrix.proof import freshness
from quantmatrix.proof.record import CheckResult
from quantmatrix.tables.rows import Matrix


def make_group(number: int, cells: tuple[str, ...] = ("a", "b"), hardware: str = "cpu") -> Group:
    return Group(hardware, "m", f"c{number}", cells, 3, 5.0, needs_device=True)


class Cluster:
    """An engine that is asked and never answers, until it is told to."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.waits: list[float] = []
        self.cancelled: list[str] = []
        self.nodes: list[Node] = []
        self.answers: list[Any] = []
        self.notes: list[bytes] = []

    def list_nodes(self) -> list[Node]:
        return self.nodes

    def submit(self, name: str, order: bytes, demand: Demand) -> None:
        self.submitted.append(name)

    def wait(self, seconds: float) -> list[Any]:
        self.waits.append(seconds)
        return self.answers.pop(0) if self.answers else []

    def read_notes(self) -> list[bytes]:
        return self.notes

    def cancel(self, name: str) -> None:
        self.cancelled.append(name)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])
    return clock


def make_driver(folder: Path, groups: list[Group]) -> tuple[Driver, Cluster]:
    cells = {
        name: SimpleNamespace(checks=("load", "latents"))
        for group in groups
        for name in group.cells
    }
    judge: Any = SimpleNamespace(
        only=(), full_size=False, cells=cells, take=lambda data, cells: intake.Taken("n")
    )
    cluster = Cluster()
    progress = Progress(folder / "e.fleet", {})
    one = Driver(cluster, judge, folder / "e", progress, Outcome({}), limit=7)
    one.sites = {}
    for group in groups:
        progress.expect([group])
        one.outcome.expect(group.cells)
        one.demands[group.name] = Demand({})
        one.waiting.setdefault(group.hardware, deque()).append(group)
    return one, cluster


@pytest.mark.parametrize(("count", "handed"), [(99, 99), (100, 100), (103, 100)])
def test_so_many_groups_are_handed_over(
    count: int, handed: int, tmp_path: Path, now: list[float]
) -> None:
    groups = [make_group(number) for number in range(count)]
    one, cluster = make_driver(tmp_path, [*groups, make_group(0, hardware="h200")])
    one.hand_over()
    assert cluster.submitted == [
        *(group.name for group in groups[:handed]),
        "h200/m/c0",
    ]
    one.hand_over()
    assert len(cluster.submitted) == handed + 1
    assert len(one.waiting["cpu"]) == count - handed


@pytest.mark.parametrize(("passed", "looks"), [(4.9, 0), (5.0, 0), (5.1, 1)])
def test_nodes_are_looked_at_every_five_seconds(
    passed: float, looks: int, tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, cluster = make_driver(tmp_path, [make_group(1)])
    seen: list[float] = []
    said: list[int] = []
    monkeypatch.setattr(one, "look", lambda: seen.append(now[0]) or 3)
    wait = cluster.wait

    def late(seconds: float) -> Any:
        now[0] += passed
        one.handed["cpu"].clear()
        return wait(seconds)

    monkeypatch.setattr(cluster, "wait", late)
    one.run(said.append)
    assert cluster.waits == [1.0]
    assert seen == [now[0]] * looks
    assert said == [3] * looks
    assert one.looked == (now[0] if looks else 1000.0)


@pytest.mark.parametrize(("passed", "lost"), [(59.9, 0), (60.0, 0), (60.1, 5)])
def test_hardware_is_given_up_after_a_minute(
    passed: float, lost: int, tmp_path: Path, now: list[float]
) -> None:
    groups = [make_group(1), make_group(2, ("c", "d", "e"))]
    one, cluster = make_driver(tmp_path, groups)
    one.handed["cpu"] = {groups[0].name: one.waiting["cpu"].popleft()}
    node = Node("1", "n", {"CPU": 1.0})
    one.sites = {"cpu": SimpleNamespace(by_name=False, nodes=[node])}  # type: ignore[dict-item]
    cluster.nodes = [node]
    assert one.look() == 0
    assert one.progress.lanes["cpu"].nodes == 1
    cluster.nodes = []
    assert one.look() == 0
    assert one.progress.lanes["cpu"].nodes == 0
    now[0] += passed
    assert one.look() == lost
    assert cluster.cancelled == ([groups[0].name] if lost else [])
    why = dict.fromkeys("abcde", "every node of cpu died") if lost else {}
    assert one.outcome.reasons == why
    assert one.progress.lanes["cpu"].not_executed == lost


def test_nodes_that_name_their_hardware_later_count(tmp_path: Path, now: list[float]) -> None:
    one, cluster = make_driver(tmp_path, [make_group(1)])
    first, later = (Node(n, "n", {"quantmatrix/cpu": 1.0}) for n in "12")
    one.sites = {"cpu": SimpleNamespace(by_name=True, nodes=[first])}  # type: ignore[dict-item]
    cluster.nodes = [first, later, Node("3", "n", {})]
    one.look()
    assert one.progress.lanes["cpu"].nodes == 2


@pytest.mark.parametrize(
    ("verdicts", "counts"),
    [
        ({"load": "pass", "latents": "pass"}, (1, 0, 1)),
        ({"load": "pass"}, (0, 0, 2)),
        ({"load": "fail", "latents": "pass"}, (0, 1, 1)),
        ({"load": "fail"}, (0, 0, 2)),
        ({}, (0, 0, 2)),
    ],
)
def test_cells_of_a_group_are_counted(
    verdicts: dict[str, str], counts: tuple[int, int, int], tmp_path: Path, now: list[float]
) -> None:
    group = make_group(1)
    one, _ = make_driver(tmp_path, [group])
    one.outcome.add("a", verdicts)
    taken = intake.Taken("n", reasons={"b": "gone"}, code=12, seconds=9.0)
    one.close(group, taken)
    lane = one.progress.lanes["cpu"]
    assert (lane.done, lane.failed, lane.not_executed) == counts
    assert (one.outcome.reasons, one.outcome.code) == ({"b": "gone"}, 12)
    assert (lane.spent, lane.estimated) == (9.0, 5.0)
    one.outcome.code = 14
    one.progress.expect([group])
    one.close(group, taken)
    assert one.outcome.code == 14


def test_answers_are_taken_with_their_files(tmp_path: Path, now: list[float]) -> None:
    groups = [make_group(1), make_group(2, ("c", "d", "e")), make_group(3, ("f",))]
    one, _ = make_driver(tmp_path, groups)
    one.handed = {"h200": {}, "cpu": {group.name: group for group in groups}}
    junit = {groups[0].name: [b"1", b"2"], groups[1].name: [b"3"]}
    one.intake.take = lambda data, cells: intake.Taken("n", junit=junit[data.decode()])  # type: ignore[method-assign]
    found = one.take(
        [
            *((group.name, group.name.encode()) for group in groups[:2]),
            (groups[2].name, Failure("it died")),
        ]
    )
    assert found == 6
    assert one.handed == {"h200": {}, "cpu": {}}
    assert one.outcome.reasons == {"f": "it died"}
    folder = tmp_path / "e.fleet" / "junit"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "cpu--m--c1.xml": b"1",
        "cpu--m--c1-2.xml": b"2",
        "cpu--m--c2.xml": b"3",
    }


def test_groups_that_no_node_can_run(tmp_path: Path, now: list[float]) -> None:
    one, _ = make_driver(tmp_path, [make_group(0)])
    one.waiting.clear()
    site: Any = SimpleNamespace(
        nodes=[1, 2, 3],
        demand=lambda needs_device: Demand({"GPU": 1.0} if needs_device else {}),
        explain_lack=lambda demand: "no GPU" if demand.resources else None,
    )
    groups = [
        make_group(1, ("a",)),
        replace(make_group(2, ("b",)), needs_device=False),
        make_group(3, ("a", "b"), hardware="b200"),
    ]
    one.plan(groups, {"cpu": site})
    assert one.outcome.reasons == {
        "a": "no node of the cluster is b200",
        "b": "no node of the cluster is b200",
    }
    assert list(one.waiting["cpu"]) == [groups[1]]
    assert one.demands[groups[1].name] == Demand({})
    assert one.progress.lanes["cpu"].nodes == 3
    assert one.progress.lanes["cpu"].not_executed == 1
    one.take_note(b"{}")
    one.take_note(answers.write(Note(groups[1].name, "n", 1)))
    assert one.progress.lanes["cpu"].running[groups[1].name].done == 1


# --- answers are judged ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return fleets.make_project(tmp_path_factory.mktemp("project"))


CELL = "fp8-b@cpu"


def take(tables: Matrix, *records: Any, only: tuple[str, ...] = (), **given: Any) -> Any:
    judge = Intake(tables, freshness.Now(), only, **given)
    return judge.take(fleets.answer(records), [CELL])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda r: replace(r, cell={**r.cell, "family": "x", "row_digest": "sha256:0"}),
            "its family, row_digest are not those of the row here",
        ),
        (lambda r: replace(r, machine={}), "it does not name the machine"),
        (
            lambda r: replace(
                r,
                checks={**r.checks, "trace": CheckResult("pass"), "generate": CheckResult("pass")},
            ),
            "checks that were not asked for: generate, trace",
        ),
        (
            lambda r: replace(
                r, checkpoint={"digest": "sha256:0", "repository": "o/x", "revision": "a" * 40}
            ),
            "it says that published weights ran, and stand-ins were asked for",
        ),
    ],
)
def test_why_a_record_is_not_kept(tables: Matrix, change: Any, why: str) -> None:
    [cell] = [cell for cell in tables.cells if cell.id == CELL]
    found = take(tables, change(fleets.make_record(cell, tables)))
    assert found.reasons == {CELL: f"the record of a is not kept: {why}"}
    assert (found.records, found.code, found.seconds) == ([], 12, 1.0)


def test_records_that_are_kept_and_others(tables: Matrix) -> None:
    cells = {cell.id: cell for cell in tables.cells}
    record = fleets.make_record(cells[CELL], tables)
    found = take(tables, record, record)
    assert (len(found.records), found.reasons) == (1, {CELL: "a record of a is sent twice"})
    other = fleets.make_record(cells["svdq-a@cpu"], tables)
    found = take(tables, other, record)
    assert len(found.records) == 1
    assert found.reasons == {CELL: "a record of a is of svdq-a@cpu, which was not asked for"}
    found = take(tables, record, only=("load",))
    assert found.reasons == {
        CELL: "the record of a is not kept: checks that were not asked for: latents"
    }
    published = replace(
        record, checkpoint={"digest": "sha256:0", "repository": "o/x", "revision": "a" * 40}
    )
    assert len(take(tables, published, full_size=True).records) == 1
    now = freshness.Now(list_exceeded=lambda record: ["one", "two"])
    found = Intake(tables, now).take(fleets.answer([record]), [CELL])
    assert found.reasons == {CELL: "the record of a is not kept: one; two"}


def test_texts_that_are_no_answer_or_junit(tables: Matrix) -> None:
    judge = Intake(tables, freshness.Now())
    found = judge.take(b"{}", [CELL])
    assert found.node == ""
    assert found.reasons[CELL].startswith("its node sent no answer: Object missing required field")
    sent = answers.write(GroupAnswer("n", [], ["<a/>", "<!DOCTYPE x>"], [], 2.5))
    found = judge.take(sent, [CELL])
    assert (found.junit, found.seconds) == ([b"<a/>"], 2.5)
    assert found.reasons == {
        CELL: "n sent a JUnit file that is not kept: it declares a document type"
    }


# --- suites, plugins and Ray ------------------------------------------------------------------------


def test_suites_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = tmp_path / "matrix"
    assert bundle.find_suites(matrix) == []
    asked: list[str] = []
    monkeypatch.setattr(bundle.importlib.util, "find_spec", lambda name: asked.append(name))
    assert bundle.find_suites(matrix) == [tmp_path / "tests" / "suites"]
    assert asked == ["quantmatrix.suites"]


class Config:
    """pytest's configuration with two options."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.registered: list[tuple[Any, str]] = []
        self.pluginmanager = SimpleNamespace(
            register=lambda plugin, name: self.registered.append((plugin, name))
        )

    def getoption(self, name: str) -> Any:
        return self.options.get(name)


def test_the_plugin_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Thread:
        def __init__(self, **given: Any) -> None:
            started.append(given)

        def start(self) -> None:
            started.append("start")

    monkeypatch.setattr(threading, "Thread", Thread)
    plain: Any = Config()
    child.pytest_configure(plain)
    assert (started, plain.registered) == ([], [])
    full: Any = Config(fleet_leash=0, fleet_steps=str(tmp_path / "steps"))
    child.pytest_configure(full)
    assert started == [{"target": child.follow, "args": [0], "daemon": True}, "start"]
    [(steps, name)] = full.registered
    assert (steps.path, name) == (tmp_path / "steps", "quantmatrix-fleet-steps")


class Remote:
    """A function of Ray's, which remembers what it is asked with."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def options(self, **given: Any) -> Remote:
        self.asked.append(given)
        return self

    def remote(self, *given: Any) -> str:
        self.asked.append(given)
        return f"ref {len(self.asked)}"


def test_nodes_are_asked_what_they_are() -> None:
    asked: list[Any] = []
    waits: list[Any] = []
    cancelled: list[Any] = []

    def wait(refs: list[Any], num_returns: int, timeout: float) -> Any:
        waits.append((len(refs), num_returns, timeout))
        return refs[:1], refs[1:]

    found: Any = object.__new__(engine.RayEngine)
    found.data = b"data"
    found.ray = SimpleNamespace(
        remote=lambda function: Remote(asked),
        wait=wait,
        cancel=lambda ref, force: cancelled.append((ref, force)),
        get=lambda ref: b"answer",
        exceptions=SimpleNamespace(RayError=KeyError),
    )
    nodes = [
        Node("1", "n", {"CPU": 2.0, "GPU": 4.0, "NPU": 0.0}),
        Node("2", "n", {"CPU": 2.0, "NPU": 1.0, "quantmatrix/x": 1.0}),
        Node("3", "n", {"CPU": 0.0, "GPU": 4.0}),
        Node("4", "n", {"CPU": 1.0, "NPU": 1.0}),
    ]
    silent = Failure("it did not identify itself within 300 seconds: are its devices busy?")
    assert found.probe(nodes) == {"1": b"answer", "2": silent, "4": silent}
    assert waits == [(3, 3, 300.0)]
    assert cancelled == [("ref 4", True), ("ref 6", True)]

    def options(node: str, cpus: float, gpus: float, others: dict[str, float]) -> dict[str, Any]:
        return {
            "max_retries": 1,
            "num_cpus": cpus,
            "num_gpus": gpus,
            "resources": others,
            "label_selector": {"ray.io/node-id": f"in({node})"},
        }

    assert asked == [
        options("1", 0.01, 0.01, {}),
        (b"data", False),
        options("2", 0.01, 0, {}),
        (b"data", True),
        options("4", 0.01, 0, {"NPU": 0.01}),
        (b"data", False),
    ]
    assert found.probe([]) == {}
    assert len(waits) == 1


def test_a_task_is_submitted_and_run_again_three_times() -> None:
    asked: list[Any] = []
    found: Any = object.__new__(engine.RayEngine)
    found.task, found.data, found.board, found.names = Remote(asked), b"d", "board", {}
    found.submit("a name", b"order", Demand({"CPU": 1.0}))
    assert asked == [
        {"max_retries": 3, "name": "a name", "num_cpus": 1.0, "num_gpus": 0, "resources": {}},
        (b"d", b"order", "board"),
    ]
    assert found.names == {"ref 2": "a name"}


def test_notes_are_fetched_when_they_are_there() -> None:
    ready: list[bool] = [False, True, True]
    gets: list[Any] = [[b"1", "odd", b"2"]]

    def get(ref: Any) -> Any:
        if not gets:
            raise KeyError("the board died")
        return gets.pop()

    found: Any = object.__new__(engine.RayEngine)
    found.notes = None
    numbers = iter(range(9))
    found.board = SimpleNamespace(take=SimpleNamespace(remote=lambda: next(numbers)))
    found.ray = SimpleNamespace(
        wait=lambda refs, timeout: (refs, []) if ready.pop(0) else ([], refs),
        get=get,
        exceptions=SimpleNamespace(RayError=KeyError),
    )
    assert found.read_notes() == []
    assert found.notes == 0
    assert found.read_notes() == [b"1", b"2"]
    assert found.notes is None
    assert found.read_notes() == []
    assert next(numbers) == 2


def test_nodes_as_ray_describes_them() -> None:
    found: Any = object.__new__(engine.RayEngine)
    found.ray = SimpleNamespace(
        nodes=lambda: [
            {
                "NodeID": n,
                "NodeManagerAddress": f"10.{n}",
                "Resources": {"CPU": 3.0},
                "Alive": alive,
            }
            for n, alive in (("1", True), ("2", False), ("3", True))
        ]
    )
    assert found.list_nodes() == [Node(n, f"10.{n}", {"CPU": 3.0}) for n in "13"]


def test_the_run_of_a_group_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    clock = iter([100.0, 107.12345])
    monkeypatch.setattr(on_node.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(on_node.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(on_node.socket, "gethostname", lambda: "host")
    removed: list[Any] = []
    monkeypatch.setattr(on_node.files, "remove_leftovers", lambda *given: removed.append(given))

    def run_cells(folder: Path, wanted: Any, answer: GroupAnswer, tell: Any) -> None:
        assert wanted == {"group": "g"}
        assert (folder / "a.txt").read_text() == "x"
        for name in ("cpu/b.json", "cpu/a.json", "cpu/.c.json", "d.json", "gpu/e.txt"):
            path = folder / "evidence" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        for name, text in (("0002", "two"), ("0001", "one"), ("0003", "")):
            (folder / f"junit-{name}.xml").write_text(text)

    monkeypatch.setattr(on_node, "run_cells", run_cells)
    sent = on_node.run_group(json.dumps({"a.txt": "x"}).encode(), b'{"group": "g"}')
    assert answers.read(sent, GroupAnswer) == GroupAnswer(
        "host", ["cpu/a.json", "cpu/b.json"], ["one", "two"], [], 7.123
    )
    assert removed == [(tmp_path, "quantmatrix-fleet-*", 86_400.0)]
    assert list(tmp_path.iterdir()) == []
    assert isinstance(answers.read(on_node.probe(b"{}", named=True), Probe), Probe)
