"""Columns: records of other programs, written, read, refused and held against the rows as they stand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix.proof import columns
from quantmatrix.proof.columns import RuntimeRecord
from quantmatrix.proof.record import EvidenceError
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell, StatementRow

TABLES = read.read()
CELL = RuntimeCell("fp8-guide", "cpu", "diffusers")


def observe(cell: RuntimeCell = CELL, verdict: str = "works", **more: object) -> RuntimeRecord:
    record = RuntimeRecord(
        cell=columns.describe_cell(cell, TABLES),
        verdict=verdict,
        reason="",
        command="FluxTransformer2DModel.from_pretrained('x')",
        again="quantmatrix run-column",
        version="0.42.1",
        scope="stand-in",
        made="2026-11-29T10:00:00Z",
    )
    return replace(record, **more)


def test_records_survive_and_lie_under_their_cell(tmp_path: Path) -> None:
    record = observe(tried=("other: refuses: no",), log="a\nb", weights={"uint8": 3})
    assert columns.write(record, tmp_path)
    assert columns.read_folder(tmp_path) == {"fp8-guide@cpu~diffusers": record}
    path = tmp_path / "diffusers" / "cpu" / "fp8-guide.json"
    path.rename(path.with_name("other.json"))
    with pytest.raises(EvidenceError, match="lies elsewhere"):
        columns.read_folder(tmp_path)


def test_a_run_that_shows_the_same_rewrites_nothing(tmp_path: Path) -> None:
    record = observe()
    columns.write(record, tmp_path)
    later = replace(record, made="2026-12-01T10:00:00Z", seconds=9.0, log="other")
    assert not columns.write(later, tmp_path)
    assert columns.read_folder(tmp_path)[CELL.id].made == record.made
    for changed in ({"verdict": "refuses"}, {"reason": "x"}, {"version": "0.43.0"}):
        assert columns.write(replace(later, **changed), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("schema", 2, "schema: expected 1"),
        ("verdict", "fine", "verdict: expected works or"),
        ("weights", {"uint8": -1}, "weights.uint8: expected a count"),
        ("seconds", "1", "seconds: expected a number"),
        ("cell", {"id": "x"}, "cell.checkpoint: missing"),
    ],
)
def test_damaged_records_are_refused_with_the_place(key: str, value: object, problem: str) -> None:
    data = {**observe().to_json(), key: value}
    with pytest.raises(EvidenceError, match=problem):
        columns.decode(json.dumps(data).encode(), "file.json")
    with pytest.raises(EvidenceError, match=r"file\.json"):
        columns.decode(b"{", "file.json")


def test_states_of_cells() -> None:
    assert columns.explain_state(CELL, None, TABLES) == ("unproven", "no run yet")
    record = observe(verdict="refuses", reason="ValueError: no")
    assert columns.explain_state(CELL, record, TABLES) == ("refuses", "ValueError: no")
    for key, what in (
        ("checkpoint_digest", "the row of checkpoint fp8-guide"),
        ("runtime_digest", "the row of runtime diffusers"),
        ("adapter_digest", "the adapter of diffusers"),
    ):
        changed = replace(record, cell={**record.cell, key: "sha256:0"})
        expected = ("stale", f"{what} changed since; it was refuses")
        assert columns.explain_state(CELL, changed, TABLES) == expected


def test_the_digest_of_an_adapter_is_its_own_and_its_judges() -> None:
    digests = [
        columns.describe_cell(replace(CELL, runtime=name), TABLES) for name in TABLES.runtimes
    ]
    found = [digest["adapter_digest"] for digest in digests]
    assert all(digest.startswith("sha256:") for digest in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("state", "says", "text"),
    [
        ("works", "", "undocumented"),
        ("works", "works", "documented"),
        ("works", "refuses", "documented to refuse"),
        ("refuses", "", ""),
        ("refuses", "works", "documented to work"),
        ("wrong numbers", "works", "documented to work"),
        ("refuses", "refuses", "documented"),
        ("unproven", "works", "documented: works"),
        ("not installed", "works", ""),
        ("stale", "", ""),
    ],
)
def test_a_run_beside_what_is_documented(state: str, says: str, text: str) -> None:
    blank = StatementRow("x", "diffusers", "fp8", (), (), says, "", "2026-11-29", "page", "quote")
    assert columns.compare_said(state, [blank] if says else []) == text


def test_statements_speak_of_family_model_and_form() -> None:
    statement = TABLES.statements["diffusers-bfl"]
    spoken = {row.id for row in TABLES.checkpoints.values() if statement.speaks_of(row)}
    assert spoken
    assert all(name.startswith("modelopt-nvfp4-flux-2") for name in spoken)
    everything = replace(statement, models=(), forms=())
    assert spoken < {row.id for row in TABLES.checkpoints.values() if everything.speaks_of(row)}


def test_a_wheel_carries_them_without_logs(tmp_path: Path) -> None:
    record = observe(log="long")
    (tmp_path / columns.SUMMARY).write_bytes(columns.summarize([record]))
    assert columns.read_reports(tmp_path) == {CELL.id: replace(record, log="")}
    assert columns.read_reports(tmp_path / "none") == {}
