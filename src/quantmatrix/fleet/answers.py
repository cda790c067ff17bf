"""Answers: all that a node may say, as JSON of these forms; anything else is refused."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from quantmatrix import strict_json
from quantmatrix.errors import QuantmatrixError
from quantmatrix.quoting import quote


class AnswerError(QuantmatrixError, ValueError):
    """What a node sent is not an answer."""


class Probe(msgspec.Struct, forbid_unknown_fields=True):
    """What a node is."""

    source: str
    """Digest of its quantmatrix (`bundle.digest_source`)."""
    hardware: str = ""
    """Its row of hardware.csv; empty where a custom resource names it, or nothing does."""
    problem: str = ""
    """Why it can run nothing, as text."""


class Problem(msgspec.Struct, forbid_unknown_fields=True):
    """Why cells have no verdict, or none that counts."""

    code: int
    """One of `quantmatrix.exit_codes`."""
    cells: list[str]
    why: str


class GroupAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """What a run of a group left."""

    node: str
    """Name of the machine, to be shown and for nothing else."""
    records: list[str]
    """Each the text of a record's file; what it is about is read in it."""
    junit: list[str]
    """The text of a JUnit file of each process that came to its end."""
    problems: list[Problem]
    seconds: float


class Note(msgspec.Struct, forbid_unknown_fields=True):
    """How far a group is."""

    group: str
    node: str
    done: int
    """Cells."""


Form = TypeVar("Form", Probe, GroupAnswer, Note)


def read(data: bytes, form: type[Form]) -> Form:
    """An answer of a form; raises AnswerError for anything else, and for what is too large."""
    if len(data) > strict_json.LIMIT:
        raise AnswerError(f"it has {len(data)} bytes, but the limit is {strict_json.LIMIT}")
    try:
        strict_json.check_size(data)
        return msgspec.json.decode(data, type=form)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise AnswerError(quote(str(error))) from error


def write(answer: Form) -> bytes:
    """The JSON of an answer."""
    return msgspec.json.encode(answer)
