"""Which xdist worker runs which test of a cell.

pytest 9.2 with xdist 3.8 ignores `xdist_group` without a word, so the guarantee cannot be built on
that mark. A scheduler of our own can: the tests of one group go to one worker, as a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest


def make_scheduler(config: pytest.Config, log: Any, groups: Mapping[str, str]) -> Any:
    """An xdist scheduler; `groups` maps a cell's id to the group that its tests belong to."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class CellScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is optional
        """One unit of work per group of cells, and per file of other tests."""

        def _split_scope(self, nodeid: str) -> str:
            return find_group(nodeid, groups)

    return CellScheduling(config, log)


def find_group(nodeid: str, groups: Mapping[str, str]) -> str:
    """The group of a test: that of the cell in its brackets, or its file."""
    _, _, inside = nodeid.partition("[")
    cell = inside.removesuffix("]")
    return groups.get(cell, nodeid.partition("::")[0])
