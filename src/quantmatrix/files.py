"""Files and folders to write: looked at before long work, not after it, and never left half-written.

Everything is made in a folder of its own beside its place, `.NAME.xxxxxxxx.tmp`, and moved to its place
when it is complete. An error or an interruption removes that folder; only a process that is killed leaves
one behind, which no reader takes for a result and `remove_leftovers` deletes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quantmatrix.errors import UsageError

TOGETHER = 16
"""Files that the disk is asked for at once."""


def check_writable(path: Path, flag: str = "--output-path") -> None:
    """Raise UsageError when no file or folder can be made at a path: what is above it decides."""
    for parent in path.absolute().parents:
        if not os.path.lexists(parent):
            continue
        if not parent.is_dir():
            raise UsageError(
                f"{flag} {path}: {parent} is not a folder, and the path leads through it; "
                "choose another path"
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{flag} {path}: you may not write in {parent}; choose another path")
        return


@contextmanager
def naming(path: Path, hidden: Path | None = None) -> Iterator[None]:
    """Give an OSError that tells of no file this one: a full disk does not say where it is.

    So does one that tells of a file in the folder `hidden`, which nobody has heard of.
    """
    try:
        yield
    except OSError as error:
        inside = hidden is not None and str(error.filename).startswith(f"{hidden}{os.sep}")
        unnamed = error.filename is None and error.errno is not None  # a library's is a text alone
        if unnamed or (inside and error.filename2 is None):
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


@contextmanager
def whole(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a file or make a folder at, which becomes `path` when the block ends well.

    It has the name of `path`, in another folder. What stands at `path` stays when anything fails; a
    folder that is not empty is only replaced with `overwrite`. An OSError of the system names `path`.
    """
    with staging(path) as temporary:
        yield temporary / path.name
        put(temporary / path.name, path, temporary if overwrite else None)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A new folder beside a path, gone when the block ends; what is in it is moved out with `put`."""
    import tempfile  # only what writes pays for it

    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            built = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:32]}.", suffix=".tmp")
        except OSError as error:
            error.filename = str(path)
            raise
    try:
        with naming(path, hidden=Path(built)):
            yield Path(built)
    finally:
        shutil.rmtree(built, ignore_errors=True)


def put(built: Path, path: Path, aside: Path | None = None) -> None:
    """Move a file or folder to its place on the same disk; a file that stood there is replaced.

    With a folder `aside`, a folder that stood there is first moved into it, and back when the move fails;
    without one, OSError is raised for a folder that is not empty.
    """
    if aside is None or not os.path.lexists(path) or not (path.is_dir() or built.is_dir()):
        os.replace(built, path)
        return
    old = aside / f"{path.name}.old"
    os.replace(path, old)
    try:
        os.replace(built, path)
    except BaseException:  # an interruption, too
        os.replace(old, path)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, whoever else writes it at the same time."""
    with whole(path) as temporary, temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_several(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder by their names: all of them beside it first, then each whole to its place."""
    if not contents:
        return
    with staging(folder) as beside:
        paths = [beside / name for name in contents]
        for path, data in zip(paths, contents.values(), strict=True):
            path.write_bytes(data)
        settle(paths)
        folder.mkdir(exist_ok=True)
        for path in paths:
            put(path, folder / path.name)


def settle(paths: Sequence[Path]) -> None:
    """Wait until the disk holds some files; asked for many at once, it makes one journey of them.

    An OSError, as of a full disk, is raised once all were tried.
    """
    from concurrent.futures import ThreadPoolExecutor  # only what writes pays for it

    if len(paths) < 2:
        for path in paths:
            settle_one(path)
        return
    with ThreadPoolExecutor(min(len(paths), TOGETHER)) as pool:
        list(pool.map(settle_one, paths))


def settle_one(path: Path) -> None:
    """Wait until the disk holds a file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def remove_leftovers(folder: Path, pattern: str = ".*.tmp", older_than: float = 3600.0) -> None:
    """Delete what killed processes left half-made; what is younger than this many seconds stays."""
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process may be quicker
            if time.time() - path.lstat().st_mtime <= older_than:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
