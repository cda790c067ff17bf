"""Peers: other programs that load quantized checkpoints, each asked whether it loads ours.

People ask whether a file works with the program that they have. Each program has one file here, an
*adapter* (see `protocol`), and one row in `matrix/runtimes.csv`; nothing else names it. A *column* is
every checkpoint of the tables in one runtime on one hardware (`column`): the runtime runs the base model
in full precision and the quantized file, and what comes of it is a verdict (`verdict`) with the
command, the version and an excerpt of the log, kept as a record (`quantmatrix.proof.columns`).

An adapter never runs in our process: `session` starts a child that runs it (`worker`), watches its time,
memory and output, and starts a new one where it died, so that a crash costs its own cell.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.peers.protocol import Adapter


def load(runtime: str) -> Adapter:
    """The adapter of a runtime's id; UsageError where there is none."""
    name = f"{__name__}.{runtime.replace('-', '_')}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UsageError(f"--runtime {runtime}: there is no adapter {name}") from error
    if getattr(module, "ID", None) != runtime:
        raise UsageError(f"--runtime {runtime}: {name} is not an adapter of it")
    return cast("Adapter", module)
