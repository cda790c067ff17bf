"""Exit codes of test runs and of nox sessions: each way in which a proof is not there has its own.

0 is success, and only ever means that what was asked for ran and held. 1 to 5 are pytest's own (a
test that is no cell of the matrix failed, interrupted, internal error, wrong usage) and those of the
command line; the rest are these. A run that ends in several ways gives the largest.
"""

from __future__ import annotations

import errno

from quantmatrix.errors import UnusableError

GATE_LOOSENED = 10
"""A check passed under a limit that is wider than the one of the committed record."""
CLAIM_VIOLATED = 11
"""A check of a row failed, or passed although the committed record says that it fails."""
NOT_EXECUTED = 12
"""A row that was to be run has no verdict: it was skipped, or its process died."""
NOTHING_COLLECTED = 13
"""The selection is empty: nothing was tested, which is never success."""
ENVIRONMENT_UNUSABLE = 14
"""The machine is not the hardware that was asked for, the hub cannot be read, a package is missing, or a
disk takes no more; the command line ends so, too."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Failures of a disk, not of a claim."""

MEANINGS = {
    GATE_LOOSENED: "gate loosened",
    CLAIM_VIOLATED: "claim violated",
    NOT_EXECUTED: "row not executed",
    NOTHING_COLLECTED: "nothing collected",
    ENVIRONMENT_UNUSABLE: "environment unusable",
}
"""The text of every code of this module, for the line that a run ends with."""


def blames_environment(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that something outside is missing or full.

    A module of somebody else that is not installed is such a thing; one of ours is a fault of ours.
    """
    cause: BaseException | None = error
    while cause is not None:
        disk = isinstance(cause, OSError) and cause.errno in DISK_ERRORS
        ours = str(getattr(cause, "name", None)).partition(".")[0] == "quantmatrix"
        package = isinstance(cause, ModuleNotFoundError) and not ours
        if disk or package or isinstance(cause, UnusableError):
            return True
        cause = cause.__cause__
    return False


EXIT_PROBLEM, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143
