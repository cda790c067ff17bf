"""A real Ray cluster of four nodes on this machine, one of which is killed, and Ray's local mode."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import fleets
import pytest
import shards

from quantmatrix.cli import main
from quantmatrix.exit_codes import NOT_EXECUTED
from quantmatrix.fleet.engine import SLOW
from quantmatrix.fleet.groups import make_groups
from quantmatrix.harness import completeness
from quantmatrix.proof import code_digest, store
from quantmatrix.tables import read

STORE = 80 * 2**20
"""Bytes of each node's object store, the least that Ray takes."""
STARTS = 6
MINUTES = 5
"""Of waiting for a busy machine."""

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(60 * MINUTES * 2)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as Ray gives tasks, and the digests of code that the project's conftest gives nodes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_enable_worker_prestart", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(code_digest.Code, "prepare", lambda self: None)
    digests = {"device_digest": "sha256:1", "shared_digest": "sha256:2"}
    monkeypatch.setattr(code_digest.Code, "describe", lambda self, *about: digests)
    yield
    ray.shutdown()


@pytest.fixture
def cluster(settings: None) -> Iterator[Any]:
    """Two nodes for the cpu's rows, one at a time on each, and one for the refusals of two GPUs each."""
    from ray.cluster_utils import Cluster

    def describe(hardware: str) -> dict[str, Any]:
        return {
            "num_cpus": 2,
            "resources": {f"quantmatrix/{hardware}": 1},
            "object_store_memory": STORE,
            "include_log_monitor": False,
        }

    head = {**describe("h100"), "include_dashboard": False}
    found = start(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        start(lambda: found.add_node(**describe("b200")))
        found.doomed = start(lambda: found.add_node(**describe("cpu")))
        start(lambda: found.add_node(**describe("cpu")))
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def start(node: Callable[[], Any]) -> Any:
    """A node that is started; Ray gives it 15 seconds, and on a busy machine it gets more goes."""
    for left in reversed(range(STARTS)):
        try:
            return node()
        except Exception as error:  # Ray has no class of its own for it
            if not left or SLOW not in str(error):
                raise
    raise AssertionError("unreachable")


def kill_one(cluster: Any, shared: Path, killed: list[set[str]]) -> None:
    """Kill a node once both of the cpu's are at work, and then let the work go on."""
    end = time.monotonic() + 60 * MINUTES
    while len(found := {path.name for path in shared.iterdir()}) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    cluster.remove_node(cluster.doomed, allow_graceful=False)
    killed.append(found)
    (shared / "go").touch()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_four_nodes_one_of_which_dies_give_what_one_machine_gives(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, shared, evidence = tmp_path / "project", tmp_path / "shared", tmp_path / "fleet"
    shared.mkdir()
    wanted = ("fp8-a", "svdq-a", "svdq-a-hopper", "svdq-b-blackwell")
    cases = [case for case in fleets.CASES if case["id"] in wanted]
    tables = fleets.make_project(project, cases, shared)
    killed: list[set[str]] = []
    thread = Thread(target=kill_one, args=(cluster, shared, killed))
    thread.start()
    monkeypatch.setattr(read, "tables_folder", lambda: project / "matrix")
    words = ["--suites", str(project / "test_suites.py"), "--evidence-dir", str(evidence)]
    code = main.main(["fleet", "run", "--address", cluster.address, *words])
    thread.join()
    assert code == 0
    [before] = killed
    assert len(before) == 2, "two groups were at work when a node was killed"
    begun = [path.name.partition(" ")[0] for path in shared.iterdir() if path.name != "go"]
    # A worker outlives its node for a moment, in which it may begin the next cell of its group.
    groups = {cell: group.name for group in make_groups(tables.cells, {}) for cell in group.cells}
    again = {groups[cell] for cell in begun if begun.count(cell) > 1}
    assert len(again) == 1, "the group of the dead node, and no other, was run again"
    assert again < {groups[name.partition(" ")[0]] for name in before}
    pids = [int(path.name.partition(" ")[2]) for path in shared.iterdir() if path.name != "go"]
    assert not any(map(is_alive, pids)), "no process outlives its node"

    one = tmp_path / "one"
    status, said = shards.run(project, one, "-p", "no:xdist")
    assert status == 0, said
    assert shards.read_bytes(evidence) == shards.read_bytes(one)
    assert set(store.read_folder(evidence)) == {cell.id for cell in tables.cells}
    files = sorted((tmp_path / "fleet.fleet" / "junit").iterdir())
    assert len(files) == 4
    found = completeness.combine([completeness.read_junit(path) for path in files])
    compared = completeness.compare(tables.cells, found)
    assert compared.code == 0


def test_the_same_command_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts here; the node is named by nobody, and looked at."""
    project, evidence = tmp_path / "project", tmp_path / "fleet"
    fleets.make_project(project)
    monkeypatch.setattr(read, "tables_folder", lambda: project / "matrix")
    words = ["--suites", str(project / "test_suites.py"), "--evidence-dir", str(evidence)]
    code = main.main(["fleet", "run", "--address", "local", *words, "--rows", rows(tmp_path)])
    assert code == NOT_EXECUTED  # nothing here is an H100
    assert set(store.read_folder(evidence)) == {"svdq-a@cpu"}


def rows(folder: Path) -> str:
    """A file that names one row of the cpu and one of an H100."""
    path = folder / "rows"
    path.write_text("svdq-a\nsvdq-a-hopper\n")
    return str(path)
