"""Int8 layers on Ascend NPUs, through torch_npu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantmatrix.errors import RefusedError
from quantmatrix.kernels import Needs
from quantmatrix.kernels.int8_arithmetic import count_codes, smooth
from quantmatrix.kernels.portable import keep_used

if TYPE_CHECKING:
    from typing import Any

    from quantmatrix.kernels import Tensors
    from quantmatrix.scheme import Scheme


FRACTAL_NZ = 29
"""The NPU's own weight layout, as `npu_format_cast` numbers it."""


def import_npu() -> Any:
    """torch_npu; without CANN its import fails, and with it every other import of torch.

    Raises RefusedError where it cannot be imported.
    """
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
    """Weights as [K, N] in the NPU's layout, int4 packed by eight; scales in x's terms.

    Takes tensors as in the table of `kernels.linear_int8`. A static `input_scale` becomes its
    reciprocal, [K] in `dtype` as `input_offset`; `deq_scale` is recoded for float16. Raises
    RefusedError for a dtype other than bfloat16 and float16, and without torch_npu.
    """
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
    """x [..., K] -> [..., N] through torch_npu's quantize and quantized matmul.

    x, `bias` [N] and the result are of the dtype (bfloat16 or float16) that `prepare_npu` made
    `buffers` for. Raises RefusedError without torch_npu.
    """
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


def count_npu(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the NPU's codes with their scales."""
    packed = out_features * in_features // 2 if scheme.weight == "int4" else 0
    vectors = 2 * in_features * item if scheme.activation == "tensor-static" else 0
    return count_codes(scheme, out_features, in_features, item) - packed + vectors


WEIGHTS = ("int8", "int4")

ACTIVATIONS = ("tensor-static", "token-dynamic")

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
