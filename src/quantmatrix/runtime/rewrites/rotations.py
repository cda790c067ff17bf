"""Rotations: an RMS norm and a rotation of each query and key become one kernel.

Rotations are written in three ways: with complex numbers (Qwen-Image, Z-Image), with a copy of each
pair turned by a quarter (FLUX), and into every second column of an empty tensor (Wan). Sequences that
are joined before or after it are joined by the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantmatrix.kernels.launching import can_launch
from quantmatrix.runtime.rewrites.norms import find_norm
from quantmatrix.runtime.rewrites.patterns import Node, follow, is_call, is_node, skip, value_of


def replace_rotations(graph: fx.Graph, *, everywhere: bool) -> None:
    """Put the kernel where a graph rotates normalized numbers, on a GPU (or `everywhere`)."""
    for node in list(graph.nodes):
        rotation = find_rotation(node)
        if rotation and (everywhere or can_launch(value_of(rotation.x))):
            replace_rotation(graph, node, rotation)
    for node in list(graph.nodes):
        if is_call(node, "cat"):
            join_rotations(graph, node)


@dataclass(frozen=True)
class Rotation:
    """What a rotation reads: numbers [B, S, H, D], and angles."""

    x: Node
    angles: tuple[Node, Node] | Node
    """(cosines, sines), or complex numbers; each is broadcast over the heads."""
    writes: tuple[Node, ...] = ()
    """Nodes that write into an empty tensor."""


def find_rotation(node: Node) -> Rotation | None:
    """The rotation whose result a cast to the dtype of its input gives."""
    if not is_call(node, "to", "type_as"):
        return None
    inner = node.args[0]
    for read in (read_complex, read_turned, read_columns):
        found = read(inner)
        if found and value_of(node).dtype == value_of(found.x).dtype:
            return found
    return None


def read_complex(node: Any) -> Rotation | None:
    """`view_as_real(view_as_complex(pairs of x) * turns).flatten(3)`."""
    product = follow(node, "flatten", "view_as_real")
    if not is_call(product, "mul"):
        return None
    pairs = follow(product.args[0], "view_as_complex")
    x = skip(pairs, "reshape", "float", "to")
    turns = product.args[1]
    if pairs is None or not is_node(turns) or value_of(turns).dtype != torch.complex64:
        return None
    return Rotation(x, turns)


def read_turned(node: Any) -> Rotation | None:
    """`x * cosines + turned * sines`, turned = (-x[1], x[0], -x[3], x[2] ...)."""
    if not is_call(node, "add") or not all(is_call(one, "mul") for one in node.args):
        return None
    (left, cosines), (right, sines) = (one.args for one in node.args)
    x, stacked = skip(left, "float"), follow(skip(right, "float"), "flatten")
    if not is_call(stacked, "stack") or stacked.kwargs.get("dim") != -1:
        return None
    minus, first = stacked.args[0]
    second = follow(minus, "neg")
    pairs = [follow(one, "getitem", "unbind", "reshape") for one in (first, second)]
    if pairs != [x, x] or not parts_pairs(first):
        return None
    order = [one.args[1] for one in (first, second) if is_call(one, "getitem")]
    return Rotation(x, (cosines, sines)) if order == [0, 1] else None


def read_columns(node: Any) -> Rotation | None:
    """`out[..., 0::2] = x1 * cos - x2 * sin` and `out[..., 1::2] = x1 * sin + x2 * cos`."""
    if not is_call(node, "empty_like"):
        return None
    writes = [user for user in node.users if is_call(user, "setitem")]
    if [one.args[1] for one in writes] != [(..., slice(0, None, 2)), (..., slice(1, None, 2))]:
        return None
    even, odd = (one.args[2] for one in writes)
    if not is_call(even, "sub") or not is_call(odd, "add"):
        return None
    products = [*even.args, *odd.args]
    if not all(is_call(one, "mul") for one in products):
        return None
    (first, cosines), (second, sines), *others = (one.args for one in products)
    parts = [follow(one, "getitem", "unbind", "unflatten") for one in (first, second)]
    order = [one.args[1] for one in (first, second) if is_call(one, "getitem")]
    same = others == [(first, sines), (second, cosines)] and parts == [node.args[0]] * 2
    if not same or order != [0, 1] or not parts_pairs(first):
        return None
    return Rotation(node.args[0], (cosines, sines), tuple(writes))


def parts_pairs(node: Node) -> bool:
    """Whether a node is an item of the last side, of two numbers, that a tensor was unbound along."""
    unbound = node.args[0]
    return unbound.args[1:] == (-1,) and value_of(unbound.args[0]).shape[-1] == 2


def replace_rotation(graph: fx.Graph, node: Node, rotation: Rotation) -> None:
    """Put the kernel in place of a rotation whose numbers were normalized; else nothing changes."""
    from quantmatrix.kernels.rope_triton import rms_norm_rope

    joined = is_call(rotation.x, "cat") and rotation.x.kwargs.get("dim") == 1
    parts = list(rotation.x.args[0]) if joined else [rotation.x]
    norms = [norm for part in parts if (norm := find_norm(part))]
    batch, tokens, heads, width = value_of(rotation.x).shape
    weights = [value_of(norm.weight).numel() for norm in norms]
    power = width & (width - 1) == 0
    if not power or len(norms) < len(parts) or len({norm.eps for norm in norms}) > 1:
        return
    if not {*weights} <= {width, heads * width}:
        return
    if not all(fits(value_of(one), batch, tokens, width) for one in list_angles(rotation)):
        return
    with graph.inserting_before(node):
        tables = [
            graph.call_method("reshape", (one, -1, tokens, angles_of(one)))
            for one in split_angles(graph, rotation)
        ]
        given, weights, start = [], [], 0
        shares: list[list[Node]] = [[], []]
        for part, norm in zip(parts, norms, strict=True):
            x = norm.x
            given.append(graph.call_method("unflatten", (x, 2, norm.heads)) if norm.heads else x)
            weights.append(norm.weight)
            length = value_of(part).shape[1]
            for table, share in zip(tables, shares, strict=True):
                share.append(
                    graph.call_method("narrow", (table, 1, start, length)) if joined else table
                )
            start += length
        found = graph.call_function(
            rms_norm_rope._opoverload, (given, weights, *shares, norms[0].eps)
        )
    found.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(found)
    for write in rotation.writes:
        graph.erase_node(write)


def join_rotations(graph: fx.Graph, node: Node) -> None:
    """Let one call of the kernel write what several wrote and a `cat` along tokens joined."""
    from quantmatrix.kernels.rope_triton import rms_norm_rope

    parts = node.args[0]
    mine = all(one.target is rms_norm_rope._opoverload and len(one.users) == 1 for one in parts)
    if not mine or node.kwargs.get("dim") != 1 or len({one.args[4] for one in parts}) != 1:
        return
    lists = [[x for one in parts for x in one.args[number]] for number in range(4)]
    with graph.inserting_before(node):
        found = graph.call_function(rms_norm_rope._opoverload, (*lists, parts[0].args[4]))
    found.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(found)
    for one in (node, *parts):
        graph.erase_node(one)


def list_angles(rotation: Rotation) -> list[Node]:
    """The nodes that angles are read from."""
    return [rotation.angles] if is_node(rotation.angles) else [*rotation.angles]


def split_angles(graph: fx.Graph, rotation: Rotation) -> list[Node]:
    """Nodes of cosines and sines."""
    if not is_node(rotation.angles):
        return [*rotation.angles]
    parts = graph.call_function(torch.view_as_real, (rotation.angles,))
    found = [graph.call_method("select", (parts, -1, which)) for which in (0, 1)]
    for one in found:
        one.meta["example_value"] = value_of(rotation.angles).real
    return found


def angles_of(node: Node) -> int:
    """Angles of a token."""
    return int(value_of(node).shape[-1])


def fits(angles: torch.Tensor, batch: int, tokens: int, width: int) -> bool:
    """Whether angles are one row per token, the same for all heads, and for one sample or for each.

    `angles` are [B or 1, S, 1, K] or have fewer sides, float32 or complex64; K is half a head's `width` or
    all of it.
    """
    shape = [1] * (4 - angles.ndim) + [*angles.shape]
    return (
        angles.ndim <= 4
        and shape[0] in (1, batch)
        and shape[1:3] == [tokens, 1]
        and shape[3] in (width // 2, width)
    )
