"""Portable backends: `reference` and `decode`, which run on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from quantmatrix.kernels import Tensors
    from quantmatrix.scheme import Scheme


def keep_used(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The tensors that the scheme's arithmetic reads, as they are."""
    static = ("input_scale", "input_offset", "deq_scale", "quant_bias")
    used = static if scheme.activation == "tensor-static" else ("weight_scale",)
    smoothing = ("mul_scale",) if scheme.smoothed else ()
    return {name: tensors[name] for name in ("weight", *used, *smoothing)}
