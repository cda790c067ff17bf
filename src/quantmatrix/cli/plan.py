"""quantmatrix plan: how a request would run, or why it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.cli.flags import SAVING, hide_flags
from quantmatrix.cli.output import add_command, backends_text, print_json, read_request, say
from quantmatrix.exit_codes import EXIT_REFUSED
from quantmatrix.request import add_output_flags, add_request_flags, add_sharing_flag

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import Any


def _add_plan(commands: Any) -> None:
    text = "show what would run, with which kernels and how much memory, or why not; reads headers only"
    parser = add_command(commands, "plan", text, run_plan)
    add_request_flags(parser)
    add_output_flags(parser)
    add_sharing_flag(parser)
    parser.add_argument("--hardware", help="a row of hardware.csv instead of this machine")
    unread = ("prompt", "negative_prompt", "guidance_scale", "seed", "cuda_graph", "output_path")
    hide_flags(parser, *unread, *SAVING)  # a command of generate is planned by changing its name
    parser.set_defaults(takes_overrides=True)


def run_plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix plan`."""
    from quantmatrix.api import plan
    from quantmatrix.runtime.plan.types import Refusal

    planned = plan(read_request(arguments, rest))
    fields = planned.to_json()
    if not isinstance(planned, Refusal) and planned.request.tiny:
        fields |= describe_true_size(planned, fields["warnings"])
    if arguments.json:
        print_json(fields)
    elif isinstance(planned, Refusal):
        say(f"refused [{planned.rule}]: {planned.message}")
    else:
        print_plan(fields)
    return 0 if planned.ok else EXIT_REFUSED


def describe_true_size(plan: Any, warnings: list[str]) -> dict[str, Any]:
    """What a plan of stand-ins says of the model itself: bytes per component, and whether they fit."""
    from quantmatrix.runtime import true_bytes

    sizes = true_bytes.measure_all(plan)
    why = true_bytes.explain_fit(sizes, plan)
    whole = {name: size.whole for name, size in sizes.items()}
    return {"true_bytes": whole, "warnings": [*warnings, *([why] if why else [])]}


def print_plan(plan: Mapping[str, Any]) -> None:
    """A plan for people."""
    say(f"{plan['model']} on {plan['machine']['name']} ({plan['machine']['arch']})")
    each = f" in each of {plan['processes']} processes" if plan["processes"] > 1 else ""
    parts = {**plan["components"], **plan.get("text_encoders", {})}
    for name, part in parts.items():
        say(f"  {name}: {part['family'] or 'full precision'} ({part['why']})")
        say(f"    weights      {', '.join(part['files'])}")
        if part["layout"]:
            say(f"    layout       {part['layout']}")
        say(f"    config       {part['config_from']}")
        rank = f", rank {part['rank']}" if part["rank"] else ""
        layers = f"{part['quantized_layers']} of {part['total_layers']}"
        say(f"    quantized    {layers} linear layers, {part['precision'] or '-'}{rank}")
        say(f"    kernels      {backends_text(part['backends'])}")
        say(f"    memory       {describe_weights(plan, name, part)}{each}")
    for one in plan.get("pictures", ()):
        tokens = f", {one['tokens']} tokens a step" if one["tokens"] else ""
        size = f"{one['width']} x {one['height']}"
        say(f"  {one['argument']}: {one['path']} ({size}, sha256 {one['sha256'][:16]}{tokens})")
    for warning in plan["warnings"]:
        say(f"  warning: {warning}")


def describe_weights(plan: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> str:
    """Bytes of a component's weights; of a transformer's stand-in those of the model itself, too."""
    found = f"{part['bytes'] / 2**20:,.1f} MiB of weights"
    if name not in plan.get("true_bytes", {}):
        return found
    return f"{found} in the stand-in; at true size {plan['true_bytes'][name] / 2**30:,.1f} GiB"
