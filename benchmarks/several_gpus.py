"""One forward at true size on one GPU and on several of one host, in the same processes.

    python benchmarks/several_gpus.py --output-path results.json [--processes 2] [--budget 400]
        [--only 'flux-1 FP8 graph' ...] [--tiny]

torchrun starts a process per GPU. Each first times the whole forward alone, then its share of it, so
that both numbers come from one run. Weights are random in the true formats, models and inputs as in
`benchmarks/hopper.py`; the first process prints one table of medians. `--tiny` tries the script on a
CPU with two processes over gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from quantmatrix import models
from quantmatrix.hardware import probe
from quantmatrix.measure.bench import speed
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime import parallel, peer_memory
from quantmatrix.runtime.sharded_weights import shard

FORMS: dict[str, dict[str, str]] = {
    "BF16": {},
    "FP8": {"family": "modelopt-fp8", "scheme": "FP8", "backend": "torch"},
}
WANTED = (
    "flux-1 FP8 eager",
    "flux-1 FP8 graph",
    "flux-1 FP8 compiled-graph",
    "qwen-image FP8 graph",
    "qwen-image FP8 compiled-graph",
    "wan-2-2 FP8 eager",
    "wan-2-2 FP8 compiled",
    "flux-1 FP8 sharded",
    "flux-1 FP8 sharded-graph",
    "wan-2-2 FP8 sharded",
    "flux-1 BF16 graph",
    "flux-1 FP8 compiled",
    "flux-2 FP8 graph",
    "qwen-image FP8 eager",
    "wan-2-2 BF16 eager",
)
"""Model, form and mode, in order of worth; `sharded` splits the weights of the shared one, too;
`ring` gathers keys and values where others exchange heads."""


def main() -> int:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-path", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--budget", type=float, default=400, help="seconds for all forms")
    parser.add_argument("--only", nargs="+", default=list(WANTED), help="'model form mode'")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    given = parser.parse_args()
    if not parallel.is_worker():
        command = [*parallel.name_launcher(given.processes), __file__, *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode
    work(given)
    return 0


def work(given: argparse.Namespace) -> None:
    """All forms in their order, as far as the time goes; the first process keeps and prints them."""
    kind = "cpu" if given.tiny else "cuda"
    rank = int(os.environ["LOCAL_RANK"])
    device = kind if given.tiny else f"cuda:{rank}"
    if not given.tiny:
        torch.cuda.set_device(rank)
    distributed.init_process_group(parallel.TRANSPORTS[kind])
    results: dict[str, Any] = {"machine": probe.fingerprint(), "forms": {}}
    deadline = time.monotonic() + given.budget
    for wanted in given.only:
        left = torch.tensor([deadline - time.monotonic()], device=device)
        distributed.broadcast(left, 0)
        if left.item() < 30 and not given.tiny:
            results["forms"][wanted] = {"not_reached": f"{left.item():.0f} s left"}
            continue
        results["forms"][wanted] = time_form(given, wanted, device)
        if rank == 0:
            print(wanted, json.dumps(results["forms"][wanted]), flush=True)
            given.output_path.write_text(json.dumps(results, indent=1, sort_keys=True))
    if rank == 0:
        print(render(results))
    distributed.destroy_process_group()


def time_form(given: argparse.Namespace, wanted: str, device: str) -> dict[str, Any]:
    """Medians in milliseconds, peak memory in bytes and the distance of the outputs of both."""
    model, form, mode = wanted.split()
    found: dict[str, Any] = {}
    try:
        alone = run_once(given, model, form, mode, device, 1)
        shared = run_once(given, model, form, mode, device, distributed.get_world_size())
        one, two = alone.pop("output"), shared.pop("output")
        distance = float((one - two).norm() / one.norm())
        found = {"alone": alone, "shared": shared, "relative_l2": distance}
        found["ratio"] = shared["ms"] / alone["ms"]
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    torch._dynamo.reset()
    return found


def run_once(
    given: argparse.Namespace, model: str, form: str, mode: str, device: str, processes: int
) -> dict[str, Any]:
    """One model, whole in this process or parted among all of them."""
    size = "tiny" if given.tiny else "full"
    module: Any = synthesize(model, probe.probe(device), size=size, **FORMS[form])
    inputs = make_inputs(model, module, device, torch.bfloat16, size=size)
    if processes > 1:
        if model == "flux-2":  # pipelines give positions of every picture of a batch
            inputs |= {name: inputs[name][None] for name in ("img_ids", "txt_ids")}
        degrees = (1, processes) if "ring" in mode else (processes, 1)
        parallel.part(module, *degrees, on_cpu=given.tiny)
    if processes > 1 and "sharded" in mode:
        shard(module, models.load(model).BLOCKS)
        gc.collect()
    run = speed.prepare_forward(module, inputs, compiled="compiled" in mode, graph="graph" in mode)
    if not given.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        output = speed.flatten_output(run()).clone()
        repeats = torch.equal(output, speed.flatten_output(run()))
        distributed.barrier()
        ms = speed.measure_ways({"it": run}, device.partition(":")[0], given.repeats)["it"]
        distributed.barrier()
    peak = 0 if given.tiny else torch.cuda.max_memory_allocated() + peer_memory.count_bytes()
    del module, inputs, run
    peer_memory.release()
    gc.collect()
    if not given.tiny:
        torch.cuda.empty_cache()
    return {"ms": ms, "peak_bytes": peak, "repeats": repeats, "output": output.cpu()}


def render(results: dict[str, Any]) -> str:
    """The table of all forms in Markdown."""
    lines = [
        "| model, form, mode | one GPU ms | shared ms | ratio | relative L2 | repeats | peak GiB |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, found in results["forms"].items():
        if "ratio" not in found:
            lines.append(f"| {name} | {found.get('error') or found['not_reached']} | | | | | |")
            continue
        alone, shared = found["alone"], found["shared"]
        peaks = f"{alone['peak_bytes'] / 2**30:.2f} -> {shared['peak_bytes'] / 2**30:.2f}"
        same = "yes" if alone["repeats"] and shared["repeats"] else "no"
        lines.append(
            f"| {name} | {alone['ms']:.1f} | {shared['ms']:.1f} | {found['ratio']:.3f} "
            f"| {found['relative_l2']:.1e} | {same} | {peaks} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
