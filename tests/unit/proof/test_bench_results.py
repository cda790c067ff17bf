"""Files of benchmarks: nothing empty, partial, damaged or written by hand passes for a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from benched import make_result

from quantmatrix.proof import bench_results
from quantmatrix.proof.bench_results import BenchmarkError


def test_round_trip(tmp_path: Path) -> None:
    result = make_result()
    path = bench_results.write_cell(result, tmp_path)
    assert path == tmp_path / "cpu" / "some-row.json"
    assert bench_results.read(path) == [result]
    assert bench_results.read(tmp_path) == [result]
    assert path.read_bytes() == bench_results.encode([result], ["some-row@cpu"])
    assert "[10.0, 10.0, " in path.read_text()  # samples on one line
    assert [entry.name for entry in path.parent.iterdir()] == ["some-row.json"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench_results.write_cell(make_result(), tmp_path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        bench_results.write_cell(make_result(step=0.5), tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["some-row.json"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (b"[" * 100_000, "not JSON"),
        (b" \n", "empty file"),
        (b"{", "not JSON"),
        (b"[]", "not a file of `quantmatrix bench`"),
        (b'{"schema": 2}', "not a file of `quantmatrix bench`"),
        (b'{"schema": 1, "planned": ["a"], "results": []}', "nothing was measured"),
        (b'{"schema": 1, "planned": [], "results": [1]}', "nothing was measured"),
        (b'{"schema": 1, "planned": ["a"], "results": [null]}', "not a JSON object"),
    ],
)
def test_files_that_are_none(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(data)
    with pytest.raises(BenchmarkError, match=said) as raised:
        bench_results.read(path)
    assert str(path) in str(raised.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(BenchmarkError) as raised:
        bench_results.read(path)
    assert str(raised.value) == f"{path}: No such file or directory"
    with pytest.raises(BenchmarkError, match=r"no \.json file in it"):
        bench_results.read(tmp_path)


def test_a_planned_row_that_is_missing_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="partial: other@cpu was planned and not measured"):
        bench_results.encode([make_result()], ["some-row@cpu", "other@cpu"])
    with pytest.raises(BenchmarkError, match="appears twice"):
        bench_results.encode([make_result(), make_result()], ["some-row@cpu"])


def change(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(result)
    *way, last = path.split("/")
    place: Any = changed
    for name in way:
        place = place[int(name) if name.isdecimal() else name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


PART = "components/transformer"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("device", None, "device: missing"),
        ("schema", 2, "schema: expected 1, found 2"),
        ("components", {}, "components: empty"),
        (f"{PART}/layers", [], "transformer.layers: empty"),
        (f"{PART}/step", None, "step: missing"),
        (f"{PART}/memory", None, "components.transformer.memory: missing"),
        (f"{PART}/memory", 3, "components.transformer.memory: expected an object, found 3"),
        (f"{PART}/memory/bf16/peak", 0, "memory.bf16.peak: expected a count above 0, found 0"),
        (
            f"{PART}/memory/bf16/peak",
            True,
            "memory.bf16.peak: expected a count above 0, found True",
        ),
        (f"{PART}/layers/0/rows", None, "layers[0].rows: missing"),
        (f"{PART}/layers/0/scheme", [], "layers[0].scheme: expected a text, found []"),
        (f"{PART}/step/median", {"bf16": 1.0}, "step.median.quantized: missing"),
        (f"{PART}/step/ratio", "fast", "step.ratio: expected a number, found 'fast'"),
        (f"{PART}/load/milliseconds/bf16", [], "load.milliseconds.bf16: empty"),
        (
            f"{PART}/load/milliseconds/bf16",
            ["x"],
            "milliseconds.bf16[0]: expected a number, found 'x'",
        ),
        ("settings/clock", None, "settings.clock: missing"),
        ("cell", 3, "cell: expected an object, found 3"),
        (f"{PART}/memory/bf16/working", "many", "bf16.working: expected a count, found 'many'"),
        (f"{PART}/memory/weights_ratio", 0.4, "bytes are not"),
        (f"{PART}/memory/peak_verdict", "larger", "bytes are not"),
        (f"{PART}/step/ratio", 0.5, "transformer step: its samples give 0.800"),
        (f"{PART}/step/verdict", "slower", "transformer step: its samples give"),
        (f"{PART}/step/median/bf16", 9.0, "transformer step: its samples give"),
        (f"{PART}/load/high", 9.0, "transformer load: its samples give"),
        (f"{PART}/layers/0/detectable", 0.5, "layer 16x256->512 FP8 decode: its samples give"),
        (f"{PART}/step/milliseconds/bf16", [1.0], "timings: expected the same number"),
    ],
)
def test_results_that_are_none(path: str, value: Any, said: str) -> None:
    problems = bench_results.list_problems(change(make_result(), path, value))
    assert len(problems) == 1, problems
    assert said in problems[0]


def test_a_good_result_has_no_problem() -> None:
    assert bench_results.list_problems(make_result()) == []
    without = change(make_result(), f"{PART}/load", None)  # random weights have no files
    assert bench_results.list_problems(without) == []


def test_results_of_reports_lie_under_their_names(tmp_path: Path) -> None:
    folder = tmp_path / bench_results.BENCHMARKS
    path = bench_results.write_cell(make_result(), folder)
    assert list(bench_results.read_reports(tmp_path)) == ["some-row@cpu"]
    path.rename(path.with_name("other.json"))
    with pytest.raises(BenchmarkError, match="named after"):
        bench_results.read_reports(tmp_path)


def test_reports_do_not_count_samples_again_unless_asked(tmp_path: Path) -> None:
    path = bench_results.write_cell(make_result(), tmp_path / bench_results.BENCHMARKS)
    path.write_text(path.read_text().replace('"ratio": 0.8', '"ratio": 0.1'))
    assert bench_results.read_reports(tmp_path)
    with pytest.raises(BenchmarkError, match="its samples give"):
        bench_results.read_reports(tmp_path, deep=True)


def write_pytest(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"benchmarks": list(entries)}))
    return path


def test_a_file_of_pytest_benchmark(tmp_path: Path) -> None:
    stats = {"median": 1.0}
    row = {"fullname": "test_rows.py::a", "extra_info": {"what": "a@cpu"}, "stats": stats}
    kernel = {"fullname": "test_int8.py::b", "extra_info": {"ratio": 1}, "stats": stats}
    path = write_pytest(tmp_path / "bench.json", row, kernel)
    found = bench_results.read_pytest(path, ["a@cpu"])
    assert list(found) == ["a@cpu", "test_int8.py::b"]
    with pytest.raises(BenchmarkError, match="partial: b@cpu was planned"):
        bench_results.read_pytest(path, ["a@cpu", "b@cpu"])
    write_pytest(path, row, {**kernel, "stats": None})
    with pytest.raises(BenchmarkError, match=r"test_int8.py::b: no statistics"):
        bench_results.read_pytest(path)
    write_pytest(path)
    with pytest.raises(BenchmarkError, match="nothing was measured"):
        bench_results.read_pytest(path)
    path.write_text("[]")
    with pytest.raises(BenchmarkError, match="not a file of pytest-benchmark"):
        bench_results.read_pytest(path)
    with pytest.raises(BenchmarkError, match="missing or empty"):
        bench_results.read_pytest(tmp_path / "none.json")


QUICK = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=1")
"""What is timed does not matter."""


def test_what_workers_leave_is_rejected(tmp_path: Path) -> None:
    """The real plugins: under workers a benchmark passes, and its file has no byte."""
    (tmp_path / "test_it.py").write_text("def test_it(benchmark):\n    benchmark(lambda: 1)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    clean = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    file = tmp_path / "bench.json"
    for workers, good in ((["-n", "1"], False), (["-p", "no:xdist"], True)):
        file.unlink(missing_ok=True)
        done = subprocess.run(
            [*command, *workers, *QUICK, f"--benchmark-json={file}"],
            cwd=tmp_path, env=clean, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        if good:
            assert list(bench_results.read_pytest(file)) == ["test_it.py::test_it"]
            continue
        assert not file.exists() or not file.stat().st_size
        with pytest.raises(BenchmarkError, match="was it run with workers"):
            bench_results.read_pytest(file)
