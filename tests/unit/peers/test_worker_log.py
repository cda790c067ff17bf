"""What a worker prints, native code included, is added to the log of its task."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantmatrix.peers import worker
from quantmatrix.peers.protocol import LOG


@pytest.mark.parametrize("before", ["", "before\n"])
def test_both_outputs_are_added_to_the_log(before: str, tmp_path: Path) -> None:
    if before:
        (tmp_path / LOG).write_text(before)
    kept = os.dup(1), os.dup(2)
    mask = os.umask(0)
    try:
        worker.redirect(tmp_path)
        os.write(1, b"said\n")
        os.write(2, b"warned\n")
        (tmp_path / LOG).open("a").write("another process\n")
        os.write(1, b"said more\n")
    finally:
        os.umask(mask)
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
    lines = f"{before}said\nwarned\nanother process\nsaid more\n"
    assert (tmp_path / LOG).read_text() == lines
    if not before:
        assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o644
