"""A node's side without a cluster: a group is run, whatever its checks do, and the rest of it, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import fleets
import pytest

from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, NOT_EXECUTED
from quantmatrix.fleet import answers, bundle, on_node
from quantmatrix.fleet.answers import GroupAnswer, Note, Probe
from quantmatrix.fleet.groups import make_groups
from quantmatrix.fleet.on_node import Ended, explain_death, explain_end, read_steps
from quantmatrix.proof import store


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ended is seen at once."""
    monkeypatch.setattr(on_node, "POLL", 0.02)


def test_a_check_that_ends_its_process_costs_its_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = fleets.make_project(tmp_path / "project", fleets.FAULTY)
    [group] = make_groups(tables.cells, {})
    data = bundle.pack(tmp_path / "project/matrix", [tmp_path / "project/test_suites.py"])
    monkeypatch.setattr(on_node, "GRACE", 0.5)
    monkeypatch.setattr(on_node.tempfile, "gettempdir", lambda: str(tmp_path))
    notes: list[Note] = []
    order = group.order((), 1, full_size=False)
    sent = on_node.run_group(data, order, lambda note: notes.append(answers.read(note, Note)))
    answer = answers.read(sent, GroupAnswer)
    found = {
        record.cell["row"]: set(record.checks)
        for record in (store.decode(text.encode()) for text in answer.records)
    }
    both = {"load", "latents"}
    assert found == {
        "fine": both,
        "hung": {"load"},
        "last": both,
    }  # `hung` has no verdict of latents
    reasons = {problem.cells[0]: problem.why for problem in answer.problems}
    assert list(reasons) == ["killed@cpu", "stuck@cpu", "crashed@cpu"]
    assert "killed by signal 9, as for want of memory (it had 0." in reasons["killed@cpu"]
    assert "hung where no signal reaches it" in reasons["stuck@cpu"]
    assert "the process ended with 3" in reasons["crashed@cpu"]
    assert {problem.code for problem in answer.problems} == {NOT_EXECUTED}
    assert len(answer.junit) == 1  # of the process that came to its end
    assert notes[-1].group == "cpu/flux-1/fp8-a"
    assert [note.done for note in notes] == sorted(note.done for note in notes)
    assert notes[-1].done >= 5
    assert not list(tmp_path.glob("quantmatrix-fleet-*"))  # nothing stays on the node


def end(**given: object) -> Ended:
    usual: dict[str, object] = {
        "code": -signal.SIGKILL,
        "finished": False,
        "begun": {"a@cpu"},
        "open": "a@cpu",
        "output": "some\nlast line\n",
        "out_of_memory": False,
        "gib": 30.25,
        "too_long": False,
    }
    return Ended(**{**usual, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"out_of_memory": True}, "out of memory: the system killed the process (it had 30.2 GiB)"),
        ({"too_long": True}, "not done at the end of its time"),
        ({}, "killed by signal 9, as for want of memory (it had 30.2 GiB)"),
        ({"code": -signal.SIGSEGV}, "killed by signal 11 (Segmentation fault)"),
        ({"code": 1, "output": "Timeout (0:01:01)!\n File"}, "hung where no signal reaches it"),
        ({"code": 3}, "the process ended with 3: some\\nlast line"),
    ],
)
def test_how_a_process_died_is_told(given: dict[str, object], expected: str) -> None:
    assert expected in explain_death(end(**given))


@pytest.mark.parametrize(
    ("killed", "expected"),
    [
        (4, "out of memory: the system killed the process (it had 0."),
        (3, "killed by signal 9, as for want of memory (it had 0."),
    ],
)
def test_a_process_that_the_system_kills_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, expected: str
) -> None:
    """The count of the system rises while it runs, or does not; the cell that it was in is named."""
    count, steps = tmp_path / "vmstat", tmp_path / "steps-0"
    count.write_text("pgfault 7\noom_kill 3\n")
    monkeypatch.setattr(on_node, "OOM_COUNTS", (count, tmp_path / "none"))
    code = f"""
import os, signal, time
from pathlib import Path
Path({str(steps)!r}).write_text("start a@cpu\\nend a@cpu\\nstart b@cpu\\n")
block = bytearray(96 << 20)
Path({str(count)!r}).write_text("pgfault 9\\noom_kill {killed}\\n")
time.sleep(0.25)
os.kill(os.getpid(), signal.SIGKILL)
"""
    monkeypatch.setattr(on_node, "command_of", lambda *given: [sys.executable, "-c", code])
    cells = ["a@cpu", "b@cpu", "c@cpu"]
    ended = on_node.run_process(tmp_path, {"most_seconds": 60}, cells, lambda done: None)
    assert ended.gib > 96 / 1024
    [problem] = explain_end(ended, cells)
    assert problem.cells == ["b@cpu"]
    assert expected in problem.why


def test_what_an_ended_process_says_of_its_cells() -> None:
    cells = ["a@cpu", "b@cpu"]
    for code in (0, 1, 10, 11, 12):  # the records say which checks have a verdict
        assert explain_end(end(code=code, finished=True, open=""), cells) == []
    [problem] = explain_end(end(code=14, finished=True, open=""), cells)
    assert (problem.code, problem.cells) == (ENVIRONMENT_UNUSABLE, cells)
    assert problem.why == "pytest ended with 14: last line"
    [problem] = explain_end(end(code=4, finished=True, begun=set(), open=""), cells)
    assert problem.code == ENVIRONMENT_UNUSABLE  # wrong usage: it cannot run there
    [problem] = explain_end(end(begun=set(), open=""), cells)
    assert problem.cells == cells  # before the first
    assert explain_end(end(open=""), cells) == []  # between two: those that were begun are done


def test_steps_of_a_process(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    path.write_text("start a\nend a\nstart \nend \nstart b\nend b\nstart c\nen")
    assert read_steps(path) == ({"a", "b", "c"}, "c", False)
    path.write_text("start a\nend a\nfinish\n")
    assert read_steps(path) == ({"a"}, "", True)


def test_a_process_ends_with_the_one_that_holds_its_leash() -> None:
    reading, writing = os.pipe()
    code = (
        f"from quantmatrix.fleet.child import follow; print('ready', flush=True); follow({reading})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        pass_fds=[reading],
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        os.close(writing)
        assert process.wait(timeout=30) == -signal.SIGKILL
    os.close(reading)


def test_a_node_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = answers.read(on_node.probe(b"{}", named=True), Probe)
    assert named == Probe(bundle.digest_source())
    monkeypatch.setattr(on_node, "NEEDED", {"no_such_module": "pytest"})
    lacking = answers.read(on_node.probe(b"{}", named=True), Probe)
    assert lacking.problem == "without pytest: pip install 'quantmatrix[ray,test]'"


def test_a_node_without_a_name_is_identified(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, *results.pop())

    results = [(14, "", "warning\nM60 (nvidia sm52, 8 GiB) is not a row\n"), (0, "h200\n", "")]
    monkeypatch.setattr(on_node.subprocess, "run", run)
    assert on_node.identify(b"{}") == ("h200", "")
    assert on_node.identify(b"{}") == ("", "M60 (nvidia sm52, 8 GiB) is not a row")
    assert commands[0][1:3] == ["-m", "quantmatrix.tables.identify"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x"])
def test_a_bundle_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    import json

    with pytest.raises(ValueError, match="lies in its folder"):
        bundle.unpack(json.dumps({name: "x"}).encode(), tmp_path / "folder")
    assert not (tmp_path / "x").exists()


def test_the_digest_of_the_source_knows_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    first = bundle.digest_source(tmp_path)
    (tmp_path / "data.csv").write_text("not code")
    assert bundle.digest_source(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = bundle.digest_source(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({first, second, bundle.digest_source(tmp_path)}) == 3


def test_lines_of_another_kind_begin_no_cell(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    path.write_text("start a\nteardown b\nzero c\nend a\n")
    assert read_steps(path) == ({"a"}, "", False)
