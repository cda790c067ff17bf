"""The command line. Every command has `--json`; nothing heavy is imported before it is needed.

Exit codes: 0 done, 1 something is wrong with a file or a claim, 2 the arguments contradict each
other, 3 a refusal (the plan ended in a rule), 14 the environment is unusable (the hub cannot be
read, a package is missing, the disk is full), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import platform
import signal
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from quantmatrix import __version__
from quantmatrix.cli.dequantize import _add_dequantize
from quantmatrix.cli.doctor import _add_doctor
from quantmatrix.cli.flags import fill_help
from quantmatrix.cli.generate import _add_generate
from quantmatrix.cli.inspect import _add_inspect
from quantmatrix.cli.matrix import _add_matrix
from quantmatrix.cli.output import (
    Parser,
    drop_output,
    explain_os_error,
    print_json,
    report_error,
    shown_log,
    tell_tables,
)
from quantmatrix.cli.plan import _add_plan
from quantmatrix.cli.report import _add_report
from quantmatrix.cli.tiny_hub import _add_tiny_hub
from quantmatrix.errors import QuantmatrixError, RefusedError, UsageError
from quantmatrix.exit_codes import (
    ENVIRONMENT_UNUSABLE,
    EXIT_INTERRUPTED,
    EXIT_PROBLEM,
    EXIT_REFUSED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    blames_environment,
)
from quantmatrix.request import normalize_flags
from quantmatrix.tables import read, source

if TYPE_CHECKING:
    from quantmatrix.cli.output import Handler


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    flags = normalize_flags(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in flags
    try:
        code = run_command(flags)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except RefusedError as error:
        return report_error(error, EXIT_REFUSED, as_json=as_json)
    except QuantmatrixError as error:
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_PROBLEM
        code = ENVIRONMENT_UNUSABLE if blames_environment(error) else code
        return report_error(error, code, as_json=as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_output()  # whoever read it went away
        return EXIT_PROBLEM
    except OSError as error:
        code = ENVIRONMENT_UNUSABLE if blames_environment(error) else EXIT_PROBLEM
        try:
            report_error(explain_os_error(error), code, as_json=as_json)
            sys.stdout.flush()
        except OSError:  # it was the output that could not be written
            drop_output()
        return code


def run_command(argv: list[str]) -> int:
    """Parse the arguments and run their command; raises UsageError for one that nothing takes."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.argv = argv
    handler: Handler | None = getattr(arguments, "handler", None)
    if handler is None and arguments.version and not rest:
        return show_version(as_json=arguments.json)
    if handler is None:
        if rest or arguments.json:
            raise UsageError(
                f"{' '.join(rest)}: which command? See `{parser.prog} --help`".lstrip(": ")
            )
        parser.print_help()
        return EXIT_USAGE
    if rest and not getattr(arguments, "takes_overrides", False):
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}")
    read.last_read.clear()
    folder = getattr(arguments, "tables", None)
    with shown_log(verbose=getattr(arguments, "verbose", False)), source.use(folder):
        code = handler(arguments, rest)
        if not getattr(arguments, "json", False):
            tell_tables()
        return code


def show_version(*, as_json: bool) -> int:
    """The version of the package; as JSON those of the forms that it reads and of what it runs on, too."""
    from importlib import metadata

    from quantmatrix.tables import table

    if not as_json:
        print(f"quantmatrix {__version__}")
        return 0
    packages: dict[str, str | None] = {}
    for name in ("torch", "diffusers", "transformers", "triton"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    print_json(
        {
            "quantmatrix": __version__,
            "python": platform.python_version(),
            "tables_version": table.VERSION,
            "record_schema": 1,
            "packages": packages,
        }
    )
    return 0


@cache
def build_parser() -> argparse.ArgumentParser:
    """The parser of every command, built once: its six hundred flags take 10 ms."""
    parser = Parser(
        prog="quantmatrix",
        description="Which quantized diffusion checkpoint works on which hardware, with proof.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action="store_true",
        help="show the version; with --json those of Python, torch and the file forms, too",
    )
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_generate(commands)
    _add_plan(commands)
    _add_inspect(commands)
    _add_dequantize(commands)
    _add_doctor(commands)
    _add_matrix(commands)
    _add_tiny_hub(commands)
    _add_report(commands)
    for name in NAMES:
        import_module(f"quantmatrix.cli.{name}").add_to(commands)
    fill_help(parser)
    return parser


def terminate(number: int, frame: Any) -> NoReturn:
    """Leave on a signal as on any error, so that nothing half-written stays."""
    print("terminated", file=sys.stderr)
    sys.exit(EXIT_TERMINATED)


def entry() -> None:
    """Console entry point."""
    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):  # whatever a locale cannot write is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    entry()

# fmt: off
NAMES: tuple[str, ...] = (
    "completion",
    "init",
    "explain",
    "recommend",
    "run_column",
    "agreement",
    "validate",
    "packet",
    "evidence",
    "summary",
    "speed",
    "quantize",
    "fallback",
    "compare",
    "mutate",
    "thresholds",
    "trace",
    "true_size",
    "bench",
    "compile",
    "fleet",
)
# fmt: on
"""The modules, in the order of `quantmatrix --help`. One name a line, so that changes merge."""
