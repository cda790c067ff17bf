"""A task of a fleet whose checks do nothing: the records of its cells, made without pytest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))


def work(data: bytes, order: bytes, board: Any) -> bytes:
    """The answer of a node on which every check passes at once; `data` is the bundle."""
    import tempfile

    import fleets

    from quantmatrix.fleet import bundle
    from quantmatrix.tables import read

    wanted = json.loads(order)
    if not CELLS:
        with tempfile.TemporaryDirectory() as name:
            bundle.unpack(data, Path(name))
            tables = read.read(Path(name, bundle.TABLES))
        CELLS.update({cell.id: cell for cell in tables.cells})
        TABLES.append(tables)
    found = [fleets.make_record(CELLS[cell], TABLES[0]) for cell in wanted["cells"]]
    junit = "".join(
        f'<testcase name="test_load[{cell}]"><properties><property name="cell" value="{cell}"/>'
        '<property name="check" value="load"/></properties></testcase>'
        for cell in wanted["cells"]
    )
    return fleets.answer(found, junit=[f"<testsuites>{junit}</testsuites>"])


CELLS: dict[str, Any] = {}
TABLES: list[Any] = []
