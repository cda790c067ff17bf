"""compressed-tensors: what the block of a header may say, each edge from both sides."""

from __future__ import annotations

from typing import Any

import pytest

from quantmatrix.errors import CheckpointError
from quantmatrix.families.producers.compressed_tensors import read_block


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ([128, 64], (128, 64)),
        ([1, 1], (1, 1)),
        ("128x64", (128, 64)),
        ("1x128", (1, 128)),
        ([1, 128], (1, 128)),
        ([128, 1], (128, 1)),
    ],
)
def test_a_block_has_rows_and_columns(size: Any, found: tuple[int, int]) -> None:
    assert read_block(size, "f.json") == found


@pytest.mark.parametrize(
    "size",
    [None, 128, [128], [128, 128, 1], "128", "x", [0, 128], [128, 0], [-1, 128], "0x128", "128x0"],
    ids=repr,
)
def test_a_block_without_them_is_refused(size: Any) -> None:
    with pytest.raises(CheckpointError, match="block_structure"):
        read_block(size, "f.json")
