"""quantmatrix inspect: what a checkpoint is, from its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, backends_text, print_json, report_problems, say
from quantmatrix.exit_codes import EXIT_PROBLEM

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import Any


def _add_inspect(commands: Any) -> None:
    text = "identify a checkpoint: family and why, scheme of each layer, sizes, header facts"
    parser = add_command(commands, "inspect", text, run_inspect)
    parser.add_argument("checkpoint", help="a file, a folder or a hub id")
    parser.add_argument("--tiny", action="store_true", help="use the tiny stand-ins")
    parser.add_argument("--layers", action="store_true", help="list every quantized layer")
    what = (
        "compare decoded layers with this base model's own weights; exit code 1 when one disagrees"
    )
    parser.add_argument("--against", metavar="BASE", help=what)
    what = "which transformer of the base a file is compared with (default: the first)"
    parser.add_argument("--component", metavar="NAME", help=what)
    parser.add_argument("--json", action="store_true")


def run_inspect(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix inspect`."""
    from quantmatrix.request import Hub
    from quantmatrix.runtime.plan.inspect import inspect

    hub = Hub()
    if arguments.tiny:
        from quantmatrix.tiny.hub import open_tiny_hub

        hub = open_tiny_hub([arguments.checkpoint, *filter(None, [arguments.against])])
    if arguments.against:
        return show_comparison(arguments, hub)
    found = inspect(arguments.checkpoint, hub)
    if arguments.json:
        print_json(found)
        return 0
    for name, part in found["components"].items():
        plain = "unknown quantization" if part["unknown"] else "full precision"
        say(f"{name}: {part['family'] or plain} ({part['why']}): {part['summary']}")
        for file in part["files"]:
            say(f"  file         {file}")
        for file in part["left_out"]:
            say(f"  left out     {file} (a LoRA, which adds to a model)")
        for start, count in part["aside"].items():
            say(f"  left aside   {count} tensors {start}* (another part of a whole checkpoint)")
        say(f"  size         {part['bytes'] / 2**20:,.1f} MiB in {part['tensors']} tensors")
        say(f"  declared in  {part['quantization_from'] or part['description_file'] or '-'}")
        note = f": {part['names_note']}" if part["names_note"] else ""
        prefix = f" after the prefix {part['prefix']}" if part["prefix"] else ""
        say(f"  names        {', '.join(part['names'])}{prefix}{note}")
        say(f"  schemes      {backends_text(part['schemes'])}")
        for layout, count in part["layouts"].items():
            say(f"  layout       {count} layers: {layout}")
        for layer, scheme in part["layers"].items() if arguments.layers else ():
            say(f"    {layer}: {', '.join(f'{k}={v}' for k, v in scheme.items())}")
    return 0


def show_comparison(arguments: argparse.Namespace, hub: Any) -> int:
    """`quantmatrix inspect --against`: the witness's table; 1 unless every layer agrees."""
    from quantmatrix.runtime.witness.inspect_against import compare

    found = compare(arguments.checkpoint, arguments.against, hub, arguments.component)
    parts = found["components"].values()
    if arguments.json:
        print_json(found)
    for name, part in () if arguments.json else found["components"].items():
        print(f"{name} beside {part['base']}: {part['verdict']}")
        names = [name_compared(layer) for layer in part["layers"]]
        width = max(map(len, ["layer", *names]))
        reading = max(map(len, ["reading", *(layer["reading"] for layer in part["layers"])]))
        print(f"  {'layer':{width}}  {'reading':{reading}}  cosine  rel. L2  verdict")
        for shown, layer in zip(names, part["layers"], strict=True):
            print(
                f"  {shown:{width}}  {layer['reading']:{reading}}  "
                f"{layer['cosine']:6.4f}  {layer['relative_l2']:7.4f}  {layer['verdict']}"
            )
    report_problems(problem for part in parts for problem in part["problems"])
    return 0 if all(part["verdict"] == "agrees" for part in parts) else EXIT_PROBLEM


def name_compared(layer: Mapping[str, Any]) -> str:
    """A layer on disk, and the module that it is compared with where that has another name."""
    same = layer["layer"] == layer["module"]
    return str(layer["layer"]) if same else f"{layer['layer']} -> {layer['module']}"
