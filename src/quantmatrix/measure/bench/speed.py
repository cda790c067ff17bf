"""Speed: one forward of a transformer in a quantized form beside the same model in BF16.

Weights are random in the true formats (`quantmatrix.measure.bench.synthetic`), at the model's true size or tiny, so
nothing is downloaded. Both forms are run in turn in one process and timed by CUDA events, or by the
clock on a CPU; what is compared are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime import acceleration

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine

WARM_UP = 2


def measure_ways(
    ways: Mapping[str, Callable[[], Any]], device: str, repeats: int, burst: int = 1
) -> dict[str, float]:
    """Median milliseconds of each way, run in turn after a warm-up; `burst` calls per timing."""
    for way in ways.values():
        for _ in range(WARM_UP):
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(time_calls(way, device, burst))
    return {name: statistics.median(values) for name, values in times.items()}


def time_calls(
    way: Callable[[], Any], device: str, burst: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Milliseconds of one call out of `burst` without a pause, as the device counts them.

    On a CPU `clock` (seconds) is what counts.
    """
    if device == "cpu":
        start = clock()
        for _ in range(burst):
            way()
        return (clock() - start) * 1e3 / burst
    accelerator: Any = getattr(torch, device.partition(":")[0])  # torch.cuda, torch.npu
    begin, end = (accelerator.Event(enable_timing=True) for _ in range(2))
    accelerator.synchronize()
    begin.record()
    for _ in range(burst):
        way()
    end.record()
    accelerator.synchronize()
    return float(begin.elapsed_time(end)) / burst


def prepare_forward(
    module: nn.Module, inputs: Mapping[str, Any], *, compiled: bool = False, graph: bool = False
) -> Callable[[], Any]:
    """A call of a transformer on fixed inputs: as it is, with compiled blocks, as a CUDA graph."""
    if compiled:
        acceleration.compile_blocks(module)
    if graph:
        acceleration.graph_forward(module)
    return lambda: module(**inputs)


def flatten_output(output: Any) -> torch.Tensor:
    """The first output of a transformer's forward, float32, in any shape that the model gives."""
    value = output[0]
    first: torch.Tensor = value[0] if isinstance(value, list) else value
    return first.float()


def count_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    kept = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def compare_forms(
    model: str,
    machine: Machine,
    *,
    family: str,
    scheme: str,
    backend: str | None = None,
    size: str = "full",
    compiled: bool = False,
    graph: bool = False,
    repeats: int = 10,
) -> dict[str, Any]:
    """Milliseconds and bytes of a form and of BF16; both run in the mode that is asked for.

    Raises RefusedError where no kernel fits, UsageError for a scheme that the family lacks.
    """
    quantized = synthesize(model, machine, family=family, scheme=scheme, backend=backend, size=size)
    plain = synthesize(model, machine, size=size)
    inputs = make_inputs(model, plain, machine.device, torch.bfloat16, size=size)
    sizes = {"bf16": count_bytes(plain), "quantized": count_bytes(quantized)}
    ways = {
        name: prepare_forward(module, inputs, compiled=compiled, graph=graph)
        for name, module in (("bf16", plain), ("quantized", quantized))
    }
    with torch.no_grad():
        first = flatten_output(ways["quantized"]()).clone()
        same = torch.equal(first, flatten_output(ways["quantized"]()))
        times = measure_ways(ways, machine.device, repeats)
    return {
        "model": model,
        "size": size,
        "family": family,
        "scheme": scheme,
        "backends": count_backends(quantized),
        "milliseconds": times,
        "bytes": sizes,
        "ratio": times["quantized"] / times["bf16"],
        "repeats_bit_identical": same,
        "finite": bool(torch.isfinite(first).all()),
        "machine": {"name": machine.name, "arch": machine.arch},
    }


def count_backends(module: nn.Module) -> dict[str, int]:
    """Quantized layers by the backend that computes them."""
    from quantmatrix.runtime.quantized_linear import QuantizedLinear

    found: dict[str, int] = {}
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            found[layer.kernel.backend] = found.get(layer.kernel.backend, 0) + 1
    return found
