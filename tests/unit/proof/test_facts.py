"""Facts: what makes a record be written again, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from observed import PROVEN, find, observe_run
from tables import CASES, write_tables

from quantmatrix.proof import facts, merge
from quantmatrix.proof import store as records
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.tables import read

pytest_plugins = "pytester"
TODAY = date(2026, 11, 24)
Change = Callable[[Evidence], dict[str, Any]]


@pytest.fixture
def record(tmp_path: Path) -> Evidence:
    tables = read.read(write_tables(tmp_path / "matrix"))
    made = observe_run(tables, find(tables, PROVEN))
    latents = made.checks["latents"]
    metrics = {**latents.metrics, "peak": {"bf16_bytes": 1000}, "stages": {"seconds": 0.5}}
    checks = {**made.checks, "latents": replace(latents, metrics=metrics)}
    witness = {"transformer": {"seconds": 0.5, "bytes": 1, "kinds": []}}
    return records.decode(records.encode(replace(made, checks=checks, witness=witness)))


def with_metric(**metrics: Any) -> Change:
    def change(record: Evidence) -> dict[str, Any]:
        check = record.checks["latents"]
        changed = replace(check, metrics={**check.metrics, **metrics})
        return {"checks": {**record.checks, "latents": changed}}

    return change


def with_step(value: float) -> Change:
    def change(record: Evidence) -> dict[str, Any]:
        first, *rest = record.checks["latents"].metrics["steps"]
        return with_metric(steps=[{**first, "psnr_db": value}, *rest])(record)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {"made": "2026-11-24T10:00:00Z"},
        lambda r: {"commit": "1" * 40},
        lambda r: {"timings": {"generate": 9.0}},
        lambda r: {"machine": {**r.machine, "memory_bytes": 1}},
        lambda r: {"cell": {**r.cell, "checks": ["load", "latents", "true-size"]}},
        lambda r: {"checks": {"load": r.checks["load"]}, "latents_digest": ""},
        lambda r: {"witness": {"transformer": {"seconds": 0.7, "bytes": 1, "kinds": []}}},
        with_metric(stages={"seconds": 0.7}),
        with_metric(peak={"bf16_bytes": 1010}),
        with_step(50.00001),
    ],
    ids=[
        *("made", "commit", "timings", "machine", "row grew", "one check"),
        *("witness", "time", "peak", "digit"),
    ],
)
def test_noise_is_no_news(record: Evidence, change: Change) -> None:
    newer = replace(record, **change(record))
    assert list(facts.list_changes(record, newer)) == []
    assert not facts.is_news(record, newer, TODAY)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda r: {"versions": {**r.versions, "torch": "2.14.0"}}, ["versions"]),
        (lambda r: {"plan": {**r.plan, "warnings": ["w"]}}, ["plan"]),
        (
            lambda r: {"witness": {"transformer": {"seconds": 0.5, "bytes": 2, "kinds": []}}},
            ["witness"],
        ),
        (lambda r: {"checkpoint": {"digest": "sha256:1"}}, ["checkpoint"]),
        (lambda r: {"latents_digest": "sha256:1"}, ["latents_digest"]),
        (lambda r: {"command": "other"}, ["command"]),
        (lambda r: {"cell": {**r.cell, "row_digest": "sha256:1"}}, ["cell.row_digest"]),
        (
            lambda r: {"checks": {"load": CheckResult("fail", message="far")}},
            ["checks.load.verdict", "checks.load.message", "checks.load.metrics"],
        ),
        (lambda r: {"checks": {"trace": CheckResult("pass")}}, ["checks.trace"]),
        (with_metric(psnr_db=1.0), ["checks.latents.metrics"]),
        (with_metric(peak={"bf16_bytes": 1100}), ["checks.latents.metrics"]),
        (with_metric(repeats=False), ["checks.latents.metrics"]),
        (with_step(50.001), ["checks.latents.metrics"]),
    ],
    ids=[
        *(
            "versions",
            "plan",
            "witness",
            "checkpoint",
            "latents",
            "command",
            "row",
            "verdict",
            "new check",
        ),
        *("new metric", "peak", "repeats", "step"),
    ],
)
def test_facts_are_news(record: Evidence, change: Change, names: list[str]) -> None:
    newer = replace(record, **change(record))
    assert list(facts.list_changes(record, newer)) == names
    assert facts.is_news(record, newer, TODAY)


def test_a_record_too_old_to_count_is_written_again(record: Evidence) -> None:
    assert not facts.is_news(record, record, TODAY)
    assert facts.is_news(record, record, date(2027, 11, 24))


def test_merging_what_is_known_leaves_the_folder_alone(record: Evidence, tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    older = replace(record, made=f"{date.today()}T00:00:00Z")
    assert len(merge.write([older], folder)) == 1
    again = replace(older, commit="1" * 40, timings={"generate": 9.0})
    assert merge.write([again], folder) == []
    assert merge.write([replace(again, latents_digest="sha256:1")], folder) != []
    assert records.read_folder(folder)[PROVEN].latents_digest == "sha256:1"


def test_a_second_run_of_the_suites_changes_no_file(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    pytester.makeini("[pytest]\nquantmatrix_tables = matrix\n")
    write_tables(pytester.path / "matrix", [{**CASES[0], "hardware": "cpu", "backend": "decode"}])
    pytester.makepyfile(
        test_suites="""
        import time, pytest

        @pytest.mark.check("load")
        def test_load(cell, proof):
            proof.timings["load"] = time.perf_counter()

        @pytest.mark.check("latents")
        def test_latents(cell, proof):
            proof.metrics["psnr_db"] = 40.0
        """
    )
    pytester.runpytest("--evidence-dir=ev").assert_outcomes(passed=2)
    [path] = (pytester.path / "ev").glob("*/*.json")
    first = path.read_bytes()
    done = pytester.runpytest("--evidence-dir=ev")
    done.stdout.fnmatch_lines(["evidence: records in *ev, 1 say nothing new"])
    pytester.runpytest("--evidence-dir=ev", "--check", "load").assert_outcomes(passed=1)
    assert path.read_bytes() == first
    pytester.runpytest("--evidence-dir=ev", "--rewrite").assert_outcomes(passed=2)
    assert path.read_bytes() != first
