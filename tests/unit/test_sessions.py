"""The nox sessions of every hardware: what they install, where they stop, what they pack."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from quantmatrix import identify, matrix, sessions
from quantmatrix.errors import MachineError, UsageError

ROOT = Path(__file__).parents[2]
TABLES = matrix.read()
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


def test_nox_lists_the_sessions_of_the_table_with_a_line_each() -> None:
    named = ["-s", *(job.name for job in JOBS)]
    listed = run_nox("-l", "--json", *named)
    told = {entry["name"]: entry["description"] for entry in json.loads(listed.stdout)}
    assert told == {job.name: job.description for job in JOBS}


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
    assert line.startswith(f"{job.name} wants one {job.row.name} ({job.row.arch}")


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
    assert len(gaps) == 2
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "row.json").write_text("{}")
    (tmp_path / "bench.json").write_text("{}")
    assert sessions.list_gaps(tmp_path) == []


def test_codes_are_told_in_words() -> None:
    assert sessions.explain_code(13) == "exit code 13 (nothing collected)"
    assert "failed" in sessions.explain_code(1)


def test_noxfile_needs_the_standard_library_only() -> None:
    code = "from quantmatrix import matrix, sessions; sessions.list_sessions(matrix.read())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
