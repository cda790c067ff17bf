"""Offers: the commands for published weights that a reader of the matrix may copy.

A proof stands beside the command that ran. What is offered below it has not been run yet, unless the
record's scope is `published`. Some repositories of the tables exist only as stand-ins: `quantmatrix/*`
and the guide's `/path/to/...`. Nobody can download those, so the offer makes the checkpoint from its
base model first and then runs it:

    quantmatrix quantize --model-path black-forest-labs/FLUX.1-dev --family fp8 ... --output-path ./x
    quantmatrix generate --model-path black-forest-labs/FLUX.1-dev --transformer-path ./x ...
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from quantmatrix.proof.scopes import PUBLISHED

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, CheckpointRow, Matrix

INVENTED = ("quantmatrix/", "/path/to/")
"""Beginnings of references that lead nowhere but to stand-ins."""
NOT_RUN = "not yet run"
FILE = ".safetensors"


@dataclass(frozen=True)
class Offer:
    """Commands that use published weights."""

    run: str
    """The command of the cell."""
    make: str = ""
    """The command that makes the checkpoint first; empty where it can be downloaded."""
    ran: bool = False
    """Whether a record of published weights shows that command."""

    @property
    def commands(self) -> tuple[str, ...]:
        """All of them, in order."""
        return (self.make, self.run) if self.make else (self.run,)

    @property
    def title(self) -> str:
        """What stands above them."""
        first = "Made from the base model" if self.make else "With the published repository"
        return first if self.ran else f"{first}: {NOT_RUN}"


def is_invented(reference: str) -> bool:
    """Whether a repository or path exists only as a stand-in."""
    return reference.startswith(INVENTED)


def offer(cell: Cell, tables: Matrix, record: Evidence | None = None, scope: str = "") -> Offer:
    """What a cell offers; `record` and its scope are those that name the cell."""
    row = tables.checkpoints[cell.checkpoint]
    real = find_real(row, tables)
    ran = bool(record) and scope == PUBLISHED
    if real == row:
        return Offer(cell.shell(tables), "", ran)
    checkpoints = {**tables.checkpoints, row.id: real}
    run = cell.shell(replace(tables, checkpoints=checkpoints))
    return Offer(run, write_quantize(real) if real.form != "online" else "", ran)


def find_real(row: CheckpointRow, tables: Matrix) -> CheckpointRow:
    """The row with a base model that can be downloaded, and a local checkpoint to be made from it."""
    base = tables.models[row.model].repo if is_invented(row.base) else row.base
    if row.form == "online" or not is_invented(row.reference):
        return replace(row, base=base)
    return replace(row, base=base, reference=f"./{name_output(row)}")


def name_output(row: CheckpointRow) -> str:
    """What to call the checkpoint of a row that has to be made, as its family's readers need it."""
    if row.family == "nunchaku-svdq":
        form, _, rank = row.scheme.partition("_")
        bits = "int4" if form == "int4" else "fp4"
        return f"svdq-{bits}_{rank}-{row.model}{FILE}"
    return PurePosixPath(row.reference).name


def write_quantize(row: CheckpointRow) -> str:
    """The command that makes a checkpoint like the row's from its base model."""
    argv = ["--model-path", row.base, "--family", row.family]
    if row.family == "nunchaku-svdq":
        form, _, rank = row.scheme.partition("_r")
        argv += ["--precision", form, "--rank", rank]
    else:
        argv += ["--scheme", row.scheme]
    argv += ["--keep", *row.kept.split(), "--output-path", row.reference]
    return shlex.join(["quantmatrix", "quantize", *argv])
