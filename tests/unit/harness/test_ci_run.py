"""`.ci/run` on stand-ins of Python: whatever fails lets no change land, and nothing runs after it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[3] / ".ci" / "run"
PROGRAMS = {
    "python3": "mkdir -p .nox/ci-runner/bin; touch .nox/ci-runner/bin/activate",
    "python": 'echo "$*" >> calls; case "$*" in *"$FAILS"*) exit 3;; esac',
}


@pytest.mark.parametrize(
    ("fails", "code", "tests"),
    [
        ("-s lint", 1, False),
        ("-s producers", 1, False),
        ("-s tests", 3, True),
        ("pip install", 3, False),
        ("nothing", 0, True),
    ],
)
def test_every_part_must_pass(fails: str, code: int, tests: bool, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")],
        env={**os.environ, "PATH": path, "FAILS": fails},
        capture_output=True,
        check=False,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode, "-m nox -s tests" in calls) == (code, tests), done.stderr
    if tests:
        assert {"-m nox -s lint types report", "-m nox -s producers"} <= set(calls[:-1])
