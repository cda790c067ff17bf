"""quantmatrix generate: make pictures or clips."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, backends_text, print_json, read_request, say
from quantmatrix.request import add_output_flags, add_request_flags, add_sharing_flag

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from quantmatrix.request import Request
    from quantmatrix.runtime.plan.types import Plan


def _add_generate(commands: Any) -> None:
    parser = add_command(
        commands, "generate", "generate images or videos with a checkpoint", run_generate
    )
    add_request_flags(parser)
    add_output_flags(parser)
    parser.add_argument("--save-latents", metavar="FILE", help="save the run for `compare`")
    add_sharing_flag(parser)
    parser.set_defaults(takes_overrides=True)


def run_generate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix generate`."""
    request = read_request(arguments, rest)
    from quantmatrix import api

    if request.nproc_per_node == 1:
        return show_runs(request, arguments, api.require_plan(request))
    from quantmatrix.runtime import parallel

    if not parallel.is_worker():
        return parallel.launch(api.require_plan(request), arguments.argv)
    request, _ = api.resolve(request)
    with parallel.join(request) as (rank, plan, pipeline):
        return show_runs(request, arguments, plan, rank, pipeline)


def show_runs(
    request: Request,
    arguments: argparse.Namespace,
    plan: Plan,
    rank: int = 0,
    pipeline: Any = None,
) -> int:
    """Generate; the process of rank 0 saves and prints."""
    from quantmatrix.measure import saved_runs
    from quantmatrix.runtime.generate import generate_all
    from quantmatrix.runtime.media import check_output, save_media
    from quantmatrix.runtime.run import Run

    if arguments.save_output:
        check_output(plan, arguments.output_path)
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
        plan=plan,
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
