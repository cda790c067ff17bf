"""Every script of every workflow is run as it stands, in order, on a project of a few cells."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import shards
from runner import ROOT, WORKFLOWS, Runner

from quantmatrix.exit_codes import (
    CLAIM_VIOLATED,
    ENVIRONMENT_UNUSABLE,
    MEANINGS,
    NOT_EXECUTED,
    NOTHING_COLLECTED,
)

FAILING = "row-5@cpu+decode"


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A runner with a fresh checkout."""
    return Runner(tmp_path)


def test_every_job_with_a_script_is_run_here() -> None:
    run = re.findall(r'run_job\("(\w+)", "(\w+)"', Path(__file__).read_text())
    assert set(run) == {(name, job) for name, flow in WORKFLOWS.items() for job in flow["jobs"]}


def test_cpu_job_runs_what_lets_a_change_land_and_shows_the_agreement(runner: Runner) -> None:
    assert shards.run(runner.checkout, runner.place("reports/evidence"), "-p", "no:xdist")[0]
    codes = runner.run_job("cpu", "cpu")
    assert codes == [0, 0, 1], runner.said  # the failing cell contradicts its claim
    text = (ROOT / "noxfile.py").read_text()
    asked = [line.split()[3:] for line in runner.calls if line.startswith("-m nox -s")]
    names = [name for words in asked for name in words]
    assert {"lint", "types", "report", "tests"} <= set(names)
    assert all(f"\ndef {name.replace('-', '_')}(" in text for name in names)
    shown = runner.summary.read_text()
    assert shown.startswith("~~~\nall claims ")
    assert "## quantmatrix: 12 cells, 0 changed" in shown
    assert f"`{FAILING}`" in shown


def test_freshness_job_keeps_one_issue(runner: Runner) -> None:
    assert shards.run(runner.checkout, runner.place("reports/evidence"), "-p", "no:xdist")[0]
    assert runner.run_job("freshness", "freshness", GH_TOKEN="t") == [0, 0], runner.said
    assert [line.split()[1:3] for line in runner.calls] == [["issue", "list"], ["issue", "create"]]
    assert "contradicting on cpu: 1\n" in runner.body.read_text()
    assert FAILING in runner.body.read_text()
    runner.issue.write_text("12\n")
    assert runner.run_job("freshness", "freshness", GH_TOKEN="t") == [0, 0]
    assert runner.calls[-1] == "gh issue edit 12 --body-file body.md"
    suite = runner.place("test_suites.py")
    suite.write_text(suite.read_text().replace('assert cell.id != "row-5', 'assert "" != "row-5'))
    assert shards.run(runner.checkout, runner.place("reports/evidence"), "-p", "no:xdist")[0] == 0
    assert runner.run_job("freshness", "freshness", GH_TOKEN="t") == [0, 0]
    assert runner.calls[-1].startswith("gh issue close 12 --comment")


def send_packet(runner: Runner, entry: dict[str, str], fault: str = "") -> None:
    """What a shard's job uploads, as the next jobs download it."""
    name = f"packet-{entry['hardware']}-{entry['part']}"
    folder = runner.place(f"packets/{name}/{entry['job']}/evidence")
    words = ["-p", "no:xdist", "--hardware", entry["hardware"], "--shard", entry["shard"]]
    shards.run(runner.checkout, folder, *words, fault=fault)


def test_hardware_jobs_from_plan_to_pull_request(runner: Runner) -> None:
    assert runner.run_job("hardware", "plan", HARDWARE="cpu") == [0, 0], runner.said
    planned = runner.read_output("jobs")
    cells = [row for entry in planned["include"] for row in entry["rows"]]
    assert sorted(cells) == sorted(cell.id for cell in runner.tables.cells)
    entry = planned["include"][0]
    runner.run_job("hardware", "shard", JOB=entry["job"], SHARD=entry["shard"])
    assert runner.calls == [f"-m nox -s {entry['job']} -- --full-size --shard {entry['shard']}"]
    for entry in planned["include"]:
        send_packet(runner, entry)
    jobs = json.dumps(planned)
    codes = runner.run_job("hardware", "executed", JOBS=jobs)
    assert codes == [0, 0, CLAIM_VIOLATED], runner.said
    assert runner.read_output("unusable") is False
    assert f"claim violated: {FAILING} (latents)" in runner.said
    assert "12 cells, 12 changed" in runner.summary.read_text()
    branch = "evidence-77"
    codes = runner.run_job("hardware", "propose", GH_TOKEN="t", BRANCH=branch)
    assert codes == [0, 0, 0], runner.said
    changed = runner.git("diff", "--name-only", "main", branch).splitlines()
    records = {f"reports/evidence/{name}" for name in shards.names_of(cells)}
    assert records | {"reports/support-matrix.md", "reports/index.html"} <= set(changed)
    assert all(name.startswith("reports/") for name in changed)
    assert branch in runner.git("ls-remote", "--heads", "origin")
    assert runner.calls[-1].startswith(f"gh pr create --head {branch} --title Evidence of hardware")
    # the same evidence again is no proposal
    before = len(runner.calls)
    codes = runner.run_job("hardware", "propose", GH_TOKEN="t", BRANCH="evidence-78")
    assert (codes, len(runner.calls)) == ([0, 0, 0], before)


def test_a_shard_that_sent_nothing_fails_the_last_job_and_the_rest_is_proposed(
    runner: Runner,
) -> None:
    planned = json.loads(runner.run("quantmatrix matrix jobs --parts 3 --json").stdout)
    for entry in planned["include"][1:]:
        send_packet(runner, entry)
    jobs = json.dumps(planned)
    assert runner.run_job("hardware", "executed", JOBS=jobs) == [0, 0, NOT_EXECUTED]
    lost = planned["include"][0]["rows"]
    assert all(f"row not executed: {row} (load, latents)" in runner.said for row in lost)
    codes = runner.run_job("hardware", "propose", GH_TOKEN="t", BRANCH="evidence-1")
    assert codes == [0, 0, 0]
    kept = shards.names_of(row for entry in planned["include"][1:] for row in entry["rows"])
    found = runner.git("ls-tree", "-r", "--name-only", "evidence-1", "reports/evidence")
    assert {name.removeprefix("reports/evidence/") for name in found.split()} == kept
    shutil.rmtree(runner.place("packets"))
    assert runner.run_job("hardware", "executed", JOBS=jobs)[-1] != 0


def test_nothing_is_proposed_from_an_environment_that_is_unusable(runner: Runner) -> None:
    junit = runner.place("packets/packet-cpu-1/gpu/junit.xml")
    said = f'<property name="problem" value="{MEANINGS[ENVIRONMENT_UNUSABLE]}"/>'
    junit.write_text(f"<testsuites><properties>{said}</properties></testsuites>")
    runner.run_job("hardware", "executed", JOBS='{"include": []}')
    assert runner.read_output("unusable") is True
    job = WORKFLOWS["hardware"]["jobs"]["propose"]
    assert "needs.executed.outputs.unusable != 'true'" in job["if"]
    outputs = WORKFLOWS["hardware"]["jobs"]["executed"]["outputs"]
    assert outputs == {"unusable": "${{ steps.environment.outputs.unusable }}"}


def test_nothing_to_plan_gives_the_matrix_that_the_guards_look_for(runner: Runner) -> None:
    assert runner.run_job("hardware", "plan", HARDWARE="b200") == [0, 0]
    printed = json.dumps(runner.read_output("jobs"))
    guards = [job["if"] for job in WORKFLOWS["hardware"]["jobs"].values() if "if" in job]
    assert len(guards) == 3
    assert all(f"!= '{printed}'" in guard for guard in guards)
    assert NOTHING_COLLECTED != 0
