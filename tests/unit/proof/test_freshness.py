"""Freshness: each thing that can go on makes a record stale, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from observed import PROVEN, REFUSED, find, observe
from tables import CASES, write_tables

from quantmatrix.proof import states
from quantmatrix.proof.carried import Carried, CarriedError, Pair
from quantmatrix.proof.code_digest import own_code
from quantmatrix.proof.freshness import Now, find_age_problem, find_upgrades, shorten_version
from quantmatrix.proof.record import Evidence
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

MACHINE = {"processor": "some", "devices": ["H100"], "memory_bytes": 2**37, "system": "Linux"}
OLDER, OTHER, LAST = (f"sha256:{letter * 64}" for letter in "abf")


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


@pytest.fixture
def now() -> Now:
    return Now(code=own_code())


def judge(tables: Matrix, record: Evidence, now: Now) -> tuple[str, str]:
    return states.explain_state(find(tables, record.cell["id"]), record, tables, now)


@pytest.mark.parametrize("name", [PROVEN, REFUSED])
def test_a_record_of_this_code_is_fresh(tables: Matrix, now: Now, name: str) -> None:
    state = "proven" if name == PROVEN else "refused"
    assert judge(tables, observe(tables, name), now) == (state, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_digest": OLDER}, "the kernels (decode) or their order changed"),
        ({"device_digest": f"sha256:{'0' * 64}"}, "the kernels (decode) or their order changed"),
        ({"device_digest": LAST}, "the kernels (decode) or their order changed"),
        ({"shared_digest": OLDER}, "the code of fp8 on flux-1 changed"),
        ({"shared_digest": LAST}, "the code of fp8 on flux-1 changed"),
        ({"shared_digest": None}, "the record has no digests of the code that it was made with"),
    ],
)
def test_changed_code(tables: Matrix, now: Now, changes: dict[str, Any], reason: str) -> None:
    record = observe(tables, PROVEN)
    changed = {k: v for k, v in {**record.cell, **changes}.items() if v is not None}
    assert judge(tables, replace(record, cell=changed), now) == ("stale", reason)
    failed = observe(tables, PROVEN, fails="latents", cell=changed)
    assert judge(tables, failed, now)[0] == "stale"  # nobody knows whether it still fails


def test_a_changed_row_comes_before_the_code(tables: Matrix, now: Now, tmp_path: Path) -> None:
    record = observe(tables, PROVEN)
    cases = [{**CASES[0], "flags": "--seed 7"}, *CASES[1:]]
    changed = read.read(write_tables(tmp_path / "changed", cases))
    state, reason = judge(changed, record, now)
    assert (state, "flags was" in reason) == ("stale", True)


def test_limits_that_were_tightened_make_a_record_fail(tables: Matrix) -> None:
    record = observe(tables, PROVEN)
    tight = Now(list_exceeded=lambda record: [f"{record.cell['model']}: too far now"])
    assert judge(tables, record, tight) == ("failing", "flux-1: too far now")
    assert judge(tables, record, Now(list_exceeded=lambda record: [])) == ("proven", "")


def test_a_carried_record_stays_fresh_and_says_so(tables: Matrix, now: Now) -> None:
    record = observe(tables, PROVEN)
    today = record.cell["shared_digest"]
    pairs = [
        Pair(OLDER, OTHER, "1" * 40, "a CPU", f"sha256:{'c' * 64}", "3"),
        Pair(OTHER, today, "2" * 40, "another CPU", f"sha256:{'d' * 64}", "3"),
    ]
    carrying = replace(now, carried=Carried(tuple(pairs)))
    older = replace(record, cell={**record.cell, "shared_digest": OLDER})
    state, reason = judge(tables, older, carrying)
    assert state == "proven"
    assert reason.startswith("carried: ")
    assert f"commit {'2' * 12} on another CPU" in reason
    assert judge(tables, record, carrying) == ("proven", "")
    for gap in pairs:
        less = replace(now, carried=Carried(tuple(pair for pair in pairs if pair != gap)))
        assert judge(tables, older, less)[0] == "stale"
    kernels = replace(older, cell={**older.cell, "device_digest": OLDER})
    assert judge(tables, kernels, carrying)[0] == "stale"


def test_carried_pairs_go_in_circles_and_survive_a_file(tmp_path: Path) -> None:
    there = Pair(OLDER, OTHER, "1" * 40, "a CPU", OLDER, "2")
    back = Pair(OTHER, OLDER, "1" * 40, "a CPU", OLDER, "2")
    both = Carried((there,)).add([back, there])
    assert both.pairs == (there, back)
    assert both.find_way(OLDER, OTHER) == (there,)
    assert both.find_way(OLDER, f"sha256:{'e' * 64}") == ()
    path = tmp_path / "carried.csv"
    path.write_bytes(both.encode())
    assert Carried.read(path) == both
    assert Carried.read(tmp_path / "none.csv") == Carried()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("old,new\n", 1),
        ("", 1),
        ("old,new,commit,machine,latents,twins\na,b,c,d,e,f\n", 2),
        (f"old,new,commit,machine,latents,twins\n{OLDER},{OTHER},c,d,{OLDER}\n", 2),
        (f"old,new,commit,machine,latents,twins\n{OLDER},{OTHER},c,,{OLDER},1\n", 2),
    ],
)
def test_a_damaged_line_of_carried_is_named(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "carried.csv"
    path.write_text(text)
    with pytest.raises(CarriedError, match=f"carried.csv:{line}: expected"):
        Carried.read(path)


@pytest.mark.parametrize(
    ("machine", "versions", "reason"),
    [
        (MACHINE, {"torch": "2.14.0"}, "torch was 2.13.0+cpu, is 2.14.0 on its machine since"),
        (MACHINE, {"torch": "2.13.1+cu130"}, ""),
        (MACHINE, {"quantmatrix": "9.0", "triton": "4.0"}, ""),
        ({**MACHINE, "processor": "other"}, {"torch": "2.14.0"}, ""),
    ],
)
def test_packages_count_on_the_machine_of_the_record(
    tables: Matrix, machine: dict[str, Any], versions: dict[str, str], reason: str
) -> None:
    record = observe(tables, PROVEN, machine=MACHINE)
    newer = observe(
        tables, "fp8-flux-1@cpu+reference", machine=machine, made="2026-12-01T00:00:00Z"
    )
    newer = replace(newer, versions=versions)
    found = {one.cell["id"]: one for one in (record, newer)}
    now = Now(upgrades=find_upgrades(found))
    state, why = judge(tables, record, now)
    assert state == ("stale" if reason else "proven")
    assert why.startswith(reason)
    assert bool(why) == bool(reason)
    assert judge(tables, newer, now) == ("proven", "")


@pytest.mark.parametrize(
    ("today", "made", "expected"),
    [
        (date(2027, 2, 21), "2026-11-23T10:00:00Z", None),
        (date(2027, 2, 22), "2026-11-23T10:00:00Z", "91 days old, the limit is 90"),
        (date(2026, 11, 22), "2026-11-23T10:00:00Z", None),
        (date(2026, 11, 21), "2026-11-23T10:00:00Z", "made 2026-11-23, which is after 2026-11-21"),
        (date(2026, 11, 24), "", "made at no known time: not a date"),
        (date(2026, 11, 24), "yesterday", "made yesterday: not a date"),
    ],
)
def test_age(tables: Matrix, today: date, made: str, expected: str | None) -> None:
    assert find_age_problem(observe(tables, PROVEN, made=made), today, 90) == expected


def test_builds_and_patches_are_one_version() -> None:
    assert shorten_version("2.13.0+cpu") == shorten_version("2.13.2") == "2.13"
