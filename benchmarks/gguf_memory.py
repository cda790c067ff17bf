"""Memory of a GGUF file that is loaded with its blocks kept: at most a tenth over its size.

    python benchmarks/gguf_memory.py --gib 12 [--device cuda] [--output-path results.json]

A FLUX.1 transformer of as many single blocks as the size asks for is written in Q8_0, one tensor in
memory at a time, then planned and loaded with `packed` in a process of its own. `peak` is what that
process had in memory beyond what it had before loading, pages of the mapped file included; on a GPU
it is what torch had there. Below one GiB the model has the width of its stand-in, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

MOST = 1.10
"""Accepted peak, as a share of the file."""
GIB = 2**30


def describe(gib: float) -> dict[str, Any]:
    """The configuration of a transformer that has about so many GiB in Q8_0."""
    from quantmatrix.models import flux_1

    tiny = gib < 1
    config = dict(flux_1.TINY if tiny else flux_1.FULL)
    width = 256 if tiny else 3072
    block = width * width * 15 * 34 / 32
    """Bytes of a single block: modulation 3, queries to values 3, the feed-forward 4 and 5."""
    layers = 1
    config |= {"num_layers": layers, "num_single_layers": max(1, round(gib * GIB / block) - 2)}
    return {"_class_name": "FluxTransformer2DModel", **config}


def write_model(folder: Path, gib: float) -> Path:
    """A base model without weights, and the file of its transformer beside it."""
    from quantmatrix.checkpoints import gguf_writer
    from quantmatrix.runtime.empty_model import build_empty

    config = describe(gib)
    transformer = ["diffusers", "FluxTransformer2DModel"]
    index = {"_class_name": "FluxPipeline", "transformer": transformer}
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    model = build_empty("FluxTransformer2DModel", config, "config.json")
    tensors: dict[str, torch.Tensor] = {}
    blocks: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        inside = "blocks." in name and name.endswith(".weight") and len(shape) == 2
        if inside and shape[1] % 32 == 0:
            one = torch.randint(0, 256, (1, shape[1] // 32, 34), dtype=torch.uint8)
            one[..., :2] = torch.tensor([2**-14]).half().view(torch.uint8)
            tensors[name], blocks[name] = one.flatten(1).expand(shape[0], -1), "Q8_0"
        else:  # one number in memory, as many as the shape has in the file
            tensors[name] = torch.full((1,) * len(shape), 0.01).bfloat16().expand(shape)
    path = folder / "synthetic-Q8_0.gguf"
    gguf_writer.write_file(path, tensors, blocks, {"general.architecture": "flux"})
    return path


def read_memory() -> dict[str, int]:
    """Bytes of this process: `now`, `peak`, and `own` without pages of files."""
    names = {"VmRSS": "now", "VmHWM": "peak", "RssAnon": "own"}
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[key].split()[0]) * 1024 for key, name in names.items()}


def load(folder: Path, path: Path, device: str) -> dict[str, Any]:
    """Load the file with `packed`, and say what that took."""
    from quantmatrix.hardware import probe
    from quantmatrix.request import Request
    from quantmatrix.runtime.load import load_component
    from quantmatrix.runtime.plan.decide import plan_transformers
    from quantmatrix.runtime.plan.types import require

    request = Request(
        model_path=str(folder), weights_paths={"transformer": str(path)}, backend="packed",
        device=device, witness="off",
    )  # fmt: skip
    plan = require(plan_transformers(request, probe.probe(device)))
    torch.ones(8).to(device) @ torch.ones(8).to(device)  # what torch itself takes is there now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_memory()
    model = load_component(plan.components["transformer"], request, device=device)
    after, size = read_memory(), path.stat().st_size
    kept = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    peak = after["peak"] - before["now"]
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    return {
        "device": device,
        "file_bytes": size,
        "kept_bytes": kept,
        "planned_bytes": plan.components["transformer"].bytes,
        "peak_bytes": peak,
        "own_bytes": after["own"] - before["own"],
        "peak": round(peak / size, 4),
        "kept": round(kept / size, 4),
        "layers": len(plan.components["transformer"].layers),
        "passed": peak <= MOST * size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=12.0, help="size of the file, about")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output-path", type=Path, help="a JSON file of the result")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        found = load(arguments.load, next(arguments.load.glob("*.gguf")), arguments.device)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, arguments.gib)
        words = [sys.executable, __file__, "--load", str(folder), "--device", arguments.device]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    if arguments.output_path:
        arguments.output_path.write_text(json.dumps(found, indent=1) + "\n")
    if not found["passed"]:
        raise SystemExit(f"the peak is {found['peak']} of the file, at most {MOST} is accepted")


if __name__ == "__main__":
    main()
