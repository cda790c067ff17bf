"""quantmatrix plan: how a request would run, or why it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, backends_text, print_json, read_request, say
from quantmatrix.exit_codes import EXIT_REFUSED
from quantmatrix.request import add_output_flags, add_request_flags, add_sharing_flag

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import Any


def _add_plan(commands: Any) -> None:
    text = "say what would run, with which kernels and memory, or why not; reads headers only"
    parser = add_command(commands, "plan", text, run_plan)
    add_request_flags(parser)
    add_output_flags(parser)
    add_sharing_flag(parser)
    parser.add_argument("--hardware", help="a row of hardware.csv instead of this machine")
    parser.set_defaults(takes_overrides=True)


def run_plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix plan`."""
    from quantmatrix.api import plan
    from quantmatrix.runtime.plan.types import Refusal

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
    from quantmatrix.runtime import true_bytes

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
