"""Revisions: the files of a commit, as they were, in a folder."""

from __future__ import annotations

import io
import subprocess
import tarfile
from typing import TYPE_CHECKING

from quantmatrix.errors import QuantmatrixError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


TABLES, REPORTS, SOURCES = "matrix", "reports", "src/quantmatrix"

EVIDENCE = f"{REPORTS}/evidence"

BESIDE = tuple(f"{REPORTS}/{name}.csv" for name in ("carried", "limits", "spread"))
"""Files that records are judged against; a revision may have none of them."""


def find_commit(revision: str, root: Path) -> str:
    """Commit of a revision; UsageError when git does not know it."""
    arguments = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    done = ask_git(root, *arguments)
    if done.returncode:
        raise UsageError(f"{revision}: no such revision in {root}; see `git log`")
    return done.stdout.decode().strip()


def extract(commit: str, root: Path, folder: Path) -> None:
    """Put tables, evidence and code of a commit in a folder; only tables must be there.

    Raises UsageError where they are not, QuantmatrixError where git fails.
    """
    wanted = (TABLES, EVIDENCE, SOURCES, *BESIDE)
    listed = ask_git(root, "ls-tree", "--name-only", commit, *wanted)
    present = listed.stdout.decode().split()
    if TABLES not in present:
        raise UsageError(f"{commit[:12]}: has no {TABLES}/ at the top of the repository")
    for name, data in read_files(commit, root, present).items():
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def read_files(commit: str, root: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """Files of a commit, those in folders too, by their path; QuantmatrixError where git fails."""
    if not paths:
        return {}
    done = ask_git(root, "archive", "--format=tar", commit, *paths)
    if done.returncode:
        raise QuantmatrixError(f"git archive {commit[:12]}: {done.stderr.decode().strip()}")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            if member.isfile() and (stream := archive.extractfile(member)) is not None:
                found[member.name] = stream.read()
    return found


def ask_git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in a repository; QuantmatrixError when there is no git."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, check=False, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise QuantmatrixError(f"git {arguments[0]}: {error}") from error
