"""What holds for every test: the garbage collector looks at what a module made, once, and a module that
waits for others begins early."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from quantmatrix.harness.plugin import COLLECTED

FIRST = ("tests/unit/fleet/test_ray_cluster.py",)
"""Modules of few tests that wait for other processes: with nothing beside them, a core would have no work."""


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage as seldom as where cells are run, and let workers take modules in their order here.

    xdist sorts them by their number of tests, so that those of a single long test were left to the end,
    where one worker is alone with them. In the order of the collection, what comes last takes seconds.
    """
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
