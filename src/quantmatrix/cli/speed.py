"""`quantmatrix speed`: a forward at true size with random weights, quantized beside BF16."""

from __future__ import annotations

import argparse
from typing import Any

from quantmatrix.errors import UsageError


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = (
        "time one transformer forward with random weights, quantized and in BF16; downloads nothing"
    )
    parser = add_command(commands, "speed", text, run_speed)
    parser.add_argument("--synthetic", choices=("full", "tiny"), default="full", help="model size")
    parser.add_argument("--model-id", required=True, help="model: flux-1, flux-2, wan-2-2 ...")
    parser.add_argument("--family", required=True, help="format: fp8, modelopt-nvfp4 ...")
    parser.add_argument("--scheme", help="scheme of the family (default: its first)")
    parser.add_argument("--backend", help="use only this kernel backend")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the best there is)")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--cuda-graph", action="store_true", help="replay from a CUDA graph")
    parser.add_argument("--repeats", type=int, default=10, help="timings of each")
    parser.add_argument("--json", action="store_true")


def run_speed(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix speed`; prints milliseconds and GiB.

    Raises UsageError for an unknown model, family or scheme, no repeats, and `--cuda-graph` without
    CUDA.
    """
    from quantmatrix import families, models
    from quantmatrix.cli.output import backends_text, print_json
    from quantmatrix.hardware import probe
    from quantmatrix.measure.bench import speed

    for flag, value, known in (
        ("--model-id", arguments.model_id, models.IDS),
        ("--family", arguments.family, families.IDS),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value}: expected one of {', '.join(known)}")
    schemes = families.load(arguments.family).SCHEMES
    scheme = arguments.scheme or next(iter(schemes))
    if scheme not in schemes:
        raise UsageError(f"--scheme {scheme}: {arguments.family} has {', '.join(schemes)}")
    if arguments.repeats < 1:
        raise UsageError(f"--repeats {arguments.repeats}: expected 1 or more")
    machine = probe.probe(arguments.device)
    if arguments.cuda_graph and not machine.device.startswith("cuda"):
        raise UsageError(f"--cuda-graph needs an NVIDIA GPU, the device is {machine.device}")
    found = speed.compare_forms(
        arguments.model_id,
        machine,
        family=arguments.family,
        scheme=scheme,
        backend=arguments.backend,
        size=arguments.synthetic,
        compiled=arguments.compile,
        graph=arguments.cuda_graph,
        repeats=arguments.repeats,
    )
    if arguments.json:
        print_json(found)
        return 0
    times, sizes = found["milliseconds"], found["bytes"]
    print(f"{found['model']} ({found['size']}) on {found['machine']['name']}")
    print(f"  layers   {backends_text(found['backends'])}")
    print(
        f"  time     {times['quantized']:.2f} ms, BF16 {times['bf16']:.2f} ms: {found['ratio']:.3f}x"
    )
    share = sizes["quantized"] / sizes["bf16"]
    print(f"  weights  {sizes['quantized'] / 2**30:.2f} GiB: {share:.3f}x of BF16")
    print(f"  repeats  {'bit-identical' if found['repeats_bit_identical'] else 'differ'}")
    return 0
