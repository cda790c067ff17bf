"""Links: files that are not where their names say.

A folder that somebody else made may hold a link to any file of the machine. What is read of such a
folder stays in it; only the links of a hub cache, from its snapshots to its blobs, lead out of theirs.
"""

from __future__ import annotations

from pathlib import Path


def explain_link(path: Path, base: Path) -> str | None:
    """Why a path is not followed: a link in it leads out of the folder `base`; None: it is."""
    try:
        real, inside = path.resolve(), base.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        return f"cannot be followed: {error}; download it again"
    if any(real.is_relative_to(folder) for folder in (inside, *find_blobs(inside))):
        return None
    return (
        f"leads to {real}, which is not in {base}: expected the file itself. If you trust it, name "
        "the path that it leads to, or put a copy in its place"
    )


def find_blobs(folder: Path) -> list[Path]:
    """The folder of a hub cache that the links of a snapshot lead to; empty elsewhere."""
    return [
        parent.parent / "blobs"
        for parent in (folder, *folder.parents)
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
