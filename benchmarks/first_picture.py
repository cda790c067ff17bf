"""First forward: what a user waits for before a compiled model draws, with and without a compile cache.

    python benchmarks/first_picture.py [--model flux-1] [--family modelopt-fp8 --scheme FP8] [--tiny]

Each run is a process of its own: importing, building the transformer at true size with random codes,
compiling its blocks (the first forward), and a second forward. The first process begins with an empty
compile cache (`TORCHINDUCTOR_CACHE_DIR`), the second finds what the first has left, as a user who keeps the
folder does. Reading a real file from disk is not in it; `benchmarks/test_load.py` times that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

STARTED = time.monotonic()


def run_once(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of this process to each step's end."""
    import torch

    from quantmatrix.hardware import probe
    from quantmatrix.measure.bench import speed
    from quantmatrix.measure.bench.synthetic import make_inputs, synthesize

    size = "tiny" if arguments.tiny else "full"
    machine = probe.probe("cpu" if arguments.tiny else "cuda")
    found = {"imported": time.monotonic() - STARTED}
    made = synthesize(
        arguments.model, machine, family=arguments.family, scheme=arguments.scheme, size=size
    )
    inputs = make_inputs(arguments.model, made, machine.device, torch.bfloat16, size=size)
    found["built"] = time.monotonic() - STARTED
    run = speed.prepare_forward(made, inputs, compiled=True, graph=machine.device != "cpu")
    with torch.no_grad():
        for step in ("first forward", "second forward"):
            speed.flatten_output(run()).sum().item()  # waits for the device
            found[step] = time.monotonic() - STARTED
    return found


def start(cache: str, argv: list[str]) -> dict[str, float]:
    """The seconds of a process with a compile cache in a folder."""
    command = [sys.executable, __file__, *argv, "--once"]
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="flux-1")
    parser.add_argument("--family", default="modelopt-fp8")
    parser.add_argument("--scheme", default="FP8")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(run_once(arguments)))
        return
    with tempfile.TemporaryDirectory() as cache:
        runs = {name: start(cache, sys.argv[1:]) for name in ("empty cache", "kept cache")}
    print(f"| {arguments.model}, seconds since the start | {' | '.join(runs)} |")
    print("| - | -: | -: |")
    for step in runs["empty cache"]:
        print(f"| {step} | {' | '.join(f'{run[step]:.1f}' for run in runs.values())} |")
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
