"""Portable backends: what `reference` and `decode` of every op have in common, on any device.

`reference` keeps a layer's canonical tensors and calls the op's exact arithmetic with them; `decode`
keeps one plain weight, `decoded` [out, in] in the compute dtype, and is an ordinary linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch

    from quantmatrix.kernels import Tensors
    from quantmatrix.scheme import Scheme


def keep_all(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The canonical tensors of a layer, as the module of its op lists them: all, unchanged.

    Weights are [out, in], or packed, in the dtypes of that table.
    """
    return dict(tensors)


def keep_used(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The tensors that the arithmetic of linear.int8 reads under a scheme, as they are.

    Takes and gives tensors as in the table of `kernels.linear_int8`.
    """
    static = ("input_scale", "input_offset", "deq_scale", "quant_bias")
    used = static if scheme.activation == "tensor-static" else ("weight_scale",)
    smoothing = ("mul_scale",) if scheme.smoothed else ()
    return {name: tensors[name] for name in ("weight", *used, *smoothing)}


def run_exactly(
    reference: Callable[[torch.Tensor, Tensors, Scheme], torch.Tensor],
) -> Callable[[torch.Tensor, Tensors, torch.Tensor | None, Scheme], torch.Tensor]:
    """A kernel's `run` out of an op's `reference`, which finds the bias among the tensors.

    Both take x [..., in] and give [..., out], in any float dtype.
    """

    def run(
        x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, scheme: Scheme
    ) -> torch.Tensor:
        return reference(x, tensors if bias is None else {**tensors, "bias": bias}, scheme)

    return run


def run_decoded(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., in] times `decoded` [out, in] in its dtype, as x's dtype; inputs are not quantized."""
    weight = buffers["decoded"]
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
