"""QuantizedLinear: the one module that stands in for a linear layer, whatever its family.

Codes and scales are plain buffers, so a trace shows plain kernels and offloading moves them like
anything else. Three properties matter to the diffusers models around it: `weight` answers with a
tensor of the compute dtype that owns no memory (Z-Image and Wan ask for a layer's dtype through
it), the bias is a parameter (Wan asks a module's first parameter for its dtype), and a change of
dtype never touches codes or scales.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn

from quantmatrix.kernels import Kernel, Tensors
from quantmatrix.scheme import Scheme

STEPS = ("q_input_scale", "q_input_offset")
"""Buffers that say how a layer's input is quantized."""


class SharedInput:
    """Codes of one input for the layers that read it (q, k and v): made once, gone with the input.

    An input is recognised by identity and version, so a wrong grouping costs nothing but the
    sharing. Under `torch.compile` nothing is kept: there equal calls are merged by the compiler.
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._input: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._encoded: tuple[torch.Tensor, ...] | None = None

    def find(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The codes of x [..., in], when they were kept: what the kernel's `encode` gave.

        x is compared by identity, whatever its dtype.
        """
        if torch.compiler.is_compiling() or self._input is None or self._input() is not x:
            return None
        return self._encoded if self._version == x._version else None

    def keep(self, x: torch.Tensor, encoded: tuple[torch.Tensor, ...]) -> None:
        """Keep the codes of x [..., in] for the other readers, as long as x lives.

        `encoded` is what the kernel's `encode` gave: codes [M, in] and scales, in the dtypes of its
        op.
        """
        if torch.compiler.is_compiling() or x.is_inference():
            return  # inference tensors have no version that would tell of a change
        self._input = weakref.ref(x, self._forget)
        self._version, self._encoded = x._version, encoded

    def _forget(self, gone: weakref.ref[torch.Tensor]) -> None:
        if gone is self._input:
            self._input = self._encoded = None


def share_inputs(model: nn.Module) -> int:
    """Let layers of one block with equal inputs' scales share codes; returns how many may."""
    groups: dict[tuple[object, ...], list[QuantizedLinear]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear) or layer.kernel.encode is None:
            continue
        block = re.match(r"(.*?\.\d+)\.", name)
        steps = [float(layer._buffers[name]) for name in STEPS if name in layer._buffers]  # type: ignore[arg-type]
        kind = (layer.in_features, layer.scheme, layer.kernel.backend)
        key = (block and block[1], *kind, *steps)
        groups.setdefault(key, []).append(layer)
    shared = 0
    for layers in groups.values():
        if len(layers) > 1:
            one = SharedInput()
            for layer in layers:
                layer.shared = one
                for name in STEPS:  # one tensor: a compiler sees equal codes
                    if name in layer._buffers:
                        setattr(layer, name, getattr(layers[0], name))
            shared += len(layers)
    return shared


class QuantizedLinear(nn.Module):
    """A linear layer computed by a kernel from quantized tensors: [..., in] -> [..., out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel: Kernel,
        scheme: Scheme,
        tensors: Tensors,
        compute_dtype: torch.dtype,
    ) -> None:
        """Take canonical `tensors` (see the op's file), prepare them once, keep the result."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kernel = kernel
        self.scheme = scheme
        self.compute_dtype = compute_dtype
        self.shared: SharedInput | None = None
        bias = tensors.get("bias")
        weights = {name: tensor for name, tensor in tensors.items() if name != "bias"}
        kept = kernel.prepare(weights, scheme, compute_dtype)
        for name, tensor in kept.items():
            self.register_buffer(f"q_{name}", tensor)
        self._kept = tuple((name, f"q_{name}") for name in kept)
        self.bias = (
            None if bias is None else nn.Parameter(bias.to(compute_dtype), requires_grad=False)
        )

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in [out, in] of the compute dtype, without memory: only its dtype is real."""
        return torch.empty(
            self.out_features, self.in_features, dtype=self.compute_dtype, device="meta"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the layer keeps."""
        kept = [*self.buffers(recurse=False), *self.parameters(recurse=False)]
        return sum(t.numel() * t.element_size() for t in kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in_features]; the result has x's dtype."""
        kernel, buffers = self.kernel, self._buffers
        tensors: Tensors = {name: buffers[key] for name, key in self._kept}  # type: ignore[misc]
        if self.shared is None or kernel.encode is None or kernel.multiply is None:
            return kernel.run(x, tensors, self.bias, self.scheme)
        encoded = self.shared.find(x)
        if encoded is None:
            encoded = kernel.encode(x, tensors, self.scheme)
            if encoded is None:
                return kernel.run(x, tensors, self.bias, self.scheme)
            self.shared.keep(x, encoded)
        return kernel.multiply(encoded, x, tensors, self.bias, self.scheme)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Move buffers where `fn` moves them, but keep the dtype of codes and scales."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        moved: nn.Module = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, backend={self.kernel.backend}"
        )


class SplitInputLinear(nn.Module):
    """A linear layer whose input columns are served by several layers, added up.

    FLUX.1's single-block `proj_out` lies in an SVDQuant file as two layers, one for the attention
    columns and one for the MLP columns.
    """

    def __init__(self, parts: Sequence[QuantizedLinear]) -> None:
        """Take the parts in column order."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.widths = [part.in_features for part in parts]
        self.in_features = sum(self.widths)
        self.out_features = parts[0].out_features
        self.compute_dtype = parts[0].compute_dtype

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in [out, in] of the compute dtype without memory, as in `QuantizedLinear`."""
        return torch.empty(
            self.out_features, self.in_features, dtype=self.compute_dtype, device="meta"
        )

    @property
    def bias(self) -> None:
        """The biases belong to the parts."""
        return

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in_features] column range by column range and add in float32."""
        pieces = x.split(self.widths, dim=-1)
        total: torch.Tensor = self.parts[0](pieces[0]).float()
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            total = total + part(piece).float()
        return total.to(x.dtype)
