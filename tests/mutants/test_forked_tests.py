"""Tests of a mutant run in a fork: what passes, fails, hangs, and cannot be collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked_tests
import pytest

HERE = Path(__file__).resolve().parent
TESTS = """
import time

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "one - two"

def test_hangs():
    time.sleep(60)
"""
ASK = """
import json, sys
import forked_tests
code, output = forked_tests.run_tests(sys.argv[2:], float(sys.argv[1]))
print(json.dumps([code, forked_tests.name_killer(output) if code else ""]))
"""


@pytest.mark.parametrize(
    ("names", "seconds", "code", "killer"),
    [
        (["test_passes"], 30, 0, ""),
        (["test_passes", "test_fails"], 30, 1, "test_a.py::test_fails"),
        (["test_hangs"], 1, None, ""),
        (["test_nowhere"], 30, 4, ""),
    ],
)
def test_a_fork_says_how_tests_end(
    tmp_path: Path, names: list[str], seconds: float, code: int | None, killer: str
) -> None:
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    tests = [f"test_a.py::{name}" for name in names]
    command = [sys.executable, "-c", ASK, str(seconds), *tests]
    folder = str(Path(forked_tests.__file__).parent)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": folder, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [code, killer], done.stderr


@pytest.mark.parametrize(
    ("line", "killer"),
    [
        ("FAILED tests/unit/test_a.py::test_b[x - y] - AssertionError: a - b", "tests/unit/test_a.py::test_b[x - y]"),
        ("FAILED tests/unit/test_a.py::test_b", "tests/unit/test_a.py::test_b"),
        ("ERROR tests/unit/test_a.py - ImportError", "tests/unit/test_a.py"),
        ("1 failed in 3 s", ""),
    ],
)  # fmt: skip
def test_the_first_failure_is_named(line: str, killer: str) -> None:
    assert forked_tests.name_killer(f"==== short test summary info ====\n{line}\n") == killer


@pytest.mark.parametrize(("code", "used"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_recording_is_used_unless_it_was_cut_off(
    code: int, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that fails without a mutant does not throw half an hour away."""
    pytest.importorskip("coverage")
    import mutants

    write(tmp_path / "tests/unit/test_a.py", "")

    def record(command: list[str], env: dict[str, str], **_: object) -> Any:
        Path(env["QUANTMATRIX_SEEN"], "seconds.json").write_text(
            '{"tests/unit/test_a.py::test": 0.5}'
        )
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(mutants.subprocess, "run", record)
    monkeypatch.setattr(mutants, "digest_source", lambda: "source")
    given = mutants.parse(["--workers", "1", "--tests", "tests/unit"])
    if used:
        seen = mutants.read_seen(tmp_path / "kept", tmp_path, given)
        assert seen.seconds == {"tests/unit/test_a.py::test": 0.5}
        return
    with pytest.raises(SystemExit, match=f"ended with {code}"):
        mutants.read_seen(tmp_path / "kept", tmp_path, given)
    assert not list(tmp_path.rglob("part-*"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_only_files_of_tests_that_changed_are_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what they import beside them; what the others executed stays, as does a new source's absence."""
    coverage = pytest.importorskip("coverage")
    import mutants

    kept, source = tmp_path / "kept", ["one"]
    tree = kept / "state" / "tree-0"
    write(tree / "tests/unit/helper.py", "")
    write(tree / "tests/unit/test_a.py", "import helper")
    write(tree / "tests/unit/kind/test_b.py", "")
    module = tree / "src/quantmatrix/quoting.py"
    write(module, "")
    recorded: list[list[str]] = []

    def record(command: list[str], env: dict[str, str], **_: object) -> Any:
        recorded.append([word for word in command if word.startswith("tests/")])
        line, folder = len(recorded), Path(env["QUANTMATRIX_SEEN"])
        data = coverage.CoverageData(basename=str(folder / "coverage"), suffix="x")
        names = ["test_a.py", "kind/test_b.py"] if line == 1 else ["test_a.py"]
        tests = [f"tests/unit/{name}::test" for name in names]
        for test in tests:
            data.set_context(test)
            data.add_lines({str(module): [line], "/elsewhere/src/quantmatrix/quoting.py": [9]})
        data.write()
        (folder / "seconds.json").write_text(json.dumps(dict.fromkeys(tests, float(line))))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(mutants.subprocess, "run", record)
    monkeypatch.setattr(mutants, "digest_source", lambda: source[0])
    given = mutants.parse(["--workers", "1", "--tests", "tests/unit"])
    a, b = "tests/unit/test_a.py::test", "tests/unit/kind/test_b.py::test"
    seen = mutants.read_seen(kept, tree, given)
    assert seen.seconds == {a: 1.0, b: 1.0}
    assert {n: sorted(t) for n, t in seen.lines["src/quantmatrix/quoting.py"].items()} == {
        1: [b, a]
    }
    assert mutants.read_seen(kept, tree, given) == seen
    assert recorded == [["tests/unit"]]
    write(tree / "tests/unit/helper.py", "changed = True")
    seen = mutants.read_seen(kept, tree, given)
    assert recorded[1:] == [["tests/unit/test_a.py"]]
    assert seen.seconds == {a: 2.0, b: 1.0}
    assert seen.lines == {"src/quantmatrix/quoting.py": {1: [b], 2: [a]}}
    source[0] = "another"
    mutants.read_seen(kept, tree, given)
    assert recorded[2:] == [["tests/unit"]]


CHILD = """
import os, subprocess, sys

def test_here():
    from quantmatrix import exit_codes

def test_in_a_child():
    subprocess.run([sys.executable, "-c", "import quantmatrix.quoting"], check=True)

def test_in_a_fork():
    child = os.fork()
    if not child:
        import quantmatrix.scheme
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_what_a_child_executes_is_its_tests(tmp_path: Path) -> None:
    coverage = pytest.importorskip("coverage")
    (tmp_path / "test_child.py").write_text(CHILD)
    seen = tmp_path / "seen"
    seen.mkdir()
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])
    variables = {**os.environ, "QUANTMATRIX_SEEN": str(seen), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "watch_tests", "-p", "no:xdist", "."]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    contexts: dict[str, set[str]] = {}
    for file in seen.glob("coverage.*"):
        data = coverage.CoverageData(basename=str(file))
        data.read()
        for source in data.measured_files():
            found = {test for tests in data.contexts_by_lineno(source).values() for test in tests}
            contexts.setdefault(Path(source).name, set()).update(found - {""})
    assert contexts["quoting.py"] == {"test_child.py::test_in_a_child"}
    assert contexts["scheme.py"] == {"test_child.py::test_in_a_fork"}


@pytest.mark.parametrize(
    ("text", "found"), [("a = {**b}", True), ("a = {&b}", False), ("a = 1 +", False)]
)
def test_what_cannot_be_compiled_is_no_program(text: str, found: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(text)
    assert forked_tests.is_program(path) is found
