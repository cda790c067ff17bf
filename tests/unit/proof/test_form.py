"""Records that were edited by hand, or damaged below their keys, are refused as text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from observed import REFUSED, find, observe, observe_run
from tables import write_tables

from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.record import CheckResult, EvidenceError
from quantmatrix.tables import read as matrix
from quantmatrix.tables.rows import Matrix

VALUES = (None, 3, -1.5, True, "x", "", [], {}, [1], {"a": 1}, {"b": None}, [[]], 10**400)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return matrix.read(write_tables(tmp_path_factory.mktemp("tables") / "matrix"))


@pytest.fixture(scope="module")
def record(tables: Matrix) -> dict[str, Any]:
    run = observe_run(tables, find(tables, "fp8-flux-1@cpu+decode"))
    limits = {"layer_error": {"at_most": 0.05}, "identical": False, "repeats": True}
    latents = run.checks["latents"]
    said = CheckResult("pass", latents.metrics, {**latents.limits, **limits})
    whole = records.Evidence(**{**vars(run), "checks": {**run.checks, "latents": said}})
    found: dict[str, Any] = json.loads(store.encode(whole))
    return found


@pytest.fixture(scope="module")
def refusal(tables: Matrix) -> dict[str, Any]:
    rule = find(tables, REFUSED).rule
    said = {"rule": rule, "message": "no integer units"}
    plan = {"ok": False, "refusal": said, "components": {}}
    checks = {"refuse": CheckResult("pass", {"rule": rule}, {"rule": rule})}
    found: dict[str, Any] = json.loads(
        store.encode(observe(tables, REFUSED, plan=plan, checks=checks))
    )
    return found


def put(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of a record with one value replaced."""
    changed = copy.deepcopy(record)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data; of a list the first."""
    items = list(value.items()) if isinstance(value, dict) else []
    items = [(0, value[0])] if isinstance(value, list) and value else items
    return [p for key, item in items for p in [(*path, key), *list_paths(item, (*path, key))]]


def problems_of(record: dict[str, Any]) -> str:
    with pytest.raises(EvidenceError, match=r"^some\.json") as caught:
        store.decode(json.dumps(record).encode(), "some.json")
    return str(caught.value)


LATENTS = ("checks", "latents", "metrics")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ((*LATENTS, "worst", "psnr_db"), 3.0, "psnr_db is 3, at least 40.5 is allowed"),
        ((*LATENTS, "worst", "relative_l2"), 0.5, "relative_l2 is 0.5, at most 0.06 is allowed"),
        ((*LATENTS, "worst", "identical"), True, "identical is True, not False"),
        ((*LATENTS, "layers", "transformer", "worst"), 0.9, "layer_error is 0.9, at most 0.05"),
        ((*LATENTS, "repeats"), False, "repeats is False, not True"),
        (("plan", "refusal"), {"rule": "r", "message": "m"}, "although the plan is a refusal: r"),
        (("cell", "id"), "fp8-flux-1@h100", "'fp8-flux-1@h100' is not a cell of fp8-flux-1@cpu"),
        (("versions", "torch"), 2, "versions.torch: expected a text, found 2"),
        (("timings", "generate"), None, "timings.generate: expected a number, found None"),
        (
            ("plan", "components", "transformer", "backends"),
            1,
            "backends: expected an object, found 1",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(
    record: dict[str, Any], path: tuple[str, ...], value: Any, problem: str
) -> None:
    assert problem in problems_of(put(record, path, value))


def test_a_failed_check_may_be_beyond_its_limit(record: dict[str, Any]) -> None:
    changed = put(record, (*LATENTS, "worst", "psnr_db"), 3.0)
    changed["checks"]["latents"] |= {"verdict": "fail", "message": "too far"}
    store.decode(json.dumps(changed).encode())


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("plan", "refusal", "rule"), "other", "passed, although 'other' refused it, not"),
        (("checks", "refuse", "metrics", "rule"), "other", "although 'other' refused it, not"),
        (("plan", "ok"), True, "passed, although the plan is not a refusal"),
    ],
)
def test_a_refusal_by_another_rule_is_no_proof(
    refusal: dict[str, Any], path: tuple[str, ...], value: Any, problem: str
) -> None:
    assert problem in problems_of(put(refusal, path, value))


@pytest.mark.parametrize("which", ["record", "refusal"])
def test_whatever_stands_in_a_record_is_read_or_refused(
    which: str, tables: Matrix, request: pytest.FixtureRequest, use: Callable[[Any], None]
) -> None:
    record = request.getfixturevalue(which)
    for path in list_paths(record):
        for value in VALUES:
            try:
                found = store.decode(json.dumps(put(record, path, value)).encode())
            except EvidenceError:
                continue
            use(found)


@pytest.fixture
def use(tables: Matrix) -> Callable[[Any], None]:
    """Whatever reads records: none of it may trip over one that was taken."""
    from quantmatrix.harness import shards
    from quantmatrix.proof import agreement, limits, merge, scopes, states
    from quantmatrix.proof.code_digest import own_code
    from quantmatrix.proof.freshness import Now, find_upgrades
    from quantmatrix.proof.joined import Joined
    from quantmatrix.report import answers, history, page_data
    from quantmatrix.report.markdown import write_measurements, write_refusals

    def read(record: records.Evidence) -> None:
        found = {scopes.key_of(record): record}
        now = Now(code=own_code(), upgrades=find_upgrades(found))
        standings = states.stand_all(tables, found, now)
        agreement.measure(tables, found, now, standings)
        limits.collect_samples(found)
        shards.estimate_all(tables.cells, found)
        joined = Joined(tables, standings)
        page_data.collect(joined, answers.collect(joined, {}, {}), history.update({}, [record]))
        known = [cell for cell in tables.cells if standings[cell.id].record]
        write_measurements(joined, known)
        write_refusals(joined, known)
        merge.find_conflicts([merge.Found(record, Path("a")), merge.Found(record, Path("b"))])

    return read


def test_a_record_nested_without_end_is_refused() -> None:
    with pytest.raises(EvidenceError, match="nested too deeply"):
        store.decode(b'{"a":' * 100_000, "some.json")
