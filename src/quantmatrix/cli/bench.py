"""`quantmatrix bench`: quantized beside BF16, with an interval, a verdict, and a gate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError
from quantmatrix.files import check_writable

ROUNDS = 20
STAGES = ("layers", "step", "load", "memory")
"""What is measured of a component, one after the other: the steps of the progress bar."""


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import add_request_flags, parse_number

    text = "time a checkpoint against BF16: layers, step, load and memory, each with its interval"
    parser = add_command(commands, "bench", text, run_bench)
    add_request_flags(parser, needed=False)
    what = parser.add_argument_group("what to measure, instead of --model-path")
    what.add_argument("--row", nargs="+", metavar="CELL", help="cells of the matrix (row@hardware)")
    what.add_argument("--synthetic", choices=("full", "tiny"), help="random weights of this size")
    what.add_argument("--family", help="with --synthetic: fp8, modelopt-nvfp4 ...")
    what.add_argument(
        "--scheme", help="with --synthetic: scheme of the family (default: its first)"
    )
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("KEPT", "NEW"),
        help="compare two saved results, measure nothing",
    )
    how = parser.add_argument_group("measurement")
    how.add_argument("--repeats", type=int, default=ROUNDS, help="rounds of each comparison")
    how.add_argument(
        "--baseline", metavar="FILE", help="saved results: exit code 1 when a ratio got worse"
    )
    text = "how much worse is allowed (default 1.1, of a layer alone 1.35)"
    how.add_argument("--tolerance", type=parse_number, help=text)
    how.add_argument("--output-path", metavar="FILE", help="save the results")
    how.add_argument("--json", action="store_true")
    parser.set_defaults(takes_overrides=True)


def run_bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure, keep, compare; 1 for a regression, 2 where nothing can be judged, 3 for a refusal."""
    from quantmatrix.cli.output import report_problems
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.proof import bench_gate, bench_results

    check_arguments(arguments)
    kept = None
    if arguments.compare:
        kept, results = (bench_results.read(Path(file)) for file in arguments.compare)
    else:
        if arguments.output_path:
            check_writable(Path(arguments.output_path))
        if arguments.baseline:
            kept = bench_results.read(Path(arguments.baseline))  # before anything is measured
        results = measure(arguments, rest)
        planned = [result["what"] for result in results]
        bench_results.check_file(
            {"schema": bench_results.SCHEMA, "planned": planned, "results": results}, "measured"
        )
        if arguments.output_path:
            bench_results.write(results, planned, Path(arguments.output_path))
    findings = None
    if kept is not None:
        findings = bench_gate.compare_results(kept, results, arguments.tolerance)
    show(arguments, results, findings)
    worse = [finding for finding in findings or () if finding.verdict == bench_gate.WORSE]
    report_problems(finding.tell() for finding in worse)
    return EXIT_PROBLEM if worse else 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError where the flags do not say exactly one thing to measure."""
    from quantmatrix.proof.ratios import FEWEST

    ways = {
        "--model-path": arguments.model_path,
        "--row": arguments.row,
        "--synthetic": arguments.synthetic,
        "--compare": arguments.compare,
    }
    given = [flag for flag, value in ways.items() if value]
    if len(given) != 1:
        found = f"both {' and '.join(given)}" if given else "none of them"
        raise UsageError(f"give one of {', '.join(ways)}; found {found}")
    if arguments.repeats < FEWEST:
        raise UsageError(
            f"--repeats {arguments.repeats}: expected {FEWEST} or more; fewer give no interval"
        )
    if arguments.compare and (arguments.baseline or arguments.output_path):
        raise UsageError("--compare measures nothing: leave out --baseline and --output-path")
    if arguments.tolerance is not None and not (arguments.baseline or arguments.compare):
        raise UsageError("--tolerance is for --baseline and --compare")


def measure(arguments: argparse.Namespace, rest: list[str]) -> list[dict[str, Any]]:
    """The results of what the flags name."""
    if arguments.row:
        return measure_cells(arguments)
    with progress_bar("bench", len(STAGES)) as say:
        if arguments.synthetic:
            return [measure_synthetic(arguments, say)]
        return [measure_request(arguments, rest, say)]


def measure_cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of cells of the matrix; UsageError for one that there is not, or that is refused."""
    from quantmatrix.measure.bench.rows import find_cells
    from quantmatrix.tables import read

    cells = find_cells(read.read(), arguments.row)
    from quantmatrix.measure.bench.pairs import bench_cell
    from quantmatrix.measure.workbench import Workbench

    workbench = Workbench(read.read(), tiny=arguments.tiny)
    results = []
    for cell in cells:
        with progress_bar(cell.id, len(STAGES)) as say:
            results.append(bench_cell(workbench, cell, arguments.repeats, say))
    return results


def measure_request(
    arguments: argparse.Namespace, rest: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """The result of the flags of `generate`."""
    from quantmatrix.cli.output import read_request

    request = read_request(arguments, rest)
    from quantmatrix.measure.bench.pairs import bench_request, name_request

    found = bench_request(request, request.model_path, arguments.repeats, say)
    return {"what": name_request(request), "command": tell_command(arguments), **found}


def measure_synthetic(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of random weights in a family's format.

    Raises UsageError for an unknown model, family or scheme.
    """
    from quantmatrix import families, models
    from quantmatrix.hardware import probe

    for flag, value, known in (
        ("--model-id", arguments.model_id, models.IDS),
        ("--family", arguments.family, families.IDS),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value}: --synthetic expects one of {', '.join(known)}")
    schemes = families.load(arguments.family).SCHEMES
    scheme = arguments.scheme or next(iter(schemes))
    if scheme not in schemes:
        raise UsageError(f"--scheme {scheme}: {arguments.family} has {', '.join(schemes)}")
    from quantmatrix.measure.bench.pairs import bench_synthetic

    names = [arguments.model_id, arguments.family, scheme, arguments.backend or "default"]
    found = bench_synthetic(
        arguments.model_id,
        probe.probe(arguments.device),
        family=arguments.family,
        scheme=scheme,
        size=arguments.synthetic,
        backend=arguments.backend,
        repeats=arguments.repeats,
        say=say,
    )
    what = f"synthetic {arguments.synthetic} {' '.join(names)}"
    return {"what": what, "command": tell_command(arguments), **found}


def tell_command(arguments: argparse.Namespace) -> str:
    """The command as it was given."""
    import shlex

    return shlex.join(["quantmatrix", *arguments.argv])


@contextmanager
def progress_bar(title: str, stages: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that moves with every stage; yields what is called with its name."""
    from tqdm import tqdm

    total = 1 + stages
    with tqdm(total=total, desc=title, disable=not sys.stderr.isatty(), leave=False) as bar:

        def say(stage: str) -> None:
            if bar.n + 1 > bar.total:  # another component
                bar.total += stages
            bar.set_postfix_str(stage)
            bar.update()

        yield say


def show(
    arguments: argparse.Namespace, results: list[dict[str, Any]], findings: list[Any] | None
) -> None:
    """Print results and findings, as JSON or as tables."""
    from quantmatrix.cli.output import print_json
    from quantmatrix.proof import bench_gate

    if arguments.json:
        judged = None if findings is None else bench_gate.to_json(findings)
        worse = any(finding.verdict == bench_gate.WORSE for finding in findings or ())
        print_json({"ok": not worse, "results": results, "comparison": judged})
        return
    if not arguments.compare:
        for result in results:
            print_result(result)
    if findings is not None:
        if arguments.compare:
            for finding in findings:
                print(finding.tell())
        counts = bench_gate.count_verdicts(findings)
        print("; ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def print_result(result: Mapping[str, Any]) -> None:
    """A result as a table: what took how long, the ratio with its interval, the verdict."""
    from quantmatrix.proof.bench_results import list_comparisons

    print(
        f"{result['what']}, {result['size']}, on {result['device']} ({result['settings']['clock']})"
    )
    head = ("", "BF16 ms", "quantized ms", "ratio", "95 % interval", "noticed from", "verdict")
    lines = [head]
    for name, timing in list_comparisons(result):
        medians = [f"{timing['median'][form]:.4g}" for form in ("bf16", "quantized")]
        interval = f"{timing['low']:.3f} to {timing['high']:.3f}"
        count = f"{name} ({timing['count']} such)" if "count" in timing else name
        lines.append(
            (
                count,
                *medians,
                f"{timing['ratio']:.3f}",
                interval,
                f"{timing['detectable']:.1%}",
                timing["verdict"],
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    for line in lines:
        first, *middle, last = line
        cells = [f"{text:>{width}}" for text, width in zip(middle, widths[1:-1], strict=True)]
        print("  ".join([f"  {first:<{widths[0]}}", *cells, last]))
    for component, part in result["components"].items():
        memory = part["memory"]
        for what, text in (("weights", "weights"), ("peak", "weights and working memory")):
            sizes = [memory[form][what] / 2**20 for form in ("bf16", "quantized")]
            print(
                f"  {component} {text}: {sizes[1]:,.2f} MiB, BF16 {sizes[0]:,.2f} MiB: "
                f"{memory[f'{what}_ratio']:.3f}, {memory[f'{what}_verdict']}"
            )
        print(f"  {component} working memory counted by {memory['counted_by']}")
