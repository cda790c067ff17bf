"""`quantmatrix quantize`: make a checkpoint of any family from a full-precision model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.flags import ACCELERATION, QUANTIZED, remove_flags
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import add_request_flags

    text = "quantize a full-precision model into a family's format, calibrated by running it"
    parser = add_command(commands, "quantize", text, run_quantize)
    add_request_flags(parser)
    remove_flags(parser, *QUANTIZED, *ACCELERATION, "prompt", "seed", "backend")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--family", required=True, help="format to write: fp8, modelopt-fp8, nunchaku-svdq ..."
    )
    group.add_argument(
        "--scheme", help="scheme of the family: FP8, NVFP4, W8A8_DYNAMIC, tensor-static ..."
    )
    what = "a text encoder, such as text_encoder_2, to quantize instead of the transformers"
    group.add_argument("--component", metavar="NAME", help=what)
    group.add_argument("--precision", help="int4 or nvfp4, for nunchaku-svdq")
    group.add_argument("--rank", type=int, help="low-rank size, for nunchaku-svdq (default 32)")
    group.add_argument(
        "--keep", nargs="*", metavar="SET|REGEX",
        help="layers to leave unquantized (default: those of the validated checkpoints; no names: none)",
    )  # fmt: skip
    group.add_argument(
        "--calibration-prompts", metavar="FILE", help="file of prompts, one per line"
    )
    group.add_argument("--output-path", required=True, help="a folder, or one .safetensors file")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")
    group.add_argument("--json", action="store_true")


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty; UsageError for none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--calibration-prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--calibration-prompts {path}: {error}; expected text, one prompt per line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--calibration-prompts {path}: holds no prompt; expected one per line")
    return prompts


def show_progress(what: str, things: Iterable[Any]) -> Iterable[Any]:
    """A progress bar on standard error, where that is a terminal."""
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(things, desc=what, disable=not sys.stderr.isatty())
    return bar


def run_quantize(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix quantize`; raises UsageError for flags that nothing takes."""
    from quantmatrix.cli.output import print_json, read_request
    from quantmatrix.tiny.hub import use_tiny
    from quantmatrix.tools import quantize as work
    from quantmatrix.tools.quantize_encoder import quantize_encoder

    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}")
    given, request = arguments.calibration_prompts, use_tiny(read_request(arguments, rest))
    common = {
        "family": arguments.family,
        "output": arguments.output_path,
        "scheme": arguments.scheme,
        "kept": arguments.keep,
        "prompts": work.PROMPTS if given is None else read_prompts(given),
        "overwrite": arguments.overwrite,
        "show": show_progress,
    }
    own = {"precision": arguments.precision, "rank": arguments.rank}
    if arguments.component is None:
        found = work.quantize(request, **common, **own)
    elif named := [f"--{name}" for name, value in own.items() if value is not None]:
        raise UsageError(f"{named[0]}: for nunchaku-svdq, which is for transformers; leave it out")
    else:
        found = quantize_encoder(request, arguments.component, **common)
    if arguments.json:
        print_json({"ok": True, **found})
        return 0
    print(f"{found['output']}: {found['scheme']}, {found['bytes'] / 2**20:,.1f} MiB")
    for name, counts in found["components"].items():
        print(f"  {name}: {counts['quantized']} layers quantized, {counts['kept']} kept")
    return 0
