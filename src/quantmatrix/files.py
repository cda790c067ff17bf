"""Places to write to: looked at before long work, not after it, and never left half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantmatrix.errors import UsageError


def check_place(path: Path, flag: str = "--output-path") -> None:
    """Raise UsageError when no file or folder can be made at a path: what is above it decides."""
    for parent in path.absolute().parents:
        if not os.path.lexists(parent):
            continue
        if not parent.is_dir():
            raise UsageError(
                f"{flag} {path}: {parent} is no folder, and the path leads through it; "
                "choose another place"
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{flag} {path}: you may not write in {parent}; choose another place")
        return


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that tells of no file this one: a full disk does not say where it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def share_file(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the two cannot be on one disk; never write in either.

    A symbolic link would lead out of its folder, and such links are not followed.
    """
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
