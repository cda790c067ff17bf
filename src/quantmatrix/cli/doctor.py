"""quantmatrix doctor: what would run on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, print_json

if TYPE_CHECKING:
    import argparse
    from typing import Any


def _add_doctor(commands: Any) -> None:
    text = "check this machine: devices, optional packages, an unrelated `nunchaku` package"
    parser = add_command(commands, "doctor", text, run_doctor)
    parser.add_argument("--json", action="store_true")


def run_doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix doctor`."""
    from quantmatrix.runtime import doctor

    found = doctor.examine()
    if arguments.json:
        print_json(found)
    else:
        print(doctor.to_text(found))
    return 0
