"""Norms: a norm, its modulation and the codes of the result become one kernel.

The numbers may be modulated by a scale and a shift per sample, as FLUX and Qwen-Image do, by a scale
alone (Z-Image), or not at all (the norm before Wan's cross-attention).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from quantmatrix.kernels.launching import can_launch
from quantmatrix.runtime.rewrites.patterns import Node, follow, is_call, is_node, skip, value_of


@dataclass(frozen=True)
class Norm:
    """What an RMS norm reads."""

    x: Node
    weight: Node
    eps: float
    heads: tuple[int, int] | None = None
    """(heads, width) that the result is parted into, where x is not."""


@dataclass(frozen=True)
class Modulated:
    """What a norm with its modulation reads."""

    x: Node
    eps: float
    center: bool
    weight: Node | None = None
    scale: Node | None = None
    shift: Node | None = None


def replace_norms(graph: fx.Graph, *, everywhere: bool) -> None:
    """Put the kernel where codes e4m3 are made of normalized numbers, on a GPU (or `everywhere`)."""
    for node in list(graph.nodes):
        quotient = find_quotient(node)
        if quotient is None or value_of(quotient.args[1]).numel() != 1:
            continue
        found = read(quotient.args[0])
        if found and (everywhere or can_launch(value_of(found.x))):
            replace_norm(graph, node, found, quotient.args[1])


def find_quotient(node: Node) -> Any:
    """The division whose result codes e4m3 are made of and nothing else is; None where there is none."""
    if not is_call(node, "to") or node.args[1:] != (torch.float8_e4m3fn,):
        return None
    clamp = node.args[0]
    quotient = follow(clamp, "clamp")
    if not is_call(quotient, "truediv") or not is_node(quotient.args[1]):
        return None
    return quotient if len(clamp.users) == len(quotient.users) == 1 else None


def read(node: Any) -> Modulated | None:
    """The norm and modulation that a node is made by, if no other node reads what lies between."""
    while is_call(node, "float", "reshape", "to", "type_as"):
        node = node.args[0]
        if not is_node(node) or len(node.users) != 1:
            return None
    shift = scale = None
    if is_call(node, "add"):
        node, shift = part(node.args, "mul")
    if is_call(node, "mul") and find_norm(node) is None:
        one, other = node.args
        if is_one_more(one):
            one, other = other, one
        node, scale = (one, other.args[1]) if is_one_more(other) else (None, None)
    found = read_norm(node)
    if found is None or not all(
        vector is None or is_vector(vector, found.x) for vector in (scale, shift)
    ):
        return None
    if found.shift and (scale or shift):
        return None  # a bias of the norm's own would be scaled, too
    return replace(found, scale=scale, shift=shift or found.shift)


def part(values: Any, name: str) -> tuple[Any, Any]:
    """(the one of two values that is a call of this name, the other)."""
    one, other = values
    return (one, other) if is_call(one, name) else (other, one)


def is_one_more(node: Any) -> bool:
    """Whether a node is 1 plus another one."""
    return is_call(node, "add") and node.args[0] == 1 and is_node(node.args[1])


def read_norm(node: Any) -> Modulated | None:
    """A layer norm, with or without weights of its own, or an RMS norm with weights."""
    node = skip_casts(node)
    if is_call(node, "layer_norm") and len(node.args) == 5:
        x, shape, weight, bias, eps = node.args
        weight, bias = (None if one is None else skip_casts(one) for one in (weight, bias))
        if tuple(shape) != tuple(value_of(x).shape[-1:]):
            return None
        return Modulated(skip_casts(x), eps, True, weight, shift=bias)
    norm = find_norm(node) if is_node(node) else None
    if norm is None or norm.heads is not None:
        return None
    if value_of(norm.weight).shape != value_of(norm.x).shape[-1:]:
        return None
    return Modulated(norm.x, norm.eps, False, norm.weight)


def find_norm(node: Node) -> Norm | None:
    """The RMS norm of a query or key: torch's, of each head or of all, or diffusers' own."""
    whole = follow(node, "unflatten")
    norm = whole if whole is not None else node
    if is_call(norm, "rms_norm") and len(norm.args) == 4 and is_node(norm.args[2]):
        x, _, weight, eps = norm.args
        shape = value_of(node).shape
        if not isinstance(eps, float):
            return None  # torch would take that of the dtype
        return Norm(x, weight, eps, None if norm is node else (shape[2], shape[3]))
    if not is_call(node, "mul"):
        return None
    scaled, weight = skip(node.args[0], "to"), node.args[1]
    if not is_call(scaled, "mul") or not is_call(scaled.args[1], "rsqrt"):
        return None
    x, total = scaled.args[0], scaled.args[1].args[0]
    if not is_call(total, "add") or not is_node(weight) or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args
    squares = follow(mean, "mean", "pow")
    same = skip(squares, "to", "float") is x and mean.args[1:] == (-1,)
    return Norm(x, weight, eps) if same and mean.args[0].args[1] == 2 else None


def skip_casts(node: Any) -> Any:
    """The node whose numbers others widen to float32."""
    while is_call(node, "float", "to", "type_as") and value_of(node).dtype == torch.float32:
        node = node.args[0]
    return node


def is_vector(node: Any, x: Node) -> bool:
    """Whether a node has one row of numbers per sample of x [B, S, K]."""
    if not is_node(node) or value_of(x).ndim != 3:
        return False
    batch, _, width = value_of(x).shape
    shape = tuple(value_of(node).shape)
    # [B, K] would be a row per token, where there are as many tokens as samples
    return shape == (batch, 1, width) or (batch == 1 and shape in ((width,), (1, width)))


def replace_norm(graph: fx.Graph, node: Node, found: Modulated, step: Node) -> None:
    """Put the kernel in place of the codes that a node makes."""
    from quantmatrix.kernels.norm_triton import norm_codes

    value = value_of(found.x)
    if value.ndim != 3 or value_of(node).shape != value.flatten(0, 1).shape:
        return
    joined = is_call(found.x, "cat") and found.x.kwargs.get("dim") == 1
    parts = list(found.x.args[0]) if joined else [found.x]
    batch, _, width = value.shape
    with graph.inserting_before(node):
        rows = [
            None if one is None else graph.call_method("reshape", (one, -1, width))
            for one in (found.scale, found.shift)
        ]
        if found.shift is not None and value_of(found.shift).numel() == width < batch * width:
            rows[1] = graph.call_method("expand", (rows[1], batch, width))
        codes = graph.call_function(
            norm_codes._opoverload, (parts, found.weight, *rows, step, found.eps, found.center)
        )
    codes.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(codes)
