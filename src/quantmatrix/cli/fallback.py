"""`quantmatrix fallback`: which layers of a quantized checkpoint to keep in full precision."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError
from quantmatrix.files import check_writable, whole, write_whole


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import add_request_flags, parse_number

    text = "measure how much each quantized layer changes the latents; propose the smallest set to keep in BF16"
    parser = add_command(commands, "fallback", text, run_fallback)
    add_request_flags(parser)
    parser.add_argument(
        "--target-psnr", type=parse_number, default=30.0, metavar="DB",
        help="PSNR that the final latents must reach against full precision (default 30)",
    )  # fmt: skip
    parser.add_argument(
        "--by",
        choices=("layer", "block"),
        default="layer",
        help="keep single layers or whole blocks",
    )
    parser.add_argument("--output-path", metavar="DIR", help="write fallback.json and .svg there")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(takes_overrides=True)


def run_fallback(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix fallback`; raises UsageError for an output path that is a file."""
    from quantmatrix.cli.output import print_json, read_request
    from quantmatrix.cli.quantize import show_progress
    from quantmatrix.measure import fallback

    folder = Path(arguments.output_path) if arguments.output_path else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-path {folder}: is a file, expected a folder")
    if folder is not None:
        check_writable(folder / "files")
    found = fallback.propose(
        read_request(arguments, rest),
        target_db=arguments.target_psnr,
        by=arguments.by,
        show=show_progress,
    )
    if folder is not None:
        write_results(found, folder)
    if arguments.json:
        print_json(found)
    else:
        print_table(found)
    return 0 if found["met"] else 1


def write_results(found: dict[str, Any], folder: Path) -> None:
    """Write the numbers and the picture, each whole or not at all."""
    from quantmatrix.measure import fallback

    text = json.dumps(found, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_whole(folder / "fallback.json", text.encode())
    with whole(folder / "fallback.svg") as temporary:
        fallback.draw_shares(found, temporary)


def print_table(found: dict[str, Any]) -> None:
    """The shares, and what is proposed."""
    print(f"{'relative L2':>12}  {'PSNR dB':>8}  layer alone quantized")
    for share in found["shares"]:
        mark = "  (keep)" if share["kept"] else ""
        psnr = "inf" if share["psnr_db"] is None else f"{share['psnr_db']:.2f}"
        print(f"{share['relative_l2']:12.3e}  {psnr:>8}  {share['name']}{mark}")
    verdict = "meets" if found["met"] else "does not meet"
    shown = "inf" if found["psnr_db"] is None else f"{found['psnr_db']:.2f}"
    print(
        f"keeping {len(found['kept'])} of the quantized layers gives {shown} dB, which {verdict} "
        f"{found['target_psnr_db']:g} dB"
    )
