"""linear.fp8: a linear layer whose weight is stored as e4m3 codes.

Canonical tensors of a layer with N outputs and K inputs:

| tensor | dtype | shape | meaning |
| ------ | ----- | ----- | ------- |
| `weight` | float8_e4m3fn | [N, K] | codes |
| `weight_scale` | float32 | [], [N, 1] or [ceil(N/bn), ceil(K/bk)] | per tensor, channel or block; a multiplier |
| `input_scale` | float32 | [] | calibrated, only when activations are static |
| `bias` | any float | [N] | never quantized |

Real weight = code x scale. Inputs are divided by their scale, held within 448 and rounded to e4m3:
one calibrated scale (`tensor-static`), one per call (`tensor-dynamic`), one per token
(`token-dynamic`), or one per token and block of columns (`group-dynamic`; `group-power` when it is
a power of two, as in MXFP8). With `activation` = `none` they are left alone.
Products are exact in float32 and summed there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors
from quantmatrix.kernels.launching import can_launch
from quantmatrix.kernels.number_formats import (
    E4M3_MAX,
    expand_blocks,
    round_e4m3,
    widen_float8,
)
from quantmatrix.kernels.portable import keep_all, run_decoded, run_exactly
from quantmatrix.scheme import Scheme

ROWS = 4
"""Scales of a group of columns lie side by side, in pieces of 16 bytes."""
TORCH_ARCHES = ("sm89", "sm90", "sm100", "sm103", "sm120", "sm121")


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    weight = widen_float8(tensors["weight"])
    return weight.mul_(spread_scales(tensors["weight_scale"], scheme, weight.shape))


def spread_scales(
    scales: torch.Tensor, scheme: Scheme, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Weight scales float32 in a shape that multiplies a weight [N, K], which `shape` gives.

    Block scales become [N, K]; scales [] and [N, 1] stay as they are.
    """
    if scheme.scale == "block":
        return expand_blocks(scales, scheme.block, (shape[0], shape[1]))
    return scales


def take_rows(tensors: Tensors, rows: torch.Tensor | slice, height: int = 0) -> Tensors:
    """The tensors of some output rows; block scales, of `height` rows each, by whole blocks only.

    Tensors as in the module's table; `rows` is a slice or int64 [rows]. `height` 0 means that no
    scale is shared by several rows. Raises ValueError where a block would be parted.
    """
    taken = dict(tensors)
    codes = tensors["weight"]
    taken["weight"] = codes.view(torch.uint8)[rows].view(codes.dtype)
    if "bias" in tensors:
        taken["bias"] = tensors["bias"][rows]
    scales = tensors["weight_scale"]
    if height:
        taken["weight_scale"] = scales[find_blocks(rows, tensors["weight"].shape[0], height)]
    elif scales.ndim == 2:
        taken["weight_scale"] = scales[rows]
    return taken


def find_blocks(rows: torch.Tensor | slice, count: int, height: int) -> torch.Tensor:
    """int64 [blocks]: the blocks of `height` rows that these rows, of `count`, consist of.

    `rows` is a slice or int64 [rows], and blocks come in its order. Raises ValueError where a block
    would be parted.
    """
    places = torch.arange(count)[rows]
    starts = places[::height]
    whole = (starts.unsqueeze(-1) + torch.arange(height)).flatten()[: len(places)]
    if (starts % height).any() or not torch.equal(places, whole):
        raise ValueError(f"its rows are cut within blocks of {height} rows that share a scale")
    return starts // height


def find_input_scale(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme
) -> torch.Tensor:
    """The float32 scale that x [..., K] is divided by: [], [..., 1], or [..., K/group] for groups.

    Of `tensors` only `input_scale` is read, and only where activations are static. Raises
    ValueError for an activation that the op does not know.
    """
    if scheme.activation == "tensor-static":
        return tensors["input_scale"]
    magnitude = x.abs().float()
    if scheme.activation == "tensor-dynamic":
        amax = magnitude.amax()
    elif scheme.activation == "token-dynamic":
        amax = magnitude.amax(dim=-1, keepdim=True)
    elif scheme.activation in ("group-dynamic", "group-power"):
        group = scheme.block[1]
        padded = functional.pad(magnitude, (0, -x.shape[-1] % group))
        amax = padded.unflatten(-1, (-1, group)).amax(dim=-1)
        if scheme.activation == "group-power":  # MX: the largest code lies between 256 and 448
            return torch.ldexp(torch.ones_like(amax), torch.frexp(amax).exponent - 9)
    else:
        raise ValueError(f"linear.fp8 knows no activation {scheme.activation}")
    return torch.where(amax > 0, amax, E4M3_MAX) / E4M3_MAX


def round_input(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme
) -> torch.Tensor:
    """x [..., K] as the numbers that its e4m3 codes stand for, float32."""
    if scheme.activation == "none":
        return x.float()
    scale = find_input_scale(x, tensors, scheme)
    if scheme.activation in ("group-dynamic", "group-power"):
        scale = scale.repeat_interleave(scheme.block[1], dim=-1)[..., : x.shape[-1]]
    return round_e4m3(x.float() / scale).float() * scale


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype, bias included."""
    bias = tensors.get("bias")
    y = functional.linear(round_input(x, tensors, scheme), decode(tensors, scheme))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the weight decoded once, in the compute dtype.

    Takes tensors as in the module's table.
    """
    return {"decoded": decode(tensors, scheme).to(dtype)}


def prepare_torch(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The weight as a column-major [K, N] view, and scales as `torch._scaled_mm` takes them.

    Takes tensors as in the module's table. One float32 scale per output channel [1, N] when weights
    or inputs are scaled by rows, else one number [].
    """
    prepared = {"columns": tensors["weight"].contiguous().t()}
    scale = tensors["weight_scale"].float()
    if scheme.scale == "channel" or scheme.activation == "token-dynamic":
        rows = tensors["weight"].shape[0]
        prepared["weight_scale"] = scale.reshape(1, -1).expand(1, rows).contiguous()
    else:
        prepared["weight_scale"] = scale.reshape(())
    if "input_scale" in tensors:
        prepared["input_scale"] = tensors["input_scale"].float()
    return prepared


def encode_torch(
    x: torch.Tensor, tensors: Tensors, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [M, K], scale [] or [M, 1]) of x [..., K]: one fused kernel where triton runs.

    x is of any float dtype, M the product of its leading sides; codes are float8_e4m3fn, scales
    float32. `input_scale` [] is read from `tensors` where activations are static.
    """
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or not can_launch(flat):
        # the compiler fuses these into what made x; CUDA would multiply by a number's reciprocal
        scale = find_input_scale(flat, tensors, scheme)
        return round_e4m3(flat.float() / scale), scale
    from quantmatrix.kernels import fp8_triton

    if scheme.activation == "tensor-static":
        return fp8_triton.launch_static(flat, tensors["input_scale"]), tensors["input_scale"]
    dynamic = scheme.activation == "tensor-dynamic"
    return (fp8_triton.launch_tensor if dynamic else fp8_triton.launch_tokens)(flat)


def run_torch(
    x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """`torch._scaled_mm` on e4m3 codes, one scale per tensor or one per row and column.

    x [..., K] and `bias` [N] of any float dtype, tensors of `prepare_torch`; [..., N] in x's dtype.
    """
    return multiply_torch(encode_torch(x, tensors, scheme), x, tensors, bias, scheme)


def multiply_torch(
    encoded: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    tensors: Tensors,
    bias: torch.Tensor | None,
    scheme: Scheme,
) -> torch.Tensor:
    """Codes [M, K] times the weight; only shape and dtype of x are used."""
    codes, scale = encoded
    if tensors["weight_scale"].ndim:
        scale = scale.expand(codes.shape[0], 1)
    out_dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    columns = tensors["columns"]
    y = torch._scaled_mm(
        codes,
        columns,
        scale_a=scale.contiguous(),
        scale_b=tensors["weight_scale"],
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
    )
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def prepare_blocks(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The weight as a column-major [K, N] view, and its block scales as [K/128, N/128].

    Takes tensors as in the module's table; codes stay float8_e4m3fn, scales float32.
    """
    return {
        "columns": tensors["weight"].contiguous().t(),
        "weight_scale": tensors["weight_scale"].float().contiguous().t(),
    }


def run_blocks(
    x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """`torch._scaled_mm` with a scale per 128 columns of a token and per block of the weight.

    x [..., K] of any float dtype, tensors of `prepare_blocks`, `bias` [N]; gives [..., N] in x's
    dtype. The matmul takes rows in fours, so zeros are added to x where there are fewer.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows, out_dtype = flat.shape[0], torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    flat = functional.pad(flat, (0, 0, 0, -rows % ROWS)) if rows % ROWS else flat
    if torch.compiler.is_compiling() or not can_launch(flat):
        scale = find_input_scale(flat, tensors, scheme).t().contiguous().t()
        wide = scale.repeat_interleave(scheme.block[1], dim=-1)
        codes = round_e4m3(flat.float() / wide)
    else:
        from quantmatrix.kernels import fp8_triton

        codes, scale = fp8_triton.launch_groups(flat, scheme.block[1])
    y = torch._scaled_mm(
        codes,
        tensors["columns"],
        scale_a=scale,
        scale_b=tensors["weight_scale"],
        out_dtype=out_dtype,
    )[:rows]
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def count_bytes(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of codes, scales and bias (a bias is counted whether or not there is one)."""
    scales = {"tensor": 1, "channel": out_features}.get(scheme.scale, 0)
    if scheme.scale == "block":
        scales = -(-out_features // scheme.block[0]) * -(-in_features // scheme.block[1])
    static = scheme.activation == "tensor-static"
    return out_features * in_features + 4 * (scales + static) + item * out_features


def count_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of a decoded weight and a bias."""
    return item * out_features * (in_features + 1)


KERNELS = (
    Kernel(
        "linear.fp8",
        "reference",
        "W8A8",
        Needs("fp8-reference"),
        keep_all,
        run_exactly(reference),
        count_bytes,
    ),
    Kernel(
        "linear.fp8",
        "decode",
        "W8A16",
        Needs("fp8-decode"),
        prepare_decode,
        run_decoded,
        count_decoded,
    ),
    Kernel(
        "linear.fp8",
        "torch",
        "W8A8",
        Needs(
            "fp8-torch-sm89",
            vendors=("nvidia",),
            arches=TORCH_ARCHES,
            scales=("tensor", "channel"),
            activations=("tensor-static", "tensor-dynamic", "token-dynamic"),
            out_multiple=16,
            in_multiple=16,
        ),
        prepare_torch,
        run_torch,
        count_bytes,
        encode=encode_torch,
        multiply=multiply_torch,
        matmul=("aten::_scaled_mm",),
    ),
    Kernel(
        "linear.fp8",
        "torch-block",
        "W8A8",
        Needs(
            "fp8-torch-block-sm90",
            vendors=("nvidia",),
            arches=("sm90",),
            scales=("block",),
            activations=("group-dynamic",),
            blocks=((128, 128),),
            out_multiple=128,
            in_multiple=512,
            remedy="--backend decode runs anywhere",
        ),
        prepare_blocks,
        run_blocks,
        count_bytes,
        matmul=("aten::_scaled_mm",),
    ),
)

ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("decode", "reference"),
    "sm80": ("decode", "reference"),
    "sm86": ("decode", "reference"),
    "sm90": ("torch", "torch-block", "decode"),
    "nvidia": ("torch", "decode"),
    "*": ("decode", "reference"),
}
