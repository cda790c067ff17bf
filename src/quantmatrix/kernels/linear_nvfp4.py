"""linear.nvfp4: four-bit floating-point weights with one scale per 16 columns.

| canonical tensor | dtype | shape | meaning |
| ---------------- | ----- | ----- | ------- |
| `weight` | uint8 | [N, K/2] | two e2m1 codes per byte, the even column in the low nibble |
| `weight_scale` | float8_e4m3fn | [N, K/16] | one scale per 16 columns, row-major |
| `weight_scale_2` | float32 | [] | scale of the whole weight: amax / (6 * 448) |
| `input_scale` | float32 | [] | scale of the whole input; absent: amax(x) / (6 * 448) per call |
| `pre_quant_scale` | any float | [K] | multiplies the input first (AWQ, SVDQuant) |
| `lora_a`, `lora_b` | any float | [R, K], [N, R] | low-rank branch beside the codes (SVDQuant) |
| `bias` | any float | [N] | |

    weight[n, k] = e2m1(code) * (weight_scale[n, k // 16] * weight_scale_2)
    x'           = x * pre_quant_scale
    s            = e4m3(amax(16 columns of x') / (6 * input_scale)), held to [2^-9, 448]
    y            = (e2m1(x' / (s * input_scale)) * s * input_scale) weight^T + (x' a^T) b^T + bias

With `activation` = `none` (W4A16) the inputs are not rounded.

| backend | weights | inputs | where |
| ------- | ------- | ------ | ----- |
| `reference` | as stored | rounded to e2m1 as above | anywhere |
| `decode` | decoded at load | as they come | anywhere |
| `fp8-recode` | e4m3, made at load | e4m3 | matrix units with fp8 but without fp4 |
| `packed` | as stored, decoded on every call | as they come | NVIDIA and AMD, through Triton |
| `packed-fp8` | as stored, made e4m3 on every call | e4m3 | the same with fp8 matrix units |
| `flashinfer-*` | as stored, reordered | e2m1 | matrix units with fp4 |
"""

from __future__ import annotations

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors, linear_fp8, nvfp4_flashinfer
from quantmatrix.kernels.launching import TRITON
from quantmatrix.kernels.number_formats import E2M1_MAX, E4M3_MAX, round_e4m3
from quantmatrix.kernels.nvfp4_arithmetic import (
    GROUP,
    cut_rows,
    decode,
    decode_codes,
    decode_to,
    reference,
    take_rows,
)
from quantmatrix.kernels.portable import keep_all, run_decoded, run_exactly
from quantmatrix.scheme import Scheme

__all__ = ["KERNELS", "ORDER", "backend_alias", "decode", "reference", "take_rows"]

OP = "linear.nvfp4"
ANYWHERE = "--backend decode runs anywhere"
FP8_ARCHES = ("sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
RECODE = 6.0
"""fp8-recode divides code * group scale (at most 2688) by this to fit into e4m3. Codes 6, 3 and 1.5
are exact then, and most groups have a 6; a power of two would err half as much again."""

ALIASES = {
    "cudnn": "flashinfer-cudnn",
    "cutlass": "flashinfer-cutlass",
    "trtllm": "flashinfer-trtllm",
    "auto": None,
}


def backend_alias(value: str) -> str | None:
    """Backend of a value of SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND, any case.

    `flashinfer_cudnn` and `cudnn` are the same; None for `auto`: the order of the architecture.
    Raises KeyError, naming the known values, for anything else.
    """
    alias = value.strip().lower().removeprefix("flashinfer_")
    if alias not in ALIASES:
        known = ", ".join(name for alias in ALIASES for name in (alias, f"flashinfer_{alias}"))
        raise KeyError(f"no such FP4 GEMM backend: {value!r}; known: {known}")
    return ALIASES[alias]


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the whole weight in the compute dtype.

    Takes tensors as in the module's table.
    """
    return {"decoded": decode_to(tensors, scheme, dtype)}


RECODED: dict[tuple[bool, bool], Scheme] = {
    (plain, static): Scheme(
        op="linear.fp8",
        name="NVFP4 as fp8",
        weight="e4m3",
        scale="tensor" if plain else "channel",
        activation=("tensor-static" if static else "tensor-dynamic") if plain else "token-dynamic",
    )
    for plain in (True, False)
    for static in (True, False)
}
"""linear.fp8 schemes of recoded layers, by: neither smoothed nor low-rank, inputs have a scale."""


def describe_recoded(scheme: Scheme, tensors: Tensors) -> Scheme:
    """The linear.fp8 scheme of a recoded layer: channel scales and token scales if smoothed.

    Of the tensors, as in the module's table, it asks only whether `input_scale` is there.
    """
    return RECODED[not (scheme.smoothed or scheme.rank), "input_scale" in tensors]


def recode(tensors: Tensors, scheme: Scheme) -> Tensors:
    """Canonical linear.fp8 tensors of the same layer; takes tensors as in the module's table.

    A plain weight keeps its own scale: e4m3(code * group scale / 6), times 6 * weight_scale_2, so
    that the largest number of a layer stays the largest of e4m3 (the relative error is 1.5%).
    Smoothing and a low-rank branch are merged into the weight, which then gets one scale per row,
    float32 [N, 1].
    """
    if not (scheme.smoothed or scheme.rank):
        found = {
            "weight": decode_codes(
                tensors["weight"], tensors["weight_scale"].float() / RECODE, torch.float8_e4m3fn
            ),
            "weight_scale": tensors["weight_scale_2"].float() * RECODE,
        }
        if "input_scale" in tensors:
            found["input_scale"] = tensors["input_scale"].float() * E2M1_MAX
        return found
    rows, columns = tensors["weight"].shape[0], 2 * tensors["weight"].shape[1]
    device = tensors["weight"].device
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(rows, 1, device=device)
    for part in cut_rows(rows, columns):
        whole = decode(take_rows(tensors, part), scheme)
        amax = whole.abs().amax(dim=1, keepdim=True)
        scales[part] = torch.where(amax > 0, amax, 1.0) / E4M3_MAX
        codes[part] = round_e4m3(whole / scales[part])
    return {"weight": codes, "weight_scale": scales}


def prepare_recoded(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """What `linear_fp8.prepare_torch` keeps of the recoded weight, float8_e4m3fn [K, N] and scales."""
    recoded = recode(tensors, scheme)
    return linear_fp8.prepare_torch(recoded, describe_recoded(scheme, tensors), dtype)


def encode_recoded(
    x: torch.Tensor, buffers: Tensors, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [M, K], scale float32 [] or [M, 1]) of an fp8 layer's input x [..., K]."""
    return linear_fp8.encode_torch(x, buffers, describe_recoded(scheme, buffers))


def multiply_recoded(
    encoded: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    buffers: Tensors,
    bias: torch.Tensor | None,
    scheme: Scheme,
) -> torch.Tensor:
    """An fp8 layer on codes: [..., N] in x's dtype for x [..., K], of which nothing else is used.

    `encoded` is what `encode_recoded` gives, `bias` [N] of any float dtype.
    """
    recoded = describe_recoded(scheme, buffers)
    return linear_fp8.multiply_torch(encoded, x, buffers, bias, recoded)


def run_recoded(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """An fp8 layer: x [..., K] -> [..., N] in x's dtype, with what `prepare_recoded` kept."""
    return multiply_recoded(encode_recoded(x, buffers, scheme), x, buffers, bias, scheme)


def run_packed(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """A plain linear layer whose weight is decoded for the call, in x's dtype.

    x [..., K], `bias` [N] and the result [..., N] share one float dtype; buffers are tensors as in
    the module's table.
    """
    from quantmatrix.kernels import packed_triton

    smooth = x * buffers["pre_quant_scale"].to(x.dtype) if scheme.smoothed else x
    weight = packed_triton.decode(
        buffers["weight"], buffers["weight_scale"], buffers["weight_scale_2"], x.dtype
    )
    y = functional.linear(smooth, weight, bias)
    return add_low_rank(y, smooth, buffers) if scheme.rank else y


def add_low_rank(y: torch.Tensor, x: torch.Tensor, buffers: Tensors) -> torch.Tensor:
    """y [..., N] and what the low-rank branch makes of the smoothed x [..., K].

    y, of x's dtype, is changed in place and handed back.
    """
    low = functional.linear(x, buffers["lora_a"].to(x.dtype))
    return y.add_(functional.linear(low, buffers["lora_b"].to(x.dtype)))


def encode_packed(
    x: torch.Tensor, buffers: Tensors, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [M, K], scale float32 [] or [M, 1]) of x [..., K], as in `fp8-recode`."""
    static = "input_scale" in buffers
    scaled = {"input_scale": buffers["input_scale"] * E2M1_MAX} if static else {}
    return linear_fp8.encode_torch(x, scaled, describe_recoded(scheme, buffers))


def multiply_packed(
    encoded: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    buffers: Tensors,
    bias: torch.Tensor | None,
    scheme: Scheme,
) -> torch.Tensor:
    """An fp8 layer whose weight is recoded for the call, bit for bit as in `fp8-recode`.

    `encoded` is what `encode_packed` gives; the result is [..., N] in x's dtype for x [..., K].
    Buffers are tensors as in the module's table.
    """
    from quantmatrix.kernels import packed_triton

    weight = packed_triton.decode(
        buffers["weight"], buffers["weight_scale"], None, torch.float8_e4m3fn
    )
    recoded = {"columns": weight.t(), "weight_scale": buffers["weight_scale_2"] * RECODE}
    return linear_fp8.multiply_torch(encoded, x, recoded, bias, describe_recoded(scheme, buffers))


def run_packed_fp8(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """`multiply_packed` after `encode_packed`: x [..., K] -> [..., N] in x's dtype."""
    return multiply_packed(encode_packed(x, buffers, scheme), x, buffers, bias, scheme)


def measure_stored(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the canonical tensors, a bias included."""
    codes = out_features * (in_features // 2 + in_features // GROUP + item) + 8
    smoothing = in_features * 2 if scheme.smoothed else 0
    return codes + smoothing + scheme.rank * (in_features + out_features) * 2


def measure_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the weight in the compute dtype and a bias."""
    return out_features * (in_features + 1) * item


def measure_recoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the weight in e4m3, its scales and a bias."""
    scales = 4 * out_features if scheme.smoothed else 8
    return out_features * (in_features + item) + scales


KERNELS = (
    Kernel(
        op=OP,
        backend="reference",
        numerics="W4A4",
        needs=Needs(rule="nvfp4-reference"),
        prepare=keep_all,
        run=run_exactly(reference),
        footprint=measure_stored,
    ),
    Kernel(
        op=OP,
        backend="decode",
        numerics="W4A16",
        needs=Needs(rule="nvfp4-decode"),
        prepare=prepare_decode,
        run=run_decoded,
        footprint=measure_decoded,
    ),
    Kernel(
        op=OP,
        backend="fp8-recode",
        numerics="W8A8",
        needs=Needs(
            rule="nvfp4-fp8-recode",
            vendors=("nvidia",),
            arches=FP8_ARCHES,
            activations=("group-dynamic",),
            out_multiple=16,
            in_multiple=16,
            remedy=ANYWHERE,
        ),
        prepare=prepare_recoded,
        run=run_recoded,
        footprint=measure_recoded,
        encode=encode_recoded,
        multiply=multiply_recoded,
        matmul=("aten::_scaled_mm",),
    ),
    Kernel(
        op=OP,
        backend="packed",
        numerics="W4A16",
        needs=Needs(rule="nvfp4-packed", vendors=TRITON, package="triton", remedy=ANYWHERE),
        prepare=keep_all,
        run=run_packed,
        footprint=measure_stored,
    ),
    Kernel(
        op=OP,
        backend="packed-fp8",
        numerics="W8A8",
        needs=Needs(
            rule="nvfp4-packed-fp8",
            vendors=("nvidia",),
            arches=FP8_ARCHES,
            package="triton",
            activations=("group-dynamic",),
            plain=True,
            out_multiple=16,
            in_multiple=16,
            remedy=ANYWHERE,
        ),
        prepare=keep_all,
        run=run_packed_fp8,
        footprint=measure_stored,
        encode=encode_packed,
        multiply=multiply_packed,
        matmul=("aten::_scaled_mm",),
    ),
    *(
        Kernel(
            op=OP,
            backend=f"flashinfer-{name}",
            numerics="W4A4",
            needs=needs,
            prepare=nvfp4_flashinfer.PREPARE[name],
            run=nvfp4_flashinfer.RUN[name],
            footprint=measure_stored,
            matmul=(),
        )
        for name, needs in nvfp4_flashinfer.NEEDS.items()
    ),
)

DATACENTER = ("flashinfer-trtllm", "flashinfer-cutlass", "flashinfer-cudnn", "fp8-recode", "decode")
WORKSTATION = ("flashinfer-cutlass", "flashinfer-cudnn", "fp8-recode", "decode")
ORDER = {
    "sm89": ("fp8-recode", "decode"),
    "sm90": ("fp8-recode", "decode"),
    "sm100": DATACENTER,
    "sm103": DATACENTER,
    "sm120": WORKSTATION,
    "sm121": WORKSTATION,
    "*": ("decode", "reference"),
}
