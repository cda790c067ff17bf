"""The life of evidence: each thing that can go on makes it stale, and nothing else does."""

from __future__ import annotations

import ast
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from observed import PROVEN, REFUSED, find, observe
from tables import CASES, write_tables

from quantmatrix import code_path, matrix
from quantmatrix.evidence import CheckResult
from quantmatrix.lifecycle import Now, judge, newest_date, shorten_version
from quantmatrix.matrix import Matrix

TODAY = date(2026, 11, 24)


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return matrix.read(write_tables(tmp_path / "matrix"))


def life(tables: Matrix, name: str, now: Now, **changes: object) -> tuple[str, str]:
    found = judge(find(tables, name), observe(tables, name, **changes), tables, now)
    return found.life, found.reason


def test_fresh_missing_and_contradicting(tables: Matrix) -> None:
    now = Now(TODAY, {"torch": "2.13.0"}, code_path.digest_code)
    assert life(tables, PROVEN, now) == ("fresh", "")
    assert life(tables, REFUSED, now) == ("fresh", "")
    assert judge(find(tables, PROVEN), None, tables, now).life == "missing"
    assert life(tables, PROVEN, now, fails="latents") == ("contradicting", "latents: too far")
    works = life(tables, REFUSED, now, fails="refuse")
    assert works == ("contradicting", "refuse: too far")
    record = observe(tables, PROVEN)
    less = replace(record, checks={"load": record.checks["load"]})
    found = judge(find(tables, PROVEN), less, tables, now)
    assert (found.life, found.reason) == ("missing", "not run: latents")


def test_limits_that_were_tightened_make_a_record_stale(tables: Matrix) -> None:
    now = Now(TODAY, list_beyond=lambda record: [f"{record.cell['model']}: too far now"])
    assert life(tables, PROVEN, now) == ("stale", "flux-1: too far now")
    assert life(tables, PROVEN, Now(TODAY, list_beyond=lambda record: [])) == ("fresh", "")


def test_a_claimed_failure_agrees_until_it_works(tmp_path: Path) -> None:
    words = {"claim": "failing", "rule": "latents", "notes": "codes are read wrongly"}
    tables = matrix.read(write_tables(tmp_path / "failing", [{**CASES[0], **words}]))
    now = Now(TODAY)
    assert life(tables, PROVEN, now, fails="latents") == ("fresh", "")
    outdated = "latents: claimed to fail, and it passes: change the claim"
    assert life(tables, PROVEN, now) == ("contradicting", outdated)
    assert life(tables, PROVEN, now, fails="load") == ("contradicting", outdated)
    record = observe(tables, PROVEN, fails="latents")
    both = replace(record, checks={**record.checks, "load": CheckResult("fail", message="torn")})
    found = judge(find(tables, PROVEN), both, tables, now)
    assert (found.life, found.reason) == ("contradicting", "load: torn; latents: too far")
    less = replace(record, checks={"load": record.checks["load"]})
    assert judge(find(tables, PROVEN), less, tables, now).life == "missing"


@pytest.mark.parametrize(
    ("today", "made", "expected"),
    [
        (date(2027, 2, 21), "2026-11-23T10:00:00Z", ("fresh", "")),
        (date(2027, 2, 22), "2026-11-23T10:00:00Z", ("stale", "91 days old, the limit is 90")),
        (date(2026, 11, 22), "2026-11-23T10:00:00Z", ("fresh", "")),
        (date(2026, 11, 21), "2026-11-23T10:00:00Z", ("stale", "made 2026-11-23, which is after")),
        (TODAY, "", ("stale", "made at no known time: not a date")),
        (TODAY, "yesterday", ("stale", "made yesterday: not a date")),
    ],
)
def test_age(tables: Matrix, today: date, made: str, expected: tuple[str, str]) -> None:
    state, reason = life(tables, PROVEN, Now(today), made=made)
    assert state == expected[0]
    assert reason.startswith(expected[1])
    assert bool(reason) == bool(expected[1])


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"torch": "2.14.0"}, "torch was 2.13.0+cpu, is 2.14.0"),
        ({"torch": "2.13.1+cu130"}, ""),
        ({"diffusers": "1.0"}, "diffusers was 0.42.1, is 1.0"),
        ({"triton": "4.0"}, ""),
        ({}, ""),
    ],
)
def test_versions(tables: Matrix, here: dict[str, str], reason: str) -> None:
    state = "stale" if reason else "fresh"
    assert life(tables, PROVEN, Now(versions=here)) == (state, reason)


def test_a_changed_row(tables: Matrix, tmp_path: Path) -> None:
    record = observe(tables, PROVEN)
    cases = [{**CASES[0], "flags": "--seed 7"}, *CASES[1:]]
    changed = matrix.read(write_tables(tmp_path / "changed", cases))
    found = judge(find(changed, PROVEN), record, changed, Now(TODAY))
    assert found.life == "stale"
    assert "flags was" in found.reason


def test_changed_code(tables: Matrix) -> None:
    now = Now(digest_code=lambda family, model: f"sha256:{family} {model} of tomorrow")
    assert life(tables, PROVEN, now) == ("stale", "the code of fp8 on flux-1 changed")
    record = observe(tables, PROVEN)
    older = {key: value for key, value in record.cell.items() if key != "code_digest"}
    assert life(tables, PROVEN, now, cell=older) == ("fresh", "")


def test_an_old_failure_is_stale_and_all_reasons_are_named(tables: Matrix) -> None:
    now = Now(date(2027, 3, 1), {"torch": "2.14.0"})
    state, reason = life(tables, PROVEN, now, fails="latents")
    assert state == "stale"
    assert reason == "98 days old, the limit is 90; torch was 2.13.0+cpu, is 2.14.0"


def test_newest_date_and_versions(tables: Matrix) -> None:
    record = observe(tables, PROVEN)
    later, undated = replace(record, made="2026-12-01T00:00:00Z"), replace(record, made="")
    assert newest_date([record, later, undated]) == date(2026, 12, 1)
    assert newest_date([undated]) is None
    assert shorten_version("2.13.0+cpu") == shorten_version("2.13.2") == "2.13"


def test_code_path_is_family_model_and_kernels() -> None:
    modules = code_path.list_modules("nunchaku-svdq", "flux-1")
    wanted = {"families.nunchaku_svdq", "kernels.linear_svdq", "kernels.svdq_engines"}
    assert wanted <= set(modules)
    assert {"models.flux_1", "svdq_packing", "formats", "layers", "load"} <= set(modules)
    assert not {"cli", "report", "models.wan_2_2", "kernels.linear_int8"} & set(modules)
    assert code_path.digest_code("fp8", "flux-1") != code_path.digest_code("fp8", "flux-2")


def test_only_statements_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "formats.py"
    source = '"""Words."""\n\n# a comment\ndef f(x):\n    """Words."""\n    return x + 1\n'
    monkeypatch.setattr(code_path, "PACKAGE", tmp_path)

    def read(text: str) -> str:
        code_path.read_statements.cache_clear()
        module.write_text(text)
        return code_path.read_statements("formats")

    before = read(source)
    assert ast.unparse(ast.parse(before)) == "def f(x):\n    return x + 1"
    assert read(source.replace("Words", "Other\n\nwords").replace("comment", "note")) == before
    assert read(source.replace("x + 1", "x + 2")) != before
    code_path.read_statements.cache_clear()
