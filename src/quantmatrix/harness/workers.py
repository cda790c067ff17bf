"""What an xdist worker is given: tests of cells, and a device of its own.

Devices are counted in the list that the caller lets us see (CUDA_VISIBLE_DEVICES and the like), for
that is how torch counts them. A worker that replaces a dead one takes its device, although
xdist gives it a number that was never used.

pytest 9.2 with xdist 3.8 ignores `xdist_group` silently, so the guarantee cannot be built on
that mark. A scheduler of our own can: the tests of one group go to one worker, as a unit.

When a worker dies, xdist's scheduler runs the test that killed it again on the next one, and waits
for ever for a worker that it gave finished units only. Ours drops that test, which has no verdict,
and gives the rest of its unit to the worker that replaces the dead one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell


CELLS = "quantmatrix_cells"
"""What a worker is given: the ids of the cells."""
SLOT = "quantmatrix_slot"
"""What a worker is given: the number of its device."""


class Workers:
    """Hooks of the process that starts workers."""

    def __init__(self, cells: Callable[[], Sequence[Cell]]) -> None:
        """`cells` are those that the options select."""
        self.cells = cells
        self.slots: dict[str, int] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand the selected cells and the first device that no other has to a worker."""
        taken = set(self.slots.values())
        slot = next(number for number in count() if number not in taken)
        self.slots[node.gateway.id] = slot
        node.workerinput[SLOT] = slot
        node.workerinput[CELLS] = [cell.id for cell in self.cells()]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the device of a worker back."""
        self.slots.pop(node.gateway.id, None)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """All tests of a checkpoint on one worker, whatever the version of xdist."""
        if config.getoption("dist") not in ("load", "loadgroup"):
            return None  # --dist each, loadfile ... were asked for by name
        groups = {cell.id: f"{cell.model} {cell.checkpoint}" for cell in self.cells()}
        return make_scheduler(config, log, groups)


def read_worker(config: pytest.Config) -> int | None:
    """Number of this worker's device; None in a session without workers, and in their controller."""
    given: Mapping[str, Any] | None = getattr(config, "workerinput", None)
    return int(given[SLOT]) if given else None


def make_scheduler(config: pytest.Config, log: Any, groups: Mapping[str, str]) -> Any:
    """An xdist scheduler; `groups` maps a cell's id to the group that its tests belong to."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class CellScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is optional
        """One unit of work per group of cells, and per file of other tests."""

        def _split_scope(self, nodeid: str) -> str:
            return find_group(nodeid, groups)

        def remove_node(self, node: Any) -> str | None:
            """Forget a worker; the test that it died in, if it did."""
            units = self.assigned_work.pop(node).items()
            crashed = drop_first([unit for _, unit in units])
            self.workqueue.update({name: unit for name, unit in units if not all(unit.values())})
            for other in self.assigned_work if crashed else ():
                self._reschedule(other)
            return crashed

        def _reschedule(self, node: Any) -> None:
            if node.shutting_down or node not in self.registered_collections:
                return
            # A worker starts its last test once it knows that there is no other.
            while self.workqueue and self._pending_of(self.assigned_work[node]) <= 2:
                self._assign_work_unit(node)
            if not self.workqueue:
                node.shutdown()

    return CellScheduling(config, log)


def find_group(nodeid: str, groups: Mapping[str, str]) -> str:
    """The group of a test: that of the cell in its brackets, or its file."""
    _, _, inside = nodeid.partition("[")
    cell = inside.removesuffix("]")
    return groups.get(cell, nodeid.partition("::")[0])


def drop_first(units: Sequence[dict[str, bool]]) -> str | None:
    """Mark the first test that is not done as done, and name it; None when all are."""
    for unit in units:
        for test, done in unit.items():
            if not done:
                unit[test] = True
                return test
    return None
