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

PATCH, CLIP = 16, 4
"""Pixels of a token's side and frames of a token, in every model that has a file."""


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
    if not isinstance(planned, Refusal):
        fields |= describe_shares(planned)
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


def describe_shares(plan: Any) -> dict[str, Any]:
    """`shares` of a plan of several processes: tokens of a picture or clip at the request's size, and of each.

    Empty for one process, and for a model without a file of its own, whose patches are not known.
    """
    from quantmatrix import models

    if plan.processes == 1 or plan.model not in models.IDS:
        return {}
    from quantmatrix.runtime.plan.context_parallel import choose_degrees, count_heads
    from quantmatrix.runtime.token_shares import share_out

    usual, asked = models.load(plan.model).DEFAULTS, plan.request
    height, width = asked.height or usual.height, asked.width or usual.width
    frames = asked.num_frames or usual.frames
    tokens = (height // PATCH) * (width // PATCH) * (-(-frames // CLIP))
    shares = share_out(tokens, plan.processes)
    size = {"height": height, "width": width, "frames": frames}
    names = ("ulysses", "ring")
    degrees = {
        name: dict(zip(names, choose_degrees(count_heads(part), plan.processes), strict=True))
        for name, part in plan.components.items()
    }
    even = len({*shares}) == 1
    return {
        "shares": {**size, "tokens": tokens, "of_each": shares, "even": even, "degrees": degrees}
    }


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
    if "shares" in plan:
        say(f"  {describe_tokens(plan['shares'])}")
    for one in plan.get("pictures", ()):
        tokens = f", {one['tokens']} tokens a step" if one["tokens"] else ""
        size = f"{one['width']} x {one['height']}"
        say(f"  {one['argument']}: {one['path']} ({size}, sha256 {one['sha256'][:16]}{tokens})")
    for warning in plan["warnings"]:
        say(f"  warning: {warning}")


def describe_tokens(shares: Mapping[str, Any]) -> str:
    """How tokens are parted, and which exchange of diffusers follows where texts divide as well."""
    from quantmatrix.runtime.plan.context_parallel import name_degrees

    clip = f" x {shares['frames']}" if shares["frames"] > 1 else ""
    size = f"{shares['width']} x {shares['height']}{clip}"
    each = " + ".join(map(str, shares["of_each"]))
    way = "evenly" if shares["even"] else "by a rule that all processes know"
    named = {name_degrees(**degrees): None for degrees in shares["degrees"].values()}
    return (
        f"tokens: {shares['tokens']} of {size} as {each}, exchanged {way} ({', '.join(named)}); "
        "texts by their length"
    )


def describe_weights(plan: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> str:
    """Bytes of a component's weights; of a transformer's stand-in those of the model itself, too."""
    found = f"{part['bytes'] / 2**20:,.1f} MiB of weights"
    if name not in plan.get("true_bytes", {}):
        return found
    return f"{found} in the stand-in; at true size {plan['true_bytes'][name] / 2**30:,.1f} GiB"
