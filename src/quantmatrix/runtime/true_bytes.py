"""True bytes: what a model's transformers need at their own size, and whether a device holds them.

A plan of a stand-in knows which layers are quantized, how, and by which kernel; blocks of a model are
alike, so the same is true of every block of the model itself. Its shapes come from diffusers' published
defaults, built without memory, and what a kernel keeps of a layer from its `footprint`. Nothing is
read, and the numbers are those of weights in memory: activations and other components come on top.

Where the weights do not fit, the offload that makes them fit is named:

| flag | on the device at one time |
| ---- | ------------------------- |
| `--dit-cpu-offload` | one transformer, where a model has two |
| `--dit-layerwise-offload` | what is outside the blocks, and two blocks: one runs, one is fetched |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from quantmatrix.models import further
from quantmatrix.request import DTYPES

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.runtime.plan.types import ComponentPlan, Piece, Plan

GIB = 2**30
AHEAD = 2
"""Blocks that lie on the device while others wait."""


@dataclass(frozen=True)
class Size:
    """Bytes of one transformer's weights in memory."""

    outside: int
    """Of what is in no block."""
    blocks: tuple[int, ...]

    @property
    def whole(self) -> int:
        """All of it."""
        return self.outside + sum(self.blocks)

    @property
    def layerwise(self) -> int:
        """The most that lies on a device while blocks wait elsewhere."""
        return self.outside + sum(sorted(self.blocks)[-AHEAD:])


def measure_all(plan: Plan) -> dict[str, Size]:
    """Size of every transformer component of a plan at the model's own size."""
    item = DTYPES[plan.request.dtype]
    model = further.list_repositories().get(plan.base, plan.model)
    return {name: measure(model, part, item) for name, part in plan.components.items()}


def measure(model: str, part: ComponentPlan, item: int) -> Size:
    """Size of one component: what its kernels keep, everything else in the compute dtype."""
    patterns = {generalize(name): pieces for name, pieces in part.layers.items()}
    outside = 0
    blocks: dict[str, int] = {}
    for name, shape in list_parameters(model):
        layer, _, leaf = name.rpartition(".")
        pieces = patterns.get(generalize(layer))
        if pieces is None:
            size = item * math.prod(shape)
        elif leaf == "weight":
            size = sum(measure_piece(piece, len(pieces), shape, item) for piece in pieces)
        else:
            size = 0  # a kernel's footprint has the bias
        block = re.match(r"(.+?\.\d+)\.", name)
        if block:
            blocks[block[1]] = blocks.get(block[1], 0) + size
        else:
            outside += size
    return Size(outside, tuple(blocks.values()))


def measure_piece(piece: Piece, count: int, shape: tuple[int, ...], item: int) -> int:
    """Bytes that a piece's kernel keeps of a layer [out, in]; several share its columns equally."""
    from quantmatrix import kernels

    kernel = next(k for k in kernels.kernels_of(piece.scheme.op) if k.backend == piece.backend)
    return kernel.footprint(piece.scheme, shape[0], shape[1] // count, item)


def generalize(name: str) -> str:
    """A module's name with the numbers of blocks left open: `blocks.#.attn.to_q`."""
    return re.sub(r"^([a-z_]+)\.\d+\.", r"\1.#.", name)


@lru_cache(maxsize=8)
def list_parameters(model: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of every parameter of a base model's transformer at its own size."""
    from quantmatrix.runtime.empty_model import build_plain

    model_built = build_plain(model, "full")
    return tuple((name, tuple(tensor.shape)) for name, tensor in model_built.named_parameters())


def explain_fit(sizes: Mapping[str, Size], plan: Plan) -> str | None:
    """Why the weights do not fit as planned, and the offload that makes them fit; None: they do."""
    room = plan.machine.memory_bytes
    need = sum(size.whole for size in sizes.values())
    if plan.layerwise_offload:
        need = max(size.layerwise for size in sizes.values())
    elif plan.cpu_offload:
        need = max(size.whole for size in sizes.values())
    if not room or need <= room:
        return None
    found = (
        f"the transformer weights of {plan.model} need {need / GIB:.1f} GiB at true size, "
        f"{plan.machine.name} has {room / GIB:.1f} GiB"
    )
    return f"{found}: {advise(sizes, plan, plan.machine)}"


def advise(sizes: Mapping[str, Size], plan: Plan, machine: Machine) -> str:
    """The gentlest offload with which the weights fit, as text."""
    from quantmatrix import families

    own = {part.family for part in plan.components.values()} - {None}
    movable = all(families.load(str(name)).CPU_OFFLOAD for name in own)
    largest = max(size.whole for size in sizes.values())
    layerwise = max(size.layerwise for size in sizes.values())
    if len(sizes) > 1 and largest <= machine.memory_bytes and movable:
        return f"--dit-cpu-offload makes it fit, with {largest / GIB:.1f} GiB at one time"
    if layerwise <= machine.memory_bytes:
        return f"--dit-layerwise-offload makes it fit, with {layerwise / GIB:.1f} GiB at one time"
    return (
        f"no offload makes it fit, for two blocks alone need {layerwise / GIB:.1f} GiB: take a kernel "
        "that keeps fewer bits (see --backend), or another hardware"
    )
