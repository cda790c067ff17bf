"""Lint of flags: what a `flags` cell must not hold.

They are read by the parser of `generate` itself, so a flag that it does not know, a number that is
none and a value that is missing are problems of the table, and not of the run that would trip over
them hours later. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NoReturn

from quantmatrix.errors import UsageError
from quantmatrix.request import (
    Request,
    add_output_flags,
    add_request_flags,
    add_sharing_flag,
    normalize_flags,
)
from quantmatrix.tables.rows import ASSIGNMENT, CheckpointRow

ELSEWHERE = {
    **dict.fromkeys(
        ("--model-path", "--transformer-path", "--transformer-weights-path", "--quantization"),
        "the column checkpoint says it",
    ),
    "--backend": "the column backend says it",
    "--revision": "the column revision of checkpoints.csv says it",
    **dict.fromkeys(("--hardware", "--device"), "the column hardware says it"),
    **dict.fromkeys(("--tiny", "--json", "--output-path"), "whoever runs the row says it"),
}
"""Flags that a row must not give."""
SVDQUANT = ("--enable-svdquant", "--quantization-precision", "--quantization-rank")
OFFLOADS = ("--dit-layerwise-offload", "--dit-cpu-offload")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors, and which prints no help."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse would print its usage and exit."""
        raise UsageError(message)


def list_flag_problems(flags: Sequence[str], checkpoint: CheckpointRow) -> Iterator[str]:
    """Flags that other columns say, that exclude each other, or that nothing understands."""
    names = [flag.partition("=")[0].replace("_", "-") for flag in flags if flag[:2] == "--"]
    problems = list(list_misplaced(names, checkpoint)) + list(list_setting_problems(flags))
    yield from problems
    argv = tuple(flag for flag in flags if not ASSIGNMENT.fullmatch(flag))
    if not problems and (why := find_parse_problem(argv)):
        yield why


def list_misplaced(names: Sequence[str], checkpoint: CheckpointRow) -> Iterator[str]:
    """Flags that do not belong into the row of this checkpoint, or beside each other."""
    for name in dict.fromkeys(names):
        if name in ELSEWHERE:
            yield f"{name}: {ELSEWHERE[name]}"
        if names.count(name) > 1:
            yield f"{name} is given twice"
        if name in SVDQUANT and checkpoint.family != "nunchaku-svdq":
            yield f"{name} is for nunchaku-svdq, not {checkpoint.family}"
        if name == "--quantization-ignored-layers" and checkpoint.form != "online":
            yield f"{name} is for --quantization, not a {checkpoint.form}"
    if all(name in names for name in OFFLOADS):
        yield f"{' and '.join(OFFLOADS)} exclude each other"


def list_setting_problems(flags: Sequence[str]) -> Iterator[str]:
    """Environment variables that are set twice, or behind the flags."""
    settings = [flag for flag in flags if ASSIGNMENT.fullmatch(flag)]
    for flag in settings if tuple(settings) != tuple(flags[: len(settings)]) else ():
        yield f"{flag}: a setting of the environment stands before every flag"
    counts = Counter(flag.partition("=")[0] for flag in settings)
    yield from (f"{name} is set twice" for name, count in counts.items() if count > 1)


@lru_cache(maxsize=4096)
def find_parse_problem(argv: Sequence[str]) -> str | None:
    """What `quantmatrix generate` would say to these arguments, or None."""
    try:
        arguments, rest = make_parser().parse_known_args(normalize_flags(argv))
        Request.from_arguments(arguments, rest)
    except UsageError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def make_parser() -> Parser:
    """The parser of `generate`, without what the other columns say."""
    parser = Parser(prog="quantmatrix generate", add_help=False, allow_abbrev=False)
    add_request_flags(parser, needed=False)
    add_sharing_flag(parser)
    add_output_flags(parser)
    return parser
