"""Pages: the Markdown of the report, written from tables and records that were joined.

The overview reproduces the quantization guide's two big tables with our proof beside each claim;
each family has a page with its rows, what was measured, what is refused, the commands to copy, and
the description of its format, which is the docstring of the module that reads it.
"""

from __future__ import annotations

import ast
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.proof.agreement import is_compiled
from quantmatrix.proof.carried import CARRIED
from quantmatrix.proof.freshness import CARRYING
from quantmatrix.proof.joined import LABELS, read_worst
from quantmatrix.proof.scopes import SCOPES, WEIGHTS
from quantmatrix.report import bench_pages
from quantmatrix.report.table import write_table
from quantmatrix.tables.rows import ASSIGNMENT

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, CheckpointRow, FamilyRow

NOTICE = (
    "<!-- Rendered by `quantmatrix report` from matrix/ and reports/evidence/: do not edit. -->"
)


def show_number(value: float | None) -> str:
    """Four significant digits, or nothing."""
    return "" if value is None else f"{value:.4g}"


def write_overview(joined: Joined, classes: str = "") -> str:
    """support-matrix.md: the picture, the counts, and the guide's two tables with our proof.

    `classes` is a sentence on the transformer classes that were proved.
    """
    tables = joined.tables
    claims = [cell for cell in tables.cells if cell.claim != "planned"]
    agreeing = sum(joined.agrees(cell) for cell in claims)
    share = f"{1000 * agreeing // len(claims) / 10} %" if claims else "no"
    counts = joined.count(tables.cells)
    picture = "![Support matrix: quant family by hardware](support-matrix.svg)"
    checkpoints = [row for row in tables.checkpoints.values() if row.algo]
    parts = [
        NOTICE,
        "# Support matrix",
        f"{agreeing} of {len(claims)} claims ({share}) are backed by a run of the row as it "
        "stands. Every state links to its evidence, and names its scope: what was run.",
        write_scopes(joined),
        *write_carried(joined),
        picture,
        write_table(["state and scope", "cells"], [(name, str(n)) for name, n in counts.items()]),
        "## Families and hardware",
        write_grid(joined),
        "## Quant families",
        "`quant_family` means a checkpoint and loading family with shared usage and loader "
        "behaviour, not just a numeric precision or a kernel backend.",
        write_families(joined),
        *([classes] if classes else []),
        "## Validated ModelOpt checkpoints",
        write_checkpoints(joined, checkpoints, ""),
        *(
            ["## Other programs", "Which of them loads which file: [runtimes.md](runtimes.md)."]
            if tables.runtimes
            else []
        ),
    ]
    return "\n\n".join(parts) + "\n"


def write_scopes(joined: Joined) -> str:
    """What each scope means, and how many cells agree with their claim by a record of it."""
    rows = []
    for scope in SCOPES:
        cells = [cell for cell in joined.tables.cells if joined.standings[cell.id].scope == scope]
        shown = [c for c in cells if joined.agrees(c) or is_compiled(joined.standings[c.id])]
        rows.append([f"`{scope}`", WEIGHTS[scope], str(len(shown))])
    return write_table(["scope", "what was run", "claims"], rows)


def write_carried(joined: Joined) -> list[str]:
    """A line on the records that are carried, where there are some."""
    carried = sum(reason.startswith(CARRYING) for reason in joined.reasons.values())
    return (
        [
            f"{carried} of these records are *carried*: the code has changed since, and the latents of "
            f"the same cells on a CPU have not, to the last bit ([{CARRIED}]({CARRIED}))."
        ]
        if carried
        else []
    )


def write_grid(joined: Joined) -> str:
    """Families by hardware, as counts."""
    tables = joined.tables
    rows = []
    for family in tables.families:
        cells: dict[str, list[Cell]] = {}
        for cell in tables.cells:
            if cell.family == family:
                cells.setdefault(cell.hardware, []).append(cell)
        boxes = [show_counts(joined.count(cells.get(name, []))) for name in tables.hardware]
        rows.append([f"[`{family}`](families/{family}.md)", *boxes])
    return write_table(["family", *tables.hardware], rows)


def show_counts(counts: Mapping[str, int]) -> str:
    """`4 proven, 1 stale`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "–"


def write_families(joined: Joined) -> str:
    """The guide's table of families, with our proof in the last column."""
    head = ["quant_family", "checkpoint form", "canonical CLI", "supported models"]
    head += ["extra dependency", "platform / notes", "proof"]
    rows = []
    for family in joined.tables.families.values():
        cells = [cell for cell in joined.tables.cells if cell.family == family.id]
        proof = f"[{show_counts(joined.count(cells))}](families/{family.id}.md)"
        facts = [family.checkpoint_form, family.canonical_cli, family.supported_models]
        facts += [family.extra_dependency, family.notes]
        rows.append([f"`{family.id}`", *facts, proof])
    return write_table(head, rows)


def write_checkpoints(joined: Joined, rows: Iterable[CheckpointRow], base: str) -> str:
    """The guide's table of validated checkpoints, with our proof in the last column."""
    head = ["Quant Algo", "Base Model", "Preferred CLI", "HF Repo", "Current Scope", "Notes"]
    lines = []
    for row in rows:
        cells = [cell for cell in joined.tables.cells if cell.checkpoint == row.id]
        facts = [f"`{row.algo}`", f"`{row.base}`", f"`{row.cli}`", f"`{row.reference}`"]
        lines.append([*facts, row.scope, row.notes, write_proof(joined, cells, base)])
    return write_table([*head, "Proof"], lines)


def write_proof(joined: Joined, cells: Sequence[Cell], base: str) -> str:
    """`**proven · stand-in**: cpu decode (2), h100; **unproven**: b200`, each linked to a record."""
    by_label: dict[str, dict[str, list[Cell]]] = {label: {} for label in LABELS}
    for cell in cells:
        by_hardware = by_label[joined.standings[cell.id].label]
        by_hardware.setdefault(f"{cell.hardware} {cell.backend}".strip(), []).append(cell)
    texts = []
    for label, by_hardware in by_label.items():
        links = []
        for name, found in by_hardware.items():
            names = [name, *(f"({number})" for number in range(2, len(found) + 1))]
            pairs = zip(found, names, strict=True)
            links.append(" ".join(joined.link(cell, name, base) for cell, name in pairs))
        if links:
            texts.append(f"**{label}**: {', '.join(links)}")
    return "; ".join(texts) or "no cell"


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
        write_table(["", ""], facts),
        "## Rows",
        write_rows(joined, cells),
    ]
    measured = [cell for cell in cells if joined.states[cell.id] == "proven"]
    if measured:
        used = ", ".join(WEIGHTS[s] for s in SCOPES if any_of(joined, measured, s))
        parts += ["## What was measured", f"With {used}.", write_measurements(joined, measured)]
    if timed := bench_pages.list_lines(joined.benchmarks, joined.changes, cells):
        table = write_table(bench_pages.HEAD, timed)
        parts += ["## Speed and memory beside BF16", bench_pages.LEGEND, table]
    open_cells = [c for c in cells if joined.states[c.id] in ("failing", "stale")]
    if open_cells:
        lines = [(joined.link(c, c.id, "../"), joined.reasons[c.id]) for c in open_cells]
        parts += ["## To be looked at", write_table(["cell", "why"], lines)]
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


def write_rows(joined: Joined, cells: Sequence[Cell]) -> str:
    """One line per row of cases.csv: the claim, and the state on each hardware."""
    lines = []
    for row, group in group_rows(cells).items():
        first = group[0]
        rule = f" (`{first.rule}`)" if first.rule else ""
        proof = write_proof(joined, group, "../")
        lines.append(
            [f"`{row}`", first.model, f"`{first.checkpoint}`", f"{first.claim}{rule}", proof]
        )
    return write_table(["row", "model", "checkpoint", "claim", "state"], lines)


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
    """What the plan said where the row claims a refusal."""
    lines = []
    for cell in cells:
        refusal = joined.evidence[cell.id].plan.get("refusal") or {}
        message = str(refusal.get("message", ""))
        lines.append([joined.link(cell, cell.id, "../"), f"`{cell.rule}`", message])
    return write_table(["cell", "rule", "what the plan says"], lines)


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
