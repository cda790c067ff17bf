"""`quantmatrix trace`: a profiled run, and which kernel each quantized layer ran by."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli import add_command
    from quantmatrix.request import add_request_flags

    text = "profile a generation (Chrome trace), and see that the planned kernels ran"
    parser = add_command(commands, "trace", text, run_trace)
    add_request_flags(parser)
    parser.add_argument("--output-path", default="trace.json.gz", metavar="FILE.json.gz")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(takes_overrides=True)


def run_trace(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Trace; 1 when a planned layer did not run by its kernel, 3 for a refusal."""
    from quantmatrix.cli import EXIT_PROBLEM, print_json, read_request
    from quantmatrix.trace import trace

    found = trace(read_request(arguments, rest), Path(arguments.output_path))
    if arguments.json:
        print_json(found)
    else:
        backends = Counter(layer["backend"] for layer in found["layers"].values())
        for backend, count in backends.items():
            print(f"{count} quantized layers ran by {backend}")
        print(found["output"])
    for problem in found["problems"]:
        print(f"quantmatrix: {problem}", file=sys.stderr)
    return EXIT_PROBLEM if found["problems"] else 0
