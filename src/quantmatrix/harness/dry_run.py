"""Dry run: what a hardware's job would run for the guide's checkpoints, planned without the hardware.

For each checkpoint of the guide's table: the exact command, the kernels that would compute its
layers, and the memory of its weights. The plan is made from the headers of tiny stand-ins, for the
hardware's row. The true size is computed from the shapes of diffusers' published defaults, built
without memory, and the tensors that the family stores per layer; experts that the checkpoint leaves
alone are counted in full precision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.dtypes import ITEM_BITS
from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, CheckpointRow, Matrix

PLAIN_BYTES = 2
"""Bytes of a parameter in BF16, which is what is not quantized."""


def choose_cells(tables: Matrix, hardware: str) -> list[Cell]:
    """The first claimed cell of every checkpoint of the guide's table that the hardware loads.

    Raises UsageError for hardware that is not a row.
    """
    from quantmatrix.harness.shards import runnable

    if hardware not in tables.hardware:
        known = ", ".join(tables.hardware)
        raise UsageError(f"--hardware {hardware}: not a row of hardware.csv; known: {known}")
    chosen: dict[str, Cell] = {}
    for cell in runnable(tables, [hardware]):
        if cell.claim != "refused" and tables.checkpoints[cell.checkpoint].algo:
            chosen.setdefault(cell.checkpoint, cell)
    order = list(tables.checkpoints)
    return sorted(chosen.values(), key=lambda cell: order.index(cell.checkpoint))


def describe(tables: Matrix, cell: Cell) -> dict[str, Any]:
    """Command, plan and memory of one cell, plain data; a refusal is reported as one."""
    from quantmatrix.api import plan
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.runtime import true_bytes
    from quantmatrix.runtime.plan.types import Plan

    planned = plan(Workbench(tables, tiny=True).planned_request(cell))
    checkpoint = tables.checkpoints[cell.checkpoint]
    described: dict[str, Any] = {
        "cell": cell.id,
        "checkpoint": checkpoint.reference,
        "command": cell.shell(tables),
        "ok": planned.ok,
        "devices": tables.hardware[cell.hardware].devices,
    }
    if not isinstance(planned, Plan):
        return {**described, "refusal": {"rule": planned.rule, "message": planned.message}}
    sizes = true_bytes.measure_all(planned)
    why = true_bytes.explain_fit(sizes, planned)
    return {
        **described,
        "kernels": {
            name: {f"{op}: {backend}": count for (op, backend), count in counts.items()}
            for name, counts in count_kernels(planned).items()
        },
        "tiny_bytes": sum(part.bytes for part in planned.components.values()),
        "true_bytes": estimate_bytes(tables, checkpoint),
        "memory_bytes": sum(size.whole for size in sizes.values()),
        "warnings": [*planned.warnings, *([why] if why else [])],
    }


def count_kernels(plan: Any) -> dict[str, dict[tuple[str, str], int]]:
    """Layers per (op, backend) of each component of a plan."""
    found: dict[str, dict[tuple[str, str], int]] = {}
    for name, part in plan.components.items():
        counts = found.setdefault(name, {})
        for piece in part.pieces():
            key = (piece.scheme.op, piece.backend)
            counts[key] = counts.get(key, 0) + 1
    return found


def estimate_bytes(tables: Matrix, checkpoint: CheckpointRow) -> int:
    """Bytes of all transformer weights of a checkpoint at the base model's true size.

    Raises UsageError for a scheme that the family does not have.
    """
    from quantmatrix import families, models

    family = families.load(checkpoint.family)
    model = models.load(checkpoint.model)
    if checkpoint.scheme not in family.SCHEMES:
        raise UsageError(f"{checkpoint.id}: scheme {checkpoint.scheme} is not one of its family's")
    scheme = family.SCHEMES[checkpoint.scheme]
    kept = [re.compile(pattern) for pattern in model.FALLBACKS.get(checkpoint.kept, ())]
    total = 0
    for component in tables.models[checkpoint.model].transformers:
        quantized = component in checkpoint.components

        def stored(name: str, shape: tuple[int, int], quantized: bool = quantized) -> int | None:
            inside = quantized and name.split(".")[0] in model.BLOCKS
            if not inside or any(pattern.fullmatch(name) for pattern in kept):
                return None
            specs = family.tensors(scheme, *shape).values()
            return sum(measure(s.dtypes[0], s.shapes[0]) for s in specs if not s.optional)

        total += count_bytes(checkpoint.model, stored)
    return total


def count_bytes(model: str, stored: Callable[[str, tuple[int, int]], int | None]) -> int:
    """Bytes of one transformer; `stored` gives those of a quantized layer's weight, or None."""
    total = 0
    for name, shape, is_linear in list_parameters(model):
        layer, _, leaf = name.rpartition(".")
        matrix = (shape[0], shape[-1])
        size = stored(layer, matrix) if is_linear and leaf == "weight" else None
        total += PLAIN_BYTES * math.prod(shape) if size is None else size
    return total


@lru_cache(maxsize=8)
def list_parameters(model: str) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    """(name, shape, whether it belongs to a linear layer) of a base model's transformer."""
    from torch import nn

    from quantmatrix.runtime.empty_model import build_plain

    model_built = build_plain(model, "full")
    linear = {name for name, module in model_built.named_modules() if isinstance(module, nn.Linear)}
    return tuple(
        (name, tuple(parameter.shape), name.rpartition(".")[0] in linear)
        for name, parameter in model_built.named_parameters()
    )


def measure(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on disk."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8
