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


def test_docs_job_builds_the_documentation(runner: Runner) -> None:
    assert runner.run_job("cpu", "docs") == [0]
    assert runner.calls == ["-m nox -s docs"]


def agree(runner: Runner) -> list[int]:
    """Exit codes of both jobs of the freshness workflow."""
    codes = runner.run_job("freshness", "freshness")
    return [*codes, *runner.run_job("freshness", "issue", GH_TOKEN="t", GH_REPO="some/project")]


def test_freshness_job_keeps_one_issue(runner: Runner) -> None:
    assert shards.run(runner.checkout, runner.place("reports/evidence"), "-p", "no:xdist")[0]
    assert agree(runner) == [0, 0, 0], runner.said
    assert [line.split()[1:3] for line in runner.calls] == [["issue", "list"], ["issue", "create"]]
    assert "contradicting on cpu: 1\n" in runner.body.read_text()
    assert FAILING in runner.body.read_text()
    runner.issue.write_text("12\n")
    assert agree(runner) == [0, 0, 0]
    assert runner.calls[-1] == "gh issue edit 12 --body-file agreement/body.md"
    suite = runner.place("test_suites.py")
    suite.write_text(suite.read_text().replace('assert cell.id != "row-5', 'assert "" != "row-5'))
    assert shards.run(runner.checkout, runner.place("reports/evidence"), "-p", "no:xdist")[0] == 0
    assert agree(runner) == [0, 0, 0]
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
    assert (entry["runner"], entry["size"]) == (["l"], "")
    secret = {"JOB": entry["job"], "SHARD": entry["shard"], "HF_TOKEN": ""}
    for size, flags in (("--full-size", "--full-size "), ("", "")):
        runner.run_job("hardware", "shard", SIZE=size, **secret)
        assert runner.calls[-1] == f"-m nox -s {entry['job']} -- {flags}--shard {entry['shard']}"
    for entry in planned["include"]:
        send_packet(runner, entry)
    jobs = json.dumps(planned)
    codes = runner.run_job("hardware", "executed", JOBS=jobs)
    assert codes == [0, CLAIM_VIOLATED], runner.said
    assert runner.read_last("complete") is True
    assert f"claim violated: {FAILING} (latents)" in runner.said
    assert "12 cells, 12 changed" in runner.summary.read_text()
    branch = "evidence-77"
    assert propose(runner, branch) == [0, 0, 0], runner.said
    changed = runner.git("diff", "--name-only", "main", branch).splitlines()
    records = {f"reports/evidence/{name}" for name in shards.names_of(cells)}
    assert records | {"reports/support-matrix.md", "reports/index.html"} <= set(changed)
    assert all(name.startswith("reports/") for name in changed)
    assert branch in runner.git("ls-remote", "--heads", "origin")
    assert runner.calls[-2].startswith(f"gh pr create --head {branch} --title Evidence of hardware")
    assert runner.calls[-1] == f"gh workflow run cpu.yml --ref {branch}"
    assert "workflow_dispatch" in WORKFLOWS["cpu"][True]  # YAML reads `on` as true
    # the same evidence again is no proposal
    before = len(runner.calls)
    assert (propose(runner, "evidence-78"), len(runner.calls)) == ([0, 0, 0], before)


def propose(runner: Runner, branch: str) -> list[int]:
    """Exit codes of the jobs that render and propose, the second in a clean checkout."""
    codes = runner.run_job("hardware", "render")
    patch = runner.place("evidence.patch").read_bytes()
    runner.git("reset", "--quiet", "--hard")
    runner.git("clean", "-qfd", "reports")
    runner.place("evidence.patch").write_bytes(patch)
    return [*codes, *runner.run_job("hardware", "propose", GH_TOKEN="t", BRANCH=branch)]


def test_a_shard_that_sent_nothing_fails_the_last_job_and_nothing_is_proposed(
    runner: Runner,
) -> None:
    planned = json.loads(runner.run("quantmatrix matrix jobs --parts 3 --json").stdout)
    for entry in planned["include"][1:]:
        send_packet(runner, entry)
    jobs = json.dumps(planned)
    assert runner.run_job("hardware", "executed", JOBS=jobs) == [0, NOT_EXECUTED]
    assert runner.read_last("complete") is False
    lost = planned["include"][0]["rows"]
    assert all(f"row not executed: {row} (load, latents)" in runner.said for row in lost)
    steps = WORKFLOWS["hardware"]["jobs"]
    assert "needs.executed.outputs.complete == 'true'" in steps["render"]["if"]
    assert "needs.render.result == 'success'" in steps["propose"]["if"]
    shutil.rmtree(runner.place("packets"))
    assert runner.run_job("hardware", "executed", JOBS=jobs)[-1] != 0


def test_nothing_is_proposed_from_an_environment_that_is_unusable(runner: Runner) -> None:
    junit = runner.place("packets/packet-cpu-1/gpu/junit.xml")
    said = f'<property name="problem" value="{MEANINGS[ENVIRONMENT_UNUSABLE]}"/>'
    junit.write_text(f"<testsuites><properties>{said}</properties></testsuites>")
    codes = runner.run_job("hardware", "executed", JOBS='{"include": []}')
    assert codes == [0, ENVIRONMENT_UNUSABLE]
    assert runner.read_last("complete") is False
    outputs = WORKFLOWS["hardware"]["jobs"]["executed"]["outputs"]
    assert outputs == {"complete": "${{ steps.executed.outputs.complete }}"}


def test_nothing_to_plan_gives_the_matrix_that_the_guards_look_for(runner: Runner) -> None:
    assert runner.run_job("hardware", "plan", HARDWARE="b200") == [0, 0]
    printed = json.dumps(runner.read_output("jobs"))
    jobs = WORKFLOWS["hardware"]["jobs"]
    guards = [job["if"] for name, job in jobs.items() if "if" in job and name != "plan"]
    assert len(guards) == 4
    assert all(f"!= '{printed}'" in guard for guard in guards)
    assert NOTHING_COLLECTED != 0


HELD = {
    ("freshness", "issue"): {"issues"},
    ("hardware", "propose"): {"contents", "pull-requests", "actions"},
}
"""Jobs that may write something, and what."""
JOBS = {(name, job): body for name, flow in WORKFLOWS.items() for job, body in flow["jobs"].items()}


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_a_job_that_may_write_installs_nothing(name: str, job: str) -> None:
    body = JOBS[name, job]
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    rights = {right for right, level in body.get("permissions", {}).items() if level != "read"}
    assert rights == HELD.get((name, job), set())
    scripts = "\n".join(step.get("run", "") for step in body["steps"])
    assert not rights or not re.search(r"\b(pip|nox|npm|npx|quantmatrix \w)", scripts)


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_no_job_keeps_credentials_and_the_token_goes_where_weights_are_read(
    name: str, job: str
) -> None:
    for step in JOBS[name, job]["steps"]:
        if str(step.get("uses", "")).startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert ("HF_TOKEN" in step.get("env", {})) == ("--shard" in step.get("run", ""))
    assert "concurrency" in WORKFLOWS[name]


@pytest.mark.parametrize("name", [n for n, flow in WORKFLOWS.items() if "schedule" in flow[True]])
def test_a_schedule_runs_in_no_fork(name: str) -> None:
    first = next(iter(WORKFLOWS[name]["jobs"].values()))
    assert "vars.EVIDENCE_REPOSITORY == github.repository" in first["if"]
    assert all("needs" in job for job in list(WORKFLOWS[name]["jobs"].values())[1:])
