"""Kernels against their references, then whole steps at true sizes, on one NVIDIA GPU.

    python benchmarks/hopper.py --output-path results.json [--budget 540] [--tiny]

Weights are random in the true formats (quantmatrix.synthetic), so nothing is downloaded. First every
kernel that the machine has is compared with its op's `reference`; a kernel that is wrong is not
timed. Then layers and whole transformer forwards are timed beside diffusers in BF16 in the same
process, in turn, by CUDA events, as medians. The stages run in order of worth and stop when the time
budget is spent; what was not reached is said. `--tiny` runs everything on a CPU with tiny models,
to try the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantmatrix import families, hardware, kernels
from quantmatrix.families.protocol import Calibration
from quantmatrix.layers import QuantizedLinear
from quantmatrix.synthetic import make_inputs, synthesize

SHAPES = ((4608, 3072, 3072), (4608, 3072, 12288), (4608, 12288, 3072), (4608, 15360, 3072))
"""(M, K, N) of FLUX.1's blocks."""
LAYERS = (
    ("modelopt-fp8", "FP8", "torch"),
    ("fp8", "tensor-dynamic", "torch"),
    ("fp8", "channel-dynamic", "torch"),
    ("modelopt-nvfp4", "NVFP4", "fp8-recode"),
    ("msmodelslim", "W8A8", "int8"),
    ("msmodelslim", "W8A8_DYNAMIC", "int8"),
    ("nunchaku-svdq", "int4_r32", "merged"),
    ("nunchaku-svdq", "nvfp4_r32", "merged"),
)
STEPS = (
    ("modelopt-fp8", "FP8", "torch"),
    ("modelopt-nvfp4", "NVFP4", "fp8-recode"),
    ("nunchaku-svdq", "int4_r32", "merged"),
    ("msmodelslim", "W8A8_DYNAMIC", "int8"),
)
TOLERANCE = {"torch": 4e-3, "int8": 4e-3, "merged": 2e-1, "fp8-recode": 2e-1}
"""Relative L2 from `reference`: the same arithmetic up to BF16 rounding, or another class of it."""


class Bench:
    """Times and results; every result is written to the file at once."""

    def __init__(self, path: Path, budget: float, tiny: bool) -> None:
        self.path, self.tiny = path, tiny
        self.machine = hardware.probe("cpu" if tiny else "cuda")
        self.device = self.machine.device
        self.deadline = time.monotonic() + budget
        self.results: dict[str, Any] = {
            "machine": hardware.fingerprint()
            | {"name": self.machine.name, "arch": self.machine.arch},
            "torch": torch.__version__,
            "stages": {},
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def stage(self, name: str, work: Callable[[], Any], needs: float) -> None:
        """Run one stage unless too little time is left; an error is a result, too."""
        if self.left() < needs:
            self.results["stages"][name] = {"not_reached": f"{self.left():.0f} s left"}
        else:
            start = time.monotonic()
            try:
                found = work()
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"[:500]}
            self.results["stages"][name] = found
            print(
                f"[{time.monotonic() - start:6.1f} s] {name}: {json.dumps(found)[:1500]}",
                flush=True,
            )
        self.path.write_text(json.dumps(self.results, indent=1, sort_keys=True))
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def measure(self, ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Median milliseconds of each way, run in turn after a warm-up."""
        for way in ways.values():
            way()
            way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                times[name].append(self.time_once(way))
        return {name: statistics.median(values) for name, values in times.items()}

    def time_once(self, way: Callable[[], Any]) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            way()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        way()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def make_layer(
    bench: Bench, family: str, scheme: str, backend: str, shape: tuple[int, int]
) -> tuple[QuantizedLinear, torch.Tensor, dict[str, torch.Tensor]]:
    """(layer of a backend, the BF16 weight, canonical tensors) from a really quantized weight."""
    n, k = shape
    module = families.load(family)
    chosen = module.SCHEMES[scheme]
    weight = (torch.randn(n, k, device=bench.device) / k**0.5).bfloat16()
    limit = torch.full((k,), 4.5, device=bench.device)
    if family == "nunchaku-svdq":
        weight_, limit_ = weight.cpu(), limit.cpu()
        made = module.quantize(weight_, chosen, calibration=Calibration(-limit_, limit_))
        made = {name: tensor.to(bench.device) for name, tensor in made.items()}
    else:
        made = module.quantize(weight, chosen, calibration=Calibration(-limit, limit))
    canonical = module.canonical(made, chosen)
    kernel = kernels.choose(chosen.op, bench.machine, chosen, shape, backend)
    return QuantizedLinear(k, n, kernel, chosen, canonical, torch.bfloat16), weight, canonical


def check_layer(bench: Bench, family: str, scheme: str, backend: str) -> dict[str, float]:
    """Relative L2 of a backend from `reference` and of `reference` from the BF16 layer."""
    n, k, m = (256, 384, 32) if bench.tiny else (3072, 3072, 512)
    layer, weight, canonical = make_layer(bench, family, scheme, backend, (n, k))
    x = torch.randn(m, k, device=bench.device).bfloat16()
    reference = next(
        kernel for kernel in kernels.kernels_of(layer.scheme.op) if kernel.backend == "reference"
    )
    other = QuantizedLinear(k, n, reference, layer.scheme, canonical, torch.bfloat16)
    with torch.no_grad():
        got, expected = layer(x).float(), other(x).float()
        plain = torch.nn.functional.linear(x, weight).float()
        again = layer(x).float()
    error = ((got - expected).norm() / expected.norm()).item()
    return {
        "error_from_reference": error,
        "reference_from_bf16": ((expected - plain).norm() / plain.norm()).item(),
        "repeats": bool(torch.equal(got, again)),
        "passed": bool(error <= TOLERANCE[backend]),
    }


def time_layers(bench: Bench, wanted: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Ratio to the BF16 linear of each layer on FLUX.1's shapes, quantization included."""
    found: dict[str, Any] = {}
    shapes = ((64, 256, 384),) if bench.tiny else SHAPES
    for m, k, n in shapes:
        x = torch.randn(m, k, device=bench.device).bfloat16()
        plain = (torch.randn(n, k, device=bench.device) / k**0.5).bfloat16()
        ways: dict[str, Callable[[], Any]] = {
            "bf16": lambda x=x, w=plain: torch.nn.functional.linear(x, w)
        }
        for family, scheme, backend in wanted:
            if family == "nunchaku-svdq":
                continue  # merged is a BF16 linear layer
            layer, _, _ = make_layer(bench, family, scheme, backend, (n, k))
            ways[f"{family} {scheme} {backend}"] = lambda x=x, layer=layer: layer(x)
        with torch.no_grad():
            times = bench.measure(ways, 5 if bench.tiny else 30)
        found[f"{m}x{k}x{n}"] = {
            name: {"ms": value, "ratio": value / times["bf16"]} for name, value in times.items()
        }
    return found


def time_step(
    bench: Bench, model: str, wanted: list[tuple[str, str, str]], *, compiled: bool, repeats: int
) -> dict[str, Any]:
    """One transformer forward: diffusers in BF16 beside each quantized form, in pairs."""
    size = "tiny" if bench.tiny else "full"
    plain = synthesize(model, bench.machine, size=size)
    inputs = make_inputs(model, plain, bench.device, torch.bfloat16, size=size)
    found: dict[str, Any] = {"bf16_bytes": count_bytes(plain)}

    def forward(module: torch.nn.Module) -> Callable[[], Any]:
        return lambda: module(**inputs)

    if compiled:
        plain.compile_repeated_blocks(fullgraph=False)
    for family, scheme, backend in wanted:
        quantized = synthesize(
            model, bench.machine, family=family, scheme=scheme, backend=backend, size=size
        )
        if compiled:
            quantized.compile_repeated_blocks(fullgraph=False)
        with torch.no_grad():
            first = flatten(quantized(**inputs))
            same = torch.equal(first, flatten(quantized(**inputs)))
            times = bench.measure(
                {"bf16": forward(plain), "quantized": forward(quantized)}, repeats
            )
        found[f"{family} {scheme} {backend}"] = {
            **times,
            "ratio": times["quantized"] / times["bf16"],
            "bytes": count_bytes(quantized),
            "repeats": bool(same),
            "finite": bool(torch.isfinite(first).all()),
        }
        del quantized
        if bench.device != "cpu":
            torch.cuda.empty_cache()
    return found


def flatten(output: Any) -> torch.Tensor:
    value = output[0]
    return (value[0] if isinstance(value, list) else value).float()


def count_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    kept = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def measure_rates(bench: Bench) -> dict[str, float]:
    """TFLOP/s of BF16 and FP8 matmuls of 8192-cubes of random numbers; TB/s of a copy."""
    side = 256 if bench.tiny else 8192
    a, b = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"bf16": lambda: a @ b.t()}
    one = torch.ones((), device=bench.device)
    fa, fb = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ways["fp8"] = lambda: torch._scaled_mm(
        fa, fb.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )
    big = torch.empty(
        (1 if bench.tiny else 1000) * 2**20, device=bench.device, dtype=torch.bfloat16
    )
    ways["copy"] = big.clone
    times = bench.measure(ways, 10)
    flops = 2 * side**3 / 1e9
    return {
        "bf16_tflops": flops / times["bf16"],
        "fp8_tflops": flops / times["fp8"],
        "copy_tb_per_s": 2 * big.numel() * 2 / times["copy"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-path", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    arguments = parser.parse_args()
    bench = Bench(arguments.output_path, arguments.budget, arguments.tiny)
    torch.manual_seed(0)
    bench.stage("rates", lambda: measure_rates(bench), 20)
    good: list[tuple[str, str, str]] = []
    for way in LAYERS:
        if bench.tiny and way[2] in ("torch", "fp8-recode"):
            continue
        name = "check " + " ".join(way)
        bench.stage(name, lambda way=way: check_layer(bench, *way), 15)
        if bench.results["stages"][name].get("passed"):
            good.append(way)
    bench.stage("layers", lambda: time_layers(bench, good), 30)
    steps = [way for way in STEPS if way in good]
    fp8 = [way for way in steps if way[0] == "modelopt-fp8"]
    repeats = 3 if bench.tiny else 10
    plans: list[tuple[str, str, list[tuple[str, str, str]], bool, int, float]] = [
        ("step flux-1", "flux-1", steps, False, repeats, 60),
        ("step flux-1 compiled", "flux-1", fp8, True, repeats, 100),
        ("step z-image", "z-image", steps, False, repeats, 40),
        ("step qwen-image", "qwen-image", fp8, False, repeats, 60),
        ("step wan-2-2", "wan-2-2", fp8, False, 3, 80),
        ("step flux-2", "flux-2", fp8, False, 5, 80),
    ]
    for name, model, wanted, compiled, count, needs in plans:
        bench.stage(
            name,
            lambda model=model, wanted=wanted, compiled=compiled, count=count: time_step(
                bench, model, wanted, compiled=compiled, repeats=count
            ),
            needs,
        )
    print(json.dumps(bench.results["stages"], indent=1))


if __name__ == "__main__":
    main()
