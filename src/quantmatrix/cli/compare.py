"""`quantmatrix compare A B`: how far B is from A, for checkpoints, backends and saved runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

BOUNDS = {
    "min_psnr": "smallest PSNR of the latents (dB) at the worst step",
    "max_rel_l2": "largest relative L2 error of the latents at the worst step",
    "min_cosine": "smallest cosine of the latents at the worst step",
    "min_image_psnr": "smallest PSNR of the picture or clip (dB)",
    "min_ssim": "smallest SSIM of the picture, or mean SSIM of the frames",
}


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import add_request_flags, parse_number

    text = "compare two checkpoints, backends or saved runs; exit code 1 when a limit is exceeded"
    parser = add_command(commands, "compare", text, run_compare)
    what = "a checkpoint, the base model, X@BACKEND, or a file of `generate --save-latents`"
    parser.add_argument("reference", metavar="A", help=what)
    parser.add_argument("candidate", metavar="B", help="the same, compared with A")
    add_request_flags(parser)
    for action in parser._actions:
        if action.dest == "model_path":
            action.required = False
    limits = parser.add_argument_group("limits")
    for name, help_text in BOUNDS.items():
        flag = f"--{name.replace('_', '-')}"
        limits.add_argument(flag, type=parse_number, metavar="NUMBER", help=help_text)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(takes_overrides=True)


def run_compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run what has to be run, compare, and print; 1 when out of limits, 3 for a refusal."""
    from quantmatrix.cli.output import print_json, read_request, report_progress
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.tables.rows import PROMPT

    request = read_request(arguments, rest)
    if not arguments.prompt:
        request = replace(request, prompt=(PROMPT,))
    from quantmatrix.measure.comparison import Bounds, compare_sides, read_side

    sides = []
    for side in (arguments.reference, arguments.candidate):
        report_progress(side)
        sides.append(read_side(side, request))
    bounds = Bounds(**{name: getattr(arguments, name) for name in BOUNDS})
    found = compare_sides(sides[0], sides[1], bounds)
    if arguments.json:
        print_json(found)
    else:
        print_comparison(found)
    return EXIT_PROBLEM if found["problems"] else 0


def print_comparison(found: Mapping[str, Any]) -> None:
    """The per-step curve as a table, the picture, and what is out of limits."""
    from quantmatrix.cli.output import report_problems

    print(f"A {found['reference']['name']}")
    print(f"B {found['candidate']['name']}")
    print(f"{'step':>5} {'PSNR dB':>10} {'rel L2':>12} {'cosine':>12}")
    for number, step in enumerate(found["latents"]["steps"]):
        print_step(str(number), step)
    print_step("worst", found["latents"]["worst"])
    if media := found["media"]:
        print(f"picture: PSNR {tell(media['psnr_db'])} dB, SSIM {media['ssim']:.6g}")
    if found["latents"]["identical"]:
        print("every step is identical bit for bit")
    report_problems(found["problems"])


def print_step(label: str, step: Mapping[str, Any]) -> None:
    """One line of the table."""
    cosine = tell(step["cosine"], "-")
    print(
        f"{label:>5} {tell(step['psnr_db']):>10} {tell(step['relative_l2'], 'inf'):>12} {cosine:>12}"
    )


def tell(value: float | None, other: str = "inf") -> str:
    """Six digits; what JSON cannot hold as text."""
    return other if value is None else f"{value:.6g}"
