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
from typing import Any

import torch
from torch.nn import functional

from quantmatrix.errors import RefusedError
from quantmatrix.kernels import Kernel, Needs, Tensors
from quantmatrix.kernels.launching import TRITON, is_watched
from quantmatrix.scheme import Scheme

LARGEST = {"int8": 127, "int4": 7}
"""Largest code of a symmetric number format."""
PER_ROW = ("weight", "weight_scale", "deq_scale", "quant_bias", "bias")
ROWS = 512
"""Rows per integer matmul on a CPU."""
CUDA_ROWS = 32
CUDA_MULTIPLE = 8
"""cuBLAS takes more than 16 rows, and columns in multiples of 8."""
WHOLE_ROW = 16384
"""Longest row that the fused kernel quantizes."""
FRACTAL_NZ = 29
"""The NPU's own weight layout, as `npu_format_cast` numbers it."""


def decode(tensors: Tensors, scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K], smoothing included."""
    weight = tensors["weight"].float() * tensors["weight_scale"].float()[:, None]
    return weight * tensors["mul_scale"].float() if scheme.smoothed else weight


def take_rows(tensors: Tensors, rows: torch.Tensor | slice) -> Tensors:
    """The layer with some of its outputs only; `rows` indexes them."""
    return {name: t[rows] if name in PER_ROW else t for name, t in tensors.items()}


def smooth(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's input after its smoothing, in x's dtype."""
    return x * tensors["mul_scale"].to(x.dtype) if scheme.smoothed else x


def quantize_static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Codes int8 of x with one scale and zero point for the whole tensor."""
    return (x.float() / scale + offset).round_().clamp_(-128, 127).to(torch.int8)


def quantize_tokens(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [..., K], scales float32 [..., 1]): each token's largest magnitude fits."""
    wide = x.float()
    amax = wide.abs().amax(dim=-1, keepdim=True)
    scale = amax / torch.full_like(amax, largest)  # CUDA multiplies by a number's reciprocal
    return (wide / torch.where(scale > 0, scale, 1)).round().to(torch.int8), scale


def accumulate(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The exact product of int8 codes [..., K] and weight codes [N, K], integral float64.

    Float32 holds every integer up to 2**24 and float64 up to 2**53, so sums of K products of at
    most 2**14 are exact in the one for K <= 1024 and in the other always.
    """
    exact = torch.float32 if codes.shape[-1] * 128 * 128 <= 2**24 else torch.float64
    return functional.linear(codes.to(exact), weight.to(exact)).double()


def reference(
    x: torch.Tensor, tensors: Tensors, scheme: Scheme, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's arithmetic with an exact accumulator; `bias` defaults to that of `tensors`."""
    bias = tensors.get("bias") if bias is None else bias
    smoothed = smooth(x, tensors, scheme)
    if scheme.activation == "tensor-static":
        codes = quantize_static(smoothed, tensors["input_scale"], tensors["input_offset"])
        total = accumulate(codes, tensors["weight"]) + tensors["quant_bias"]
        return (total.float() * tensors["deq_scale"]).to(x.dtype)
    codes, scale = quantize_tokens(smoothed, LARGEST[scheme.weight])
    total = accumulate(codes, tensors["weight"]).float() * tensors["weight_scale"] * scale
    return (total if bias is None else total + bias.float()).to(x.dtype)


def keep_used(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The tensors that the scheme's arithmetic reads, as they are."""
    static = ("input_scale", "input_offset", "deq_scale", "quant_bias")
    used = static if scheme.activation == "tensor-static" else ("weight_scale",)
    smoothing = ("mul_scale",) if scheme.smoothed else ()
    return {name: tensors[name] for name in ("weight", *used, *smoothing)}


def run_reference(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., K] -> [..., N]."""
    return reference(x, buffers, scheme, bias)


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The weight in the compute dtype, once."""
    return {"weight": decode(tensors, scheme).to(dtype)}


def run_decode(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., K] -> [..., N], activations left alone."""
    return functional.linear(x, buffers["weight"], bias)


def prepare_int8(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The codes as stored; for `torch._int_mm` on CUDA padded to multiples of 8."""
    kept = keep_used(tensors, scheme, dtype)
    if kept["weight"].is_cuda and not can_fuse(kept["weight"]):
        kept["weight"] = pad_to(kept["weight"], CUDA_MULTIPLE, CUDA_MULTIPLE)
    return kept


def pad_to(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix with zeros added until its sides are multiples; itself when they are."""
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    return functional.pad(matrix, missing) if any(missing) else matrix


def run_int8(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., K] -> [..., N] through `torch._int_mm`, which takes matrices only."""
    flat = smooth(x, buffers, scheme).reshape(-1, x.shape[-1])
    multiply = multiply_on_cuda if x.is_cuda or is_watched(x) else multiply_on_cpu
    y = multiply(flat, buffers, bias, scheme)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply_on_cpu(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [M, K] -> [M, N], quantize, multiply and scale block of rows by block of rows.

    The blocks reuse one accumulator, so that M rows do not cost M * N * 8 bytes of fresh memory:
    that, not arithmetic, is what eager quantization costs most.
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
    """x [M, K] -> [M, N]: one kernel quantizes, one multiplies and scales; without Triton, more."""
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
    """Codes [M, K] (and scales [M, 1]) of x [..., K] for every layer that reads it.

    None where nothing can be shared: a CPU quantizes block of rows by block of rows, and a smoothed
    layer has an input of its own.
    """
    if scheme.smoothed or not x.is_cuda or not can_fuse(x):
        return None
    return quantize_fused(x.reshape(-1, x.shape[-1]), buffers, scheme)


def quantize_fused(x: torch.Tensor, buffers: Tensors, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """Codes (and scales) of x [M, K] in one kernel; a compiler fuses it into what made x."""
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
    """Codes times the weight, scaled in the same kernel; only shape and dtype of x are used."""
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
    """Whether Triton can compile for the tensor's device, and takes rows of its length."""
    return (is_watched(tensor) or has_compiler()) and tensor.shape[-1] <= WHOLE_ROW


@cache
def has_compiler() -> bool:
    """Whether Triton is there with the C compiler that it needs to start kernels."""
    from torch.utils._triton import has_triton

    return has_triton() and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def import_npu() -> Any:
    """torch_npu; without CANN its import fails, and with it every other import of torch."""
    try:
        import torch_npu
    except (ImportError, RuntimeError) as error:
        raise RefusedError(
            NPU.rule,
            f"backend npu needs torch_npu with a working CANN installation: {error}; install "
            f"CANN and source its set_env.sh, or use {NPU.remedy}",
        ) from error
    return torch_npu


def prepare_npu(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """Weights as [K, N] in the NPU's layout, int4 packed by eight; scales in x's terms."""
    npu = import_npu()
    if dtype not in (torch.bfloat16, torch.float16):
        raise RefusedError(
            NPU.rule,
            f"backend npu computes in bfloat16 or float16, not {dtype}: use --dtype bfloat16 or "
            f"{NPU.remedy}",
        )
    kept = keep_used(tensors, scheme, dtype)
    turned = kept["weight"].t().contiguous()
    if scheme.weight == "int4":
        kept["weight"] = npu.npu_convert_weight_to_int4pack(turned.to(torch.int32))
    else:
        kept["weight"] = npu.npu_format_cast(turned, FRACTAL_NZ)
    if scheme.activation == "tensor-static":
        width = kept["weight"].shape[0]
        kept["input_scale"] = (1 / kept["input_scale"]).to(dtype).repeat(width)
        kept["input_offset"] = kept["input_offset"].to(dtype).repeat(width)
        if dtype == torch.float16:
            kept["deq_scale"] = npu.npu_trans_quant_param(kept["deq_scale"])
    return kept


def run_npu(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """x [..., K] -> [..., N] through torch_npu's quantize and quantized matmul."""
    npu = import_npu()
    flat = smooth(x, buffers, scheme).reshape(-1, x.shape[-1])
    if scheme.activation == "tensor-static":
        scale, offset = buffers["input_scale"], buffers["input_offset"]
        y: torch.Tensor = npu.npu_quant_matmul(
            npu.npu_quantize(flat, scale, offset, torch.qint8, -1, False),
            buffers["weight"],
            buffers["deq_scale"],
            bias=buffers["quant_bias"],
            output_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], y.shape[-1])
    kind = torch.quint4x2 if scheme.weight == "int4" else torch.int8
    codes, scale = npu.npu_dynamic_quant(flat, dst_type=kind)
    inside = None if scheme.weight == "int4" else bias  # the int4 matmul takes no float bias
    y = npu.npu_quant_matmul(
        codes,
        buffers["weight"],
        buffers["weight_scale"],
        pertoken_scale=scale,
        bias=inside,
        output_dtype=x.dtype,
    )
    if bias is not None and inside is None:
        y = y + bias
    return y.view(*x.shape[:-1], y.shape[-1])


def count_codes(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of int8 codes with their scales."""
    static = scheme.activation == "tensor-static"
    vectors = out_features * 8 + 8 if static else out_features * 4
    return out_features * in_features + vectors + (in_features * item if scheme.smoothed else 0)


def count_npu(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the NPU's codes with their scales."""
    packed = out_features * in_features // 2 if scheme.weight == "int4" else 0
    vectors = 2 * in_features * item if scheme.activation == "tensor-static" else 0
    return count_codes(scheme, out_features, in_features, item) - packed + vectors


def count_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the weight in the compute dtype."""
    return out_features * in_features * item


WEIGHTS = ("int8", "int4")
ACTIVATIONS = ("tensor-static", "token-dynamic")
INT8 = Needs(
    rule="int8-matmul",
    vendors=("cpu", *TRITON),
    weights=WEIGHTS,
    scales=("channel",),
    activations=ACTIVATIONS,
    in_multiple=2,  # torch._int_mm of one column (K = 1) is wrong on a CPU, torch 2.13
    remedy="--backend decode computes the same checkpoint anywhere",
)
NPU = Needs(
    rule="msmodelslim-npu-ascend",
    vendors=("ascend",),
    package="torch_npu",
    weights=WEIGHTS,
    scales=("channel",),
    activations=ACTIVATIONS,
    out_multiple=8,
    in_multiple=8,
    remedy="--backend decode or --backend reference, which compute the same checkpoint anywhere",
)
KERNELS = (
    Kernel(
        "linear.int8", "reference", "W8A8", Needs(rule="int8-reference"),
        keep_used, run_reference, count_codes,
    ),
    Kernel(
        "linear.int8", "decode", "W8A16", Needs(rule="int8-decode"),
        prepare_decode, run_decode, count_decoded,
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
