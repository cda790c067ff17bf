"""What holds for every test: the garbage collector looks at what a module made, once, a module that
waits for others begins early, folders of tests lie in memory where there is room, and processes that they
start end at once."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantmatrix.harness.plugin import COLLECTED

FIRST = ("tests/unit/fleet/test_ray_cluster.py",)
"""Modules of few tests that wait for other processes: with nothing beside them, a core would have no work."""

CHILDREN = Path(__file__).parent / "children"
"""A folder with what every Python process does first that a test starts."""
MEMORY = Path("/dev/shm")
"""A folder in memory, of Linux."""
ROOM = 8 * 2**30
"""Bytes that must be free for it; tests have hundreds of MiB at once, and most folders go with their test."""


def has_room() -> bool:
    """Whether folders of tests fit into memory, and may lie there."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = shutil.disk_usage(MEMORY).free
    except OSError:
        return False
    [kib] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")] or ["0"]
    return min(free, int(kib) * 1024) > ROOM and os.access(MEMORY, os.W_OK)


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage as seldom as where cells are run, and let workers take modules in their order here.

    xdist sorts them by their number of tests, so that those of a single long test were left to the end,
    where one worker is alone with them. In the order of the collection, what comes last takes seconds.

    Tests write thousands of small files into folders of their own, which a disk took half a minute for.
    """
    if has_room():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(CHILDREN) not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHILDREN), *places]))
    if getattr(config.option, "loadscopereorder", False):
        config.option.loadscopereorder = False
    gc.set_threshold(*COLLECTED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the modules of `FIRST` before all others."""
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in FIRST)


@pytest.fixture(scope="module", autouse=True)
def _leave_the_libraries_alone() -> Iterator[None]:
    """Take what is left of a module out of the collector's sight.

    Libraries, tables and trees of source are two million objects at last, which live to the end and took a
    second to walk, by the collector itself or where the runtime asks for it.
    """
    yield
    gc.collect()
    gc.freeze()
