"""`quantmatrix completion`: a script that completes commands and flags in a shell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = "print a script that completes commands and flags in your shell"
    parser = add_command(commands, "completion", text, run_completion)
    parser.add_argument("shell", choices=SHELLS)


def run_completion(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix completion`; raises MissingPackageError without shtab."""
    from quantmatrix.cli.main import build_parser
    from quantmatrix.errors import MissingPackageError

    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MissingPackageError("completion needs shtab: `pip install shtab`") from error
    print(shtab.complete(build_parser(), shell=arguments.shell))
    return 0
