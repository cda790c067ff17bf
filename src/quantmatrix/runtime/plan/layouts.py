"""Layouts: where codes and scales of a checkpoint lie, as text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from quantmatrix.families.layouts import describe_reading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantmatrix.families.layouts import Layout
    from quantmatrix.scheme import Scheme


def describe_layouts(schemes: Mapping[str, Scheme], layout: Layout | None) -> dict[str, int]:
    """Layers per layout as text; one that is open is called unknown."""
    counted = Counter(filter(None, map(describe_layout, schemes.values())))
    if layout is None or layout.known:
        return dict(counted)
    return {f"unknown: {layout.why}; the base model's weights, or flags, decide": counted.total()}


def describe_layout(scheme: Scheme) -> str:
    """Where NVFP4 codes and block scales lie, as text; empty for other codes."""
    if scheme.op != "linear.nvfp4":
        return ""
    nibble = "high" if scheme.swap_nibbles else "low"
    return describe_reading(nibble, "tiles" if scheme.tiled_scales else "rows")
