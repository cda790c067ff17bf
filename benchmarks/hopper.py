"""Kernels against their references, then whole steps at true sizes, on one NVIDIA GPU.

    python benchmarks/hopper.py --output-path results.json [--budget 540] [--tiny]

Weights are random in the true formats (quantmatrix.measure.bench.synthetic), so nothing is downloaded. First
every kernel that the machine has is compared with its op's `reference`; a kernel that is wrong is
not timed. Then layers and whole transformer forwards are timed beside diffusers in BF16 in the same
process, in turn, by CUDA events, as medians; torchao's fp8 layers, too, where it is installed. The
stages run in order of worth and stop when the time budget is spent; what was not reached is said.
The goals are printed last, as one table.
`--tiny` runs everything on a CPU with tiny models, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hopper_peers as peers
import torch

from quantmatrix import families, kernels
from quantmatrix.families.protocol import Calibration
from quantmatrix.hardware import probe
from quantmatrix.measure.bench import speed
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime.quantized_linear import QuantizedLinear

SHAPES = ((4608, 3072, 3072), (4608, 3072, 12288), (4608, 12288, 3072), (4608, 15360, 3072))
"""(M, K, N) of FLUX.1's blocks."""
LAYERS = (
    ("modelopt-fp8", "FP8", "torch"),
    ("fp8", "tensor-dynamic", "torch"),
    ("fp8", "channel-dynamic", "torch"),
    ("fp8", "block-dynamic", "torch-block"),
    ("modelopt-nvfp4", "NVFP4", "fp8-recode"),
    ("modelopt-nvfp4", "NVFP4", "packed"),
    ("modelopt-nvfp4", "NVFP4", "packed-fp8"),
    ("msmodelslim", "W8A8", "int8"),
    ("msmodelslim", "W8A8_DYNAMIC", "int8"),
    ("nunchaku-svdq", "int4_r32", "merged"),
    ("nunchaku-svdq", "nvfp4_r32", "merged"),
    ("nunchaku-svdq", "int4_r32", "packed"),
    ("nunchaku-svdq", "nvfp4_r32", "packed"),
)
Way = tuple[str, str, str]
"""(family or program, scheme, backend)."""
Plan = tuple[str, str, list[Way], str, int, float]
"""(stage, model, forms, mode, repeats, seconds that must be left)."""
FP8 = ("modelopt-fp8", "FP8", "torch")
RECODED = ("modelopt-nvfp4", "NVFP4", "fp8-recode")
INT8 = ("msmodelslim", "W8A8", "int8")
STEPS = (
    FP8,
    RECODED,
    ("modelopt-nvfp4", "NVFP4", "packed"),
    ("modelopt-nvfp4", "NVFP4", "packed-fp8"),
    ("nunchaku-svdq", "int4_r32", "merged"),
    ("nunchaku-svdq", "int4_r32", "packed"),
    INT8,
    ("msmodelslim", "W8A8_DYNAMIC", "int8"),
)
BFL = ("diffusers", "nvfp4", "bfl")
"""What diffusers does with the same format."""
ROWS, WHOLE = ("torchao", "float8-row", "torch"), ("torchao", "float8-tensor", "torch")
"""What torchao does with fp8 codes: scales per row, and per tensor, of weights and inputs."""
TOLERANCE = {
    "torch": 4e-3, "torch-block": 4e-3, "int8": 4e-3, "merged": 2e-1, "packed": 2e-1,
    "packed-fp8": 2e-1, "fp8-recode": 2e-1,
}  # fmt: skip
SAME_AS = {
    ("linear.nvfp4", "packed-fp8"): "fp8-recode",
    ("linear.nvfp4", "packed"): "decode",
    ("linear.svdq", "packed"): "merged",
}
"""Backends that must agree to a rounding of BF16 with another one."""
BURST = 20
"""Layers per timing: enough that the GPU never waits for the CPU's next launch."""
"""Relative L2 from `reference`: the same arithmetic up to BF16 rounding, or another class of it."""


class Bench:
    """Times and results; every result is written to the file at once."""

    def __init__(self, path: Path, budget: float, tiny: bool) -> None:
        self.path, self.tiny = path, tiny
        self.machine = probe.probe("cpu" if tiny else "cuda")
        self.device = self.machine.device
        self.deadline = time.monotonic() + budget
        self.results: dict[str, Any] = {
            "machine": probe.fingerprint() | {"name": self.machine.name, "arch": self.machine.arch},
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
        torch._dynamo.reset()
        gc.collect()  # a captured forward and its model refer to each other
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def measure(
        self, ways: dict[str, Callable[[], Any]], repeats: int, burst: int = 1
    ) -> dict[str, float]:
        """Median milliseconds of each way, run in turn after a warm-up."""
        return speed.measure_ways(ways, self.device, repeats, burst)


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
        twin = SAME_AS.get((layer.scheme.op, backend))
        beside = 0.0
        if twin:
            found = {kernel.backend: kernel for kernel in kernels.kernels_of(layer.scheme.op)}
            same = QuantizedLinear(k, n, found[twin], layer.scheme, canonical, torch.bfloat16)
            beside = ((same(x).float() - got).norm() / got.norm()).item()
    error = ((got - expected).norm() / expected.norm()).item()
    return {
        "error_from_twin": beside,
        "error_from_reference": error,
        "reference_from_bf16": ((expected - plain).norm() / plain.norm()).item(),
        "repeats": bool(torch.equal(got, again)),
        "passed": bool(error <= TOLERANCE[backend] and beside <= 4e-3),
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
            if backend == "merged":
                continue  # a BF16 linear layer
            layer, _, _ = make_layer(bench, family, scheme, backend, (n, k))
            ways[f"{family} {scheme} {backend}"] = lambda x=x, layer=layer: layer(x)
        row = peers.make_bfl(torch.nn.Linear(k, n, bias=False, device="meta"), "fp8r", bench.device)
        ways["diffusers fp8r bfl"] = lambda x=x, row=row: row(x)
        with torch.no_grad():
            times = bench.measure(ways, 5 if bench.tiny else 15, burst=BURST)
        found[f"{m}x{k}x{n}"] = {
            name: {"ms": value, "ratio": value / times["bf16"]} for name, value in times.items()
        }
    names = next(iter(found.values()))
    found["geometric mean of ratios"] = {
        name: statistics.geometric_mean(found[shape][name]["ratio"] for shape in found)
        for name in names
    }
    return found


def time_step(
    bench: Bench,
    model: str,
    wanted: list[tuple[str, str, str]],
    *,
    mode: str,
    repeats: int,
) -> dict[str, Any]:
    """One transformer forward: diffusers in BF16 beside each quantized form, in pairs.

    `mode` is `eager`, `compiled` (the repeated blocks), `graph` (one CUDA graph) or both; `bf16` is
    always eager; for `graph` and `compiled`, `bf16 MODE` is the same model in that mode.
    """
    size = "tiny" if bench.tiny else "full"
    plain = synthesize(model, bench.machine, size=size)
    inputs = make_inputs(model, plain, bench.device, torch.bfloat16, size=size)
    found: dict[str, Any] = {"bf16_bytes": speed.count_bytes(plain)}
    ways = {"bf16": run_eagerly(plain, inputs)}
    if mode in ("graph", "compiled"):
        ways[f"bf16 {mode}"] = prepare_mode(plain, inputs, mode)
    for family, scheme, backend in wanted:
        name = f"{family} {scheme} {backend}"
        if bench.left() < 25 and not bench.tiny:
            found[name] = {"not_reached": f"{bench.left():.0f} s left"}
            continue
        try:
            found[name] = time_one(
                bench, model, (family, scheme, backend), inputs, ways, mode, repeats
            )
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        if bench.device != "cpu":
            torch.cuda.empty_cache()
    return found


def time_one(
    bench: Bench,
    model: str,
    way: tuple[str, str, str],
    inputs: dict[str, Any],
    ways: dict[str, Callable[[], Any]],
    mode: str,
    repeats: int,
) -> dict[str, Any]:
    """One quantized form beside the BF16 ways."""
    family, scheme, backend = way
    size = "tiny" if bench.tiny else "full"
    if family in peers.WRITERS:
        quantized = peers.synthesize(bench.machine, model, family, scheme, size)
    else:
        quantized = synthesize(
            model, bench.machine, family=family, scheme=scheme, backend=backend, size=size
        )
    run = prepare_mode(quantized, inputs, mode)
    with torch.no_grad():
        first = speed.flatten_output(run()).clone()
        same = torch.equal(first, speed.flatten_output(run()))
        times = bench.measure({**ways, "quantized": run}, repeats)
        kernels_run = name_kernels(bench, run)
    return {
        "ms": times,
        "ratios": {name: times["quantized"] / times[name] for name in ways},
        "bytes": speed.count_bytes(quantized),
        "repeats": bool(same),
        "finite": bool(torch.isfinite(first).all()),
        "kernels": kernels_run,
    }


def run_eagerly(module: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A forward that neither compiled code nor a captured graph takes part in."""
    forward = module.forward

    def run() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return forward(**inputs)

    return run


def prepare_mode(module: torch.nn.Module, inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    """A forward in a mode: `eager`, `compiled`, `graph` or `compiled-graph`."""
    return speed.prepare_forward(module, inputs, compiled="compiled" in mode, graph="graph" in mode)


def name_kernels(bench: Bench, run: Callable[[], Any]) -> dict[str, list[float]]:
    """The kernels that take most of a forward: name to [calls, milliseconds]."""
    if bench.device == "cpu":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    found = {
        event.key[:90]: [event.count, round(event.self_device_time_total / 1e3, 3)]
        for event in events[:8]
    }
    return {**found, "all": [sum(event.count for event in events), round(total / 1e3, 3)]}


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


def list_steps(good: Sequence[Way], repeats: int) -> list[Plan]:
    """The stages that time whole steps, in order of worth, each with those of its forms that are good."""
    steps = [way for way in STEPS if way in good]
    fp8 = [way for way in steps if way == FP8]
    torchao = [way for way in (ROWS, WHOLE) if peers.is_installed("torchao")]
    light = [way for way in steps if way in (FP8, RECODED, INT8)]
    return [
        ("step flux-1", "flux-1", [*steps, BFL], "eager", repeats, 60),
        ("step flux-1 compiled", "flux-1", fp8, "compiled", repeats, 60),
        ("step flux-1 compiled-graph", "flux-1", [*light, *torchao], "compiled-graph", repeats, 60),
        ("step flux-2", "flux-2", fp8, "eager", 5, 40),
        ("step flux-2 compiled", "flux-2", fp8, "compiled", 5, 60),
        ("step wan-2-2", "wan-2-2", fp8, "eager", 3, 60),
        ("step flux-1 graph", "flux-1", steps, "graph", repeats, 40),
        ("step qwen-image graph", "qwen-image", light, "graph", repeats, 40),
        ("step z-image graph", "z-image", light, "graph", repeats, 40),
        ("step wan-2-2 compiled-graph", "wan-2-2", fp8, "compiled-graph", 3, 60),
        ("step qwen-image compiled-graph", "qwen-image", fp8, "compiled-graph", repeats, 60),
        ("step z-image compiled-graph", "z-image", fp8, "compiled-graph", repeats, 60),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-path", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages")
    parser.add_argument("--only", nargs="+", default=[], help="stages of steps, and no others")
    parser.add_argument("--forms", nargs="+", default=[], help="'family scheme backend' to time")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    arguments = parser.parse_args()
    bench = Bench(arguments.output_path, arguments.budget, arguments.tiny)
    torch.manual_seed(0)
    bench.stage("rates", lambda: measure_rates(bench), 20)
    repeats = 3 if bench.tiny else 10
    chosen = [
        plan
        for plan in list_steps(LAYERS, repeats)
        if plan[0] in arguments.only or not arguments.only
    ]
    needed = {way for plan in chosen for way in plan[2]} if arguments.only else {*LAYERS}
    good: list[Way] = []
    for way in LAYERS:
        on_gpu = way[2] in ("torch", "torch-block", "fp8-recode", "packed", "packed-fp8")
        if way not in needed or (bench.tiny and on_gpu):
            continue
        name = "check " + " ".join(way)
        bench.stage(name, lambda way=way: check_layer(bench, *way), 15)
        if bench.results["stages"][name].get("passed"):
            good.append(way)
    if not arguments.only:
        bench.stage("layers", lambda: time_layers(bench, good), 30)
    names = {plan[0] for plan in chosen}
    plans = [plan for plan in list_steps(good, repeats) if plan[0] in names]
    for name, model, wanted, mode, count, needs in plans:
        if bench.tiny and "graph" in mode:
            continue
        if arguments.forms:
            wanted = [way for way in wanted if " ".join(way) in arguments.forms]
        bench.stage(
            name,
            lambda model=model, wanted=wanted, mode=mode, count=count: time_step(
                bench, model, wanted, mode=mode, repeats=count
            ),
            needs,
        )
    from hopper_page import render

    print(render(bench.results))


if __name__ == "__main__":
    main()
