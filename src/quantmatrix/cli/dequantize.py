"""quantmatrix dequantize: a quantized checkpoint as plain weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.cli.flags import (
    ACCELERATION,
    ADAPTERS,
    GENERATION,
    OFFLOAD,
    SAVING,
    remove_flags,
)
from quantmatrix.cli.output import add_command, print_json, read_request, say
from quantmatrix.errors import UsageError
from quantmatrix.request import add_output_flags, add_request_flags

if TYPE_CHECKING:
    import argparse
    from typing import Any


def _add_dequantize(commands: Any) -> None:
    text = "write a checkpoint as a plain diffusers component folder (--output-path DIR)"
    parser = add_command(commands, "dequantize", text, run_dequantize)
    add_request_flags(parser)
    add_output_flags(parser)
    unused = (*GENERATION, *ACCELERATION, *OFFLOAD, *SAVING, *ADAPTERS, "device", "backend")
    remove_flags(parser, *unused)
    what = "transformer to write (default: transformer)"
    parser.add_argument("--component", default="transformer", metavar="NAME", help=what)
    parser.set_defaults(takes_overrides=True, output_path=None)


def run_dequantize(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix dequantize`; raises UsageError without an output path."""
    from quantmatrix.tiny.hub import use_tiny
    from quantmatrix.tools.dequantize import dequantize

    if not arguments.output_path:
        raise UsageError("--output-path is missing: name the folder to write")
    dtype = arguments.dtype or "float32"
    request = use_tiny(read_request(arguments, rest))
    written = dequantize(request, arguments.output_path, component=arguments.component, dtype=dtype)
    if arguments.json:
        print_json(written)
    else:
        say(
            f"{written['output']}: {written['tensors']} tensors, {written['bytes'] / 2**20:,.1f} MiB"
        )
    return 0
