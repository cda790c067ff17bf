"""Models that diffusers quantizes with torchao while it loads them: the recorded verdicts of its column.

torchao is no part of the extra `test`: diffusers imports it wherever it is installed, and each process
then begins with five lines of warnings. These rows are run again by `nox -s producers-torchao`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quantmatrix.peers.column import Column
from quantmatrix.proof import columns
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell

pytest.importorskip("torchao")

TABLES = read.read()
RECORDS = columns.read_folder(Path(__file__).parents[2] / "reports" / columns.RUNTIMES)
ONLINE = [
    row.id for row in TABLES.checkpoints.values() if row.form == "online" and row.family == "fp8"
]


def test_there_are_rows() -> None:
    assert len(ONLINE) >= 5


def test_verdicts_are_those_recorded(tmp_path: Path) -> None:
    """Codes in memory, and numbers as near to BF16 as ours of the same form must be."""
    with Column(TABLES, "diffusers", "cpu", tmp_path / "runs", tiny=True) as column:
        for name in ONLINE:
            found = column.run_one(TABLES.checkpoints[name]).record
            recorded = RECORDS[RuntimeCell(name, "cpu", "diffusers").id]
            assert found is not None
            assert (found.verdict, found.reason.split(":")[0]) == (
                recorded.verdict,
                recorded.reason.split(":")[0],
            )
            assert found.verdict != "not installed"
