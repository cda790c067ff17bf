"""Output: what every command needs to read its flags and to print its results and errors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantmatrix.cli.examples import write_epilog
from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.quoting import escape_lines, limit_message
from quantmatrix.request import FP4_BACKEND_VARIABLE, Request
from quantmatrix.tables.rows import MatrixError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from logging import LogRecord
    from typing import Any, NoReturn


Handler = Callable[[argparse.Namespace, list[str]], int]


EVERYWHERE = ("--help", "--verbose", "--tables")
"""Flags of every command."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, so that `--json` has them, too.

    It and the parsers of its commands have `EVERYWHERE`, so these may stand before or after a command.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument(
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,
            help="write a log to standard error",
        )
        self.add_argument(
            "--tables",
            metavar="DIR",
            default=argparse.SUPPRESS,
            help="read the tables of this folder (default: $QUANTMATRIX_TABLES, then [tool.quantmatrix] "
            "of pyproject.toml, then the tables of quantmatrix itself)",
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse would print its usage and exit."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def drop_output() -> None:
    """Send what is still buffered nowhere, or Python tries to write it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain_os_error(error: OSError) -> QuantmatrixError:
    """What the system would not do, for people."""
    if error.filename is None:
        return QuantmatrixError(str(error))
    return QuantmatrixError(
        f"{error.filename}: {error.strerror}; look at the path, its permissions and the free space"
    )


def report_error(error: QuantmatrixError, code: int, *, as_json: bool) -> int:
    """Print an error: text on standard error, and the same as JSON where that was asked for."""
    message = shorten_error(error)
    print(f"quantmatrix: {message}", file=sys.stderr)
    if as_json:
        rule = getattr(error, "rule", None)
        refusal = {"rule": rule, "message": message} if rule else None
        kind = type(error).__name__
        print_json({"ok": False, "refusal": refusal, "error": {"type": kind, "message": message}})
    return code


def shorten_error(error: QuantmatrixError) -> str:
    """The text of an error, with names and values from untrusted files made harmless.

    Only the list of what is wrong with the tables, which are the user's own, is shown to its end.
    """
    if not isinstance(error, MatrixError):
        return limit_message(str(error))
    return "\n".join(limit_message(line) for line in str(error).split("\n"))


@contextmanager
def shown_log(*, verbose: bool = False) -> Iterator[None]:
    """Show the package's log on standard error: problems, on a terminal progress, or with `verbose` all.

    A program that uses the package has the logger `quantmatrix` for itself; nothing is shown unasked.
    """
    import logging

    logger = logging.getLogger("quantmatrix")
    shown = logging.INFO if sys.stderr is not None and sys.stderr.isatty() else logging.WARNING
    level = logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("quantmatrix: %(message)s"))
    handler.addFilter(escape_record)
    logger.setLevel(logging.DEBUG if verbose else shown)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def escape_record(record: LogRecord) -> bool:
    """Escape what names and values of strangers would do to a terminal; lets every line pass."""
    record.msg, record.args = escape_lines(record.getMessage()), ()
    return True


def report_problems(problems: Iterable[str]) -> None:
    """Say on standard error what is wrong, a line each."""
    import logging

    for problem in problems:
        logging.getLogger("quantmatrix").error("%s", problem)


def report_progress(text: str) -> None:
    """Say what is done now, on a terminal or with `--verbose`."""
    import logging

    logging.getLogger("quantmatrix").info("%s", text)


def say(text: str, *, to_errors: bool = False) -> None:
    """Print lines for people, in which names and values from untrusted files are escaped."""
    print(escape_lines(text), file=sys.stderr if to_errors else sys.stdout)


def print_json(value: Any) -> None:
    """Print finite, sorted JSON; an answer that was read from tables says from which."""
    if isinstance(value, dict) and (tables := name_tables()):
        value = {**value, "tables": tables}
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=str))


def name_tables() -> str:
    """The tables that the command has read, as text; empty when it has read none."""
    from quantmatrix.tables import read, source

    if not read.last_read:
        return ""
    found = source.find()
    folder = read.last_read[-1]
    return str(found) if found.folder == folder else str(folder)


def tell_tables() -> None:
    """Say on standard error which tables were read; our own ones only on a terminal or with `--verbose`."""
    from quantmatrix.tables import read, source

    if not (tables := name_tables()):
        return
    if read.last_read[-1] == source.own_folder():
        report_progress(f"tables: {tables}")
    else:
        print(f"tables: {tables}", file=sys.stderr)


class HelpFormatter(argparse.HelpFormatter):
    """Wraps all text but the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


def add_command(commands: Any, name: str, text: str, handler: Handler) -> argparse.ArgumentParser:
    """Add the parser of one command; `handler` runs it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.epilog = write_epilog(parser.prog)
    parser.set_defaults(handler=handler)
    return parser


def read_request(arguments: argparse.Namespace, rest: Sequence[str]) -> Request:
    """The request of parsed flags; environment variables are read only here."""
    from quantmatrix.request import Hub

    extra: dict[str, Any] = {"fp4_gemm_backend": os.environ.get(FP4_BACKEND_VARIABLE)}
    if arguments.revision:
        extra["hub"] = Hub(revision=arguments.revision)
    return Request.from_arguments(arguments, rest, **extra)


def read_variable(name: str) -> str | None:
    """An environment variable, for commands in modules of their own."""
    return os.environ.get(name)


def backends_text(found: Mapping[str, int]) -> str:
    """`28 decode, 4 reference`."""
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "none"
