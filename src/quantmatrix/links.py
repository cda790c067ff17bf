"""Links: files that are not where their names say.

A folder that somebody else made may hold a link to any file of the machine. What is read of such a
folder stays in it; only the links of a hub cache, from its snapshots to its blobs, lead out of theirs.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from pathlib import Path


def explain_link(path: Path, base: Path) -> str | None:
    """Why a path is not followed: a link in it leads out of the folder `base`; None: it is."""
    if path.parent == base and path.name != ".." and is_plain(path):
        return None
    try:
        real, inside = path.resolve(), base.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        return f"cannot be followed: {error}; download it again"
    if any(real.is_relative_to(folder) for folder in (inside, *find_blobs(inside))):
        return None
    return (
        f"leads to {real}, which is not in {base}: expected the file itself. If you trust it, name "
        "the path that it leads to, or replace it by a copy"
    )


def is_plain(path: Path) -> bool:
    """Whether something lies at a path, and is no link itself."""
    try:
        return not stat.S_ISLNK(path.lstat().st_mode)
    except OSError:
        return False


def find_blobs(folder: Path) -> list[Path]:
    """The folder of a hub cache that the links of a snapshot lead to; empty elsewhere."""
    return [
        parent.parent / "blobs"
        for parent in (folder, *folder.parents)
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]


PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
"""What a cache calls a commit; stand-ins of ours have digests of other lengths."""

LONGEST_NAME = 256
"""One more than the bytes that a file's name has at most."""


def check_name(name: str, source: object) -> None:
    """CheckpointError for the name of a file that does not lie in a folder: `../x`, `/x`.

    `source` is the folder, or the file in it that names this one.
    """
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if plain and all(len(part.encode("utf-8", "replace")) < LONGEST_NAME for part in path.parts):
        return
    what = "leads out of the folder" if not plain else "is longer than the name of any file"
    raise CheckpointError(
        f"{source}: the name {quote(name)} {what}: expected a file in it; the checkpoint is damaged, "
        "or was made to read your other files: do not use it"
    )


def check_link(path: Path, base: Path) -> Path:
    """The path itself; CheckpointError where a link in it leads out of the folder `base`.

    The links of a hub cache, from its snapshots to its blobs, do not count.
    """
    if why := explain_link(path, base):
        raise CheckpointError(f"{path}: {why}")
    return path
