"""Shards in processes and folders of their own, whole, broken and repeated, merged into one."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import shards

from quantmatrix.cli import main
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, NOT_EXECUTED
from quantmatrix.harness import completeness
from quantmatrix.harness.shards import cut, list_jobs, runnable
from quantmatrix.proof import merge, store
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

PARTS = 3
BASE = ("-p", "no:xdist")
LIMIT = ("--timeout", "1")
"""Seconds of a check; those that do not hang take a hundredth of one."""
STUCK = [*LIMIT, "-o", "faulthandler_timeout=1.5", "-o", "faulthandler_exit_on_timeout=true"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project."""
    folder = tmp_path_factory.mktemp("project")
    shards.make_project(folder)
    return folder


@pytest.fixture(scope="module")
def tables(project: Path) -> Matrix:
    """Its tables."""
    return read.read(project / "matrix")


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evidence that one machine gives."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = shards.run(project, folder, *BASE)
    assert (code, len(list(folder.rglob("*.json")))) == (11, 12), output
    return folder


@pytest.fixture
def command(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line, on the project's tables."""
    shards.take_digests(monkeypatch)
    monkeypatch.setattr(read, "tables_folder", lambda: project / "matrix")
    return lambda *words: main.main([str(word) for word in words])


def shard_cells(tables: Matrix, number: int) -> tuple[str, ...]:
    return cut(runnable(tables), {}, PARTS)[number - 1].cells


def test_any_shards_in_any_order_give_the_bytes_of_one_machine(
    project: Path, whole: Path, tables: Matrix, tmp_path: Path
) -> None:
    generator = random.Random(7)
    lost = shard_cells(tables, 2)[2]
    crash = ("2/3", f"crash {lost}")
    runs = [("1/3", ""), crash, ("3/3", ""), ("2/3", ""), ("1/2", "")]  # cut in two ways
    generator.shuffle(runs)
    folders = [tmp_path / f"machine-{i}" for i in range(len(runs))]
    started = [
        shards.start(project, folder, *BASE, "--shard", shard, fault=fault)
        for folder, (shard, fault) in zip(folders, runs, strict=True)
    ]
    for process in started:
        process.communicate(timeout=120)
    broken = folders[runs.index(crash)]
    assert 0 < len(shards.read_bytes(broken)) < len(shard_cells(tables, 2))
    for attempt in range(4):
        generator.shuffle(folders)
        output = tmp_path / f"merged-{attempt}"
        merge.write(merge.merge_folders(folders).records.values(), output)
        assert shards.read_bytes(output) == shards.read_bytes(whole)
    # two by two gives the same
    output = tmp_path / "step-by-step"
    for folder in folders:
        given = [folder, *([output] if output.is_dir() else [])]
        merge.write(merge.merge_folders(given).records.values(), output)
    assert shards.read_bytes(output) == shards.read_bytes(whole)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


FAULTS = [
    ("crash", [], 3),
    ("kill", [], -9),
    ("hang", [*LIMIT], NOT_EXECUTED),
    ("hang", [*LIMIT, "--timeout-method", "thread"], 1),
    ("stuck", STUCK, 1),
    ("disk", [], ENVIRONMENT_UNUSABLE),
    ("media", [], ENVIRONMENT_UNUSABLE),
]


@pytest.fixture(scope="module")
def start_fault(
    project: Path, tables: Matrix, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, list[str]], tuple[Path, subprocess.Popen[str]]]]:
    """What starts the first shard with a fault in its second cell, and says where its evidence goes.

    Runs that wait for a limit have begun before they are asked for, all together.
    """

    def start(fault: str, words: list[str]) -> tuple[Path, subprocess.Popen[str]]:
        folder, where = tmp_path_factory.mktemp("fault"), shard_cells(tables, 1)[1]
        shard = ["--shard", f"1/{PARTS}", *BASE]
        return folder, shards.start(project, folder, *shard, *words, fault=f"{fault} {where}")

    begun = {(fault, *words): start(fault, words) for fault, words, _ in FAULTS if words}
    yield lambda fault, words: begun.get((fault, *words)) or start(fault, words)
    for _, process in begun.values():
        process.kill()


@pytest.mark.parametrize(("fault", "words", "code"), FAULTS)
def test_a_fault_costs_unfinished_rows_of_its_shard_only(
    fault: str,
    words: list[str],
    code: int,
    start_fault: Callable[[str, list[str]], tuple[Path, subprocess.Popen[str]]],
    whole: Path,
    tables: Matrix,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = shard_cells(tables, 1)
    where = mine[1]
    folder, process = start_fault(fault, words)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    goes_on = fault == "media" or words == [*LIMIT]
    kept = [cell for cell in mine if goes_on or mine.index(cell) < 1]
    assert set(shards.read_bytes(folder)) == shards.names_of(kept), output
    others = shards.names_of(c.id for c in tables.cells if c.id not in mine)
    for name in others:  # the other shards' evidence, as their machines would have sent it
        (tmp_path / "2" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "2" / name).write_bytes((whole / name).read_bytes())
    merged = tmp_path / "merged"
    words = ["--output-path", str(merged), "--planned", "cpu", "--json"]
    assert command("evidence", "merge", tmp_path / "2", folder, *words) == 1
    missing = json.loads(capsys.readouterr().out)["missing"]
    if goes_on:
        assert missing == {where: ["latents"]}
    else:
        assert missing == {cell: ["load", "latents"] for cell in mine[1:]}
    complete = shards.read_bytes(whole)
    for name, data in shards.read_bytes(merged).items():
        assert data == complete[name] or name in shards.names_of([where])


def copy(record: Evidence, folder: Path, **changes: object) -> Path:
    store.write(replace(record, **changes), folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def record(whole: Path) -> Evidence:
    """A record of the whole run."""
    return store.read_folder(whole)["row-0@cpu+decode"]


def test_two_results_of_one_program_are_refused(
    record: Evidence, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    failed = {**record.checks, "latents": CheckResult("fail", message="too far away")}
    first = copy(record, tmp_path / "a")
    for number, (changes, what) in enumerate(
        (
            ({"checks": failed}, "check latents is"),
            ({"latents_digest": "sha256:b"}, "digest of the latents is sha256:"),
            ({"checkpoint": {**record.checkpoint, "digest": "sha256:x"}}, "digest of the checkp"),
        )
    ):
        second = copy(record, tmp_path / f"b{number}", made="2026-11-25T10:00:00Z", **changes)
        for order in ((first, second), (second, first)):
            output = tmp_path / "out"
            assert command("evidence", "merge", *order, "--output-path", output) == 1
            error = capsys.readouterr().err
            assert f"row-0@cpu+decode: {what}" in error
            assert str(first) in error
            assert str(second) in error
            assert not output.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"commit": "d" * 40},
        {"machine": {"processor": "another"}},
        {"machine": {"processor": "the same", "devices": ["NVIDIA H100"]}},
    ],
)
def test_of_different_programs_the_newest_is_taken(
    changes: dict[str, object], record: Evidence, tmp_path: Path
) -> None:
    failed = {**record.checks, "latents": CheckResult("fail", message="too far away")}
    newer = {"made": "2026-11-25T10:00:00Z", "checks": failed, **changes}
    folders = [copy(record, tmp_path / "a"), copy(record, tmp_path / "b", **newer)]
    for order in (folders, folders[::-1]):
        found = merge.merge_folders(order).records["row-0@cpu+decode"]
        assert found.checks["latents"].verdict == "fail"


def test_a_repeated_run_and_checks_run_apart_are_joined(record: Evidence, tmp_path: Path) -> None:
    load, latents = ({name: record.checks[name]} for name in ("load", "latents"))
    newer = "2026-11-25T10:00:00Z"
    folders = [
        copy(record, tmp_path / "a", checks=load),
        copy(record, tmp_path / "b", checks=latents, made=newer, timings={"load": 9.0}),
        copy(record, tmp_path / "c"),
    ]
    for order in (folders, folders[::-1]):
        found = merge.merge_folders(order).records["row-0@cpu+decode"]
        assert set(found.checks) == {"load", "latents"}
        assert (found.made, found.timings["load"]) == (newer, 9.0)


def test_a_damaged_record_is_named_and_not_there(
    whole: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in shards.read_bytes(whole).items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data[:100] if "row-3+decode" in name else data)
    words = ["--output-path", tmp_path / "out", "--planned", "cpu"]
    assert command("evidence", "merge", tmp_path / "a", *words) == 1
    text = capsys.readouterr().out
    assert f"damaged: {tmp_path / 'a' / 'cpu' / 'row-3+decode.json'}: not JSON" in text
    assert "row not executed: row-3@cpu+decode (load, latents)" in text
    assert len(shards.read_bytes(tmp_path / "out")) == 11


def test_merging_into_a_folder_keeps_its_other_cells(
    whole: Path, record: Evidence, tmp_path: Path, command: Callable[..., int]
) -> None:
    output = tmp_path / "reports"
    assert command("evidence", "merge", whole, "--output-path", output) == 0
    before = shards.read_bytes(output)
    said = {"made": "2026-11-25T10:00:00Z", "command": "another"}
    newer = copy(record, tmp_path / "a", **said)
    assert command("evidence", "merge", newer, "--output-path", output) == 0
    after = shards.read_bytes(output)
    assert [name for name in after if after[name] != before[name]] == ["cpu/row-0+decode.json"]
    # what an old folder holds is no proof that the shards ran it
    words = ["--output-path", output, "--planned", "cpu"]
    assert command("evidence", "merge", newer, *words) == 1


def test_a_full_disk_leaves_the_merged_folder_as_it_was(
    whole: Path, record: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = copy(record, tmp_path / "out")
    before = shards.read_bytes(tmp_path)
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        merge.write(merge.merge_folders([whole]).records.values(), output)
    assert shards.read_bytes(tmp_path) == before


def test_no_folder_and_no_record(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output-path", tmp_path / "out"]
    assert command("evidence", "merge", tmp_path / "none", *words) == 2
    (tmp_path / "empty").mkdir()
    assert command("evidence", "merge", tmp_path / "empty", *words) == 1
    assert "nothing collected" in capsys.readouterr().out


def test_planned_words(tables: Matrix, tmp_path: Path) -> None:
    assert len(completeness.read_planned(["cpu"], tables)) == 12
    rows = tmp_path / "rows"
    rows.write_text("row-1  # both backends\nrow-2@cpu+decode\n")
    found = [cell.id for cell in completeness.read_planned([str(rows)], tables)]
    assert found == ["row-1@cpu+reference", "row-1@cpu+decode", "row-2@cpu+decode"]
    jobs = list_jobs(tables, {}, ["cpu"], PARTS)
    rows.write_text(json.dumps({"include": jobs["include"][:1]}))
    found = [cell.id for cell in completeness.read_planned([str(rows)], tables)]
    assert tuple(found) == shard_cells(tables, 1)
    rows.write_text('{"rows": []}')
    with pytest.raises(completeness.UsageError, match=r"include\[\]\.rows"):
        completeness.read_planned([str(rows)], tables)
    with pytest.raises(completeness.UsageError, match="neither hardware of the tables nor a file"):
        completeness.read_planned(["b201"], tables)
