"""Session: an adapter runs in a child; what hangs, dies or takes too much costs its own task alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix import peers
from quantmatrix.errors import UsageError
from quantmatrix.peers.protocol import DONE, FAILED, KILLED, LOG, Task
from quantmatrix.peers.session import Bounds, Session, count_memory, describe_end
from quantmatrix.peers.verdict import judge_ending
from quantmatrix.tables import read

TOY = """
import os
import signal
import sys
import time

from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, Missing, RuntimeFailure

ID = "toy"


def probe():
    return Found(version="1")


def ways(task):
    return (task.way,)


def command(task):
    return "toy"


def run(task, folder):
    os.write(1, b"native text\\n")
    print("python text")
    if task.way.startswith("late "):
        common.mark_loaded(folder)
    match task.way.removeprefix("late "):
        case "raise":
            raise ValueError("first line\\nsecond line")
        case "index":
            [][0]
        case "missing":
            raise Missing("needs torchao")
        case "import":
            import no_such_package
        case "exit":
            sys.exit(7)
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "child hangs":
            common.call(["sleep", "600"], folder)
        case "memory":
            held = bytearray(300 << 20)
            held[:: 4096] = b"x" * len(held[:: 4096])
            time.sleep(600)
        case "log":
            while True:
                os.write(1, b"x" * (1 << 16))
        case "program":
            common.call(["sh", "-c", "echo its text; exit 3"], folder)
    return Answer(DONE, loaded=True, media=str(os.getpid()))


def explain(answer):
    return common.pick_message(answer)
"""


@pytest.fixture
def task() -> Task:
    return Task(next(iter(read.read().checkpoints.values())), base="base", weights="weights")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session of a toy adapter, which a start file puts among the real ones."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    start = f"import quantmatrix.peers\nquantmatrix.peers.__path__.append({str(folder)!r})\n"
    (folder / "sitecustomize.py").write_text(start)
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(folder)])
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    bounds = Bounds(seconds=60, memory_bytes=1 << 30, log_bytes=1 << 20)
    with Session("toy", bounds, {"PYTHONPATH": path}) as session:
        yield session


def ask(session: Session, task: Task, way: str, folder: Path) -> tuple[str, str]:
    """(ending, verdict with its reason) of a task."""
    found = session.ask(replace(task, way=way), folder)
    judged = judge_ending(found, peers.load("toy").explain(found))
    return found.ending, f"{judged.verdict}: {judged.reason}" if judged else ""


ENDINGS = {
    "raise": (FAILED, "refuses: ValueError: first line"),
    "index": (FAILED, "crashes: IndexError: list index out of range"),
    "late raise": (FAILED, "crashes: ValueError: first line"),
    "missing": (FAILED, "not installed: Missing: needs torchao"),
    "import": (FAILED, "not installed: ModuleNotFoundError: No module named 'no_such_package'"),
    "program": (FAILED, "refuses: exit code 3: its text"),
}


def test_tasks_share_a_child_and_a_death_costs_its_own(
    session: Session, task: Task, tmp_path: Path
) -> None:
    first = session.ask(replace(task, way="fine"), tmp_path / "first")
    for number, (way, expected) in enumerate(ENDINGS.items()):
        assert ask(session, task, way, tmp_path / str(number)) == expected
    again = session.ask(replace(task, way="fine"), tmp_path / "again")
    assert (first.ending, first.media) == (again.ending, again.media) == (DONE, first.media)
    assert session.started == 1
    log = (tmp_path / "first" / LOG).read_text()
    assert "native text" in log
    assert "python text" in log
    assert "first line" in (tmp_path / "0" / LOG).read_text()
    assert ask(session, task, "exit", tmp_path / "exit") == (KILLED, "crashes: died: exit code 7")
    dead = ask(session, task, "late signal", tmp_path / "signal")
    assert dead == (KILLED, "crashes: died: signal SIGSEGV")
    assert session.ask(replace(task, way="fine"), tmp_path / "last").ending == DONE
    assert session.started == 3


@pytest.mark.parametrize(
    ("way", "bounds", "reason"),
    [
        ("hang", Bounds(seconds=0.5), "the time limit of 0.5 s"),
        ("child hangs", Bounds(seconds=0.5), "the time limit of 0.5 s"),
        ("memory", Bounds(memory_bytes=200 << 20), "the memory limit of 0.1953 GiB"),
        ("log", Bounds(log_bytes=1 << 20), "the limit of 1 MiB of output"),
    ],
)
def test_limits_end_a_child_with_all_that_it_started(
    session: Session, task: Task, tmp_path: Path, way: str, bounds: Bounds, reason: str
) -> None:
    session.ask(replace(task, way="fine"), tmp_path / "first")
    assert session._child is not None
    pid = session._child.pid
    session.bounds = bounds
    assert ask(session, task, way, tmp_path / "x") == (KILLED, f"crashes: exceeds {reason}")
    end = time.monotonic() + 20  # what the child has started is gone a moment later
    while count_memory(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert count_memory(pid) == 0


def test_memory_of_a_session_is_counted() -> None:
    assert count_memory(os.getsid(0)) > 1 << 20


def test_ends_that_have_no_name() -> None:
    assert describe_end(-64) in ("signal 64", "signal SIGRTMAX")
    assert describe_end(2) == "exit code 2"


def test_no_adapter_of_a_name() -> None:
    with pytest.raises(UsageError, match=r"there is no adapter quantmatrix\.peers\.no_such"):
        peers.load("no-such")
    with pytest.raises(UsageError, match="is not an adapter of it"):
        peers.load("session")
