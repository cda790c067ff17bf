"""Write the pages that come from the code: formats, tables and commands. `mkdocs build` reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantmatrix.cli.flags import list_parsers
from quantmatrix.cli.main import build_parser
from quantmatrix.report.markdown import read_docstring
from quantmatrix.tables import read, schema

DOCS = Path(__file__).parent
NOTICE = "<!-- Written by docs/write_pages.py from the code: do not edit. -->\n\n"


def write_formats() -> str:
    """Each family's docstring: what its files hold."""
    parts = [
        "# Formats",
        "How each family stores a quantized layer, as the module that reads it says.",
    ]
    for family in read.read().families.values():
        parts += [f"## {family.id}", f"{family.checkpoint_form}.", read_docstring(family.id)]
    return "\n\n".join(parts) + "\n"


def write_tables() -> str:
    """The columns of the five tables."""
    intro = (
        "# Tables reference\n\nFive CSV files in UTF-8. A line that begins with `#` is a comment; a first one "
        "`# quantmatrix tables, version 1` says which version of the columns a file has. "
        "`quantmatrix matrix schema` prints this page as JSON, `quantmatrix evidence schema` the JSON Schema "
        "of records.\n\n"
    )
    return intro + schema.write_markdown()


def write_commands() -> str:
    """The help of every command."""
    parts = ["# Commands", "Dashes and underscores in flags are interchangeable."]
    for parser in list_parsers(build_parser()):
        subcommands = any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)
        if parser.prog != "quantmatrix" and not subcommands:
            parts += [f"## {parser.prog}", f"```text\n{parser.format_help().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


PAGES = {"formats.md": write_formats, "tables.md": write_tables, "commands.md": write_commands}


def main() -> None:
    """Write them beside this file."""
    for name, write in PAGES.items():
        (DOCS / name).write_text(NOTICE + write(), encoding="utf-8")


if __name__ == "__main__":
    main()
