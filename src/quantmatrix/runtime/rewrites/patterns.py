"""Patterns: small questions about the nodes of a graph as torch.compile traced it."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import fx

Node: TypeAlias = Any
"""An fx.Node; its arguments may be anything, so types end here."""


def value_of(node: Node) -> torch.Tensor:
    """The tensor without memory that a node was traced with; it may have any shape and dtype."""
    value: torch.Tensor = node.meta["example_value"]
    return value


def is_node(value: Any) -> bool:
    """Whether an argument of a node is a node."""
    return isinstance(value, fx.Node)


def is_call(node: Any, *names: str) -> bool:
    """Whether a node calls a function or method of one of these names."""
    if not is_node(node) or node.op not in ("call_function", "call_method"):
        return False
    return (node.target if node.op == "call_method" else node.target.__name__) in names


def skip(node: Any, *names: str) -> Any:
    """The input that a chain of calls of these names begins with; the node itself where it is none."""
    while is_call(node, *names):
        node = node.args[0]
    return node


def follow(node: Any, *names: str) -> Any:
    """The input of calls of exactly these names, the last one first; None where they are others."""
    for name in names:
        if not is_call(node, name):
            return None
        node = node.args[0]
    return node
