"""A real Ray cluster of four nodes on this machine, one of which is killed, and a laptop without any."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import fleets
import pytest
import shards

from quantmatrix import suites
from quantmatrix.cli import main
from quantmatrix.exit_codes import NOT_EXECUTED
from quantmatrix.fleet import bundle
from quantmatrix.fleet.engine import SLOW
from quantmatrix.fleet.groups import make_groups
from quantmatrix.harness import completeness
from quantmatrix.proof import code_digest, store
from quantmatrix.tables import read

STORE = 80 * 2**20
"""Bytes of each node's object store, the least that Ray takes."""
STARTS = 6
MINUTES = 10
"""Of waiting for a busy machine."""

REAL = (
    "modelopt-fp8-flux-1@cpu+reference",
    "modelopt-fp8-flux-1@cpu+decode",
    "svdq-flux-1-int4-r32@cpu+reference",
    "svdq-flux-1-int4-r32@cpu+decode",
    "svdq-flux-1-int4-r32-no-engine@h100",
    "svdq-flux-1-int4-r32-no-engine@b200",
)
CHECKS = ("load", "latents", "refuse")
STILL = """

import gc
import os
from dataclasses import replace
from pathlib import Path
from time import sleep

from quantmatrix.harness.plugin import COLLECTED
from quantmatrix.proof import record as records, store

gc.set_threshold(*COLLECTED)
# What differs between two runs of one program: the time, and the checkout that people edit.
records.tell_time = lambda: "2026-11-24T10:00:00Z"
records.find_commit = lambda: "c" * 40
write = store.write


def write_still(record, folder):
    timings = dict.fromkeys(record.timings, 0.5)
    witness = {{name: {{**found, "seconds": 0.5}} for name, found in record.witness.items()}}
    return write(replace(record, timings=timings, witness=witness), folder)


store.write = write_still
SHARED = Path({shared!r})
SEEN = []


def pytest_runtest_setup(item):
    SEEN.append(item)
    cell = item.cell.id
    if "@cpu" in cell and len(SEEN) == 2:  # one check of the group is done
        (SHARED / f"{{cell}} {{os.getpid()}}").touch()
        while not (SHARED / "go").exists():
            sleep(0.05)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    gc.freeze()  # nobody walks a million objects of a process that ends
"""
"""What is added to the suites' conftest: the clock stands, and a group waits in its middle."""

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(60 * MINUTES * 2)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as Ray gives tasks, and no cluster that others have named."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_enable_worker_prestart", "0")
    # A dead node is found after five looks, which Ray takes every 3 seconds. A node that is only busy
    # has as long for an answer as ever.
    monkeypatch.setenv("RAY_health_check_period_ms", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    ray.shutdown()


@pytest.fixture
def cluster(settings: None) -> Iterator[Any]:
    """Two nodes for the cpu's rows, one at a time on each, and one for the refusals of two GPUs each."""
    from ray.cluster_utils import Cluster

    def describe(hardware: str) -> dict[str, Any]:
        return {
            "num_cpus": 2 if hardware == "cpu" else 1,  # Ray starts a worker for each
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
    """Kill a node once both of the cpu's are in the middle of a group, and then let the work go on."""
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


def copy_suites(folder: Path, shared: Path) -> Path:
    """The suites of the package, which wait in the middle of a cpu's group for a file `go` in `shared`."""
    packaged = Path(suites.__file__).parent
    folder.mkdir(parents=True)
    for name in ("load", "latents", "refuse"):
        shutil.copy(packaged / f"test_{name}.py", folder)
    text = (packaged / "conftest.py").read_text()
    (folder / "conftest.py").write_text(text + STILL.format(shared=str(shared)))
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """The same rows on one machine, in a process beside the cluster, which mostly waits."""
    shared, listed = tmp_path / "shared alone", tmp_path / "rows"
    shared.mkdir()
    (shared / "go").touch()
    listed.write_text("\n".join(REAL))
    folder = copy_suites(tmp_path / "alone" / "suites", shared)
    project = tmp_path / "project"
    bundle.unpack(bundle.pack(read.tables_folder(), [folder]), project)
    checks = [flag for check in CHECKS for flag in ("--check", check)]
    words = ("-p", "no:xdist", "--rows", str(listed), *checks, bundle.FOLDER)
    process = shards.start(project, tmp_path / "one", *words)
    yield process
    process.kill()


def test_real_rows_on_four_nodes_one_of_which_dies_give_what_one_machine_gives(
    alone: Any, cluster: Any, tmp_path: Path
) -> None:
    """Rows of our tables, of two families on two nodes and their refusals on two others."""
    shared, evidence, listed = tmp_path / "shared", tmp_path / "fleet", tmp_path / "rows"
    shared.mkdir()
    folder = copy_suites(tmp_path / "suites", shared)
    killed: list[set[str]] = []
    thread = Thread(target=kill_one, args=(cluster, shared, killed))
    thread.start()
    words = ["--rows", str(listed), "--checks", *CHECKS]
    given = ["--suites", str(folder), "--evidence-dir", str(evidence)]
    code = main.main(["fleet", "run", "--address", cluster.address, *given, *words])
    thread.join()
    assert code == 0
    [before] = killed
    assert len(before) == 2, "two groups were at work when a node was killed"
    begun = [path.name.partition(" ")[0] for path in shared.iterdir() if path.name != "go"]
    tables = read.read()
    cells = [cell for cell in tables.cells if cell.id in REAL]
    groups = {cell: group.name for group in make_groups(cells, {}) for cell in group.cells}
    again = {groups[cell] for cell in begun if begun.count(cell) > 1}
    assert len(again) == 1, "the group of the dead node, and no other, was run again"
    assert again < {groups[name.partition(" ")[0]] for name in before}
    pids = [int(path.name.partition(" ")[2]) for path in shared.iterdir() if path.name != "go"]
    assert not any(map(is_alive, pids)), "no process outlives its node"

    said, _ = alone.communicate(timeout=60 * MINUTES)
    assert alone.returncode == 0, said
    assert shards.read_bytes(evidence) == shards.read_bytes(tmp_path / "one")
    found = store.read_folder(evidence)
    assert set(found) == set(REAL)
    assert {record.cell["family"] for record in found.values()} == {"modelopt-fp8", "nunchaku-svdq"}
    for name, record in found.items():
        wanted = {"load", "latents"} if "@cpu" in name else {"refuse"}
        assert set(record.checks) == wanted
    files = sorted((tmp_path / "fleet.fleet" / "junit").iterdir())
    assert len(files) == 4
    verdicts = completeness.combine([completeness.read_junit(path) for path in files])
    assert completeness.compare(cells, verdicts, CHECKS).code == 0


def test_the_same_command_without_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a laptop: Ray starts here; the node is named by nobody, and looked at."""
    project, evidence = tmp_path / "project", tmp_path / "fleet"
    fleets.make_project(project)
    monkeypatch.setattr(code_digest.Code, "prepare", lambda self: None)
    digests = {"device_digest": "sha256:1", "shared_digest": "sha256:2"}
    monkeypatch.setattr(code_digest.Code, "describe", lambda self, *about: digests)
    monkeypatch.setattr(read, "tables_folder", lambda: project / "matrix")
    words = ["--suites", str(project / "test_suites.py"), "--evidence-dir", str(evidence)]
    with tempfile.TemporaryDirectory(prefix="qm-", ignore_cleanup_errors=True) as short:
        monkeypatch.setenv(
            "RAY_TMPDIR", short
        )  # no cluster is known there; sockets want short paths
        code = main.main(["fleet", "run", *words, "--rows", rows(tmp_path)])
        assert list(Path(short, "ray").glob("session_*")), "Ray was started here"
        ray.shutdown()
    assert code == NOT_EXECUTED  # nothing here is an H100
    assert set(store.read_folder(evidence)) == {"svdq-a@cpu"}


def rows(folder: Path) -> str:
    """A file that names one row of the cpu and one of an H100."""
    path = folder / "rows"
    path.write_text("svdq-a\nsvdq-a-hopper\n")
    return str(path)
