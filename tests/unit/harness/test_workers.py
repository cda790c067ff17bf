"""What workers are given: units of work, and a device of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quantmatrix.harness.workers import CELLS, SLOT, Workers, drop_first, read_worker


def start(workers: Workers, name: str) -> SimpleNamespace:
    node = SimpleNamespace(gateway=SimpleNamespace(id=name), workerinput={})
    workers.pytest_configure_node(node)
    return node


def test_each_worker_has_a_device_and_a_new_one_takes_that_of_the_dead() -> None:
    workers = Workers(lambda: [SimpleNamespace(id="a@cpu"), SimpleNamespace(id="b@cpu")])
    nodes = [start(workers, f"gw{i}") for i in range(3)]
    assert [node.workerinput[SLOT] for node in nodes] == [0, 1, 2]
    assert nodes[0].workerinput[CELLS] == ["a@cpu", "b@cpu"]
    workers.pytest_testnodedown(nodes[1])
    assert start(workers, "gw3").workerinput[SLOT] == 1
    workers.pytest_testnodedown(nodes[0])
    workers.pytest_testnodedown(nodes[2])
    assert [start(workers, f"gw{i}").workerinput[SLOT] for i in (4, 5, 6)] == [0, 2, 3]


def test_only_workers_have_a_number() -> None:
    worker = SimpleNamespace(workerinput={SLOT: 2, "workerid": "gw7"})
    assert read_worker(worker) == 2
    assert read_worker(SimpleNamespace()) is None


def test_the_test_that_a_worker_died_in_is_not_run_again() -> None:
    units = [{"a": True, "b": True}, {"c": True, "d": False, "e": False}, {"f": False}]
    assert drop_first(units) == "d"
    assert units == [{"a": True, "b": True}, {"c": True, "d": True, "e": False}, {"f": False}]
    assert drop_first([{"a": True}]) is None


class Node:
    """A worker as xdist's controller sees it."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.sent: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def make_scheduler(tests: list[str], names: list[str]) -> tuple[object, list[Node]]:
    pytest.importorskip("xdist")
    from quantmatrix.harness.workers import make_scheduler

    option = SimpleNamespace(loadscopereorder=False)
    config = SimpleNamespace(getvalue=lambda name: ["popen"] * len(names), option=option)
    groups = {test.partition("[")[2].removesuffix("]"): test[-3] for test in tests}
    scheduler = make_scheduler(config, None, groups)
    nodes = [Node(name) for name in names]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    return scheduler, nodes


@pytest.mark.parametrize("checks", ["x", "xy", "xyz"])
@pytest.mark.parametrize("units", ["ab", "abcde", "abcdefgh"])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_rest_of_a_dead_workers_units_goes_to_its_successor(
    checks: str, units: str, before: int
) -> None:
    tests = [f"t.py::test_{check}[{unit}1]" for unit in units for check in checks]
    scheduler, (first, second) = make_scheduler(tests, ["gw0", "gw1"])
    done = first.sent[: min(before, len(first.sent) - 1)]
    for index in done:
        scheduler.mark_test_complete(first, index)
    crashed = tests[first.sent[len(done)]]
    assert scheduler.remove_node(first) == crashed
    third = Node("gw2")
    scheduler.add_node(third)
    scheduler.add_node_collection(third, tests)
    scheduler.schedule()
    ran = {first: list(done), second: [], third: []}
    for _ in range(len(tests)):
        for node in (second, third):
            # As a worker does: a test starts once it is known what comes next.
            rest = [index for index in node.sent if index not in ran[node]]
            if len(rest) > 1 or (rest and node.shutting_down):
                ran[node].append(rest[0])
                scheduler.mark_test_complete(node, rest[0])
    everything = sorted(index for indices in ran.values() for index in indices)
    assert everything == [index for index, test in enumerate(tests) if test != crashed]
    assert (second.shutting_down, third.shutting_down) == (True, True)
    assert not scheduler.has_pending


def test_a_worker_that_still_collects_is_not_given_work() -> None:
    tests = [f"t.py::test_x[{unit}1]" for unit in "abcdefgh"]
    scheduler, (first, second) = make_scheduler(tests, ["gw0", "gw1"])
    scheduler.remove_node(first)
    third = Node("gw2")
    scheduler.add_node(third)
    scheduler.remove_node(second)
    assert (third.sent, third.shutting_down) == ([], False)
    scheduler.add_node_collection(third, tests)
    scheduler.schedule()
    assert third.sent
