"""Made-up results of benchmarks, such as a measurement would have left them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantmatrix.proof import record as records
from quantmatrix.proof.bench_results import describe_sizes, sign, summarize
from quantmatrix.tables.rows import Matrix

DEVICE = "Some CPU, 1 thread"
NOISE = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.005, 0.995)


def make_timing(ratio: float = 0.8, noise: Sequence[float] = NOISE) -> dict[str, Any]:
    """Eight rounds whose ratios are scattered about `ratio`."""
    times = {"bf16": [10.0] * len(noise), "quantized": [10.0 * ratio * n for n in noise]}
    return {**summarize(times), "milliseconds": times}


def make_memory(bf16: int, quantized: int, working: int = 2**20) -> dict[str, Any]:
    """Bytes of weights, and the same working memory for both."""
    memory: dict[str, Any] = {"counted_by": "live tensors"}
    for form, weights in (("bf16", bf16), ("quantized", quantized)):
        memory[form] = {"weights": weights, "working": working, "peak": weights + working}
    for what in ("weights", "peak"):
        said = describe_sizes(memory["bf16"][what], memory["quantized"][what])
        memory[f"{what}_ratio"], memory[f"{what}_verdict"] = said
    return memory


def make_result(
    what: str = "some-row@cpu",
    device: str = DEVICE,
    *,
    step: float = 0.8,
    weights: int = 2**24,
    cell: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A result of one component with one kind of layer."""
    layer = {"rows": 16, "in": 256, "out": 512, "scheme": "FP8", "backend": "decode"}
    layer |= {"count": 4, "layer": "blocks.0.to_q", **make_timing(0.9)}
    part = {
        "layers": [layer],
        "step": make_timing(step),
        "load": make_timing(1.5),
        "memory": make_memory(2**25, weights),
    }
    return {
        "schema": 1,
        "what": what,
        "size": "tiny",
        "device": device,
        "command": f"quantmatrix bench --row {what} --tiny",
        "components": {"transformer": part},
        "backends": {"transformer": {"decode": 4}},
        "settings": {"repeats": 8, "confidence": 0.95, "power": 0.8, "clock": "wall clock"},
        "machine": {"processor": "some"},
        "commit": "0" * 40,
        "made": "2026-11-26T10:00:00Z",
        **({"cell": dict(cell)} if cell else {}),
    }


def bench_cell(tables: Matrix, name: str, **changes: Any) -> dict[str, Any]:
    """The result of a cell of the tables as it stands."""
    cell = next(cell for cell in tables.cells if cell.id == name)
    said = records.describe_cell(cell, tables)
    return make_result(name, cell=sign(said, make_result(name, **changes), tables), **changes)
