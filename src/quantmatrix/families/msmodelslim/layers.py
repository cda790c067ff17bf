"""What the tensors of a msmodelslim layer are, and the values that they cannot hold.

Scales are positive, codes fit their number format, and a W8A8 layer stores some numbers twice: its
bias in `bias` and in `quant_bias`, its scales in `deq_scale` and, from older writers, one by one.
Backends read one or the other record, so two that contradict each other would give two images.
`msmodelslim` has the table of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantmatrix.families.msmodelslim import mx_blocks
from quantmatrix.kernels import linear_mxfp4
from quantmatrix.scheme import Scheme, TensorSpec

FLOATS = ("F32", "BF16", "F16")
"""Dtypes of scales: float32, or the model's own from older writers."""
SCHEMES: Mapping[str, Scheme] = {
    "W8A8": Scheme("linear.int8", "W8A8", "int8", "channel", "tensor-static"),
    "W8A8_DYNAMIC": Scheme("linear.int8", "W8A8_DYNAMIC", "int8", "channel", "token-dynamic"),
    "W4A4_DYNAMIC": Scheme("linear.int8", "W4A4_DYNAMIC", "int4", "channel", "token-dynamic"),
    "W8A8_MXFP8": Scheme(
        "linear.fp8", "W8A8_MXFP8", "e4m3", "block", "group-power", (1, mx_blocks.BLOCK)
    ),
    "W4A4_MXFP4": Scheme(
        "linear.mxfp4", "W4A4_MXFP4", "e2m1", "group", "group-power", group_size=mx_blocks.BLOCK
    ),
    "W4A4_MXFP4_DUALSCALE": Scheme(
        "linear.mxfp4",
        "W4A4_MXFP4_DUALSCALE",
        "e2m1",
        "group",
        "group-dual",
        group_size=mx_blocks.BLOCK,
    ),
}
MX = ("block", "group")
"""Granularities of the weight scales of MX schemes; those of integers are per channel."""
WRAPPERS = ("linear", "div")
"""Levels that smoothing adds to names, and `wan_repack` removes."""
PER_ROW = (
    *("weight", "weight_scale", "weight_dual_scale", "weight_offset"),
    *("deq_scale", "quant_bias", "bias"),
)
"""Suffixes of tensors with one entry, or one row of them, per output channel."""
CONTRADICTION = 0.02
"""Share by which two records of one number may differ; what is rounded differs by less."""


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    rows, column = (out_features,), (out_features, 1)
    static = scheme.activation == "tensor-static"
    if scheme.scale in MX:
        return list_mx_tensors(scheme, out_features, in_features)
    specs = {
        "weight": TensorSpec(("I8",), ((out_features, in_features),)),
        "weight_scale": TensorSpec(FLOATS, (column,), optional=static),
        "weight_offset": TensorSpec(FLOATS, (column,), optional=True),
    }
    if static:
        specs["input_scale"] = TensorSpec(FLOATS, ((1,), ()))
        specs["input_offset"] = TensorSpec(FLOATS, ((1,), ()))
        specs["deq_scale"] = TensorSpec(("F32", "I64"), (rows,))
        specs["quant_bias"] = TensorSpec(("I32",), (rows,))
    if scheme.smoothed:
        specs["mul_scale"] = TensorSpec(FLOATS, ((in_features,),))
    return specs


def list_mx_tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer in one of the MX schemes, by suffix, `bias` left out."""
    blocks = -(-in_features // mx_blocks.BLOCK)
    specs = {
        "weight": TensorSpec(("F8_E4M3",), ((out_features, in_features),)),
        "weight_scale": TensorSpec(("U8",), ((out_features, blocks),)),
    }
    if scheme.weight == "e2m1":
        specs["weight"] = TensorSpec(("U8",), ((out_features, in_features // 2),))
    if scheme.activation == "group-dual":
        coarse = -(-in_features // linear_mxfp4.COARSE)
        shapes = ((out_features, coarse, 1), (out_features, coarse))
        specs["weight_dual_scale"] = TensorSpec(FLOATS, shapes)
    if scheme.smoothed and scheme.weight == "e2m1":
        specs["mul_scale"] = TensorSpec(FLOATS, ((in_features,),))
    return specs


def find_fault(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds and what was expected) of a tensor on disk with impossible values.

    None where there is none. Tensors as in the table of `families.msmodelslim`.
    """
    names = {plain_suffix(suffix): suffix for suffix in tensors}
    stored = {plain: tensors[suffix] for plain, suffix in names.items()}
    stored |= {plain: tensor.cpu() for plain, tensor in stored.items() if plain != "weight"}
    blocks = scheme.scale in MX
    if blocks and bool((stored["weight_scale"] == 255).any()):
        return names["weight_scale"], "holds exponents of 255, which mean NaN: expected 0 to 254"
    for plain in ("weight_scale", "weight_dual_scale", "deq_scale", "input_scale", "mul_scale"):
        if plain not in stored or (blocks and plain == "weight_scale"):
            continue
        scales = stored[plain].float()
        if plain == "deq_scale":
            scales = decode_deq_scale(stored[plain])
        wrong = ~(torch.isfinite(scales) & (scales >= torch.finfo(torch.float32).tiny))
        if plain == "weight_scale" and bool(wrong.any()):  # a row of zeros may have any scale
            wrong &= (scales != 0) | stored["weight"].cpu().any(dim=1, keepdim=True)
        if bool(wrong.any()):
            value = scales[wrong][0].item()
            return names[plain], f"holds {value:g}: expected positive, finite numbers"
    if "weight_offset" in stored and bool(stored["weight_offset"].any()):
        value = stored["weight_offset"].abs().max().item()
        return names["weight_offset"], (
            f"holds {value:g}: expected zeros (symmetric weights); quantize again with symmetric: "
            "true"
        )
    if scheme.weight == "int4":
        low, high = (int(end) for end in stored["weight"].cpu().aminmax())
        if low < -8 or high > 7:
            return names["weight"], (
                f"holds codes from {low} to {high}: expected -8 to 7, one int4 code per byte; the "
                "description is of another checkpoint, or eight bits were meant"
            )
    fault = _find_static_fault(stored) if scheme.activation == "tensor-static" else None
    return None if fault is None else (names[fault[0]], fault[1])


def _find_static_fault(stored: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """What contradicts itself in a W8A8 layer, where numbers are stored twice.

    Writers round in the model's dtype: a bfloat16 is off by 0.4 % at most.
    """
    offset = stored["input_offset"].double().reshape(())
    if not bool(offset == offset.round()) or abs(offset.item()) > 128:
        return "input_offset", f"holds {offset.item():g}: expected a whole number, -128 to 128"
    deq_scale = decode_deq_scale(stored["deq_scale"]).double()
    if "weight_scale" in stored:
        scale = stored["weight_scale"].double().flatten() * stored["input_scale"].double()
        wrong = (scale - deq_scale).abs() > CONTRADICTION * deq_scale
        if bool(wrong.any()):
            return "deq_scale", (
                f"holds {deq_scale[wrong][0].item():g}, where input_scale * weight_scale is "
                f"{scale[wrong][0].item():g}: expected their product"
            )
    if "bias" in stored:
        zero_point = offset * sum_rows(stored["weight"].cpu())
        folded, bias = stored["quant_bias"] + zero_point, stored["bias"].double()
        allowed = 2 + zero_point.abs() * 2**-20 + CONTRADICTION * bias.abs() / deq_scale
        wrong = ~((folded - bias / deq_scale).abs() <= allowed)
        if bool(wrong.any()):
            return "quant_bias", (
                f"folds a bias of {(folded * deq_scale)[wrong][0].item():g}, where bias is "
                f"{bias[wrong][0].item():g}: expected round(bias / deq_scale - input_offset * row "
                "sum of weight)"
            )
    return None


def decode_deq_scale(stored: torch.Tensor) -> torch.Tensor:
    """float32 [N] from either encoding: plain float32, or its bits widened to int64."""
    if stored.dtype == torch.int64:
        return stored.to(torch.int32).view(torch.float32)
    return stored.float().flatten()


def plain_suffix(suffix: str) -> str:
    """A suffix without the level that smoothing adds."""
    for wrapper in WRAPPERS:
        suffix = suffix.removeprefix(f"{wrapper}.")
    return suffix


def sum_rows(codes: torch.Tensor) -> torch.Tensor:
    """Sums int32 [N] of int8 codes [N, K] on a CPU, where the matmul is 40 times faster than `sum`."""
    return torch._int_mm(codes, torch.ones(codes.shape[1], 1, dtype=torch.int8)).flatten()
