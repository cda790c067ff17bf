"""Row reader: some rows of a large matrix in a file, and nothing around them.

A mapped file brings in what lies around every page that is touched, megabytes at a time on some
machines. Rows of a safetensors tensor lie one after another, so they are read by their offset
instead, and the system is asked not to read ahead.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.checkpoints.checkpoint import Checkpoint, find_offsets
from quantmatrix.checkpoints.dtypes import to_torch
from quantmatrix.checkpoints.gguf import is_gguf

if TYPE_CHECKING:
    import torch


class RowReader:
    """Rows of tensors of a checkpoint whose files are on this machine, by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open nothing yet; leaving the with block closes the files."""
        self._checkpoint = checkpoint
        self._files: dict[str, tuple[int, dict[str, int]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> RowReader:
        """Use as a with block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        """Rows of a tensor in the order given: [rows, ...] in the dtype of the file.

        `rows` is a slice without a step, or int64 [rows].
        """
        import torch

        header = self._checkpoint.tensors[name]
        handle, offsets = self._open(header.file)
        dtype = to_torch(header.dtype)
        width = prod(header.shape[1:]) * dtype.itemsize
        start = offsets[header.on_disk] if header.start is None else header.start
        parts = [
            read_exactly(handle, start + first * width, (last - first) * width)
            for first, last in find_runs(rows)
        ]
        whole = torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype)
        return whole.view(-1, *header.shape[1:])

    def _open(self, file: str) -> tuple[int, dict[str, int]]:
        if file not in self._files:
            handle = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, handle)
            offsets = {}
            if not is_gguf(file):
                with Path(file).open("rb") as stream:
                    offsets = find_offsets(stream)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            self._files[file] = handle, offsets
        return self._files[file]


def find_runs(rows: slice | torch.Tensor) -> list[tuple[int, int]]:
    """(first, end) of the runs of neighbouring rows, in order; `rows` is a slice or int64 [rows]."""
    if isinstance(rows, slice):
        return [(rows.start, rows.stop)]
    runs: list[tuple[int, int]] = []
    for row in rows.tolist():
        if runs and runs[-1][1] == row:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs


def read_exactly(handle: int, start: int, count: int) -> bytes:
    """Bytes at an offset of an open file; OSError where the file ends before."""
    found = b""
    while len(found) < count:
        part = os.pread(handle, count - len(found), start + len(found))
        if not part:
            raise OSError(
                f"the file ends at byte {start + len(found)}, expected {count} from {start}"
            )
        found += part
    return found
