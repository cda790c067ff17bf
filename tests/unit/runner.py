"""A checkout with a remote, and stand-ins for the programs that a CI runner has, for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import shards
import yaml

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
WORKFLOWS: dict[str, dict[str, Any]] = {
    name: yaml.safe_load(path.read_text()) for name, path in FILES.items()
}
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m pip"|"-m nox") echo "$*" >> "$CALLS"; exit 0;;
"-m venv") mkdir -p "$3/bin"; : > "$3/bin/activate"; exit 0;;
esac
exec {sys.executable} "$@"
"""
GH = """#!/bin/sh
echo "gh $*" >> "$CALLS"
case "$2" in list) cat "$OPEN_ISSUE";; esac
"""
STILL = f"""

Code.prepare = lambda self: None
Code.describe = lambda self, *about: {shards.DIGESTS!r}
"""
PROGRAMS = {
    "python": PYTHON,
    "python3": PYTHON,
    "quantmatrix": f'#!/bin/sh\nexec {sys.executable} -m quantmatrix "$@"\n',
    "gh": GH,
}


class Runner:
    """One checkout of a small project, in which steps of the workflows are run as they stand."""

    def __init__(self, folder: Path) -> None:
        """Write the project, its remote and the programs."""
        self.checkout = folder / "checkout"
        self.remote = folder / "remote.git"
        self.calls_file = folder / "calls"
        self.outputs = folder / "outputs"
        self.summary = folder / "summary.md"
        self.issue = folder / "issue"
        self.body = self.checkout / "agreement" / "body.md"
        self.issue.touch()
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in PROGRAMS.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.tables = shards.make_project(self.checkout)
        conftest = self.place("conftest.py")
        lines = conftest.read_text().splitlines(keepends=True)
        still = "record.tell_time ="  # freshness is judged by the true time
        conftest.write_text("".join(line for line in lines if not line.startswith(still)))
        source = shutil.ignore_patterns("*.egg-info")  # with bytecode: every step is a process
        shutil.copytree(ROOT / "src", self.checkout / "src", ignore=source)
        with self.place("src/quantmatrix/proof/code_digest.py").open("a") as code:
            code.write(STILL)  # the digests of the suites' records, for every command of a step
        shutil.copytree(ROOT / ".ci", self.checkout / ".ci")
        for name in ("limits.csv", "spread.csv"):
            shutil.copy(ROOT / "reports" / name, self.place(f"reports/{name}"))
        (self.checkout / ".gitignore").write_text("__pycache__/\npackets/\n")
        self.git("init", "--quiet", "--bare", str(self.remote))
        for words in (
            ("init", "--quiet", "-b", "main"),
            ("add", "."),
            ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "start"),
            ("remote", "add", "origin", str(self.remote)),
        ):
            self.git(*words)

    def place(self, name: str) -> Path:
        """A file of the checkout, in a folder that is there."""
        path = self.checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def git(self, *words: str) -> str:
        """What git prints in the checkout."""
        done = subprocess.run(
            ["git", *words], cwd=self.checkout, capture_output=True, text=True, check=True
        )
        return done.stdout

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A script as a runner runs it."""
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.checkout,
            env={
                **os.environ,
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "PYTHONPATH": str(self.checkout / "src"),
                "CALLS": str(self.calls_file),
                "OPEN_ISSUE": str(self.issue),
                "GITHUB_ENV": str(self.outputs),
                "GITHUB_OUTPUT": str(self.outputs),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "GITHUB_RUN_ID": "77",
                "GITHUB_SERVER_URL": "https://example.org",
                "GITHUB_REPOSITORY": "some/project",
                **variables,
            },
        )

    def run_job(self, workflow: str, job: str, **values: str) -> list[int]:
        """Exit codes of the scripts of a job; those after a failure run if they say `always()`.

        `values` stand for what the expressions of a step's `env` would be.
        """
        codes: list[int] = []
        for step in WORKFLOWS[workflow]["jobs"][job]["steps"]:
            if "run" not in step or (any(codes) and step.get("if") != "always()"):
                continue
            given = {name: str(text) for name, text in step.get("env", {}).items()}
            wanted = {name for name, text in given.items() if "${{" in text}
            assert wanted <= set(values), f"{workflow} {job}: values of {wanted - set(values)}"
            done = self.run(step["run"], **{**given, **{name: values[name] for name in wanted}})
            self.said = done.stdout + done.stderr
            codes.append(done.returncode)
        return codes

    @property
    def calls(self) -> list[str]:
        """What was asked of the programs that are stand-ins, `pip` left out."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.is_file() else []
        return [line for line in lines if not line.startswith("-m pip ")]

    def read_output(self, name: str) -> Any:
        """An output that a step has set, JSON."""
        lines = self.outputs.read_text().splitlines()
        [found] = [line for line in lines if line.startswith(f"{name}=")]
        return json.loads(found.removeprefix(f"{name}="))

    def read_last(self, name: str) -> Any:
        """An output that a step has set more than once, as the runner takes it: the last."""
        lines = self.outputs.read_text().splitlines()
        found = [line for line in lines if line.startswith(f"{name}=")]
        return json.loads(found[-1].removeprefix(f"{name}="))
