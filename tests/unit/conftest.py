"""What holds for every test: the garbage collector looks at what a module made, once."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _leave_the_libraries_alone() -> Iterator[None]:
    """Take what is left of a module out of the collector's sight.

    Libraries, tables and trees of source are two million objects at last, which live to the end and took a
    second to walk, by the collector itself or where the runtime asks for it.
    """
    yield
    gc.collect()
    gc.freeze()
