"""linear.int8: integer codes times integer activation codes, the arithmetic of Ascend's W8A8.

Canonical tensors of a layer with N outputs and K inputs:

| tensor | dtype, shape | when |
| ------ | ------------ | ---- |
| `weight` | int8 [N, K] | always; `int4` codes use one byte each, in [-8, 7] |
| `weight_scale` | float32 [N] | always |
| `input_scale`, `input_offset` | float32 [] | `tensor-static` |
| `deq_scale` | float32 [N], input_scale * weight_scale | `tensor-static` |
| `quant_bias` | int32 [N], bias and zero point folded in | `tensor-static` |
| `mul_scale` | float [K] | `smoothed`: inputs are multiplied by it first |
| `bias` | float [N] | when the layer has one; `tensor-static` has it in `quant_bias` already |

| activation | code of x | output |
| ---------- | --------- | ------ |
| static | clamp(round(x / input_scale + input_offset)) | (acc + quant_bias) * deq_scale |
| dynamic | round(x / s), s = max of token / 127 (int4: 7) | acc * weight_scale * s + bias |

`acc` is the integer matrix product of codes, exact in int32. Rounding is half to even, scales and
the epilogue are float32. A token of zeros has codes of zero.

Backends: `reference` multiplies the codes as floating-point numbers wide enough to be exact;
`decode` multiplies plain numbers (W8A16); `int8` uses `torch._int_mm`, 512 rows at a time on a CPU,
so that accumulators stay in the cache, and Triton kernels on CUDA; `npu` calls torch_npu. A CPU
without VNNI instructions computes that product wrongly (`hardware.SATURATING`). The int8 matmul
of oneDNN (`onednn.qlinear_pointwise`) is not used: with int8 activations it takes a loop that is
thousands of times slower.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors
from quantmatrix.kernels.int8_arithmetic import (
    LARGEST,
    PER_ROW,
    ROWS,
    WHOLE_ROW,
    count_codes,
    decode,
    quantize_static,
    quantize_tokens,
    reference,
    smooth,
)
from quantmatrix.kernels.int8_npu import ACTIVATIONS, NPU, WEIGHTS, count_npu, prepare_npu, run_npu
from quantmatrix.kernels.launching import TRITON, is_watched
from quantmatrix.kernels.portable import keep_used, run_decoded, run_exactly
from quantmatrix.scheme import Scheme

CUDA_ROWS = 32
CUDA_MULTIPLE = 8
"""cuBLAS takes more than 16 rows, and columns in multiples of 8."""


def take_rows(tensors: Tensors, rows: torch.Tensor | slice) -> Tensors:
    """The layer with some of its outputs only; `rows` (a slice or int64 [rows]) indexes them.

    Tensors as in the module's table; those of the input side are shared.
    """
    return {name: t[rows] if name in PER_ROW else t for name, t in tensors.items()}


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the weight in the compute dtype, decoded once.

    Takes tensors as in the module's table.
    """
    return {"decoded": decode(tensors, scheme).to(dtype)}


def prepare_int8(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The codes as stored; for `torch._int_mm` on CUDA padded to multiples of 8.

    Takes and gives tensors as in the module's table, those that the scheme's arithmetic reads.
    """
    kept = keep_used(tensors, scheme, dtype)
    if kept["weight"].is_cuda and not can_fuse(kept["weight"]):
        kept["weight"] = pad_to(kept["weight"], CUDA_MULTIPLE, CUDA_MULTIPLE)
    return kept


def pad_to(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix [rows, columns], of any dtype, with zeros added until its sides are multiples.

    `rows` and `columns` are the divisors; a matrix that has such sides comes back itself.
    """
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    return functional.pad(matrix, missing) if any(missing) else matrix


def run_int8(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype through `torch._int_mm`, which takes matrices only.

    x is of any float dtype, `bias` float [N] or None, `buffers` what `prepare_int8` kept.
    """
    flat = smooth(x, buffers, scheme).reshape(-1, x.shape[-1])
    multiply = multiply_on_cuda if x.is_cuda or is_watched(x) else multiply_on_cpu
    y = multiply(flat, buffers, bias, scheme)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply_on_cpu(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [M, K] -> [M, N] in x's dtype: quantize, multiply and scale block of rows by block of rows.

    `bias` is float [N], `buffers` are tensors as in the module's table. The blocks reuse one
    accumulator, so that M rows do not cost M * N * 8 bytes of fresh memory: that, not arithmetic,
    is what eager quantization costs most.
    """
    weight = buffers["weight"]
    rows = min(ROWS, x.shape[0])
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    wide = torch.empty(rows, x.shape[1])
    codes = torch.empty(rows, x.shape[1], dtype=torch.int8)
    totals = torch.empty(rows, weight.shape[0], dtype=torch.int32)
    result = torch.empty(rows, weight.shape[0])
    bias = torch.zeros(1) if bias is None else bias.float()
    for start in range(0, x.shape[0], ROWS):
        n = min(ROWS, x.shape[0] - start)
        part, scaled = wide[:n].copy_(x[start : start + n]), result[:n]
        if scheme.activation == "tensor-static":
            part.div_(buffers["input_scale"]).add_(buffers["input_offset"])
            codes[:n].copy_(part.round_().clamp_(-128, 127))
            torch._int_mm(codes[:n], weight.t(), out=totals[:n])
            scaled.copy_(totals[:n].add_(buffers["quant_bias"])).mul_(buffers["deq_scale"])
        else:
            scale = torch.linalg.vector_norm(part, torch.inf, dim=-1, keepdim=True)
            scale.div_(LARGEST[scheme.weight])
            codes[:n].copy_(part.div_(torch.where(scale > 0, scale, 1)).round_())
            torch._int_mm(codes[:n], weight.t(), out=totals[:n])
            scaled.copy_(totals[:n]).mul_(buffers["weight_scale"])
            torch.addcmul(bias, scaled, scale, out=scaled)
        out[start : start + n].copy_(scaled)
    return out


def multiply_on_cuda(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [M, K] -> [M, N] in x's dtype: one kernel quantizes, one multiplies and scales.

    Without Triton there are more. `bias` is float [N], `buffers` what `prepare_int8` kept.
    """
    if can_fuse(x):
        return multiply_codes(quantize_fused(x, buffers, scheme), x, buffers, bias, scheme)
    dtype = x.dtype
    if scheme.activation == "tensor-static":
        codes = quantize_static(x, buffers["input_scale"], buffers["input_offset"])
        totals = multiply_padded(codes, buffers["weight"], buffers["deq_scale"].shape[0])
        return ((totals + buffers["quant_bias"]).float() * buffers["deq_scale"]).to(dtype)
    codes, scale = quantize_tokens(x, LARGEST[scheme.weight])
    totals = multiply_padded(codes, buffers["weight"], buffers["weight_scale"].shape[0])
    y = totals.float() * buffers["weight_scale"] * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def encode_int8(
    x: torch.Tensor, buffers: Tensors, scheme: Scheme
) -> tuple[torch.Tensor, ...] | None:
    """Codes int8 [M, K] (and scales float32 [M, 1]) of x [..., K] for every layer that reads it.

    None where nothing can be shared: a CPU quantizes block of rows by block of rows, and a smoothed
    layer has an input of its own.
    """
    if scheme.smoothed or not x.is_cuda or not can_fuse(x):
        return None
    return quantize_fused(x.reshape(-1, x.shape[-1]), buffers, scheme)


def quantize_fused(x: torch.Tensor, buffers: Tensors, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """Codes int8 [M, K] (and scales float32 [M, 1]) of x [M, K] in one kernel.

    x is of any float dtype. A compiler fuses this into what made x.
    """
    from quantmatrix.kernels import int8_triton

    x, compiling = x.contiguous(), torch.compiler.is_compiling()
    if scheme.activation == "tensor-static":
        quantize = quantize_static if compiling else int8_triton.quantize_static
        return (quantize(x, buffers["input_scale"], buffers["input_offset"]),)
    by_token = quantize_tokens if compiling else int8_triton.quantize_tokens
    return by_token(x, LARGEST[scheme.weight])


def multiply_codes(
    encoded: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    buffers: Tensors,
    bias: torch.Tensor | None,
    scheme: Scheme,
) -> torch.Tensor:
    """Codes times the weight, scaled in the same kernel; only shape and dtype of x are used.

    `encoded` is what `quantize_fused` gives: int8 [M, K], and float32 [M, 1] where scales are
    dynamic. The result is [..., N] in x's dtype for x [..., K].
    """
    from quantmatrix.kernels import int8_triton

    codes, scale = encoded[0], encoded[1] if len(encoded) == 2 else None
    if scheme.activation == "tensor-static":
        outputs, bias = buffers["deq_scale"], buffers["quant_bias"]
    else:
        outputs = buffers["weight_scale"]
    compiling = torch.compiler.is_compiling()
    multiply = int8_triton.multiply_op if compiling else int8_triton.multiply
    y: torch.Tensor = multiply(codes, buffers["weight"], outputs, scale, bias, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply_padded(codes: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    """Accumulators int32 [M, width] of codes [M, K] and a weight padded to multiples of 8."""
    if codes.shape[0] == 0:
        return torch.empty(0, width, dtype=torch.int32, device=codes.device)
    padded = pad_to(codes, CUDA_ROWS, CUDA_MULTIPLE)
    return torch._int_mm(padded, weight.t())[: codes.shape[0], :width]


def can_fuse(tensor: torch.Tensor) -> bool:
    """Whether Triton can compile for the tensor's device, and takes rows of its length.

    The tensor is [..., K] of any dtype.
    """
    return (is_watched(tensor) or has_compiler()) and tensor.shape[-1] <= WHOLE_ROW


@cache
def has_compiler() -> bool:
    """Whether Triton is there with the C compiler that it needs to start kernels."""
    from torch.utils._triton import has_triton

    return has_triton() and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def count_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the weight in the compute dtype."""
    return out_features * in_features * item


INT8 = Needs(
    rule="int8-matmul",
    vendors=("cpu", *TRITON),
    weights=WEIGHTS,
    scales=("channel",),
    activations=ACTIVATIONS,
    in_multiple=2,  # torch._int_mm of one column (K = 1) is wrong on a CPU, torch 2.13
    remedy="--backend decode computes the same checkpoint anywhere",
)
KERNELS = (
    Kernel(
        "linear.int8", "reference", "W8A8", Needs(rule="int8-reference"),
        keep_used, run_exactly(reference), count_codes,
    ),
    Kernel(
        "linear.int8", "decode", "W8A16", Needs(rule="int8-decode"),
        prepare_decode, run_decoded, count_decoded,
    ),
    Kernel(
        "linear.int8", "int8", "W8A8", INT8, prepare_int8, run_int8, count_codes,
        encode=encode_int8, multiply=multiply_codes, matmul=("aten::_int_mm", "multiply"),
    ),
    Kernel("linear.int8", "npu", "W8A8", NPU, prepare_npu, run_npu, count_npu, matmul=()),
)  # fmt: skip
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("int8", "decode", "reference"),
    "nvidia": ("int8", "decode"),
    "ascend": ("npu", "decode"),
    "*": ("decode",),
}
"""Backends, best first; `int8` is exact, and the fastest save beside a BF16 product of AMX."""
