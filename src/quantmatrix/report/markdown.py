"""Family pages: the Markdown of one family, written from tables and records that were joined.

A page has a heading for each checkpoint, to which others link, with a line for each of its cells; what was
measured, what is refused, the commands to copy, and the description of the format, which is the docstring
of the module that reads it. GitHub cuts off what is wide: nothing in a table is longer than 120 characters.
"""

from __future__ import annotations

import ast
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.proof.joined import read_worst
from quantmatrix.proof.scopes import SCOPES, WEIGHTS
from quantmatrix.quoting import escape_markdown
from quantmatrix.report import bench_pages
from quantmatrix.report.table import write_table
from quantmatrix.tables.rows import ASSIGNMENT

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined
    from quantmatrix.tables.rows import Cell, FamilyRow

NOTICE = (
    "<!-- Rendered by `quantmatrix report` from matrix/ and reports/evidence/: do not edit. -->"
)


SIGNS = {
    "proven": "✓", "refused": "⊘", "failing": "✗", "unjudged": "≈", "stale": "↻", "unproven": "?", "planned": "…",
}  # fmt: skip
"""A sign for each state, as the page has it."""


def show_number(value: float | None) -> str:
    """Four significant digits, or nothing."""
    return "" if value is None else f"{value:.4g}"


def write_checkpoints(joined: Joined, cells: Sequence[Cell]) -> list[str]:
    """A heading per checkpoint, which the overview's proofs link to, and a line per cell below it."""
    parts = []
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in cells):
        row = joined.tables.checkpoints[checkpoint]
        about = [f"{joined.tables.models[row.model].name}: `{row.reference}`", row.scope, row.notes]
        parts += [f"### {checkpoint}", ". ".join(text for text in about if text)]
        lines = [list_cells(joined, cell) for cell in cells if cell.checkpoint == checkpoint]
        parts.append(write_table(CELL_HEAD, lines))
    return parts


CELL_HEAD = ("row", "hardware", "backend", "claim", "state", "PSNR dB", "proof")


def list_cells(joined: Joined, cell: Cell) -> list[str]:
    """A cell as a line of `CELL_HEAD`."""
    rule = f" (`{cell.rule}`)" if cell.rule else ""
    psnr = show_number(read_worst(joined.evidence.get(cell.id)).get("psnr_db"))
    label = joined.standings[cell.id].label
    proof = joined.link(cell, "record", "../") if cell.id in joined.evidence else ""
    where = [f"`{cell.row}`", cell.hardware, cell.backend, f"{cell.claim}{rule}"]
    return [*where, f"{SIGNS[joined.states[cell.id]]} {label}", psnr, proof]


def show_counts(counts: Mapping[str, int]) -> str:
    """`4 proven, 1 stale`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "–"


def write_family(joined: Joined, family: FamilyRow) -> str:
    """The page of one family: what is claimed, what was seen, the commands, the format."""
    cells = [cell for cell in joined.tables.cells if cell.family == family.id]
    facts = [
        ("checkpoint form", family.checkpoint_form),
        ("canonical CLI", family.canonical_cli),
        ("supported models", family.supported_models),
        ("extra dependency", family.extra_dependency),
        ("platform / notes", family.notes),
        ("cells", show_counts(joined.count(cells))),
    ]
    parts = [
        NOTICE,
        f"# {family.id}",
        "[All families](../support-matrix.md)",
        "\n".join(f"- {name}: {text}" for name, text in facts if text),
        "## Checkpoints",
        *write_checkpoints(joined, cells),
    ]
    measured = [cell for cell in cells if joined.states[cell.id] == "proven"]
    if measured:
        used = ", ".join(WEIGHTS[s] for s in SCOPES if any_of(joined, measured, s))
        parts += ["## What was measured", f"With {used}.", write_measurements(joined, measured)]
    if timed := bench_pages.list_lines(joined.benchmarks, joined.changes, cells):
        table = write_table(bench_pages.HEAD, timed)
        parts += ["## Speed and memory compared with BF16", bench_pages.LEGEND, table]
    open_cells = [c for c in cells if joined.states[c.id] in ("failing", "stale")]
    if open_cells:
        lines = [
            f"- {joined.link(c, c.id, '../')}: {escape_markdown(joined.reasons[c.id])}"
            for c in open_cells
        ]
        parts += ["## To be looked at", "\n".join(lines)]
    refused = [cell for cell in cells if joined.states[cell.id] == "refused"]
    if refused:
        parts += ["## Refusals", write_refusals(joined, refused)]
    parts += ["## Commands", write_commands(joined, cells)]
    if text := read_docstring(family.id):
        parts += ["## Format", text]
    return "\n\n".join(parts) + "\n"


def group_rows(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells by the row that they come from."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append(cell)
    return rows


def write_measurements(joined: Joined, cells: Sequence[Cell]) -> str:
    """Distance of each proven cell from the BF16 run of the same seed, at its worst step."""
    head = [
        "cell",
        "scope",
        "layers",
        "kernels",
        "PSNR dB",
        "cosine",
        "relative L2",
        "torch",
        "made",
    ]
    lines = []
    for cell in cells:
        record = joined.evidence[cell.id]
        worst = read_worst(record)
        components = record.plan.get("components", {}).values()
        layers = " + ".join(f"{c['quantized_layers']} of {c['total_layers']}" for c in components)
        kernels = Counter[str]()
        for component in components:
            kernels.update(component["backends"])
        numbers = [show_number(worst.get(n)) for n in ("psnr_db", "cosine", "relative_l2")]
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(kernels.items()))
        facts = [record.versions.get("torch", ""), record.made[:10]]
        scope = joined.standings[cell.id].scope
        lines.append([joined.link(cell, cell.id, "../"), scope, layers, shown, *numbers, *facts])
    return write_table(head, lines)


def write_refusals(joined: Joined, cells: Sequence[Cell]) -> str:
    """What the plan said where the row claims a refusal: hardware that hears the same in one entry."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        refusal = joined.evidence[cell.id].plan.get("refusal") or {}
        message = escape_markdown(str(refusal.get("message", "")))
        link = joined.link(cell, cell.hardware, "../")
        said.setdefault((cell.row, cell.rule, message), []).append(link)
    return "\n".join(
        f"- `{row}` on {', '.join(dict.fromkeys(links))}: `{rule}`: {message}"
        for (row, rule, message), links in said.items()
    )


def write_commands(joined: Joined, cells: Sequence[Cell]) -> str:
    """Per row the command that ran, with its scope, and below it what published weights need."""
    blocks = []
    for row, group in group_rows(cells).items():
        blocks.append(f"`{row}`")
        ran = next((cell for cell in group if cell.id in joined.evidence), None)
        if ran is not None and joined.evidence[ran.id].command:
            scope, record = joined.standings[ran.id].scope, joined.evidence[ran.id]
            blocks += [f"Ran ({scope}, `{ran.id}`):", show_commands([record.command])]
        offered = joined.offers[group[0].id]
        blocks += [f"{offered.title}:", show_commands(offered.commands)]
    return "\n\n".join(blocks)


def show_commands(commands: Iterable[str]) -> str:
    """Commands as a block to copy, one flag per line."""
    return "\n".join(["```bash", *map(wrap_command, commands), "```"])


def wrap_command(command: str) -> str:
    """A command quoted for a shell, one flag per line."""
    lines: list[list[str]] = [[]]
    for argument in shlex.split(command):
        if argument.startswith("--") or (lines[-1] and ASSIGNMENT.fullmatch(lines[-1][0])):
            lines.append([])
        lines[-1].append(argument)
    return " \\\n  ".join(join_arguments(line) for line in lines if line)


def join_arguments(arguments: Sequence[str]) -> str:
    """Arguments quoted for a shell; a leading assignment stays one."""
    if arguments and ASSIGNMENT.fullmatch(arguments[0]):
        name, _, value = arguments[0].partition("=")
        return f"{name}={shlex.quote(value)}"
    return shlex.join(arguments)


def any_of(joined: Joined, cells: Iterable[Cell], scope: str) -> bool:
    """Whether one of the cells is named by a record of a scope."""
    return any(joined.standings[cell.id].scope == scope for cell in cells)


def read_docstring(family: str) -> str:
    """The docstring of a family's module, read without importing it; empty when there is none."""
    name = family.replace("-", "_")
    folder = Path(__file__).parents[1] / "families"
    path = folder / name / "__init__.py" if (folder / name).is_dir() else folder / f"{name}.py"
    if not path.is_file():
        return ""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
