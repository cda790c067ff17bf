"""Activations: GELU, what stands before it in one row, and the codes of both become one kernel."""

from __future__ import annotations

from typing import Any

from torch import fx

from quantmatrix.kernels.launching import can_launch
from quantmatrix.runtime.rewrites.norms import find_quotient
from quantmatrix.runtime.rewrites.patterns import Node, is_call, value_of


def replace_activations(graph: fx.Graph, *, everywhere: bool) -> None:
    """Put the kernel where codes e4m3 are made of GELU's results, on a GPU (or `everywhere`)."""
    from quantmatrix.kernels.gelu_triton import gelu_codes

    for node in list(graph.nodes):
        quotient = find_quotient(node)
        if quotient is None or value_of(quotient.args[1]).numel() != 1:
            continue
        parts = list_parts(quotient.args[0])
        active = [is_gelu(part) for part in parts]
        if not any(active) or not (everywhere or can_launch(value_of(parts[0]))):
            continue
        rows, columns = value_of(node).shape
        if sum(value_of(part).shape[-1] for part in parts) != columns:
            continue
        if any(value_of(part).numel() != rows * value_of(part).shape[-1] for part in parts):
            continue
        with graph.inserting_before(node):
            given = [
                part.args[0] if chosen else part for part, chosen in zip(parts, active, strict=True)
            ]
            flat = [graph.call_method("flatten", (one, 0, -2)) for one in given]
            codes = graph.call_function(gelu_codes._opoverload, (flat, active, quotient.args[1]))
        codes.meta["example_value"] = value_of(node)
        node.replace_all_uses_with(codes)


def list_parts(node: Any) -> list[Node]:
    """The nodes whose columns stand beside each other in what is quantized; itself, where it is one."""
    while is_call(node, "float", "reshape", "to"):
        node = node.args[0]
    if is_call(node, "cat"):
        last = value_of(node).ndim - 1
        return list(node.args[0]) if node.kwargs.get("dim") in (-1, last) else [node]
    if is_call(node, "dropout") and node.args[2:3] == (False,):
        node = node.args[0]
    return [node]


def is_gelu(node: Node) -> bool:
    """Whether a node is GELU by its tanh form and nothing else reads it."""
    return (
        is_call(node, "gelu")
        and node.kwargs.get("approximate") == "tanh"
        and len(node.users) == 1
        and value_of(node).ndim >= 2
    )
