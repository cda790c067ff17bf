"""The errors a user can meet, each saying what was found, what was expected and what to try.

`UsageError`       the flags or the table rows contradict each other; nothing was read yet
`CheckpointError`  a file on disk is not what it claims to be, or cannot be used as asked
`RefusedError`     everything is well formed, but this hardware has no kernel for it
`MachineError`     this machine is not the hardware that was asked for
`UnusableError`    something outside is missing: the hub, a token, a licence, a package
`BrokenRunError`   a generation gave NaN or infinity, so that it shows nothing
`UnjudgedError`    a check measured something, and there is no limit to judge it by
"""

from __future__ import annotations


class QuantmatrixError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""


class UsageError(QuantmatrixError, ValueError):
    """Flags or arguments that contradict each other."""


class MachineError(UsageError):
    """The machine is not the one asked for, so no failure on it proves anything."""


class UnusableError(QuantmatrixError):
    """Something a run needs is not available here and now; this says nothing about a checkpoint or
    a claim."""


class MissingPackageError(UnusableError, ImportError):
    """An optional package that is not installed."""


class CheckpointError(QuantmatrixError, ValueError):
    """A checkpoint that is damaged, ambiguous, incomplete or not what was asked for."""


class UnreachableError(CheckpointError, UnusableError):
    """A repository that cannot be read from here: no network, no token, no accepted licence."""


class BrokenRunError(QuantmatrixError, ArithmeticError):
    """A generation whose latents are not finite."""


class RefusedError(QuantmatrixError, RuntimeError):
    """A plan that ended in a refusal; `rule` is its id in the tables."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule
        self.message = message


class WitnessError(CheckpointError):
    """Decoded layers are not the base model's, or nothing says how to decode them."""


class UnjudgedError(QuantmatrixError):
    """What a check measured has no limit to be judged by: the row is `unjudged`, and not failing."""
