"""`quantmatrix explain`: one question about the matrix, answered from claims and evidence."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.report.explain import Explanation


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = "check whether a checkpoint works on your GPU, and what to use if it does not"
    parser = add_command(commands, "explain", text, run_explain)
    parser.add_argument(
        "--checkpoint",
        help="an id, a hub id, a path or file name; `recommend` chooses one for you",
    )
    parser.add_argument("--hardware", required=True, help="an id, a group or `auto`")
    parser.add_argument("--model", help="only checkpoints of this model")
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument("--json", action="store_true")


def run_explain(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print one explanation per cell; 0 whatever the state, for the question was answered.

    UsageError without a checkpoint, which names the command that chooses one.
    """
    if arguments.checkpoint is None:
        model = f" --model {arguments.model}" if arguments.model else ""
        raise UsageError(
            "--checkpoint is missing: name one, or let "
            f"`quantmatrix recommend --hardware {arguments.hardware}{model}` choose it"
        )
    from quantmatrix.cli.matrix import tell_where
    from quantmatrix.cli.output import print_json
    from quantmatrix.proof import columns, reports_folder
    from quantmatrix.proof.freshness import read_now
    from quantmatrix.report import render
    from quantmatrix.report.explain import Explainer
    from quantmatrix.tables import read

    evidence = render.read_evidence(arguments.reports)
    now = read_now(reports_folder.find_source(arguments.reports), evidence)
    others = columns.read_reports(reports_folder.find_source(arguments.reports))
    explainer = Explainer(read.read(), evidence, now, others)
    found = explainer.explain(arguments.checkpoint, arguments.hardware, arguments.model)
    if arguments.json:
        answer = {"cells": [one.to_json() for one in found]}
        print_json(
            {"ok": True, "read_from": reports_folder.tell_source(arguments.reports), **answer}
        )
    else:
        print("\n\n".join(to_text(explanation) for explanation in found))
        tell_where(arguments.reports)
    return 0


def to_text(found: Explanation) -> str:
    """An explanation for people."""
    from quantmatrix.proof.scopes import label

    lines = [
        f"{found.cell or f'{found.checkpoint} on {found.hardware}'}: "
        f"{label(found.state, found.scope)}",
        f"  why       {found.why}",
    ]
    if found.ran:
        lines.append(f"  ran       {found.ran}")
    lines.append(f"  {found.title}")
    lines += [f"            {command}" for command in found.commands]
    if found.evidence:
        lines.append(f"  evidence  {found.evidence}")
    for other in found.alternatives:
        label_text = label(other.state, other.scope)
        lines.append(f"  instead   {other.how}: {other.cell} ({label_text})")
        lines += [f"            {command}" for command in other.commands]
    if not found.alternatives and found.state != "proven":
        lines.append("  instead   nothing in the tables")
    return "\n".join(lines)
