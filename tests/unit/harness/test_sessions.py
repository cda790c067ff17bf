"""The nox sessions of every hardware: what they install, where they stop, what they pack."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import nox.registry
import pytest
from nox.command import CommandFailed

from quantmatrix.errors import MachineError, UsageError
from quantmatrix.harness import sessions
from quantmatrix.tables import identify, read

ROOT = Path(__file__).parents[3]
TABLES = read.read()
ROWS = TABLES.hardware
JOBS = sessions.list_sessions(TABLES)
WHEELS = {"NUNCHAKU_WHEEL": "engine.whl", "TORCH_INDEX_URL": "https://example.org/rocm"}


def run_nox(*words: str) -> subprocess.CompletedProcess[str]:
    """nox on the real noxfile, in this environment."""
    return subprocess.run(
        [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
    )


def test_every_hardware_but_the_cpu_has_a_session() -> None:
    names = [job.name for job in JOBS]
    assert names == [row.job for row in ROWS.values() if row.id != "cpu"]
    assert {"gpu-h200", "multimodal-gen-test-1-b200", "ascend-910b"} <= set(names)


def list_json(*words: str) -> dict[str, str]:
    """Description of each session that `nox -l --json` names."""
    said = json.loads(run_nox("-l", "--json", *words).stdout)
    return {entry["name"]: entry["description"] for entry in said}


def test_nox_lists_every_session_with_a_line_each() -> None:
    text = (ROOT / "noxfile.py").read_text()
    written = set(re.findall(r"^@nox\.session.*\ndef (\w+)\(", text, re.MULTILINE))
    own = {"matrix", "tests", "lint", "types", "bench", "report", "browser", "producers"}
    said = list_json()
    assert {job.name: said[job.name] for job in JOBS} == {job.name: job.description for job in JOBS}
    assert own <= written
    rest = {name.replace("-", "_") for name in said} - {job.name.replace("-", "_") for job in JOBS}
    assert rest == written
    assert all("\n" not in line and len(line) > 20 for line in said.values())


def test_a_tag_gives_the_hardware_sessions_alone() -> None:
    assert list(list_json("-t", "hardware")) == [job.name for job in JOBS]


def test_nox_without_words_runs_the_tests_only() -> None:
    lines = run_nox("-l").stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("* ")] == ["tests"]
    assert not sessions.asks_for_json(["nox", "--", "-l", "--json"])  # pytest's words, not nox's


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_without_a_driver_a_session_wants_its_hardware_in_one_line(
    job: sessions.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identify.shutil, "which", lambda name: None)
    monkeypatch.setattr(identify, "DRIVERS", dict.fromkeys(identify.DRIVERS, ("/nowhere",)))
    with pytest.raises(MachineError) as raised:
        identify.require_driver(job.row)
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith(f"{job.name} wants {job.row.wanted} ({job.row.arch}")


def has_driver(vendor: str) -> bool:
    files = any(Path(file).exists() for file in identify.DRIVERS[vendor])
    return files or shutil.which(identify.TOOLS[vendor]) is not None


def test_nox_stops_on_a_wrong_machine_before_it_installs() -> None:
    job = next(job for job in JOBS if not has_driver(job.row.vendor))  # nobody has every vendor
    done = run_nox("--no-venv", "-s", job.name)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "wants one" in line]
    assert len(lines) == 1, done.stderr
    assert job.row.name in lines[0]
    assert "pytest" not in done.stderr
    assert not (ROOT / "packets" / job.name).exists()


def test_requirements_are_those_of_the_row() -> None:
    assert sessions.list_requirements(ROWS["h200"], "torch==2", {}) == [("torch==2",)]
    assert sessions.list_requirements(ROWS["b200"], "torch==2", {})[1:] == [
        ("torch==2", "flashinfer-python")
    ]
    assert sessions.list_requirements(ROWS["ascend-910b"], "torch==2", {})[1:] == [
        ("torch==2", "torch-npu")
    ]
    for row in (job.row for job in JOBS):
        assert sessions.list_requirements(row, "torch==2", WHEELS)


@pytest.mark.parametrize("place", ["rtx-4090", "rtx-5090", "mi300x"])
def test_what_no_index_has_must_be_named(place: str) -> None:
    row = ROWS[place]
    with pytest.raises(UsageError, match=f"{row.job} wants .* set [A-Z_]+ to") as raised:
        sessions.list_requirements(row, "torch==2", {})
    assert "\n" not in str(raised.value)
    given = sessions.list_requirements(row, "torch==2", WHEELS)
    assert ("engine.whl",) in given or (
        "--index-url",
        WHEELS["TORCH_INDEX_URL"],
        "torch==2",
    ) in given


def test_nobody_installs_the_statistics_package_called_nunchaku() -> None:
    words = [w for job in JOBS for s in sessions.list_requirements(job.row, "t", WHEELS) for w in s]
    assert "nunchaku" not in words


def test_commands_are_taken_by_the_programs(tmp_path: Path) -> None:
    suites = sessions.suites_command(ROWS["h200"], tmp_path, ["--shard", "1/3", "--collect-only"])
    # A worker's name in the environment would make the benchmarks' plugin switch itself off.
    clean = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    for command in (suites, [*sessions.bench_command(tmp_path), "--collect-only"]):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=clean,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "--evidence-dir" in suites


def test_a_check_that_hangs_is_stopped_and_one_that_cannot_be_ends_the_run(tmp_path: Path) -> None:
    for words, limit in (([], 900), (["--full-size"], 3600)):
        command = sessions.suites_command(ROWS["h200"], tmp_path, words)
        assert f"--timeout={limit}" in command
        assert f"faulthandler_timeout={limit + 60}" in command
        assert "faulthandler_exit_on_timeout=true" in command
    # what the caller says comes last
    assert sessions.suites_command(ROWS["h200"], tmp_path, ["--timeout=9"])[-1] == "--timeout=9"


def test_traces_have_the_size_of_the_suites(tmp_path: Path) -> None:
    row, target = ROWS["h200"], str(tmp_path / "traces")
    command = ["quantmatrix", "trace", "--hardware", "h200", "--output-path", target]
    assert sessions.trace_command(row, tmp_path, ["--shard", "1/3"]) == [*command, "--tiny"]
    assert sessions.trace_command(row, tmp_path, ["--full-size"]) == command


@pytest.fixture(scope="module")
def noxfile() -> dict[str, Any]:
    """What the noxfile defines."""
    with (
        mock.patch.dict(nox.registry._REGISTRY, clear=True),
        mock.patch.object(sys, "argv", ["nox"]),
    ):
        return runpy.run_path(str(ROOT / "noxfile.py"))


MEASURED = {"fullname": "a", "extra_info": {}, "stats": {"median": 1.0}}
STEPS = ["pytest --pyargs", "pytest benchmarks", "quantmatrix trace"]


class FakeSession:
    """What a hardware's session asks nox for, on a machine that is that hardware."""

    posargs: tuple[str, ...] = ("--shard", "1/3")
    virtualenv = None

    def __init__(self, row: str, failing: str = "") -> None:
        self.row, self.failing = row, failing
        self.env: dict[str, str] = {}
        self.ran: list[str] = []

    def install(self, *words: str) -> None:
        self.ran.append("install")

    def log(self, line: str) -> None:
        pass

    def error(self, line: str) -> None:
        raise AssertionError(line)

    def run(self, *words: str, **options: object) -> str:
        name = " ".join(words[:2])
        if "quantmatrix.tables.identify" in words:
            return self.row
        self.ran.append(name)
        files = {
            "pytest --pyargs": ("--evidence-dir", "h200/row.json"),
            "quantmatrix trace": ("--output-path", "row@h200.json.gz"),
        }
        if name in files:
            option, file = files[name]
            path = Path(words[words.index(option) + 1], file)
            path.parent.mkdir(parents=True)
            path.write_text("{}")
        else:
            Path(words[-1].partition("=")[2]).write_text(json.dumps({"benchmarks": [MEASURED]}))
        if name == self.failing:
            raise CommandFailed(f"Command {name} failed with exit code 11")
        return ""


@pytest.mark.parametrize("failing", ["", *STEPS])
def test_every_step_runs_and_a_failure_is_told_at_the_end(
    failing: str, noxfile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_hardware = noxfile["run_on_hardware"]
    monkeypatch.setitem(run_on_hardware.__globals__, "ROOT", tmp_path)
    session = FakeSession("h200", failing)
    job = next(job for job in JOBS if job.row.id == "h200")
    context = pytest.raises(AssertionError, match=failing) if failing else nullcontext()
    with context as raised:
        run_on_hardware(session, job)
    if failing:
        assert str(raised.value) == f"{failing}: exit code 11 (claim violated)"
    assert [name for name in session.ran if name != "install"] == STEPS
    with tarfile.open(tmp_path / "packets" / "gpu-h200.tar.gz") as packed:
        names = [name.removeprefix("gpu-h200/") for name in packed.getnames()]
    assert names == [
        "bench.json",
        "evidence/h200/row.json",
        "traces/row@h200.json.gz",
        "SHA256SUMS",
    ]


@pytest.mark.parametrize("words", [("--shard", "2/3"), ("--shard=2/3", "--full-size")])
def test_only_the_first_part_has_benchmarks_and_traces(
    words: tuple[str, ...],
    noxfile: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_on_hardware = noxfile["run_on_hardware"]
    monkeypatch.setitem(run_on_hardware.__globals__, "ROOT", tmp_path)
    session = FakeSession("h200")
    session.posargs = words
    run_on_hardware(session, next(job for job in JOBS if job.row.id == "h200"))
    assert [name for name in session.ran if name != "install"] == STEPS[:1]
    assert sessions.is_first(["--full-size"])
    assert sessions.is_first(["--shard", "1/12"])
    assert not sessions.is_first(["--shard", "11/12"])


def test_archive_holds_every_file_with_its_digest(tmp_path: Path) -> None:
    folder = tmp_path / "gpu-h200"
    (folder / "evidence" / "h200").mkdir(parents=True)
    (folder / "evidence" / "h200" / "row.json").write_text("{}")
    (folder / "junit.xml").write_text("<testsuites/>")
    archive = sessions.pack(folder, tmp_path / "gpu-h200.tar.gz")
    with tarfile.open(archive) as packed:
        names = packed.getnames()
        sums = packed.extractfile("gpu-h200/SHA256SUMS")
        assert sums is not None
        lines = sums.read().decode().splitlines()
    assert names == [
        f"gpu-h200/{name}" for name in ("evidence/h200/row.json", "junit.xml", "SHA256SUMS")
    ]
    assert lines[0] == f"{hashlib.sha256(b'{}').hexdigest()}  evidence/h200/row.json"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert sessions.pack(folder, archive) == archive  # again, over the old one


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nothing was run"):
        sessions.pack(tmp_path / "empty", tmp_path / "empty.tar.gz")
    assert not (tmp_path / "empty.tar.gz").exists()


def test_gaps_are_named(tmp_path: Path) -> None:
    (tmp_path / "bench.json").touch()  # what pytest-benchmark leaves when it measured nothing
    gaps = sessions.list_gaps(tmp_path)
    assert [gap.rpartition("/")[2] for gap in gaps] == [
        "evidence has no record",
        "bench.json: missing or empty: was it run with workers (-n)?",
        "traces has no trace",
    ]
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "row@h200.json.gz").write_text("{}")
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "row.json").write_text("{}")
    worker = {**MEASURED, "stats": None}
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": [worker]}))
    [gap] = sessions.list_gaps(tmp_path)
    assert "a: no statistics" in gap
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": [MEASURED]}))
    assert sessions.list_gaps(tmp_path) == []


def test_codes_are_told_in_words() -> None:
    assert sessions.explain_code(13) == "exit code 13 (nothing collected)"
    assert "failed" in sessions.explain_code(1)


def test_noxfile_needs_the_standard_library_only() -> None:
    code = (
        "from quantmatrix.harness import sessions\n"
        "from quantmatrix.tables import read\n"
        "sessions.list_sessions(read.read())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
