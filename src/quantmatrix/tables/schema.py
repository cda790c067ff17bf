"""Schema: the columns of the five tables, as data; what `quantmatrix matrix schema` prints.

It is read from the row classes, whose docstrings are the descriptions, so that it cannot differ from what the
reader accepts. `table.VERSION` is the version of all of it.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from typing import Any

from quantmatrix.tables import rows, table
from quantmatrix.tables.rows import CheckpointRow, FamilyRow, HardwareRow, ModelRow
from quantmatrix.tables.table import LATER, OPTIONAL, CaseRow

KINDS: dict[str, type[Any]] = {
    "families": FamilyRow,
    "models": ModelRow,
    "hardware": HardwareRow,
    "checkpoints": CheckpointRow,
    "cases": CaseRow,
}
"""The class of a row, by table, in the order in which they name one another."""
CHOICES = {
    ("hardware", "vendor"): rows.VENDORS,
    ("checkpoints", "form"): tuple(rows.SELECTORS),
    ("cases", "checks"): rows.CHECKS,
    ("cases", "claim"): rows.CLAIMS,
}
"""What a column may say, by (table, column)."""
TYPES = {
    "tuple[str, ...]": "names, separated by blanks",
    "float": "number",
    "int": "whole number",
    "str": "text",
}


def describe() -> dict[str, Any]:
    """Version, and per table what its rows are and its columns in order, as plain data."""
    return {
        "version": table.VERSION,
        "tables": {
            f"{name}.csv": {"row": first_line(kind), "columns": list_columns(name, kind)}
            for name, kind in KINDS.items()
        },
    }


def first_line(kind: type[Any]) -> str:
    """What a row is, from the docstring of its class."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def list_columns(name: str, kind: type[Any]) -> list[dict[str, Any]]:
    """The columns of a table: name, type, whether it may be blank or missing, and what it says."""
    texts = read_descriptions(kind)
    return [
        {
            "name": column.name,
            "type": TYPES[str(column.type)],
            "may_be_blank": column.name in OPTIONAL.get(name, ()),
            "may_be_missing": column.name in LATER.get(name, ()),
            "choices": list(CHOICES.get((name, column.name), ())),
            "description": texts.get(column.name, ""),
        }
        for column in fields(kind)
    ]


def read_descriptions(kind: type[Any]) -> dict[str, str]:
    """The texts below the fields of a class, by field, each on one line."""
    [body] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            name, value = ast.unparse(field.target), ast.literal_eval(text.value)
            found[name] = " ".join(str(value).split())
    return found


def write_markdown() -> str:
    """The tables reference as Markdown: a section per table, a line per column."""
    from quantmatrix.tables.rows import SELECTORS

    parts = [f"Version {table.VERSION} of the columns."]
    for name, kind in KINDS.items():
        lines = [f"## {name}.csv", "", first_line(kind), "", "| column | value | meaning |"]
        lines.append("| --- | --- | --- |")
        for column in list_columns(name, kind):
            choices = ", ".join(f"`{choice}`" for choice in column["choices"])
            value = choices or column["type"]
            blank = "; may be blank" if column["may_be_blank"] else ""
            lines.append(f"| `{column['name']}` | {value}{blank} | {column['description']} |")
        parts.append("\n".join(lines))
    forms = [f"| `{form}` | {', '.join(f'`{f}`' for f in s)} |" for form, s in SELECTORS.items()]
    head = ["## Forms of a checkpoint", "", "| form | flags that may name one |", "| --- | --- |"]
    return "\n\n".join([*parts, "\n".join([*head, *forms])]) + "\n"
