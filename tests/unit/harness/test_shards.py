"""Parts of the rows of a device: every cell once, about equally long, the same everywhere."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import shards

from quantmatrix.cli import main
from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import NOTHING_COLLECTED
from quantmatrix.harness.shards import (
    MOST_PARTS,
    REFUSAL_SECONDS,
    UNKNOWN_SECONDS,
    count_parts,
    cut,
    estimate,
    estimate_all,
    read_rows,
    read_shard,
    runnable,
    select_rows,
)
from quantmatrix.proof.record import CheckResult, Evidence, describe_cell
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Six checkpoints of two cells each."""
    return shards.make_project(tmp_path_factory.mktemp("project"))


def time_cells(tables: Matrix, seconds: dict[str, float]) -> dict[str, Evidence]:
    """Records in which every cell of a checkpoint took some seconds to load."""
    return {
        cell.id: Evidence(
            describe_cell(cell, tables),
            {"load": CheckResult("pass")},
            timings={"load": seconds[cell.checkpoint]},
        )
        for cell in tables.cells
        if cell.checkpoint in seconds
    }


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 9])
def test_every_cell_is_in_one_part_and_checkpoints_stay_whole(tables: Matrix, count: int) -> None:
    parts = cut(tables.cells, {}, count)
    assert [(part.number, part.count) for part in parts] == [(i + 1, count) for i in range(count)]
    found = [cell for part in parts for cell in part.cells]
    assert sorted(found) == sorted(cell.id for cell in tables.cells)
    of = {cell.id: cell.checkpoint for cell in tables.cells}
    places = {(of[cell], part.number) for part in parts for cell in part.cells}
    assert len(places) == shards.COUNT
    order = [cell.id for cell in tables.cells]
    for part in parts:
        assert list(part.cells) == sorted(part.cells, key=order.index)


def test_the_longest_go_first(tables: Matrix) -> None:
    seconds = {"c0": 10.0, "c1": 90.0, "c2": 20.0, "c3": 40.0, "c4": 30.0, "c5": 50.0}
    parts = cut(tables.cells, time_cells(tables, seconds), 3)
    of = {cell.id: cell.checkpoint for cell in tables.cells}
    assert [sorted({of[cell] for cell in part.cells}) for part in parts] == [
        ["c1"],
        ["c0", "c2", "c5"],
        ["c3", "c4"],
    ]
    assert [part.seconds for part in parts] == [180.0, 160.0, 140.0]


def test_machines_agree_whatever_the_order_of_records(tables: Matrix) -> None:
    seconds = {f"c{i}": float(i % 3) for i in range(6)}
    known = list(time_cells(tables, seconds).items())
    wanted = cut(tables.cells, dict(known), 4)
    for seed in range(5):
        random.Random(seed).shuffle(known)
        assert cut(tables.cells, dict(known), 4) == wanted


def test_unknown_cells_take_as_long_as_others(tables: Matrix) -> None:
    found = estimate_all(tables.cells, time_cells(tables, {"c0": 7.0, "c1": 9.0}))
    assert found["row-0@cpu+decode"] == 7.0
    assert found["row-5@cpu+decode"] == 8.0
    assert set(estimate_all(tables.cells, {}).values()) == {UNKNOWN_SECONDS}
    cell = tables.cells[0]
    record = Evidence({}, {}, timings={"load a": 2, "load b": 3, "generate": 5, "command": 4})
    assert estimate(cell, record) == 19.0
    assert estimate(replace(cell, checks=("refuse",)), None) == REFUSAL_SECONDS


def test_the_number_of_parts_follows_from_the_time() -> None:
    assert count_parts(0.0, 5) == 1
    assert count_parts(4000.0, 50) == 3
    assert count_parts(4000.0, 2) == 2
    assert count_parts(1e9, 1000) == MOST_PARTS


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", " 1/3"])
def test_a_shard_that_is_none_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        read_shard(text)


def test_rows_of_a_file(tables: Matrix, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("# some\nrow-1\n\nrow-0@cpu+decode # one backend\nrow-1\n")
    rows = read_rows(path)
    assert rows == ("row-1", "row-0@cpu+decode")
    found = select_rows(tables.cells, rows, f"--rows {path}")
    assert [c.id for c in found] == ["row-0@cpu+decode", "row-1@cpu+reference", "row-1@cpu+decode"]
    with pytest.raises(UsageError, match="row-9: no such row or cell is claimed"):
        select_rows(tables.cells, ["row-9"], f"--rows {path}")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_rows(tmp_path / "none")


def test_jobs_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", "jobs", "--hardware", "b200", "--json"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    jobs = json.loads(text)["include"]
    assert {(j["hardware"], j["job"], j["label"]) for j in jobs} == {
        ("b200", "multimodal-gen-test-1-b200", "b200")
    }
    assert [job["shard"] for job in jobs] == [f"{i + 1}/{len(jobs)}" for i in range(len(jobs))]
    listed = [row for job in jobs for row in job["rows"]]
    claimed = {cell.id for cell in runnable(read.read(), ["b200"])}
    assert len(listed) == len(set(listed))
    assert set(listed) == claimed
    assert all(isinstance(value, (str, int, float, list)) for job in jobs for value in job.values())


def test_jobs_for_people_and_in_fixed_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", "jobs", "--hardware", "h100", "b200", "--parts", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines[1:]] == [
        ["h100", "1/2"],
        ["h100", "2/2"],
        ["b200", "1/2"],
        ["b200", "2/2"],
    ]
    # github takes 256 jobs and a megabyte
    assert main.main(["matrix", "jobs", "--json"]) == 0
    text = capsys.readouterr().out
    assert len(json.loads(text)["include"]) <= 256
    assert len(text) < 1_000_000


def test_words_that_are_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.main(["matrix", "jobs", "--hardware", "b201"]) == 2
    assert "--hardware b201: not in the tables" in capsys.readouterr().err
    assert main.main(["matrix", "jobs", "--parts", "0"]) == 2
    shards.make_project(tmp_path)
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    assert main.main(["matrix", "jobs", "--hardware", "b200", "--json"]) == NOTHING_COLLECTED
    assert capsys.readouterr().out == '{"include": []}\n'


def test_jobs_need_no_torch() -> None:
    code = (
        "import sys; from quantmatrix.cli.main import main; main(['matrix', 'jobs', '--json']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


def test_every_claim_but_a_planned_one_is_executed() -> None:
    tables = read.read()
    [cell, *_] = [cell for cell in tables.cells if cell.hardware == "cpu"]
    claims = ("planned", "refused", "validated", "expected", "failing")
    some = replace(tables, cells=tuple(replace(cell, claim=claim) for claim in claims))
    assert [found.claim for found in runnable(some, ["cpu"])] == list(claims[1:])
