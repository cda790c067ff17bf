"""msmodelslim: transformers that Ascend's MindStudio-ModelSlim quantized to int8, int4 or MX formats.

A component folder is of this family when `quant_model_description*.json` lies beside its weights.
The file has one entry per tensor; the entry of `<layer>.weight` is the layer's scheme, `FLOAT`
means full precision. Mixed folders are normal, so `model_quant_type` is never consulted.

Tensors of a quantized linear layer with N outputs and K inputs:

| scheme | tensor | dtype, shape |
| ------ | ------ | ------------ |
| `W8A8`: activation scale from calibration | `weight` | I8 [N, K] |
| | `input_scale`, `input_offset` | F32 [1] |
| | `deq_scale` = input_scale * weight_scale | F32 [N], or I64 [N]: the bits of the F32 |
| | `quant_bias` = round(bias / deq_scale - input_offset * row sum) | I32 [N] |
| | `weight_scale`, `weight_offset`: older writers only | F32 [N, 1] |
| `W8A8_DYNAMIC`: one activation scale per token | `weight` | I8 [N, K] |
| | `weight_scale`, `weight_offset` (zeros) | F32 [N, 1] |
| `W4A4_DYNAMIC` | as above; one code in [-8, 7] per byte | I8 [N, K] |
| `W8A8_MXFP8`: powers of two per 32 columns | `weight` | F8_E4M3 [N, K] |
| | `weight_scale`, exponent + 127 | U8 [N, K / 32] |
| `W4A4_MXFP4`: the same with e2m1 codes | `weight`, the even column in the low nibble | U8 [N, K / 2] |
| | `weight_scale`, exponent + 127 | U8 [N, K / 32] |
| `W4A4_MXFP4_DUALSCALE`: and a coarse scale | as above, and `weight_dual_scale` | F32 [N, K / 512, 1] |
| any | `bias`; under `W8A8` a copy of what `quant_bias` holds | F32 [N] |
| any | `mul_scale`: inputs are multiplied by it before they are quantized | [K] |

Before `wan_repack` a smoothed layer is two: `<layer>.linear.weight` and `<layer>.div.mul_scale`. An
int64 `deq_scale` is decided by its stored dtype: the writer's choice does not follow the model.
Other scales of older writers may have the model's own dtype. Both writers (MindIE and AscendV1) are
read; `quantize` writes what AscendV1 writes, with F32 `deq_scale`. Rotations `q_rot` and `k_rot`
cancel out in attention scores and are left aside; anything else beside these tensors (FlatQuant,
SVD residuals, quantized attention, other MX mixes, embeddings) is refused by name. Sources: msmodelslim
26.1.0 and SGLang 0.5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.msmodelslim import mx_blocks
from quantmatrix.families.msmodelslim.description import DESCRIPTION, FLOAT
from quantmatrix.families.msmodelslim.description import detect as detect
from quantmatrix.families.msmodelslim.description import schemes as schemes
from quantmatrix.families.msmodelslim.layers import (
    MX,
    PER_ROW,
    decode_deq_scale,
    plain_suffix,
    tensors,
)
from quantmatrix.families.msmodelslim.layers import SCHEMES as SCHEMES
from quantmatrix.families.msmodelslim.layers import WRAPPERS as WRAPPERS
from quantmatrix.families.msmodelslim.layers import find_fault as find_fault
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import int8_arithmetic, linear_fp8, linear_mxfp4
from quantmatrix.kernels.number_formats import encode_e2m1, pack_nibbles
from quantmatrix.scheme import Scheme

ID = "msmodelslim"
CODE_LEAVES = ("weight", "linear.weight")
BIAS_LEAVES = ("bias", "linear.bias", "quant_bias", "linear.quant_bias")
"""The last two hold a folded zero point, too."""
MODELS = ("wan-2-2",)
ONLINE_NAMES = {"mxfp8": "W8A8_MXFP8", "mxfp4": "W4A4_MXFP4"}
WHOLE_PIPELINE = True
WRITES_ON_CPU = True
"""Rows are summed by an integer product that GPUs do not have for one column."""
ROTATION = re.compile(r"\.(to_)?[qk]_rot$")
ARITHMETIC: Mapping[str, Any] = {
    "int8": int8_arithmetic,
    "int4": int8_arithmetic,
    "e4m3": linear_fp8,
    "e2m1": linear_mxfp4,
}
"""What decodes and multiplies codes of each number format."""
EPSILON = torch.finfo(torch.float32).eps
"""The smallest scale that the writer stores."""


def ignored(name: str) -> str | None:
    """Why a tensor on disk is left aside, or None when it is not."""
    if ROTATION.search(name):
        return "rotates queries and keys alike, which attention scores do not see"
    return None


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors, as in the module's table, of a layer with weight [N, K] of any float dtype.

    Scales are symmetric per row for weights, and the whole calibrated range (zero included) spreads
    over 255 steps for static activations. Raises UsageError where these lack a calibration.
    """
    if scheme.scale in MX:
        stored = _quantize_blocks(weight, scheme)
        return stored if bias is None else stored | {"bias": bias.float()}
    exact = weight.float()
    largest = int8_arithmetic.LARGEST[scheme.weight]
    scale = (exact.abs().amax(dim=1, keepdim=True) / largest).clamp(min=EPSILON)
    codes = (exact / scale).round().clamp(-largest - 1, largest).to(torch.int8)
    stored = {"weight": codes}
    if scheme.activation == "tensor-static":
        stored |= _quantize_input(codes, scale, bias, calibration)
    else:
        stored |= {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    return stored if bias is None else stored | {"bias": bias.float()}


def cut_rows(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table.
    """
    return {n: t[start:stop] if plain_suffix(n) in PER_ROW else t for n, t in tensors.items()}


def canonical(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """On-disk tensors of one layer as canonical tensors of linear.int8 (MXFP8: linear.fp8).

    Takes tensors as in the module's table. Raises CheckpointError for a scale that is missing and
    for offsets that are not zero.
    """
    stored = {plain_suffix(suffix): tensor for suffix, tensor in tensors.items()}
    static = ("deq_scale", "input_scale", "input_offset", "quant_bias")
    needed = static if scheme.activation == "tensor-static" else ("weight_scale",)
    if missing := [name for name in needed if name not in stored]:
        raise CheckpointError(f"a {scheme.name} layer has no {missing[0]}; it has {list(stored)}")
    if scheme.scale in MX:
        scales = mx_blocks.decode_exponents(stored["weight_scale"])
        if "weight_dual_scale" in stored:
            coarse = stored.pop("weight_dual_scale").float().reshape(len(scales), -1)
            each = linear_mxfp4.COARSE // mx_blocks.BLOCK
            scales = scales * linear_mxfp4.spread(coarse, each, scales.shape[1])
        return stored | {"weight_scale": scales}
    offset = stored.get("weight_offset")
    if offset is not None and not offset.is_meta and bool(offset.any()):
        raise CheckpointError(
            f"weight_offset of a {scheme.name} layer holds {offset.abs().max().item():g}: expected "
            "zeros (symmetric weights); quantize again with symmetric: true"
        )
    found = {"weight": stored["weight"]}
    if "mul_scale" in stored:
        found["mul_scale"] = stored["mul_scale"]
    if scheme.activation != "tensor-static":
        bias = {"bias": stored["bias"]} if "bias" in stored else {}
        return found | {"weight_scale": stored["weight_scale"].float().flatten()} | bias
    deq_scale = decode_deq_scale(stored["deq_scale"])
    scale = stored["input_scale"].float().reshape(())
    weight_scale = stored["weight_scale"] if "weight_scale" in stored else deq_scale / scale
    found |= {
        "weight_scale": weight_scale.float().flatten(),
        "input_scale": scale,
        "input_offset": stored["input_offset"].float().reshape(()),
        "deq_scale": deq_scale,
        "quant_bias": stored["quant_bias"],
    }
    found["bias"] = stored["bias"] if "bias" in stored else _unfold_bias(found)
    return found


def dequantize(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K], smoothing included."""
    weight: torch.Tensor = ARITHMETIC[scheme.weight].decode(canonical(tensors, scheme), scheme)
    return weight


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on on-disk tensors, activations quantized too.

    x [..., K] gives [..., N] in x's dtype; tensors as in the module's table.
    """
    found = canonical(tensors, scheme)
    y: torch.Tensor = ARITHMETIC[scheme.weight].reference(x, found, scheme)
    return y


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """The description file. Its readers want an entry for every tensor: name them in `tensors`."""
    entries: dict[str, Any] = {}
    for layer, scheme in schemes.items():
        for suffix in _suffixes(scheme):
            entries[f"{layer}.{suffix}"] = scheme.name
        entries[f"{layer}.bias"] = FLOAT
    entries |= {f"{layer}.weight": FLOAT for layer in kept}
    if tensors:
        entries = {name: entries.get(name, FLOAT) for name in tensors}
    names = sorted({scheme.name for scheme in schemes.values()})
    settings: dict[str, Any] = {
        "model_quant_type": names[0] if names else FLOAT,
        "version": "1.0.0",
        "group_size": 0,
        "metadata": {},
        "optional": {},
    }
    return Declaration(description=(DESCRIPTION, {**settings, **dict(sorted(entries.items()))}))


def _suffixes(scheme: Scheme) -> list[str]:
    """Suffixes that `quantize` writes for a scheme, `bias` left out."""
    static = scheme.activation == "tensor-static"
    old = ("weight_scale", "weight_offset") if static else ()
    return [suffix for suffix in tensors(scheme, 1, 1) if suffix not in old]


def _quantize_input(
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    calibration: Calibration | None,
) -> dict[str, torch.Tensor]:
    """Static activation scale and zero point, and what is folded with them."""
    if calibration is None:
        raise UsageError(
            "W8A8 needs the range of each layer's input: quantize with calibration data, or use "
            "W8A8_DYNAMIC, which needs none"
        )
    low, high = (t.float().reshape(-1) for t in (calibration.low, calibration.high))
    low, high = low.min().clamp(max=0), high.max().clamp(min=0)
    input_scale = ((high - low) / 255).clamp(min=EPSILON)
    offset = (-low / input_scale).round() - 128
    deq_scale = (input_scale * scale).flatten()
    plain = torch.zeros_like(deq_scale) if bias is None else bias.float()
    folded = plain.double() / deq_scale.double() - offset.double() * codes.double().sum(dim=1)
    return {
        "input_scale": input_scale.reshape(1),
        "input_offset": offset.reshape(1),
        "deq_scale": deq_scale,
        "quant_bias": folded.round().to(torch.int32),
    }


def _quantize_blocks(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Codes and exponents of an MX scheme, and its coarse scales."""
    if weight.shape[1] % mx_blocks.BLOCK:
        raise UsageError(
            f"{scheme.name} takes layers whose inputs are a multiple of {mx_blocks.BLOCK}, not "
            f"{weight.shape[1]}: keep the layer in full precision, or use W8A8_DYNAMIC"
        )
    if scheme.weight == "e4m3":
        codes, exponents = mx_blocks.encode_blocks(weight)
        return {"weight": codes, "weight_scale": exponents}
    exact, more = weight.float(), {}
    if scheme.activation == "group-dual":
        coarse = linear_mxfp4.find_coarse(exact)
        exact = exact / linear_mxfp4.spread(coarse, linear_mxfp4.COARSE, exact.shape[1])
        more = {"weight_dual_scale": coarse[..., None]}
    numbers, exponents = linear_mxfp4.round_groups(exact)
    stored = (exponents + mx_blocks.BIAS).clamp(min=0).to(torch.uint8)
    return {"weight": pack_nibbles(encode_e2m1(numbers)), "weight_scale": stored, **more}


def _unfold_bias(found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The bias float32 [N] that `quant_bias` holds, for arithmetic on plain activations.

    Zeros when the layer has none: `quant_bias` does not tell the two apart.
    """
    correction = found["input_offset"].double() * found["weight"].sum(dim=1)
    folded = found["quant_bias"] + correction
    folded[folded.abs() <= correction.abs() * 2**-22] = 0  # what the writer's float32 loses
    return (folded * found["deq_scale"]).float()
