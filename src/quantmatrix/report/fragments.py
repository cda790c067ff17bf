"""Fragments: tables of the matrix for somebody else's page, in the format that the page is written in.

| table         | one line is |
| ------------- | ----------- |
| `families`    | a quant family, as the quantization guide's table has it, and its states |
| `checkpoints` | a checkpoint with a label (`algo`), as the guide's second table has it, and its states |
| `cells`       | a claim on one hardware with one backend, its state, scope and numbers |

A column is a name of `COLUMNS`, or `name=Title` for a page that heads it otherwise.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.proof.joined import read_worst
from quantmatrix.report.table import write_table

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined
    from quantmatrix.tables.rows import Cell

Row = Mapping[str, str]

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "families": {
        "family": "quant_family",
        "form": "checkpoint form",
        "cli": "canonical CLI",
        "models": "supported models",
        "dependency": "extra dependency",
        "notes": "platform / notes",
        "states": "states",
    },
    "checkpoints": {
        "algo": "Quant Algo",
        "base": "Base Model",
        "cli": "Preferred CLI",
        "reference": "HF Repo",
        "scope": "Current Scope",
        "notes": "Notes",
        "states": "States",
        "checkpoint": "Checkpoint",
        "family": "quant_family",
    },
    "cells": {
        "checkpoint": "checkpoint",
        "model": "model",
        "hardware": "hardware",
        "backend": "backend",
        "claim": "claim",
        "state": "state",
        "scope": "scope",
        "psnr_db": "PSNR dB",
        "cosine": "cosine",
        "made": "date",
        "family": "quant_family",
        "rule": "rule",
        "cell": "cell",
        "reason": "why",
        "command": "command",
    },
}
"""Columns of each table, by name, with their titles."""
CODE = {
    "families": ("family",),
    "checkpoints": ("algo", "base", "cli", "reference", "checkpoint", "family"),
    "cells": ("checkpoint", "cell", "rule", "command"),
}
"""Columns whose values are code."""
DEFAULTS = {
    "families": ("family", "form", "cli", "models", "dependency", "notes"),
    "checkpoints": ("algo", "base", "cli", "reference", "scope", "notes"),
    "cells": ("checkpoint", "hardware", "backend", "claim", "state", "scope"),
}
"""Columns that a table has where nobody names any: of the guide's two tables its own."""
FORMATS = ("md", "rst", "html", "csv")


def render(joined: Joined, name: str, form: str, columns: Sequence[str] = ()) -> str:
    """A table as text in a format, between blank lines where it is no CSV, without a last line break.

    UsageError for a table, format or column that is not known.
    """
    if name not in COLUMNS:
        raise UsageError(f"{name}: no such table; known: {', '.join(COLUMNS)}")
    if form not in FORMATS:
        raise UsageError(f"--format {form}: known: {', '.join(FORMATS)}")
    pairs = [read_column(name, text) for text in columns or DEFAULTS[name]]
    rows = [[row[column] for column, _ in pairs] for row in LIST_ROWS[name](joined)]
    if form != "csv":
        code = [column in CODE[name] for column, _ in pairs]
        rows = [[mark(t, form, code=c) for t, c in zip(r, code, strict=True)] for r in rows]
    text = WRITERS[form]([title for _, title in pairs], rows)
    return text if form == "csv" else f"\n{text}\n"


def read_column(table: str, text: str) -> tuple[str, str]:
    """(name, title) of `name` or `name=Title`; UsageError for a column that is not known."""
    name, _, title = text.partition("=")
    known = COLUMNS[table]
    if name not in known:
        raise UsageError(f"--columns {name}: not a column of {table}; known: {', '.join(known)}")
    return name, title or known[name]


def list_families(joined: Joined) -> list[Row]:
    """A line per row of families.csv."""
    return [
        {
            "family": row.id,
            "form": row.checkpoint_form,
            "cli": row.canonical_cli,
            "models": row.supported_models,
            "dependency": row.extra_dependency,
            "notes": row.notes,
            "states": count_states(joined, [c for c in joined.tables.cells if c.family == row.id]),
        }
        for row in joined.tables.families.values()
    ]


def list_checkpoints(joined: Joined) -> list[Row]:
    """A line per row of checkpoints.csv that has a label."""
    cells = joined.tables.cells
    return [
        {
            **{key: str(value) for key, value in vars(row).items()},
            "checkpoint": row.id,
            "states": count_states(joined, [c for c in cells if c.checkpoint == row.id]),
        }
        for row in joined.tables.checkpoints.values()
        if row.algo
    ]


def list_cells(joined: Joined) -> list[Row]:
    """A line per cell."""
    lines: list[Row] = []
    for cell in joined.tables.cells:
        record = joined.evidence.get(cell.id)
        worst = read_worst(record)
        numbers = {n: show(worst.get(n)) for n in ("psnr_db", "cosine")}
        lines.append(
            {
                **{key: str(value) for key, value in vars(cell).items()},
                "cell": cell.id,
                "state": joined.states[cell.id],
                "scope": joined.standings[cell.id].scope,
                "reason": joined.reasons[cell.id].partition("\n")[0],
                "made": record.made[:10] if record else "",
                "command": " && ".join(joined.offers[cell.id].commands),
                **numbers,
            }
        )
    return lines


def show(value: float | None) -> str:
    """Four significant digits, or nothing."""
    return "" if value is None else f"{value:.4g}"


def count_states(joined: Joined, cells: Sequence[Cell]) -> str:
    """`4 proven · stand-in, 1 planned`."""
    return ", ".join(f"{count} {label}" for label, count in joined.count(cells).items())


def mark(text: str, form: str, *, code: bool) -> str:
    """A value in the marks of a format; the tables' own texts are Markdown, with code in backticks."""
    if not text:
        return ""
    if form == "md":
        return f"`{text}`" if code else text
    pieces = ["", text, ""] if code else text.split("`")
    if form == "html":
        tags = (("", ""), ("<code>", "</code>"))
        return "".join(
            f"{tags[i % 2][0]}{html.escape(piece)}{tags[i % 2][1]}"
            for i, piece in enumerate(pieces)
            if piece
        )
    plain = [piece.replace("\\|", "|") for piece in pieces]
    escaped = [p if i % 2 else escape_rst(p) for i, p in enumerate(plain)]
    return "".join(f"``{p}``" if i % 2 else p for i, p in enumerate(escaped) if p)


def escape_rst(text: str) -> str:
    """Text whose marks reStructuredText leaves alone."""
    for character in "\\*|_":
        text = text.replace(character, f"\\{character}")
    return text


def write_rst(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A list table of reStructuredText, which needs no widths."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        for index, cell in enumerate(row):
            lines.append(f"   {'* -' if not index else '  -'} {cell}".rstrip())
    return "\n".join(lines)


def write_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML with a head."""
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    lines = ["<table>", f"<thead><tr>{titles}</tr></thead>", "<tbody>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</tbody>", "</table>"])


def write_csv(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated values, quoted where they must be."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue().removesuffix("\n")


LIST_ROWS: Mapping[str, Callable[[Joined], list[Row]]] = {
    "families": list_families,
    "checkpoints": list_checkpoints,
    "cells": list_cells,
}
WRITERS: Mapping[str, Callable[[Sequence[str], Any], str]] = {
    "md": write_table,
    "rst": write_rst,
    "html": write_html,
    "csv": write_csv,
}
