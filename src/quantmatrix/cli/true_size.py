"""`quantmatrix true-size`: a cell's form at its model's own size, with random weights, beside BF16."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = "run four steps of a cell at its model's true size with random weights, quantized and in BF16"
    parser = add_command(commands, "true-size", text, run_true_size)
    parser.add_argument(
        "cell", help="id of a cell (row@hardware); this machine must be its hardware"
    )
    parser.add_argument("--json", action="store_true")


def run_true_size(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print what was measured (seconds, GiB); the suite's check of the same name judges it.

    Raises UsageError for an unknown cell.
    """
    from quantmatrix.cli.output import print_json
    from quantmatrix.measure import true_size
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.tables import read

    tables = read.read()
    cell = next((cell for cell in tables.cells if cell.id == arguments.cell), None)
    if cell is None:
        raise UsageError(f"{arguments.cell}: no such cell; see `quantmatrix matrix list`")
    request = Workbench(tables).request(cell)
    with tempfile.TemporaryDirectory(prefix="quantmatrix-") as folder:
        row = tables.checkpoints[cell.checkpoint]
        found = true_size.measure(row, request, tables, Path(folder))
    metrics, times = found.to_json(), found.tell_times()
    if arguments.json:
        print_json({"ok": True, "cell": cell.id, "metrics": metrics, "seconds": times})
        return 0
    print(f"{cell.id}: {found.size}, random weights")
    for form in true_size.FORMS:
        size, peak = metrics["weights"][f"{form}_bytes"], metrics["peak"][f"{form}_bytes"]
        held = f", {peak / 2**30:.2f} GiB at most" if peak else ""
        print(f"  {form:10} {times[f'step {form}']:.3f} s a step, {size / 2**30:.2f} GiB{held}")
    errors = ", ".join(f"{step['relative_l2']:.4g}" for step in metrics["steps"])
    print(f"  relative L2 of the latents after each step: {errors}")
    print(f"  repeats    {'bit-identical' if metrics['repeats'] else 'differ'}")
    return 0
