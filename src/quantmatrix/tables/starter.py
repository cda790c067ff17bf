"""Starter: the first tables of another project, with a comment above each; what `quantmatrix init` writes.

The rows are ours of one family, so that they are true and run at once: a checkpoint of FLUX.1 on a CPU and on
an H100, and a refusal. The comments name every column, from the schema.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from quantmatrix.errors import UsageError
from quantmatrix.files import check_writable, put, staging
from quantmatrix.tables import schema, source, table

ROWS = {
    "families": ("modelopt-fp8",),
    "models": ("flux-1",),
    "hardware": ("cpu", "h100"),
    "checkpoints": ("modelopt-fp8-flux-1",),
    "cases": ("modelopt-fp8-flux-1", "modelopt-fp8-flux-1-native", "modelopt-fp8-flux-1-no-units"),
}
"""Rows of our tables that the first tables have."""
CHANGES = {
    ("families", "models"): "flux-1",
    ("cases", "modelopt-fp8-flux-1-native"): {"hardware": "h100", "claim": "expected"},
    ("cases", "modelopt-fp8-flux-1-no-units"): {"hardware": "cpu"},
}
"""What they say instead: of a column in every row, or of a row by column."""
README = """# Tables of quantmatrix

Each line of `cases.csv` claims that a checkpoint passes checks on a hardware; the other four tables hold what
it names. Edit them, then:

    quantmatrix matrix check --tables {folder}
    pytest --pyargs quantmatrix.suites --tables {folder} --evidence-dir {reports}/evidence
    quantmatrix report --tables {folder} --into PAGE.md

`PAGE.md` has the lines `<!-- quantmatrix:begin families -->` and `<!-- quantmatrix:end families -->`; what lies
between them is rendered, and `--check` fails where it is out of date. To leave out `--tables`, write into
`pyproject.toml`:

    [tool.quantmatrix]
    tables = "{folder}"
"""


def write(folder: Path) -> list[Path]:
    """Write the five tables and a README into a new folder; returns their paths.

    UsageError where a file of these names is there already: nothing is overwritten.
    """
    check_writable(folder / "cases.csv", "init")
    texts = {f"{name}.csv": write_table(name) for name in schema.KINDS}
    reports = folder.parent / "reports"
    texts["README.md"] = README.format(folder=folder.as_posix(), reports=reports.as_posix())
    there = [name for name in texts if (folder / name).exists()]
    if there:
        raise UsageError(f"{folder}: holds {', '.join(there)} already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with staging(folder / "tables") as temporary:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="")
        for name in texts:
            put(temporary / name, folder / name)
    return [folder / name for name in texts]


def write_table(name: str) -> str:
    """One of the first tables as CSV, its columns explained above them."""
    with (source.own_folder() / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream)}
    kind = schema.KINDS[name]
    columns = schema.list_columns(name, kind)
    out = io.StringIO(newline="")
    out.write(f"# quantmatrix tables, version {table.VERSION}: {schema.first_line(kind)}\n#\n")
    for column in columns:
        out.write(f"# {column['name']}: {explain(column)}\n")
    writer = csv.DictWriter(out, [c["name"] for c in columns], lineterminator="\n")
    writer.writeheader()
    for row_id in ROWS[name]:
        writer.writerow(change(name, rows[row_id]))
    return out.getvalue()


def explain(column: dict[str, object]) -> str:
    """What a column holds, on one line of a comment."""
    choices = column["choices"]
    named = f" One of {', '.join(choices)}." if isinstance(choices, list) and choices else ""
    blank = " May be blank." if column["may_be_blank"] else ""
    return f"{column['description']}{named}{blank}"


def change(name: str, row: dict[str, str]) -> dict[str, str]:
    """A row of ours as the first tables have it."""
    changed = {
        column: text for column in row if isinstance(text := CHANGES.get((name, column)), str)
    }
    own = CHANGES.get((name, row["id"]))
    return {**row, **changed, **(own if isinstance(own, dict) else {})}
