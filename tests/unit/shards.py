"""A project of a few cheap cells, and suites in it that can be made to fail in every way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tables import CHECKPOINTS, write_tables

from quantmatrix.proof.code_digest import Code
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

COUNT = 6
CASES = [
    {
        "id": f"row-{i}",
        "checkpoint": f"c{i}",
        "hardware": "cpu",
        "backend": "reference decode",
        "checks": "load latents",
        "claim": "expected",
    }
    for i in range(COUNT)
]
INI = """
[pytest]
quantmatrix_tables = matrix
norecursedirs = src
strict_parametrization_ids = true
addopts = --strict-markers --strict-config
"""
CONFTEST = """
import errno, os

from quantmatrix.proof import code_digest, record

FAULT, _, WHERE = os.environ.get("FAULT", "").partition(" ")
# What differs between two runs of one program: the time, and the checkout that people edit.
record.tell_time = lambda: os.environ.get("MADE", "2026-11-24T10:00:00Z")
record.find_commit = lambda: os.environ.get("COMMIT", "c" * 40)
# Digests of code are tested elsewhere, and take longer than all of this.
code_digest.Code.prepare = lambda self: None
code_digest.Code.describe = lambda self, *about: {"device_digest": "sha256:1", "shared_digest": "sha256:2"}

if FAULT == "disk":
    write = os.fsync
    full = []

    def fail(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if WHERE.partition("@")[0] in name and WHERE.partition("+")[2] in name or full:
            full.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    os.fsync = fail
"""
DIGESTS = {"device_digest": "sha256:1", "shared_digest": "sha256:2"}
"""What every record of the project says of the code."""
SUITE = """
import errno, os, pathlib, signal, time
import pytest

FAULT, _, WHERE = os.environ.get("FAULT", "").partition(" ")

@pytest.mark.check("load")
def test_load(cell, proof, request):
    proof.metrics["layers"] = len(cell.checkpoint)
    if "SLOTS" in os.environ:
        slot = request.config.workerinput["quantmatrix_slot"]
        place = pathlib.Path(os.environ["SLOTS"], f"{slot} {os.environ['PYTEST_XDIST_WORKER']}")
        place.touch()
    proof.timings["load"] = 0.5

@pytest.mark.check("latents")
def test_latents(cell, proof):
    if cell.id == WHERE and FAULT == "crash":
        os._exit(3)
    if cell.id == WHERE and FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.id == WHERE and FAULT == "hang":
        time.sleep(30)
    if cell.id == WHERE and FAULT == "stuck":  # as in a driver: no signal gets through
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(30)
    if cell.id == WHERE and FAULT == "media":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if cell.id == WHERE and FAULT == "skip":
        pytest.skip("not here")
    if cell.id == WHERE and FAULT == "interrupt":
        raise KeyboardInterrupt
    proof.limits["psnr_db"] = {"at_least": 20.0 if cell.id == WHERE and FAULT == "loose" else 30.0}
    proof.metrics["psnr_db"] = 40.0
    digest = "b" if cell.id == WHERE and FAULT == "other" else "a"
    proof.latents_digest = f"sha256:{digest}"
    assert cell.id != "row-5@cpu+decode", "too far away"
    assert cell.id != WHERE or FAULT != "wrong", "wrong today"
"""


def make_project(folder: Path) -> Matrix:
    """Write tables and suites; `row-5@cpu+decode` always fails."""
    folder.mkdir(parents=True, exist_ok=True)
    first = CHECKPOINTS[0]
    checkpoints = [{**first, "id": f"c{i}", "reference": f"some/c{i}"} for i in range(COUNT)]
    write_tables(folder / "matrix", CASES, checkpoints)
    (folder / "pytest.ini").write_text(INI)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_suites.py").write_text(SUITE)
    return read.read(folder / "matrix")


def take_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge records of the project in this process by the digests that they have."""
    monkeypatch.setattr(Code, "describe", lambda self, *about: DIGESTS)


def start(
    project: Path, evidence: Path | None, *words: str, fault: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Run the suites in a process of their own, as a machine of its own would."""
    unused = [
        word for name in ("cacheprovider", "benchmark", "anyio") for word in ("-p", f"no:{name}")
    ]
    command = [sys.executable, "-m", "pytest", "-q", *unused, *words]
    if evidence is not None:
        command.append(f"--evidence-dir={evidence}")  # as two words it would move pytest's rootdir
    return subprocess.Popen(
        command,
        cwd=project,
        env={**os.environ, "FAULT": fault, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(
    project: Path, evidence: Path | None, *words: str, fault: str = "", **environment: str
) -> tuple[int, str]:
    """(exit code, output) of a run that is waited for."""
    process = start(project, evidence, *words, fault=fault, **environment)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def names_of(cells: Sequence[str]) -> set[str]:
    """Record files of cells."""
    from quantmatrix.proof.record import path_of

    return {str(path_of(cell)) for cell in cells}
