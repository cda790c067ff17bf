"""linear.w4a16: four-bit weights with zero points, inputs left alone (the AWQ layers of SVDQuant).

| canonical tensor | dtype | shape | meaning |
| ---------------- | ----- | ----- | ------- |
| `weight` | uint8 | [N, K/2] | two codes 0..15 per byte, the even column in the low nibble |
| `weight_scale` | 16-bit | [N, K/64] | one per 64 columns |
| `weight_zero` | 16-bit | [N, K/64] | the number of code 0 |
| `bias` | any float | [N] | |

    weight[n, k] = code * weight_scale[n, k // 64] + weight_zero[n, k // 64]

These are modulation layers: one row per picture, so a decoded weight is as fast as any kernel.
`packed` keeps the codes and decodes them for every call, in one pass. `merged` is `decode` under the
name that SVDQuant layers use; there is nothing to merge here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors, svdq_engines
from quantmatrix.kernels.launching import TRITON
from quantmatrix.kernels.nvfp4_arithmetic import cut_rows, decode_codes
from quantmatrix.kernels.portable import keep_all, run_decoded, run_exactly
from quantmatrix.scheme import Scheme

OP = "linear.w4a16"
UINT4_VALUES = tuple(float(code) for code in range(16))


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    scales, zeros = tensors["weight_scale"].float(), tensors["weight_zero"].float()
    whole = decode_codes(tensors["weight"], scales, torch.float32, UINT4_VALUES)
    whole.unflatten(1, (*zeros.shape[1:], -1)).add_(zeros.unsqueeze(-1))
    return whole


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
    """`decoded` [N, K], the weight in the compute dtype, decoded a few rows at a time.

    Takes tensors as in the module's table.
    """
    rows, columns = tensors["weight"].shape[0], 2 * tensors["weight"].shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=tensors["weight"].device)
    for part in cut_rows(rows, columns):
        out[part] = decode(take_rows(tensors, part), scheme)
    return {"decoded": out}


def run_packed(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """As `decode`, the weight being made for the call: x [..., K] -> [..., N], all in x's dtype."""
    from quantmatrix.kernels import packed_triton

    weight = packed_triton.decode_zeros(
        buffers["weight"], buffers["weight_scale"], buffers["weight_zero"], x.dtype
    )
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def measure_stored(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the canonical tensors, a bias included."""
    groups = in_features // scheme.group_size
    return out_features * (in_features // 2 + 4 * groups + item)


def measure_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the weight in the compute dtype and a bias."""
    return out_features * (in_features + 1) * item


DECODE = Kernel(
    op=OP,
    backend="decode",
    numerics="W4A16",
    needs=Needs(rule="w4a16-decode"),
    prepare=prepare_decode,
    run=run_decoded,
    footprint=measure_decoded,
)
KERNELS = (
    DECODE,
    replace(DECODE, backend="merged"),
    Kernel(
        op=OP,
        backend="packed",
        numerics="W4A16",
        needs=Needs(
            rule="w4a16-packed",
            vendors=TRITON,
            package="triton",
            remedy="--backend merged or --backend decode run anywhere",
        ),
        prepare=keep_all,
        run=run_packed,
        footprint=measure_stored,
    ),
    Kernel(
        op=OP,
        backend="reference",
        numerics="W4A16",
        needs=Needs(rule="w4a16-reference"),
        prepare=keep_all,
        run=run_exactly(reference),
        footprint=measure_stored,
    ),
    Kernel(
        op=OP,
        backend="nunchaku",
        numerics="W4A16",
        needs=svdq_engines.NUNCHAKU,
        prepare=svdq_engines.prepare_nunchaku_awq,
        run=svdq_engines.run_nunchaku_awq,
        footprint=measure_stored,
        matmul=(),
    ),
    Kernel(
        op=OP,
        backend="comfy-kitchen",
        numerics="W4A16",
        needs=svdq_engines.COMFY_KITCHEN,
        prepare=svdq_engines.prepare_comfy_awq,
        run=svdq_engines.run_comfy_awq,
        footprint=measure_stored,
        matmul=(),
    ),
)

ENGINE_FIRST = ("nunchaku", "decode", "reference")
ORDER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*svdq_engines.SM8X, *svdq_engines.SM12X), ENGINE_FIRST),
    "*": ("decode", "reference"),
}
