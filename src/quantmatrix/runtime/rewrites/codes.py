"""Codes: an input is quantized once, without a division, and its products are summed as tensor cores do."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quantmatrix.runtime.rewrites.patterns import Node, is_call, is_node, value_of

PURE = (
    *("abs", "amax", "clamp", "contiguous", "expand", "float", "mul", "reshape"),
    *("round", "to", "truediv", "view", "where"),
)
"""Operations by which an input becomes codes; none of them changes a tensor in place."""
VIEWS = (*PURE, "getitem", "narrow", "select", "t", "type_as", "unflatten", "unsqueeze")
"""Operations whose result may lie in the memory of their input."""


def merge_equal(graph: fx.Graph) -> None:
    """Keep the first of nodes that compute the same, among those of `PURE`.

    What is written in place stays as it is, with all that may lie in the same memory.
    """
    written = find_written(graph)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if is_call(node, *VIEWS) and any(one in written for one in node.all_input_nodes):
            written.add(node)
        elif is_call(node, *PURE) and node not in written:
            key = (node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items())))
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def find_written(graph: fx.Graph) -> set[Node]:
    """Nodes that a node changes in place, and the nodes that they are views of."""
    found: set[Node] = set()
    for node in graph.nodes:
        targets = [node.kwargs.get("out")]
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        inplace = name.endswith("_") or name == "setitem" or name in INPLACE
        inplace = inplace or node.kwargs.get("inplace") is True
        if node.op in ("call_function", "call_method") and inplace:
            targets.append(node.args[0])
        for target in targets:
            while is_node(target):
                found.add(target)
                target = target.args[0] if is_call(target, *VIEWS) else None
    return found


INPLACE = ("iadd", "imul", "isub", "itruediv")
"""Operators of Python that write into their first operand."""


def quantize_fast(graph: fx.Graph, *, everywhere: bool) -> None:
    """Multiply by the reciprocal of a step that is one number, where codes e4m3 are made of a quotient."""
    for node in list(graph.nodes):
        codes = is_call(node, "to") and node.args[1:] == (torch.float8_e4m3fn,)
        if not codes or not is_call(node.args[0], "clamp"):
            continue
        quotient = node.args[0].args[0]
        if not is_call(quotient, "truediv") or not is_node(quotient.args[1]):
            continue
        x, step = quotient.args
        if value_of(step).numel() != 1 or not (everywhere or value_of(step).is_cuda):
            continue
        with graph.inserting_before(quotient):
            back = graph.call_method("reciprocal", (step,))
            product = graph.call_method("mul", (x, back))
        back.meta["example_value"] = value_of(step)
        product.meta["example_value"] = value_of(quotient)
        quotient.replace_all_uses_with(product)


def multiply_fast(graph: fx.Graph) -> None:
    """Let products of codes e4m3 with one scale, or one per row and column, sum as tensor cores do."""
    for node in graph.nodes:
        if is_call(node, "_scaled_mm") and "scale_a" in node.kwargs:
            rows = value_of(node.args[0]).shape[0]
            if value_of(node.kwargs["scale_a"]).numel() in (1, rows):
                node.kwargs = {**node.kwargs, "use_fast_accum": True}
