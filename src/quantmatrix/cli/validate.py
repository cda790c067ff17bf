"""`quantmatrix validate`: a checkpoint against its base model, as a folder to publish with it."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.flags import SAVING, remove_flags
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import add_output_flags, add_request_flags

    text = "measure a quantized checkpoint against its base model: page, JSON, model-card block"
    parser = add_command(commands, "validate", text, run_validate)
    add_request_flags(parser)
    add_output_flags(parser)
    remove_flags(parser, *SAVING)
    parser.add_argument("--prompts", metavar="FILE", help="prompts, one per line")
    parser.set_defaults(takes_overrides=True, output_path=None)


def run_validate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Write the folder; 1 when a layer is not quantized as declared, 3 for a refusal.

    Raises UsageError without an output path, and for two sources of prompts.
    """
    from quantmatrix.cli.output import print_json, read_request, report_problems, report_progress
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.tables.rows import PROMPT

    if not arguments.output_path:
        raise UsageError("--output-path is missing: name the folder to write")
    if arguments.prompts and arguments.prompt:
        raise UsageError("--prompts and --prompt: give one of them")
    request = read_request(arguments, rest)
    folder = Path(arguments.output_path)
    from quantmatrix.measure.validate import read_prompts, validate
    from quantmatrix.measure.validation_page import check_output, write_folder

    check_output(folder)
    if arguments.prompts:
        request = replace(request, prompt=read_prompts(Path(arguments.prompts)))
    elif not arguments.prompt:
        request = replace(request, prompt=(PROMPT,))

    found = validate(request, tell_command(arguments, rest), report_progress)
    write_folder(found, folder)
    if arguments.json:
        print_json({**found.report, "output": str(folder)})
    else:
        from quantmatrix.measure.validation_page import list_facts

        print("\n".join(f"{name:17} {value}" for name, value in list_facts(found.report)))
        print(folder / "index.html")
        report_problems(found.problems)
    return EXIT_PROBLEM if found.problems else 0


def tell_command(arguments: argparse.Namespace, rest: list[str]) -> str:
    """The command that repeats the measurement."""
    command = ["quantmatrix", "validate", "--model-path", arguments.model_path, *rest]
    flags = ("backend", "device", "dtype", "quantization", "quantization_precision", "revision", "witness",
             "nibble_order", "nvfp4_layout",
             "quantization_rank", "height", "width", "num_frames", "num_inference_steps",
             "guidance_scale", "negative_prompt", "prompts")  # fmt: skip
    for name in flags:
        if (value := getattr(arguments, name, None)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("prompt", "seed"):
        if values := getattr(arguments, name):
            command += [f"--{name}", *map(str, values)]
    command += ["--tiny"] * bool(arguments.tiny)
    return shlex.join([*command, "--output-path", arguments.output_path])
