"""Bench: a quantized transformer beside the same one in BF16, timed in turn in one process.

Both are on the device at the same time and get the same inputs: those of the first step of a
generation with the request's prompt and size. Measured are, per transformer component:

| part     | content |
| -------- | ------- |
| `layers` | every distinct quantized layer (rows, in, out, scheme, backend) on the input that it gets in |
|          | a step, beside the BF16 linear layer of the same name; quantizing the input is included, |
|          | and weights that fit the cache stay there, as in no real step |
| `step`   | one forward |
| `load`   | reading the weights to the device until each was touched; the files are in the page cache |
| `memory` | bytes of weights, and the most that a forward holds on top of them (see `working_memory`) |

A timing is a burst of calls that takes about `BURST_MS`, after a warm-up. An accelerator's events
count its time. On a CPU it is the process's CPU time where torch has one thread, so that a neighbour
who takes the core is not measured, and the wall clock where it has more. What the numbers of a timing
mean is described in `quantmatrix.proof.ratios`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from quantmatrix.errors import CheckpointError
from quantmatrix.measure.bench.speed import WARM_UP, count_bytes, flatten_output, time_calls
from quantmatrix.measure.bench.working_memory import measure_working
from quantmatrix.proof.bench_results import describe_sizes, summarize
from quantmatrix.proof.ratios import FEWEST
from quantmatrix.runtime.quantized_linear import QuantizedLinear, SplitInputLinear

BURST_MS = 2.0
"""Milliseconds that one timing takes at least, or nearly: far above the resolution of any clock."""
TRIALS = 5
"""Single calls, of which the quickest tells how many make a burst."""
MOST_CALLS = 20_000
"""Calls of a burst at most."""
DIGITS = 5
"""Significant digits of a stored timing."""
Call = Callable[[], Any]
Say = Callable[[str], None]


@dataclass
class Part:
    """One transformer component in both forms, and how to call and to load them."""

    name: str
    device: str
    bf16: nn.Module
    quantized: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    load: Mapping[str, Callable[[], nn.Module]] | None = None
    """A fresh load of each form; None where there are no files."""
    finish: Callable[[nn.Module], None] = lambda module: None
    """What is done to a transformer before its steps are timed (`--compile`, `--cuda-graph`)."""

    def step(self, form: str) -> Any:
        """One forward of a form."""
        return getattr(self, form)(*self.args, **self.kwargs)


def measure_part(part: Part, repeats: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Everything about one component, plain data. `repeats` are the rounds of each comparison.

    Raises CheckpointError where an output is not finite: its time would mean nothing.
    """
    with torch.no_grad():
        say(f"{part.name}: layers")
        layers = measure_layers(part, repeats)
        for form in ("bf16", "quantized"):
            part.finish(getattr(part, form))
            check_finite(part, form)
        say(f"{part.name}: step")
        calls = {form: partial(part.step, form) for form in ("bf16", "quantized")}
        found = {"layers": layers, "step": time_pair(calls, part.device, repeats)}
        if part.load is not None:
            say(f"{part.name}: load")
            found["load"] = time_loads(part.load, part.device, repeats)
        say(f"{part.name}: memory")
        found["memory"] = measure_memory(part)
    return found


def check_finite(part: Part, form: str) -> None:
    """CheckpointError unless a forward gives numbers."""
    if not torch.isfinite(flatten_output(part.step(form))).all():
        raise CheckpointError(
            f"{part.name}: the {form} output has NaN or infinite elements: its time means nothing; "
            "see `quantmatrix validate`"
        )


def time_pair(calls: Mapping[str, Call], device: str, repeats: int) -> dict[str, Any]:
    """Timings of `bf16` and `quantized`, milliseconds of one call, and their ratio."""
    bursts = {form: find_burst(call, device) for form, call in calls.items()}
    clock = choose_clock(device)[0]

    def time_one(form: str) -> float:
        return time_calls(calls[form], device, bursts[form], clock)

    return {**describe_pairs(take_turns(time_one, repeats)), "burst": bursts}


def choose_clock(device: str) -> tuple[Callable[[], float], str]:
    """(clock in seconds for what a CPU does, its name; an accelerator's events are its own)."""
    if device != "cpu":
        return time.perf_counter, "device events; loading: wall clock"
    if torch.get_num_threads() == 1:
        return time.process_time, "CPU time of the process, one thread"
    return time.perf_counter, "wall clock"


def find_burst(call: Call, device: str) -> int:
    """Calls that take `BURST_MS` together, after a warm-up."""
    for _ in range(WARM_UP):
        call()
    once = min(time_calls(call, device, 1, choose_clock(device)[0]) for _ in range(TRIALS))
    return min(max(math.ceil(BURST_MS / max(once, 1e-6)), 1), MOST_CALLS)


def take_turns(time_one: Callable[[str], float], repeats: int) -> dict[str, list[float]]:
    """Times of both forms, one of each per round; who begins changes from round to round."""
    times: dict[str, list[float]] = {"bf16": [], "quantized": []}
    for number in range(repeats):
        for form in ("bf16", "quantized") if number % 2 == 0 else ("quantized", "bf16"):
            times[form].append(float(f"{time_one(form):.{DIGITS}g}"))
    return times


def describe_pairs(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Samples in milliseconds and what follows from them."""
    return {**summarize(times), "milliseconds": dict(times)}


def measure_layers(part: Part, repeats: int) -> list[dict[str, Any]]:
    """Each distinct quantized layer beside its BF16 twin; `count` says how many are like it."""
    found = []
    for facts, name, x in find_layers(part):
        layer, plain = part.quantized.get_submodule(name), part.bf16.get_submodule(name)
        with unshared(layer):
            calls = {"bf16": partial(plain, x), "quantized": partial(layer, x)}
            found.append({**facts, "layer": name, **time_pair(calls, part.device, repeats)})
    return found


def find_layers(part: Part) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """(facts, name of the first, its input) of every kind of quantized layer that a step calls.

    The input is a copy [..., in] in the dtype of the step; `rows` of the facts is the product of
    the rest.
    """
    kinds: dict[tuple[Any, ...], tuple[dict[str, Any], str, torch.Tensor]] = {}
    counted: set[str] = set()
    handles = []

    def note(name: str, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if name in counted:
            return
        counted.add(name)
        first: Any = layer.parts[0] if isinstance(layer, SplitInputLinear) else layer
        facts = {
            "rows": x.numel() // layer.in_features,
            "in": layer.in_features,
            "out": layer.out_features,
            "scheme": first.scheme.name,
            "backend": first.kernel.backend,
        }
        kind = tuple(facts.values())
        if kind not in kinds:
            kinds[kind] = ({**facts, "count": 0}, name, x.detach().clone())
        kinds[kind][0]["count"] += 1

    for name, module in list_quantized(part.quantized):
        handles.append(module.register_forward_pre_hook(partial(note, name)))
    try:
        part.step("quantized")
    finally:
        for handle in handles:
            handle.remove()
    return list(kinds.values())


def list_quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Quantized modules of a model by name; the parts of a split one count as one."""
    for name, module in model.named_modules():
        whole = isinstance(module, QuantizedLinear) and ".parts." not in f".{name}"
        if whole or isinstance(module, SplitInputLinear):
            yield name, module


@contextmanager
def unshared(layer: nn.Module) -> Iterator[None]:
    """Let a layer quantize its input on every call: on one fixed input it would do so once."""
    pieces = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
    kept = [piece.shared for piece in pieces]
    try:
        for piece in pieces:
            piece.shared = None
        yield
    finally:
        for piece, shared in zip(pieces, kept, strict=True):
            piece.shared = shared


def time_loads(
    load: Mapping[str, Callable[[], nn.Module]], device: str, repeats: int
) -> dict[str, Any]:
    """Milliseconds of fresh loads of both forms, in turn, every page of the weights touched.

    A load takes long, so there are half as many rounds as elsewhere.
    """
    clock = choose_clock(device)[0]

    def time_one(form: str) -> float:
        start = clock()
        touch(load[form]())
        if device != "cpu":
            torch.get_device_module(device.partition(":")[0]).synchronize()
        return (clock() - start) * 1e3

    for form in load:
        time_one(form)  # imports, and files that are not in the page cache yet
    return describe_pairs(take_turns(time_one, max(repeats // 2, FEWEST)))


def touch(model: nn.Module) -> int:
    """Read a byte of every page of every tensor: mapped weights are in memory only then."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,))  # in memory's order
            total += int(flat.view(torch.uint8)[::4096].sum(dtype=torch.int64))
    return total


def measure_memory(part: Part) -> dict[str, Any]:
    """Bytes of weights and of a forward, of both forms; their sum is the peak."""
    found: dict[str, Any] = {}
    for form in ("bf16", "quantized"):
        weights = count_bytes(getattr(part, form))
        working, how = measure_working(partial(part.step, form), part.device)
        found[form] = {"weights": weights, "working": working, "peak": weights + working}
        found["counted_by"] = how
    for what in ("weights", "peak"):
        ratio, verdict = describe_sizes(found["bf16"][what], found["quantized"][what])
        found[f"{what}_ratio"], found[f"{what}_verdict"] = ratio, verdict
    return found
