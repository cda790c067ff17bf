"""Ten thousand cells, each with a record, rendered: files read, states judged, pages written.

The bar is on CPU time, the least of three rounds: others of a busy machine do not count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantmatrix.proof import record as records
from quantmatrix.report.render import write
from quantmatrix.tables import read

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
LIMIT = 5.0
"""Seconds."""


def test_ten_thousand_cells(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from observed import make_large

    tables, evidence = make_large(tmp_path / "matrix")
    for record in evidence.values():
        path = tmp_path / "evidence" / records.path_of(record.cell["id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.to_json()))
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    seconds = []

    def render() -> None:
        start = time.process_time()
        write(tmp_path)
        seconds.append(time.process_time() - start)

    benchmark.pedantic(render, rounds=3)
    benchmark.extra_info["cpu_seconds"] = round(min(seconds), 2)
    page = (tmp_path / "index.html").read_bytes()
    assert page.count(b'"file":"evidence/') == len(tables.cells) == 10_002
    assert len(page) < 20e6
    assert min(seconds) <= LIMIT, seconds
