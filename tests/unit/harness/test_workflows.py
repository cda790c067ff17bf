"""The workflows: what their steps run exists here, and the steps that need no runner are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runner import FILES, WORKFLOWS

from quantmatrix.cli import main
from quantmatrix.harness import sessions
from quantmatrix.tables import read

STEPS = [
    (f"{name}-{job}-{number}", step)
    for name, workflow in WORKFLOWS.items()
    for job, body in workflow["jobs"].items()
    for number, step in enumerate(body["steps"])
]
TABLES = read.read()


def find_step(workflow: str, job: str, words: str) -> str:
    """The script of the step that contains the words."""
    steps = WORKFLOWS[workflow]["jobs"][job]["steps"]
    [script] = [step["run"] for step in steps if words in step.get("run", "")]
    return str(script)


def run_step(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script as a runner runs it, with this environment's quantmatrix first on the path."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": path, **variables},
    )


def project_commands() -> list[tuple[str, list[str]]]:
    """Every quantmatrix command of every step, as words."""
    found = []
    for name, step in STEPS:
        for command in re.findall(r"quantmatrix (?!.*egg)[^\n|)>]+", step.get("run", "")):
            words = [word for word in shlex.split(command) if word not in ("||", "&&")]
            found.append((name, words))
    return found


def test_the_three_workflows_are_there() -> None:
    assert set(FILES) == {"cpu", "hardware", "freshness"}


@pytest.mark.parametrize(("name", "step"), STEPS, ids=[name for name, _ in STEPS])
def test_steps_are_pinned_and_their_scripts_parse(name: str, step: dict[str, Any]) -> None:
    if "uses" in step:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
        return
    assert "${{" not in step["run"], "expressions belong into env, not into a script"
    checked = subprocess.run(["bash", "-n", "-c", step["run"]], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_commands_of_the_steps_are_commands_of_the_package() -> None:
    commands = project_commands()
    assert len(commands) >= 8
    for name, words in commands:
        arguments, rest = main.build_parser().parse_known_args(words[1:])
        assert (rest, hasattr(arguments, "handler")) == ([], True), f"{name}: {words}"


def test_plan_step_prints_a_matrix_whose_jobs_are_nox_sessions(tmp_path: Path) -> None:
    output = tmp_path / "output"
    script = find_step("hardware", "plan", "matrix jobs")
    done = run_step(script, tmp_path, HARDWARE="h100 b200", GITHUB_OUTPUT=str(output))
    assert done.returncode == 0, done.stderr
    [line] = output.read_text().splitlines()
    entries = json.loads(line.removeprefix("jobs="))["include"]
    assert {entry["hardware"] for entry in entries} == {"h100", "b200"}
    names = {job.name for job in sessions.list_sessions(TABLES)}
    assert {entry["job"] for entry in entries} <= names
    assert all(entry["label"] == TABLES.hardware[entry["hardware"]].label for entry in entries)
    used = re.findall(r"matrix\.(\w+)", FILES["hardware"].read_text())
    assert set(used) <= set(entries[0])


def test_misspelt_hardware_fails_the_plan_step(tmp_path: Path) -> None:
    script = find_step("hardware", "plan", "matrix jobs")
    done = run_step(script, tmp_path, HARDWARE="h300", GITHUB_OUTPUT=str(tmp_path / "output"))
    assert done.returncode != 0
    assert "h300" in done.stderr


GH = """#!/bin/sh
echo "$@" >> calls
case "$2" in list) cat open;; esac
"""


@pytest.mark.parametrize(
    ("old", "opened", "call"),
    [(0, "", None), (0, "7", "issue close 7"), (2, "", "issue create"), (2, "7", "issue edit 7")],
)
def test_freshness_opens_updates_and_closes_one_issue(
    old: int, opened: str, call: str | None, tmp_path: Path
) -> None:
    said = json.dumps({"overall": {"stale": old, "contradicting": 0}})
    programs = {"gh": GH}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "open").write_text(opened)
    script = find_step("freshness", "issue", "gh issue")
    (tmp_path / "agreement").mkdir()
    (tmp_path / "agreement" / "agreement.json").write_text(said)
    done = run_step(script, tmp_path, TITLE="Evidence is out of date")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    changes = [line for line in calls if not line.startswith("issue list")]
    assert len(changes) == (call is not None)
    assert call is None or changes[0].startswith(call)


def test_agreement_gives_what_the_freshness_step_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["agreement", "--json"]) in (0, 1)
    assert {"stale", "contradicting"} <= set(json.loads(capsys.readouterr().out)["overall"])
