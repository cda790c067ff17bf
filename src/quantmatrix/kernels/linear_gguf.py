"""linear.gguf: weights as blocks of codes and scales, inputs left alone (GGUF).

| canonical tensor | dtype | shape | meaning |
| ---------------- | ----- | ----- | ------- |
| `weight` | uint8 | [N, bytes of a row] | blocks of the type that the scheme names (`scheme.BLOCKS`) |
| `bias` | any float | [N] | |

What a block decodes to stands in `gguf_arithmetic`. `decode` does it once, while loading, and is then
an ordinary linear layer. `packed` keeps the blocks and decodes them for every call: in one pass of a
Triton kernel for the types of `gguf_triton.TYPES` on GPUs, by torch for the other types and on other
devices. A row is whole blocks, so rows of a fused layer are cut without decoding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors
from quantmatrix.kernels.compiling import TARGETS
from quantmatrix.kernels.gguf_arithmetic import decode_blocks
from quantmatrix.kernels.launching import TRITON
from quantmatrix.kernels.nvfp4_arithmetic import cut_rows
from quantmatrix.kernels.portable import keep_all, run_decoded, run_exactly
from quantmatrix.scheme import BLOCKS, Scheme

OP = "linear.gguf"


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    weight = tensors["weight"]
    return decode_blocks(weight, scheme.weight.upper()).view(weight.shape[0], -1)


def decode_to(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """`decode` of blocks, uint8 [N, bytes of a row], as [N, K] in `dtype`, a few rows at a time."""
    size, (columns, per_block) = weight.shape[1], BLOCKS[scheme.weight.upper()]
    rows, width = weight.shape[0], size // per_block * columns
    out = torch.empty(rows, width, dtype=dtype, device=weight.device)
    for part in cut_rows(rows, width):
        out[part] = decode({"weight": weight[part]}, scheme)
    return out


def take_rows(tensors: Mapping[str, torch.Tensor], rows: torch.Tensor | slice) -> Tensors:
    """Canonical tensors of some output rows, in the order given, as in the module's table.

    `rows` is a slice or int64 [rows].
    """
    return {name: tensor[rows] for name, tensor in tensors.items()}


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer with float32 sums; x [..., K] -> [..., N] in x's dtype, bias included."""
    bias = tensors.get("bias")
    weight = decode(tensors, scheme)
    return functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the weight in the compute dtype.

    Takes tensors as in the module's table.
    """
    return {"decoded": decode_to(tensors["weight"], scheme, dtype)}


def run_packed(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """As `decode`, the weight being made for the call: x [..., K] -> [..., N], all in x's dtype."""
    from quantmatrix.kernels import gguf_triton

    if gguf_triton.takes(buffers["weight"], scheme):
        weight = gguf_triton.decode(buffers["weight"], scheme, x.dtype)
    else:
        weight = decode_to(buffers["weight"], scheme, x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def measure_stored(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the blocks and a bias."""
    columns, size = BLOCKS[scheme.weight.upper()]
    return out_features * (in_features // columns * size + item)


def measure_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the weight in the compute dtype and a bias."""
    return out_features * (in_features + 1) * item


KERNELS = (
    Kernel(
        op=OP,
        backend="decode",
        numerics="A16",
        needs=Needs(rule="gguf-decode"),
        prepare=prepare_decode,
        run=run_decoded,
        footprint=measure_decoded,
    ),
    Kernel(
        op=OP,
        backend="packed",
        numerics="A16",
        needs=Needs(
            rule="gguf-packed",
            vendors=("cpu", *TRITON),
            remedy="--backend decode runs anywhere",
            further=(
                Needs(
                    rule="gguf-packed-triton",
                    package="triton",
                    only_on=tuple(TARGETS),
                    remedy="--backend decode runs anywhere",
                ),
            ),
        ),
        prepare=keep_all,
        run=run_packed,
        footprint=measure_stored,
    ),
    Kernel(
        op=OP,
        backend="reference",
        numerics="A16",
        needs=Needs(rule="gguf-reference"),
        prepare=keep_all,
        run=run_exactly(reference),
        footprint=measure_stored,
    ),
)

ORDER: Mapping[str, tuple[str, ...]] = {
    "nvidia": ("packed", "decode", "reference"),
    "amd": ("packed", "decode", "reference"),
    "*": ("decode", "packed", "reference"),
}
