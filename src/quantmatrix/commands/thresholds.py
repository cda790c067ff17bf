"""`quantmatrix thresholds`: every limit with the measurement behind it, and what loosens them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.limits import Sample

FILE = "limits.csv"


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli import add_command

    text = "list the limits and the samples behind them; with --diff, 1 when any is loosened"
    parser = add_command(commands, "thresholds", text, run_thresholds)
    what = "a git revision, or another limits.csv, that the limits are compared with"
    parser.add_argument("--diff", metavar="REV|FILE", help=what)
    parser.add_argument("--reports", type=Path, metavar="DIR", help="folder of the reports")
    parser.add_argument("--json", action="store_true")


def run_thresholds(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print limits or loosenings."""
    from quantmatrix import limits, matrix
    from quantmatrix.cli import EXIT_PROBLEM, print_json

    root = matrix.tables_folder().parent
    path = (arguments.reports or root / "reports") / FILE
    if not path.is_file():
        raise UsageError(f"{path}: no such file; name the folder of the reports with --reports")
    samples = limits.read_samples(path)
    if arguments.diff:
        loosened = limits.list_loosened(read_older(arguments.diff, root), samples)
        if arguments.json:
            print_json({"ok": not loosened, "loosened": loosened, "against": arguments.diff})
        else:
            print("\n".join(loosened) or f"no limit is wider than in {arguments.diff}")
        return EXIT_PROBLEM if loosened else 0
    found = [{"class": s.kind, "model": s.model, **s.to_limits().to_json()} for s in samples]
    if arguments.json:
        print_json({"ok": True, "margin": limits.MARGIN, "limits": found})
    else:
        for sample in samples:
            print_limit(sample)
    return 0


def print_limit(sample: Sample) -> None:
    """One class on one model."""
    allowed = sample.to_limits()
    print(
        f"{sample.kind:26} {sample.model:11} {allowed.psnr_db:6.2f} dB  "
        f"rel L2 {allowed.relative_l2:.4f}  cosine {allowed.cosine:.5f}  "
        f"layer {allowed.layer_error:.4f}  ({allowed.source})"
    )


def read_older(word: str, root: Path) -> list[Sample]:
    """The samples of a file, or of a revision of the project."""
    from quantmatrix import limits
    from quantmatrix.matrix_changes import ask_git

    if Path(word).is_file():
        return limits.read_samples(Path(word))
    place = f"{word}:reports/{FILE}"
    done = ask_git(root, "show", place)
    if done.returncode:
        raise UsageError(
            f"--diff {word}: neither a file nor a revision that has reports/{FILE}; see `git log`"
        )
    return limits.parse_samples(done.stdout.decode(), place)
