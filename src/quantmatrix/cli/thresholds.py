"""`quantmatrix thresholds`: every limit with the measurements behind it, and what loosens them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.proof.limit_samples import Sample
    from quantmatrix.proof.limits import Ledger, Limits

FILE = "limits.csv"


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = (
        "list the limits and the samples behind them; with --diff, exit code 1 when any is loosened"
    )
    parser = add_command(commands, "thresholds", text, run_thresholds)
    what = "a git revision, or another limits.csv, that the limits are compared with"
    parser.add_argument("--diff", metavar="REV|FILE", help=what)
    what = "run every base model in BF16 and in FP32, and write spread.csv; exit code 1 when that loosens a limit"
    parser.add_argument("--measure-spread", action="store_true", help=what)
    parser.add_argument("--reports", type=Path, metavar="DIR", help="folder of the reports")
    parser.add_argument("--json", action="store_true")


def run_thresholds(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print limits or loosenings.

    Raises UsageError where there are no limits to read, and where a spread would be written into
    the installed package.
    """
    from quantmatrix.cli.matrix import tell_where
    from quantmatrix.cli.output import print_json
    from quantmatrix.proof import known_limits, limits, packaged, reports_folder

    path = reports_folder.find_source(arguments.reports) / FILE
    ours = known_limits.own_reports() / FILE
    if not path.is_file() and arguments.reports is None and not arguments.measure_spread:
        print(f"no {path}: these are the limits that come with quantmatrix", file=sys.stderr)
        path = ours
    if not path.is_file() and (arguments.reports or not arguments.measure_spread):
        raise UsageError(f"{path}: no such file; name the folder of the reports with --reports")
    if arguments.measure_spread and path.parent == packaged.FOLDER:
        raise UsageError(f"--measure-spread would write into {path.parent}: name --reports DIR")
    if arguments.measure_spread:
        return tell_loosened(measure_spread(path), str(path), arguments.json)
    ledger = limits.read(path)
    if arguments.diff:
        loosened = limits.list_loosened(read_older(arguments.diff), ledger)
        return tell_loosened(loosened, arguments.diff, arguments.json)
    found = ledger.list_limits()
    if arguments.json:
        rows = [
            {"class": s.kind, "model": s.model, "side": s.side, **allowed.to_json()}
            for s, allowed in found
        ]
        spreads = {name: vars(spread) for name, spread in ledger.spreads.items()}
        answer = {"margin": limits.MARGIN, "limits": rows, "spreads": spreads}
        print_json({"ok": True, "read_from": str(path), **answer})
    else:
        for sample, allowed in found:
            print_limit(sample, allowed)
        tell_where(arguments.reports)
    return 0


def measure_spread(path: Path) -> list[str]:
    """Measure, write the files, and say what is looser than it was."""
    from quantmatrix.measure.spread import measure_all
    from quantmatrix.proof import limits
    from quantmatrix.proof.limit_samples import read_samples
    from quantmatrix.tables import read

    tables = read.read()
    found = measure_all(tables, lambda text: print(text, file=sys.stderr, flush=True))
    return limits.write(limits.Ledger(read_samples(path), found), path)


def tell_loosened(loosened: list[str], against: str, as_json: bool) -> int:
    """Print what is looser than it was; exit code 1 when anything is."""
    from quantmatrix.cli.output import print_json
    from quantmatrix.exit_codes import EXIT_PROBLEM

    if as_json:
        print_json({"ok": not loosened, "loosened": loosened, "against": against})
    else:
        print("\n".join(loosened) or f"no limit is wider than in {against}")
    return EXIT_PROBLEM if loosened else 0


def print_limit(sample: Sample, allowed: Limits) -> None:
    """One class on one model."""
    print(
        f"{sample.kind:26} {sample.model:11} {sample.side:11} {allowed.psnr_db:6.2f} dB  "
        f"rel L2 {allowed.relative_l2:.4f}  cosine {allowed.cosine:.5f}  "
        f"layer {allowed.layer_error:.4f}  decided by: {allowed.decided}  ({allowed.source})"
    )


def read_older(reference: str) -> Ledger:
    """The ledger of a file and the spread.csv beside it, or of a revision of the project.

    Raises UsageError for a word that is neither.
    """
    from quantmatrix.proof import limit_samples, limits
    from quantmatrix.proof.revisions import ask_git
    from quantmatrix.report.changes import find_checkout

    if Path(reference).is_file():
        spreads = limit_samples.read_spreads(Path(reference).with_name(limit_samples.SPREADS))
        return limits.Ledger(limit_samples.read_samples(Path(reference)), spreads)
    root = find_checkout(f"--diff {reference}")
    texts = []
    for name in (FILE, limit_samples.SPREADS):
        done = ask_git(root, "show", f"{reference}:reports/{name}")
        texts.append("" if done.returncode else done.stdout.decode())
    if not texts[0]:
        raise UsageError(
            f"--diff {reference}: neither a file nor a revision that has reports/{FILE}; see `git log`"
        )
    samples = limit_samples.parse_samples(texts[0], f"{reference}:reports/{FILE}")
    address = f"{reference}:reports/{limit_samples.SPREADS}"
    spreads = limit_samples.parse_spreads(texts[1], address) if texts[1] else {}
    return limits.Ledger(samples, spreads)  # revisions before spreads were kept have none
