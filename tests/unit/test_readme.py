"""The README: its commands run as they stand, outside the checkout, from an installed wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import wheels

from quantmatrix.tables import read

ROOT = wheels.ROOT
README = ROOT / "README.md"
GENERATED = ("formats.md", "tables.md", "commands.md")
"""Pages that `docs/write_pages.py` writes."""
WRITTEN = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED)
PAGES = [README, *WRITTEN, ROOT / "CONTRIBUTING.md"]
RUN = """
import json, shlex, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from quantmatrix.cli.main import main

for command in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(shlex.split(command, comments=True)[1:])
    with open(sys.argv[1], "a") as results:  # the profiler writes to standard output, too
        results.write(json.dumps([code, len(out.getvalue().strip()), err.getvalue()[-2000:]]) + "\\n")
"""
"""Runs commands one after another in one process, so that torch is imported once."""


def list_blocks(text: str) -> list[str]:
    """The lines of every block of shell commands."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def everyday_commands() -> list[str]:
    return [line for line in list_blocks(README.read_text()) if line.startswith("quantmatrix ")]


def test_every_command_runs_from_a_wheel_in_an_empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site, empty = wheels.install(tmp_path_factory), tmp_path / "empty"
    empty.mkdir()
    # the stand-ins of this session are as good as new ones
    keep = ("PATH", "HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "XDG_CACHE_HOME", "TMPDIR")
    variables = {name: os.environ[name] for name in keep if name in os.environ}
    commands = everyday_commands()
    assert len(commands) >= 12
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "results")],
        input=json.dumps(commands),
        env={**variables, "PYTHONPATH": wheels.join(site)},
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert len(found) == len(commands), done.stderr
    failed = [
        f"{command}: {result}"
        for command, result in zip(commands, found, strict=True)
        if result[0] or not result[1]
    ]
    assert not failed, "\n".join(failed)
    version = subprocess.run(
        [site / "bin" / "quantmatrix", "--version"],
        env={**variables, "PYTHONPATH": wheels.join(site)},
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
    )
    assert version.stdout.startswith("quantmatrix "), version.stderr
    packages = site / "quantmatrix"
    assert (packages / "suites" / "test_latents.py").is_file()
    assert not any(packages.rglob("*.orig"))


def test_the_first_commands_install_into_an_environment_of_their_own() -> None:
    """Debian's Python refuses `pip install` outside one, so nothing is installed before it is there."""
    first, second = list_blocks(README.read_text())[:2]
    steps = [shlex.split(step, comments=True) for step in first.split("&&")]
    assert steps[0][:3] == ["python3", "-m", "venv"]
    assert steps[1] == [".", f"{steps[0][3]}/bin/activate"]
    assert steps[2][:4] == ["python", "-m", "pip", "install"]
    assert steps[2][4:] == [".", "nox"]
    assert shlex.split(second, comments=True) == ["python", "-m", "nox", "-s", "matrix"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sessions_and_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text()
    source = (ROOT / "noxfile.py").read_text()
    jobs = {row.job for row in read.read().hardware.values()}
    for session in set(re.findall(r"nox -s ([a-z0-9-]+)", text)) - jobs:
        assert f"\ndef {session.replace('-', '_')}(" in source, f"{page.name}: nox -s {session}"
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        target = page.parent / link
        generated = page.parent.name == "docs" and link in GENERATED
        assert target.exists() or generated, f"{page.name} links to {link}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_of_the_documentation_are_commands(page: Path) -> None:
    from quantmatrix.cli.main import build_parser

    for line in list_blocks(page.read_text()):
        if line.startswith("quantmatrix "):
            words = shlex.split(line.replace("packets/*/evidence", "packets"), comments=True)
            arguments, rest = build_parser().parse_known_args(words[1:])
            assert hasattr(arguments, "handler"), line
            assert not rest or rest[0] == "--transformer-path", line
