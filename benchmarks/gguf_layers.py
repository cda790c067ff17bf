"""GGUF layers that keep their blocks, beside diffusers' own in the same run, on one NVIDIA GPU.

    python benchmarks/gguf_layers.py --output-path results.json [--budget 300] [--tiny]

Blocks are random codes with sound scales, so nothing is downloaded. For every type that has a kernel:

| stage | what is compared |
| ----- | ---------------- |
| check | our decoded weight with torch's arithmetic, bit by bit, and with diffusers' float16 arithmetic |
| decode | one decoding of a weight: our kernel, torch, diffusers; GB/s of blocks read and numbers written |
| layers | a whole layer on FLUX.1's shapes: `packed`, diffusers' `GGUFLinear`, and a BF16 linear layer |
| step | a FLUX.1 forward with each of the three |

diffusers decodes by torch unless it finds kernels of the hub (`DIFFUSERS_GGUF_CUDA_KERNELS`); which
of the two ran stands in the results. A type passes where `packed` is faster on every shape.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hopper import SHAPES, Bench, run_eagerly

from quantmatrix import models
from quantmatrix.families import gguf
from quantmatrix.kernels import gguf_arithmetic, gguf_triton, kernels_of, linear_gguf
from quantmatrix.measure.bench import speed
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime.quantized_linear import QuantizedLinear
from quantmatrix.scheme import BLOCKS

TINY_SHAPES = ((64, 256, 512),)
ROWS = (1, 512)
"""Rows of an input beside those of FLUX.1's blocks: modulation, and text alone."""
BURST = 10


def draw_blocks(kind: str, rows: int, columns: int, device: str) -> torch.Tensor:
    """Random blocks, uint8 [rows, bytes of a row], whose weights have the size of a model's."""
    per_block, size = BLOCKS[kind]
    blocks = torch.randint(0, 256, (rows * columns // per_block, size), device=device).byte()
    largest = {"Q8_0": 128.0, "Q4_K": 63 * 15.0, "Q5_K": 63 * 31.0, "Q6_K": 128 * 32.0}[kind]
    for number, at in enumerate(gguf_arithmetic.HALVES[kind]):
        value = (1.0 if number == 0 else 8.0) / (largest * math.sqrt(columns))
        scale = torch.full((len(blocks), 1), value, device=device).half()
        blocks[:, at : at + 2] = scale.view(torch.uint8)
    return blocks.view(rows, -1)


def make_ours(data: torch.Tensor, kind: str) -> QuantizedLinear:
    """Our layer of some blocks [N, bytes of a row], which it keeps."""
    scheme = gguf.find_scheme(kind)
    columns, size = BLOCKS[kind]
    kernel = next(k for k in kernels_of(scheme.op) if k.backend == "packed")
    shape = (data.shape[1] // size * columns, data.shape[0])
    return QuantizedLinear(*shape, kernel, scheme, {"weight": data}, torch.bfloat16)


def make_theirs(data: torch.Tensor, kind: str) -> torch.nn.Module:
    """diffusers' layer of the same blocks, which it keeps, too."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType

    columns, size = BLOCKS[kind]
    shape = (data.shape[1] // size * columns, data.shape[0])
    layer = GGUFLinear(*shape, bias=False, compute_dtype=torch.bfloat16, device="meta")
    layer.weight = GGUFParameter(data, quant_type=GGMLQuantizationType[kind])
    return layer


def check(bench: Bench, kind: str) -> dict[str, Any]:
    """Our numbers beside torch's, bit by bit, and beside diffusers' float16 arithmetic."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    rows, columns = (64, 512) if bench.tiny else (3072, 12288)
    data = draw_blocks(kind, rows, columns, bench.device)
    scheme = gguf.find_scheme(kind)
    plain = linear_gguf.decode_to(data, scheme, torch.bfloat16)
    found = plain if bench.tiny else gguf_triton.decode(data, scheme, torch.bfloat16)
    theirs = dequantize_gguf_tensor(make_theirs(data, kind).weight).float()
    return {
        "same_bits": bool(torch.equal(found, plain)),
        "from_diffusers": ((found.float() - theirs).norm() / theirs.norm()).item(),
        "passed": bool(torch.equal(found, plain) and found.isfinite().all()),
    }


def time_decoding(bench: Bench, kind: str) -> dict[str, Any]:
    """Milliseconds and GB/s of one decoding of FLUX.1's largest weights."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    found = {}
    for _, columns, rows in TINY_SHAPES if bench.tiny else SHAPES[1:]:
        data = draw_blocks(kind, rows, columns, bench.device)
        scheme, weight = gguf.find_scheme(kind), make_theirs(data, kind).weight
        ways: dict[str, Callable[[], Any]] = {
            "torch": lambda d=data, s=scheme: linear_gguf.decode_to(d, s, torch.bfloat16),
            "diffusers": lambda w=weight: dequantize_gguf_tensor(w).to(torch.bfloat16),
        }
        if not bench.tiny:
            ways["packed"] = lambda d=data, s=scheme: gguf_triton.decode(d, s, torch.bfloat16)
        with torch.no_grad():
            times = bench.measure(ways, 5 if bench.tiny else 15, burst=BURST)
        moved = data.numel() + 2 * rows * columns
        found[f"{rows}x{columns}"] = {
            name: {"ms": ms, "gb_per_s": moved / ms / 1e6} for name, ms in times.items()
        }
    return found


def time_layers(bench: Bench, kind: str) -> dict[str, Any]:
    """Milliseconds of a layer on FLUX.1's shapes, and its share of diffusers' and of BF16's."""
    found: dict[str, Any] = {}
    shapes = [*SHAPES, *((rows, 3072, 12288) for rows in ROWS)]
    for m, k, n in TINY_SHAPES if bench.tiny else shapes:
        data = draw_blocks(kind, n, k, bench.device)
        x = torch.randn(m, k, device=bench.device).bfloat16()
        plain = (torch.randn(n, k, device=bench.device) / k**0.5).bfloat16()
        ours, theirs = make_ours(data, kind), make_theirs(data, kind)
        ways: dict[str, Callable[[], Any]] = {
            "packed": lambda x=x, layer=ours: layer(x),
            "diffusers": lambda x=x, layer=theirs: layer(x),
            "bf16": lambda x=x, w=plain: torch.nn.functional.linear(x, w),
        }
        with torch.no_grad():
            times = bench.measure(ways, 5 if bench.tiny else 15, burst=BURST)
        ratios = {f"to {name}": times["packed"] / times[name] for name in ("diffusers", "bf16")}
        found[f"{m}x{k}x{n}"] = {"ms": times, **ratios}
    ratios = [one["to diffusers"] for one in found.values()]
    found["geometric mean to diffusers"] = statistics.geometric_mean(ratios)
    found["passed"] = max(ratios) < 1.0
    return found


def replace_layers(
    bench: Bench, kind: str, make: Callable[[torch.Tensor, str], torch.nn.Module]
) -> torch.nn.Module:
    """A FLUX.1 transformer whose blocks have layers of a kind."""
    made = synthesize("flux-1", bench.machine, size="tiny" if bench.tiny else "full")
    blocks = models.load("flux-1").BLOCKS
    columns = BLOCKS[kind][0]
    for name, module in list(made.named_modules()):
        inside = isinstance(module, torch.nn.Linear) and name.split(".")[0] in blocks
        if inside and module.in_features % columns == 0:
            data = draw_blocks(kind, module.out_features, module.in_features, bench.device)
            layer = make(data, kind)
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, layer)
    return made


def time_step(bench: Bench, kind: str) -> dict[str, Any]:
    """A FLUX.1 forward with our layers, with diffusers' and in BF16, in turn."""
    size = "tiny" if bench.tiny else "full"
    plain = synthesize("flux-1", bench.machine, size=size)
    inputs = make_inputs("flux-1", plain, bench.device, torch.bfloat16, size=size)
    made = {
        "packed": replace_layers(bench, kind, make_ours),
        "diffusers": replace_layers(bench, kind, make_theirs),
        "bf16": plain,
    }
    ways = {name: run_eagerly(module, inputs) for name, module in made.items()}
    with torch.no_grad():
        finite = all(bool(speed.flatten_output(run()).isfinite().all()) for run in ways.values())
        times = bench.measure(ways, 3 if bench.tiny else 8)
    return {
        "ms": times,
        "to diffusers": times["packed"] / times["diffusers"],
        "to bf16": times["packed"] / times["bf16"],
        "bytes": {name: speed.count_bytes(module) for name, module in made.items()},
        "finite": finite,
    }


def name_theirs() -> str:
    """What diffusers' layers run on a GPU."""
    from diffusers.quantizers.gguf import utils

    return "torch" if utils.ops is None else "kernels of the hub"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-path", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300, help="seconds for all stages")
    parser.add_argument("--types", nargs="+", default=list(gguf_triton.TYPES), help="Q4_K ...")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    arguments = parser.parse_args()
    bench = Bench(arguments.output_path, arguments.budget, arguments.tiny)
    torch.manual_seed(0)
    bench.results["diffusers"] = name_theirs()
    stages: dict[str, tuple[Callable[[Bench, str], Any], float]] = {
        "check": (check, 15),
        "layers": (time_layers, 20),
        "decode": (time_decoding, 15),
        "step": (time_step, 40),
    }
    for stage, (work, needs) in stages.items():
        for kind in arguments.types:
            bench.stage(f"{stage} {kind}", lambda kind=kind, work=work: work(bench, kind), needs)
    found = bench.results["stages"]
    for kind in arguments.types:
        checked, timed = found[f"check {kind}"], found[f"layers {kind}"]
        passed = bool(checked.get("passed") and timed.get("passed"))
        mean = timed.get("geometric mean to diffusers", float("nan"))
        step = found[f"step {kind}"].get("to diffusers", float("nan"))
        print(
            f"{kind}: passed {passed}, layers {mean:.3f} and a step {step:.3f} of diffusers' time"
        )


if __name__ == "__main__":
    main()
