"""Which cells a run is about: filters, files of rows, shards, and selections that are empty."""

from __future__ import annotations

from pathlib import Path

import pytest
import shards

from quantmatrix.errors import UsageError
from quantmatrix.harness.selection import EmptySelection, select_cells, show_options, split_values
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
