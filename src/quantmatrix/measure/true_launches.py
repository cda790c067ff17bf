"""True launches: the kernels of ours that a plan starts, at the sizes that its model really has.

A plan is made from the headers of a checkpoint, which may be a small stand-in's. What a kernel is
specialised on (rows, columns, groups) comes from the model's own size, so each planned layer is put
where its like is in the transformer of diffusers' published configuration, which is built
and called once without memory. The layer then takes its own way, from tensors as on disk to
canonical ones, `prepare` and `forward`, on the device `meta`, and `kernels.launching` keeps what it
would have started. Nothing here knows how a kernel is launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from quantmatrix import families, kernels
from quantmatrix.checkpoints.dtypes import to_torch
from quantmatrix.kernels.launching import TRITON, Launch, watch
from quantmatrix.measure.bench.synthetic import make_inputs
from quantmatrix.measure.census import name_kind
from quantmatrix.runtime.empty_model import build_plain
from quantmatrix.runtime.plan.types import ComponentPlan, Piece, Plan
from quantmatrix.runtime.quantized_linear import QuantizedLinear


@dataclass(frozen=True)
class TrueLayer:
    """A linear layer of a model at its published size, as one forward at the usual size calls it."""

    out_features: int
    in_features: int
    bias: bool
    inputs: frozenset[tuple[int, ...]]
    """Shapes [..., in_features]."""

    @property
    def rows(self) -> int:
        """Most rows of an input."""
        return max(torch.Size(shape[:-1]).numel() for shape in self.inputs)


@lru_cache(maxsize=8)
def list_layers(model: str) -> Mapping[str, TrueLayer]:
    """Linear layers that a forward of a base model calls, by kind (see `census.name_kind`)."""
    module_built = build_plain(model, "full").to(device="meta").to(torch.bfloat16).eval()
    seen: dict[str, tuple[nn.Linear, set[tuple[int, ...]]]] = {}

    def keep(kind: str, layer: nn.Linear) -> Any:
        return lambda _, inputs: seen.setdefault(kind, (layer, set()))[1].add(
            tuple(inputs[0].shape)
        )

    for name, module in module_built.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep(name_kind(name), module))
    with torch.no_grad():
        module_built(**make_inputs(model, module_built, "meta", torch.bfloat16))
    return {
        kind: TrueLayer(
            layer.out_features, layer.in_features, layer.bias is not None, frozenset(at)
        )
        for kind, (layer, at) in seen.items()
    }


def list_launches(plan: Plan) -> tuple[list[Launch], list[str]]:
    """(launches of a plan's layers at true size, layers that the plan's kernels do not take there).

    Layers that are alike in kind, scheme and kernel are followed once, those that packages of others
    compute not at all. Nothing starts where Triton has no GPU to compile for.
    """
    launches: list[Launch] = []
    problems: list[str] = []
    if plan.machine.vendor not in TRITON:
        return launches, problems
    for part in plan.components.values():
        followed = set()
        for module, piece in list_pieces(part):
            like = (name_kind(module), piece.scheme, piece.backend, piece.target.columns)
            layer = list_layers(plan.model).get(like[0])
            if like in followed:
                continue
            followed.add(like)
            if layer is None:
                problems.append(f"{module}: no such layer in {plan.model} at its published size")
                continue
            kernel = find_kernel(piece)
            if not is_ours(kernel):
                continue
            shape = find_shape(piece, layer)
            why = kernel.needs.why_not(plan.machine, piece.scheme, shape, layer.rows)
            if why:
                problems.append(f"{module} at its true size: {piece.backend} {why}")
                continue
            launches += follow(part, piece, layer, kernel, plan)
    return launches, problems


def list_pieces(part: ComponentPlan) -> Iterator[tuple[str, Piece]]:
    """(module, piece) of every piece of a component."""
    for module, pieces in part.layers.items():
        for piece in pieces:
            yield module, piece


def find_kernel(piece: Piece) -> kernels.Kernel:
    """The kernel that a plan names for a piece."""
    return next(k for k in kernels.kernels_of(piece.scheme.op) if k.backend == piece.backend)


def is_ours(kernel: kernels.Kernel) -> bool:
    """Whether a kernel asks for no package of others; those bring programs of their own."""
    needs = (kernel.needs, *kernel.needs.further)
    return all(need.package in ("", "triton") for need in needs)


def find_shape(piece: Piece, layer: TrueLayer) -> tuple[int, int]:
    """(out, in) of a piece whose module has a true layer's size."""
    start, stop, whole = piece.target.columns
    return layer.out_features, layer.in_features * (stop - start) // whole


def follow(
    part: ComponentPlan, piece: Piece, layer: TrueLayer, kernel: kernels.Kernel, plan: Plan
) -> list[Launch]:
    """What one layer starts when it is called with each of its inputs."""
    dtype = getattr(torch, plan.request.dtype)
    shape = find_shape(piece, layer)
    with watch(plan.machine.arch) as seen, torch.no_grad():
        canonical = draw_canonical(part, piece, shape)
        if layer.bias:
            canonical["bias"] = torch.empty(shape[0], dtype=dtype, device="meta")
        module_built = QuantizedLinear(shape[1], shape[0], kernel, piece.scheme, canonical, dtype)
        for inputs in layer.inputs:
            module_built(torch.empty(*inputs[:-1], shape[1], dtype=dtype, device="meta"))
    return seen


def draw_canonical(part: ComponentPlan, piece: Piece, shape: tuple[int, int]) -> kernels.Tensors:
    """Canonical tensors of a layer without memory: those that the checkpoint has, in its dtypes.

    `shape` is the layer's (out, in); the tensors are on `meta`, in the shapes of the op's table,
    codes [out, in] or packed. Raises ValueError for a component without a family.
    """
    if part.family is None:
        raise ValueError(f"{piece.layer} is quantized, and its component has no family")
    family = families.load(part.family)
    stored = {}
    for suffix, spec in family.tensors(piece.scheme, *shape).items():
        header = part.checkpoint.tensors.get(f"{piece.layer}.{suffix}")
        if header is None and spec.optional:
            continue
        dtypes = [header.dtype] if header and header.dtype in spec.dtypes else spec.dtypes
        stored[suffix] = torch.empty(spec.shapes[0], dtype=to_torch(dtypes[0]), device="meta")
    return dict(family.canonical(stored, piece.scheme))
