"""Which cells a run is about: filters, files of rows, shards, and selections that are empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import shards
from fleets import make_record

from quantmatrix.errors import UsageError
from quantmatrix.harness import selection
from quantmatrix.harness.selection import (
    EmptySelection,
    select_cells,
    select_changed,
    show_options,
    split_values,
)
from quantmatrix.proof import freshness, store
from quantmatrix.tables.rows import Matrix


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Six checkpoints of two cells each."""
    return shards.make_project(tmp_path_factory.mktemp("project"))


def test_words_may_be_joined_by_commas() -> None:
    assert split_values(["fp8,svdq", "int8"]) == ("fp8", "svdq", "int8")
    assert split_values([]) == ()
    assert show_options({"family": ("fp8", "svdq"), "model": ()}) == "--family fp8,svdq"


def test_filters_rows_and_shards_narrow_each_other(tables: Matrix, tmp_path: Path) -> None:
    assert len(select_cells(tables, {})) == 12
    assert len(select_cells(tables, {"backend": ("decode",)})) == 6
    rows = tmp_path / "rows"
    rows.write_text("row-0\nrow-1\nrow-2\n")
    chosen = select_cells(tables, {"backend": ("decode",)}, rows)
    assert [cell.id for cell in chosen] == [f"row-{i}@cpu+decode" for i in range(3)]
    parts = [select_cells(tables, {"backend": ("decode",)}, rows, f"{i}/2") for i in (1, 2)]
    assert [len(part) for part in parts] == [2, 1]
    assert sorted(c.id for part in parts for c in part) == sorted(c.id for c in chosen)


def test_what_is_empty_says_which_options_made_it_so(tables: Matrix, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_text("row-0\n")
    with pytest.raises(EmptySelection, match=r"--backend decode --rows .*rows --shard 2/2: no cl"):
        select_cells(tables, {"backend": ("decode",)}, rows, "2/2")


def test_unknown_words_are_wrong_usage(tables: Matrix, tmp_path: Path) -> None:
    for name, word in (("family", "fp9"), ("model", "flux-9"), ("hardware", "b201")):
        with pytest.raises(UsageError, match=f"--{name} {word}: not in the tables; known: "):
            select_cells(tables, {name: (word,)})
    with pytest.raises(UsageError, match="expected i/n"):
        select_cells(tables, {}, None, "3/2")


def test_what_changed_is_chosen_and_one_of_each_kind_of_the_rest(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "read_now", lambda reports, records: freshness.Now())
    monkeypatch.setattr(selection, "list_versions", lambda: {"torch": "2.13.0", "quantmatrix": "9"})
    evidence = tmp_path / "evidence"
    by_id = {cell.id: cell for cell in tables.cells}

    def chosen(asked: bool = True) -> set[str]:
        return {c.id for c in select_changed(tables.cells, tables, tmp_path, lambda *_: asked)}

    for cell in tables.cells:
        versions = {"torch": "2.13.0", "quantmatrix": "1"}
        store.write(make_record(cell, tables, versions=versions), evidence)
    first = {"row-0@cpu+reference", "row-0@cpu+decode"}
    assert chosen() == first
    assert chosen(asked=False) == set()

    changes = {
        "row-1@cpu+decode": make_record(by_id["row-1@cpu+decode"], tables, "fail"),
        "row-2@cpu+decode": make_record(
            by_id["row-2@cpu+decode"], tables, versions={"torch": "2.14.0"}
        ),
        "row-3@cpu+decode": make_record(by_id["row-3@cpu+decode"], tables),
    }
    older = changes["row-3@cpu+decode"]
    changes["row-3@cpu+decode"] = replace(older, cell={**older.cell, "row_digest": "sha256:0"})
    for record in changes.values():
        store.write(record, evidence)
    (evidence / "cpu" / "row-4+decode.json").unlink()
    assert chosen() == first | {*changes, "row-4@cpu+decode"}
