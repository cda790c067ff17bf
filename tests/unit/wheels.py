"""A wheel of this checkout, built once for all workers and installed as pip does it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "matrix", "reports", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")


def install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel of this checkout is installed in, with `bin/quantmatrix`."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "wheel"
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").is_file():
            build(folder)
            (folder / "done").touch()
    return folder / "site" / "packages"


def join(site: Path) -> str:
    """`PYTHONPATH` of a process that has a folder of packages, and ends as others do that tests start."""
    return os.pathsep.join([str(site), str(ROOT / "tests" / "unit" / "children")])


def build(folder: Path) -> None:
    """Build the wheel from copies of the sources and install it, without what it depends on."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=source)
    [wheel] = folder.glob("*.whl")
    words = ["-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    target = str(folder / "site" / "packages")
    call(sys.executable, "-m", "pip", "install", *words, "--target", target, str(wheel), cwd=folder)


def call(*command: str, cwd: Path) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # no hatchling: install the extra `test`
