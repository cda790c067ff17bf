"""The command line. Every command has `--json`; nothing heavy is imported before it is needed.

Exit codes: 0 done, 1 something is wrong with a file or a claim, 2 the words contradict each other,
3 a refusal (the plan ended in a rule), 14 the environment is unusable (the hub cannot be read, a package
is missing, the disk is full), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from quantmatrix import __version__
from quantmatrix.commands import NAMES
from quantmatrix.errors import QuantmatrixError, RefusedError, UsageError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, blames_environment
from quantmatrix.matrix import MatrixError
from quantmatrix.places import check_place, naming
from quantmatrix.quoting import escape_lines, limit_message
from quantmatrix.request import (
    FP4_BACKEND_VARIABLE,
    Request,
    add_output_flags,
    add_request_flags,
    add_sharing_flag,
    normalize_words,
)

LIST_FILTERS = ("family", "model", "hardware", "claim", "state", "scope")
EXIT_PROBLEM, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143

Handler = Callable[[argparse.Namespace, list[str]], int]


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, so that `--json` has them, too."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse would print its usage and exit."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = normalize_words(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        code = run_command(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except RefusedError as error:
        return report_error(error, EXIT_REFUSED, as_json=as_json)
    except QuantmatrixError as error:
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_PROBLEM
        code = ENVIRONMENT_UNUSABLE if blames_environment(error) else code
        return report_error(error, code, as_json=as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_output()  # whoever read it went away
        return EXIT_PROBLEM
    except OSError as error:
        code = ENVIRONMENT_UNUSABLE if blames_environment(error) else EXIT_PROBLEM
        try:
            report_error(explain_os_error(error), code, as_json=as_json)
            sys.stdout.flush()
        except OSError:  # it was the output that could not be written
            drop_output()
        return code


def drop_output() -> None:
    """Send what is still buffered nowhere, or Python tries to write it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(words: list[str]) -> int:
    """Parse the words and run their command."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    arguments.words = words
    handler: Handler | None = getattr(arguments, "handler", None)
    if handler is None:
        if rest:
            raise UsageError(f"{' '.join(rest)}: which command? See `{parser.prog} --help`")
        parser.print_help()
        return EXIT_USAGE
    if rest and not getattr(arguments, "takes_overrides", False):
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}")
    return handler(arguments, rest)


def explain_os_error(error: OSError) -> QuantmatrixError:
    """What the system would not do, for people."""
    if error.filename is None:
        return QuantmatrixError(str(error))
    return QuantmatrixError(
        f"{error.filename}: {error.strerror}; look at the path, its permissions and the free space"
    )


def report_error(error: QuantmatrixError, code: int, *, as_json: bool) -> int:
    """Print an error: words on standard error, and the same as JSON where that was asked for."""
    message = shorten_error(error)
    print(f"quantmatrix: {message}", file=sys.stderr)
    if as_json:
        rule = getattr(error, "rule", None)
        refusal = {"rule": rule, "message": message} if rule else None
        kind = type(error).__name__
        print_json({"ok": False, "refusal": refusal, "error": {"type": kind, "message": message}})
    return code


def shorten_error(error: QuantmatrixError) -> str:
    """The words of an error, without what names and values of strangers may do in them.

    Only the list of what is wrong with the tables, which are the user's own, is shown to its end.
    """
    if not isinstance(error, MatrixError):
        return limit_message(str(error))
    return "\n".join(limit_message(line) for line in str(error).split("\n"))


def say(text: str, *, to_errors: bool = False) -> None:
    """Print lines for people, in which names and values of strangers are escaped."""
    print(escape_lines(text), file=sys.stderr if to_errors else sys.stdout)


def print_json(value: Any) -> None:
    """Print finite, sorted JSON."""
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=str))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = Parser(
        prog="quantmatrix",
        description="Which quantized diffusion checkpoint works on which hardware, with proof.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"quantmatrix {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_generate(commands)
    _add_plan(commands)
    _add_inspect(commands)
    _add_dequantize(commands)
    _add_doctor(commands)
    _add_matrix(commands)
    _add_tiny_hub(commands)
    _add_report(commands)
    for name in NAMES:
        import_module(f"quantmatrix.commands.{name}").add_to(commands)
    return parser


def add_command(commands: Any, name: str, text: str, handler: Handler) -> argparse.ArgumentParser:
    """Add the parser of one command; `handler` runs it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_generate(commands: Any) -> None:
    parser = add_command(
        commands, "generate", "generate images or videos with a checkpoint", run_generate
    )
    add_request_flags(parser)
    add_output_flags(parser)
    parser.add_argument("--save-latents", metavar="FILE", help="keep the run for `compare`")
    add_sharing_flag(parser)
    parser.set_defaults(takes_overrides=True)


def _add_plan(commands: Any) -> None:
    text = "say what would run, with which kernels and memory, or why not; reads headers only"
    parser = add_command(commands, "plan", text, run_plan)
    add_request_flags(parser)
    add_output_flags(parser)
    add_sharing_flag(parser)
    parser.add_argument("--hardware", help="a row of hardware.csv instead of this machine")
    parser.set_defaults(takes_overrides=True)


def _add_inspect(commands: Any) -> None:
    text = "describe a checkpoint: family, why, schemes per layer, sizes, header facts"
    parser = add_command(commands, "inspect", text, run_inspect)
    parser.add_argument("checkpoint", help="a file, a folder or a hub id")
    parser.add_argument("--tiny", action="store_true", help="look in the tiny hub")
    parser.add_argument("--layers", action="store_true", help="list every quantized layer")
    what = "compare decoded layers with this base model's own weights; 1 when one disagrees"
    parser.add_argument("--against", metavar="BASE", help=what)
    what = "which transformer of the base a file is compared with (default: the first)"
    parser.add_argument("--component", metavar="NAME", help=what)
    parser.add_argument("--json", action="store_true")


def _add_dequantize(commands: Any) -> None:
    text = "write a checkpoint as a plain diffusers component folder (--output-path DIR)"
    parser = add_command(commands, "dequantize", text, run_dequantize)
    add_request_flags(parser)
    add_output_flags(parser)
    parser.add_argument("--component", default="transformer")
    parser.set_defaults(takes_overrides=True, output_path=None)


def _add_doctor(commands: Any) -> None:
    text = "look at this machine: devices, optional packages, the wrong `nunchaku`"
    parser = add_command(commands, "doctor", text, run_doctor)
    parser.add_argument("--json", action="store_true")


def _add_matrix(commands: Any) -> None:
    parser = add_command(commands, "matrix", "read the tables", run_matrix_list)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text, handler in (
        ("list", "list the cells, with their state from the evidence", run_matrix_list),
        ("check", "check the tables; every problem with file and line", run_matrix_check),
        ("show", "show one cell or row: its command, claim, rule and evidence", run_matrix_show),
    ):
        action = add_command(actions, name, text, handler)
        action.add_argument("--json", action="store_true")
        action.add_argument("--reports", help="folder of the reports (default: reports)")
        if name == "show":
            action.add_argument("id", help="id of a cell (row@hardware) or of a row")
        if name == "list":
            for flag in LIST_FILTERS:
                action.add_argument(f"--{flag}", nargs="+", default=[], metavar=flag.upper())
    for name in ("jobs", "matrix_diff", "dry_run"):
        import_module(f"quantmatrix.commands.{name}").add_to_matrix(actions)


def _add_tiny_hub(commands: Any) -> None:
    text = "make tiny true-format stand-ins for every repository in the tables"
    parser = add_command(commands, "tiny-hub", text, run_tiny_hub)
    parser.add_argument("folder", nargs="?", help="a hub cache folder (default: your cache)")
    parser.add_argument("--json", action="store_true")


def _add_report(commands: Any) -> None:
    parser = add_command(commands, "report", "render the support matrix from evidence", run_report)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on any drift")
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument("--json", action="store_true")


def read_request(arguments: argparse.Namespace, rest: Sequence[str]) -> Request:
    """The request of parsed flags; the only place where environment variables are read."""
    from quantmatrix.checkpoint import Hub

    extra: dict[str, Any] = {"fp4_gemm_backend": os.environ.get(FP4_BACKEND_VARIABLE)}
    if arguments.revision:
        extra["hub"] = Hub(revision=arguments.revision)
    return Request.from_arguments(arguments, rest, **extra)


def read_variable(name: str) -> str | None:
    """An environment variable, for commands in modules of their own."""
    return os.environ.get(name)


def run_generate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix generate`."""
    request = read_request(arguments, rest)
    if request.nproc_per_node == 1:
        return show_runs(request, arguments)
    from quantmatrix import parallel

    if not parallel.is_worker():
        return parallel.launch(request, arguments.words)
    with parallel.join(request) as (rank, made, pipeline):
        return show_runs(request, arguments, rank, made, pipeline)


def show_runs(
    request: Request,
    arguments: argparse.Namespace,
    rank: int = 0,
    made: Any = None,
    pipeline: Any = None,
) -> int:
    """Generate; the process of rank 0 saves and prints."""
    from quantmatrix import saved_runs
    from quantmatrix.run import Run, check_output, generate_all, require_plan, save_media

    made = made or require_plan(request)
    if arguments.save_output:
        check_output(made, arguments.output_path)
    several = len(request.prompt) * len(request.seed) > 1
    latents_path = saved_runs.check_target(arguments.save_latents, several=several)

    saved: set[Path] = set()

    def save(run: Run) -> None:
        for warning in run.plan.warnings:
            say(f"quantmatrix: warning: {warning}", to_errors=True)
        run.require_numbers()
        if run.degenerate is not None:
            print(
                f"quantmatrix: warning: the output shows nothing: {run.degenerate}. Run the base "
                "model alone: if that shows something, the checkpoint does not work here",
                file=sys.stderr,
            )
        if arguments.save_output:
            path = save_media(run, arguments.output_path, several=several, taken=saved)
            saved.add(path)
            print(f"saved {path}", file=sys.stderr)
        if latents_path is not None:
            print(f"saved {saved_runs.write(run, latents_path)}", file=sys.stderr)

    runs = generate_all(
        request,
        made=made,
        pipeline=pipeline,
        progress=sys.stderr.isatty(),
        save=None if rank else save,
    )
    if rank:
        return 0
    if arguments.json:
        print_json({"ok": True, "runs": [run.to_json() for run in runs]})
    else:
        for run in runs:
            print_run(run.to_json())
    return 0


def print_run(run: Mapping[str, Any]) -> None:
    """A run in two lines."""
    layers = ", ".join(
        f"{name}: {sum(found.values())} quantized layers ({backends_text(found)})"
        for name, found in run["backends"].items()
    )
    say(run["output"] or "(not saved)")
    say(f"  {layers}; {run['seconds']['generate']:.2f} s, {len(run['step_seconds']) + 1} steps")


def backends_text(found: Mapping[str, int]) -> str:
    """`28 decode, 4 reference`."""
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "none"


def run_plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix plan`."""
    from quantmatrix.planning import Refusal, plan

    made = plan(read_request(arguments, rest))
    told = made.to_json()
    if not isinstance(made, Refusal) and made.request.tiny:
        told |= describe_true_size(made, told["warnings"])
    if arguments.json:
        print_json(told)
    elif isinstance(made, Refusal):
        say(f"refused [{made.rule}]: {made.message}")
    else:
        print_plan(told)
    return 0 if made.ok else EXIT_REFUSED


def describe_true_size(made: Any, warnings: list[str]) -> dict[str, Any]:
    """What a plan of stand-ins says of the model itself: bytes per component, and whether they fit."""
    from quantmatrix import true_bytes

    sizes = true_bytes.measure_all(made)
    why = true_bytes.explain_fit(sizes, made)
    told = {name: size.whole for name, size in sizes.items()}
    return {"true_bytes": told, "warnings": [*warnings, *([why] if why else [])]}


def print_plan(made: Mapping[str, Any]) -> None:
    """A plan for people."""
    say(f"{made['model']} on {made['machine']['name']} ({made['machine']['arch']})")
    each = f" in each of {made['processes']} processes" if made["processes"] > 1 else ""
    for name, part in made["components"].items():
        say(f"  {name}: {part['family'] or 'full precision'} ({part['why']})")
        say(f"    weights      {', '.join(part['files'])}")
        if part["layout"]:
            say(f"    layout       {part['layout']}")
        say(f"    config       {part['config_from']}")
        rank = f", rank {part['rank']}" if part["rank"] else ""
        layers = f"{part['quantized_layers']} of {part['total_layers']}"
        say(f"    quantized    {layers} linear layers, {part['precision'] or '-'}{rank}")
        say(f"    kernels      {backends_text(part['backends'])}")
        say(f"    memory       {describe_weights(made, name)}{each}")
    for warning in made["warnings"]:
        say(f"  warning: {warning}")


def describe_weights(made: Mapping[str, Any], name: str) -> str:
    """Bytes of a component's weights; of a stand-in those of the model itself, too."""
    found = f"{made['components'][name]['bytes'] / 2**20:,.1f} MiB of weights"
    if "true_bytes" not in made:
        return found
    return f"{found} in the stand-in; at true size {made['true_bytes'][name] / 2**30:,.1f} GiB"


def run_inspect(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix inspect`."""
    from quantmatrix.checkpoint import Hub
    from quantmatrix.describe import inspect

    hub = Hub()
    if arguments.tiny:
        from quantmatrix.sources import open_tiny_hub

        hub = open_tiny_hub([arguments.checkpoint, *filter(None, [arguments.against])])
    if arguments.against:
        return show_comparison(arguments, hub)
    found = inspect(arguments.checkpoint, hub)
    if arguments.json:
        print_json(found)
        return 0
    for name, part in found["components"].items():
        plain = "unknown quantization" if part["unknown"] else "full precision"
        say(f"{name}: {part['family'] or plain} ({part['why']})")
        for file in part["files"]:
            say(f"  file         {file}")
        for file in part["left_out"]:
            say(f"  left out     {file} (a LoRA, which adds to a model)")
        say(f"  size         {part['bytes'] / 2**20:,.1f} MiB in {part['tensors']} tensors")
        say(f"  declared in  {part['quantization_from'] or part['description_file'] or '-'}")
        note = f": {part['names_note']}" if part["names_note"] else ""
        say(f"  names        {', '.join(part['names'])}{note}")
        say(f"  schemes      {backends_text(part['schemes'])}")
        for layout, count in part["layouts"].items():
            say(f"  layout       {count} layers: {layout}")
        for layer, scheme in part["layers"].items() if arguments.layers else ():
            say(f"    {layer}: {', '.join(f'{k}={v}' for k, v in scheme.items())}")
    return 0


def show_comparison(arguments: argparse.Namespace, hub: Any) -> int:
    """`quantmatrix inspect --against`: the witness's table; 1 unless every layer agrees."""
    from quantmatrix.inspect_against import compare

    found = compare(arguments.checkpoint, arguments.against, hub, arguments.component)
    parts = found["components"].values()
    if arguments.json:
        print_json(found)
    for name, part in () if arguments.json else found["components"].items():
        print(f"{name} beside {part['base']}: {part['verdict']}")
        names = [name_compared(layer) for layer in part["layers"]]
        width = max(map(len, names))
        reading = max(len(layer["reading"]) for layer in part["layers"])
        print(f"  {'layer':{width}}  {'reading':{reading}}  cosine  rel. L2  verdict")
        for shown, layer in zip(names, part["layers"], strict=True):
            print(
                f"  {shown:{width}}  {layer['reading']:{reading}}  "
                f"{layer['cosine']:6.4f}  {layer['relative_l2']:7.4f}  {layer['verdict']}"
            )
    for problem in [problem for part in parts for problem in part["problems"]]:
        print(f"quantmatrix: {problem}", file=sys.stderr)
    return 0 if all(part["verdict"] == "agrees" for part in parts) else EXIT_PROBLEM


def name_compared(layer: Mapping[str, Any]) -> str:
    """A layer on disk, and the module that it is compared with where that has another name."""
    same = layer["layer"] == layer["module"]
    return str(layer["layer"]) if same else f"{layer['layer']} -> {layer['module']}"


def run_dequantize(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix dequantize`."""
    from quantmatrix.dequantize import dequantize

    if not arguments.output_path:
        raise UsageError("--output-path is missing: name the folder to write")
    dtype = arguments.dtype or "float32"
    request = read_request(arguments, rest)
    made = dequantize(request, arguments.output_path, component=arguments.component, dtype=dtype)
    if arguments.json:
        print_json(made)
    else:
        say(f"{made['output']}: {made['tensors']} tensors, {made['bytes'] / 2**20:,.1f} MiB")
    return 0


def run_doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix doctor`."""
    from quantmatrix import doctor

    found = doctor.examine()
    if arguments.json:
        print_json(found)
    else:
        print(doctor.to_text(found))
    return 0


def read_standings(reports: str | None) -> tuple[Any, Mapping[str, Any]]:
    """(the matrix, state and scope of every cell joined from the evidence)."""
    from quantmatrix import matrix, report

    tables = matrix.read()
    return tables, report.read_standings(tables, reports)


def run_matrix_list(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix list`."""
    from quantmatrix import matrix
    from quantmatrix.scopes import label

    tables, standings = read_standings(arguments.reports)
    rows = matrix.rows_as_dicts(tables, standings)
    for flag in LIST_FILTERS:
        wanted = getattr(arguments, flag)
        known = {row[flag] for row in rows} - {""} | known_values(tables, flag)
        strange = [word for word in wanted if word not in known]
        if strange:
            raise UsageError(f"--{flag} {strange[0]}: not in the tables; known: {sorted(known)}")
        rows = [row for row in rows if not wanted or row[flag] in wanted]
    if arguments.json:
        from quantmatrix import report

        print_json({"rows": rows, "read_from": report.tell_source(arguments.reports)})
        return 0
    for row in rows:
        print(f"{label(row['state'], row['scope']):22} {row['claim']:10} {row['id']}")
    print(f"{len(rows)} cells", file=sys.stderr)
    tell_where(arguments.reports)
    return 0


def tell_where(reports: str | os.PathLike[str] | None) -> None:
    """Say on standard error where evidence was read from, where that is not the checkout."""
    from quantmatrix import packaged, report

    if report.find_source(reports) == packaged.FOLDER:
        print(f"read from {report.tell_source(reports)}", file=sys.stderr)


def known_values(tables: Any, flag: str) -> set[str]:
    """Values that a filter may take although no row has them at the moment."""
    from quantmatrix import matrix, report, scopes

    if flag == "scope":
        return set(scopes.SCOPES)
    if flag == "state":
        return set(report.STATES)
    if flag == "claim":
        return set(matrix.CLAIMS)
    return set({"family": tables.families, "model": tables.models}.get(flag, tables.hardware))


def run_matrix_check(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix check`."""
    from quantmatrix import matrix

    tables = matrix.read()
    found = {"ok": True, "rows": len({c.row for c in tables.cells}), "cells": len(tables.cells)}
    if arguments.json:
        print_json(found)
    else:
        print(f"{found['rows']} rows, {found['cells']} cells: no problem found")
    return 0


def run_matrix_show(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix show`."""
    from quantmatrix import matrix

    tables, standings = read_standings(arguments.reports)
    rows = matrix.rows_as_dicts(tables, standings)
    found = [row for row in rows if arguments.id in (row["id"], row["row"])]
    if not found:
        raise UsageError(f"{arguments.id}: no such row or cell; see `quantmatrix matrix list`")
    if arguments.json:
        print_json({"rows": found})
        return 0
    for row in found:
        print(row["id"])
        for key, value in row.items():
            if key != "id" and value not in ("", [], None):
                print(f"  {key:11} {' '.join(value) if isinstance(value, list) else value}")
    return 0


def run_tiny_hub(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix tiny-hub`."""
    from quantmatrix import tiny

    folder = Path(arguments.folder) if arguments.folder else tiny.default_folder()
    check_place(folder / "models", "FOLDER")
    with naming(folder):
        made = tiny.ensure_all(folder)
    if arguments.json:
        print_json({"folder": str(folder), "repositories": made})
    else:
        print("\n".join(made))
        print(f"{len(made)} stand-ins in {folder}", file=sys.stderr)
    return 0


def run_report(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix report`."""
    from quantmatrix import report

    drift = report.check(arguments.reports) if arguments.check else report.write(arguments.reports)
    if arguments.json:
        print_json({"ok": not (arguments.check and drift), "files": drift})
    elif arguments.check and not drift:
        print("reports agree with claims and evidence")
    else:
        print("\n".join(drift))
    return EXIT_PROBLEM if arguments.check and drift else 0


def terminate(number: int, frame: Any) -> NoReturn:
    """Leave on a signal as on any error, so that nothing half-written stays."""
    print("terminated", file=sys.stderr)
    sys.exit(EXIT_TERMINATED)


def entry() -> None:
    """Console entry point."""
    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):  # whatever a locale cannot write is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    entry()
