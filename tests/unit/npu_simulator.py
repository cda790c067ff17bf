"""torch_npu's operators on a CPU, after their documentation in the wheel, bound to real schemas.

`install` registers the schemas with torch's dispatcher, so that every call is bound exactly as on
an NPU: a misspelt keyword or a wrong type fails here, too. The arithmetic checks the documented
rules on dtypes and shapes and computes what the documentation says.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

SCHEMAS = (
    "npu_quantize(Tensor self, Tensor scales, Tensor? zero_points, int dtype, int axis=1, "
    "bool div_mode=True) -> Tensor",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
    'int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
    "Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, "
    "int? x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None, "
    "int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_format_cast(Tensor self, int acl_format, *, int? customize_dtype=None, "
    "int? input_dtype=None) -> Tensor",
    "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
)
"""The operators of torch_npu 2.13.0 that the `npu` backend calls."""

# The numbers of torch's dtypes, as operators see them.
INT8, FLOAT16, QINT8, BFLOAT16, QUINT4X2 = 1, 5, 12, 15, 16
OUTPUTS = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight int4 codes of the last dimension to one int32."""
    assert codes.shape[-1] % 8 == 0
    assert codes.min() >= -8
    assert codes.max() <= 7
    nibbles = (codes.long() & 15).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    return nibbles.sum(dim=-1).to(torch.uint32).view(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """One int32 to eight int4 codes."""
    nibbles = (packed.long()[..., None] >> torch.arange(0, 32, 4)) & 15
    return ((nibbles ^ 8) - 8).flatten(-2)


def npu_quantize(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Codes int8; only the multiplying mode that the backend uses."""
    assert (dtype, axis, div_mode) == (QINT8, -1, False)
    assert zero_points is not None
    assert zero_points.dtype == scales.dtype
    assert zero_points.shape == scales.shape == x.shape[-1:]
    codes = x.float() * scales.float() + zero_points.float()
    return codes.round().clamp(-128, 127).to(torch.int8)


def npu_dynamic_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale per token), symmetric."""
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert x.ndim >= 2
    assert (smooth_scales, group_index, quant_mode) == (None, None, "pertoken")
    largest = {None: 127, INT8: 127, QUINT4X2: 7}[dst_type]
    scale = x.float().abs().amax(dim=-1) / largest
    codes = (x.float() / torch.where(scale > 0, scale, 1)[..., None]).round().to(torch.int8)
    return (pack(codes) if dst_type == QUINT4X2 else codes), scale


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **others: Any,
) -> torch.Tensor:
    """x1 [M, K] @ x2 [K, N] of codes, with the dtype combinations that are documented."""
    assert not any(value is not None for value in (offset, *others.values()))
    assert x1.dtype == x2.dtype
    assert x1.is_contiguous()
    assert output_dtype is not None
    dtype = OUTPUTS[output_dtype]
    kinds = [torch.int32] if pertoken_scale is None or x1.dtype == torch.int32 else [
        torch.float32, dtype
    ]  # fmt: skip
    assert bias is None or (bias.dtype in kinds and bias.ndim == 1)
    if scale.dtype == torch.int64:
        assert dtype == torch.float16
        scale = scale.to(torch.int32).view(torch.float32)
    else:
        assert pertoken_scale is not None or dtype == torch.bfloat16
    assert scale.dtype == torch.float32
    if x1.dtype == torch.int32:
        assert pertoken_scale is not None or dtype == torch.float16
        x1, x2 = unpack(x1), unpack(x2)
    assert x1.shape[-1] == x2.shape[0]
    assert scale.shape == x2.shape[1:]
    total = x1.double() @ x2.double()
    if pertoken_scale is None:
        total = total if bias is None else total + bias
        return (total.float() * scale).to(dtype)
    assert pertoken_scale.shape == x1.shape[:1]
    total = total.float() * scale * pertoken_scale[:, None]
    return (total if bias is None else total + bias.float()).to(dtype)


def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """int32 [K, N] -> int32 [K, N / 8]."""
    assert weight.dtype == torch.int32
    assert weight.is_contiguous()
    return pack(weight)


def npu_format_cast(
    x: torch.Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """A copy: layouts do not show in values."""
    assert acl_format == 29
    return x.clone()


def npu_trans_quant_param(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    """The bits of float32 scales, widened."""
    assert scale.dtype == torch.float32
    assert offset is None
    return scale.view(torch.int32).long()


def make_module(schemas: tuple[str, ...]) -> tuple[ModuleType, torch.library.Library]:
    """(a module like torch_npu, the registration: operators live as long as it does)."""
    library = torch.library.Library("npu", "FRAGMENT")
    module = ModuleType("torch_npu")
    for schema in schemas:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, globals()[name], "CompositeExplicitAutograd")
        setattr(module, name, getattr(torch.ops.npu, name))
    return module, library
