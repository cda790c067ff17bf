"""linear.svdq: four-bit weights and inputs, with a 16-bit low-rank branch beside them (SVDQuant).

| canonical tensor | dtype | shape | meaning |
| ---------------- | ----- | ----- | ------- |
| `weight` | uint8 | [N, K/2] | two codes per byte, int4 or e2m1, the even column in the low nibble |
| `weight_scale` | 16-bit (int4), float8_e4m3fn (nvfp4) | [N, K/g] | g = 64 (int4) or 16 (nvfp4) |
| `channel_scale` | float32 | [N] | scales the coded sum (`wcscales` x `wtscale`; else ones) |
| `smooth` | 16-bit | [K] | inputs are **divided** by it before they are coded |
| `proj_down`, `proj_up` | 16-bit | [R, K], [N, R] | low-rank branch; it reads the raw input |
| `bias` | 16-bit | [N] | as stored: of an unsigned layer, with the shift folded in |

    a[m, G] = amax of (x + shift) / smooth over the group: / 7 (int4), / 15 (unsigned), / 6 (nvfp4)
    y = (sum over k of code(x) * a * code(w) * weight_scale) * channel_scale + bias
        + (x proj_down^T) proj_up^T
    weight of the raw input = codes * weight_scale * channel_scale / smooth + proj_up proj_down

*Unsigned* layers (int4 that follows a GELU) code x + 0.171875 as 0..15. Their stored bias has what
the shift adds taken out, so a backend that leaves inputs alone puts it back in.

| backend | weights | inputs | where |
| ------- | ------- | ------ | ----- |
| `merged` | one dense weight, low-rank part included, made at load | as they come | anywhere |
| `decode` | decoded at load, low-rank branch kept apart | as they come | anywhere |
| `packed` | as stored, made dense on every call | as they come | NVIDIA and AMD, through Triton |
| `reference` | as stored | coded as above | anywhere |
| `nunchaku` | as stored, in tiles | int4 or nvfp4 | the engine on SM8x and SM12x |
| `comfy-kitchen` | as stored | int4 | a CPU (slow), SM80 and newer |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from quantmatrix.kernels import Kernel, Needs, Tensors, svdq_engines
from quantmatrix.kernels.launching import TRITON
from quantmatrix.kernels.nvfp4_arithmetic import cut_rows
from quantmatrix.kernels.portable import keep_all, run_exactly
from quantmatrix.kernels.svdq_arithmetic import (
    decode,
    decode_bias,
    decode_main,
    reference,
    sum_shift,
    take_rows,
)
from quantmatrix.kernels.svdq_engines import add_shift
from quantmatrix.scheme import Scheme

__all__ = ["KERNELS", "ORDER", "decode", "decode_bias", "reference", "take_rows"]

OP = "linear.svdq"


def decode_to(
    decoder: Callable[[Tensors, Scheme], torch.Tensor],
    tensors: Tensors,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What `decoder` gives, [N, K], rounded to `dtype` without a float32 copy of the whole weight.

    `decoder` takes tensors as in the module's table and gives float32 [rows, K].
    """
    rows, columns = tensors["weight"].shape[0], 2 * tensors["weight"].shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=tensors["weight"].device)
    for part in cut_rows(rows, columns):
        out[part] = decoder(take_rows(tensors, part), scheme)
    return out


def keep_shift(tensors: Tensors, scheme: Scheme) -> Tensors:
    """`shift`, what the shift adds to each output, float32 [N]; nothing for signed layers."""
    return {"shift": sum_shift(tensors, scheme)} if scheme.unsigned else {}


def prepare_merged(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`merged` [N, K], one dense weight in the compute dtype, and the shift of an unsigned layer.

    Takes tensors as in the module's table.
    """
    return {"merged": decode_to(decode, tensors, scheme, dtype), **keep_shift(tensors, scheme)}


def run_merged(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """A plain linear layer: x [..., K] -> [..., N] in x's dtype, computed in the weight's.

    `bias` is [N] as stored, `buffers` what `prepare_merged` kept.
    """
    weight = buffers["merged"]
    plain = add_shift(bias, buffers)
    rounded = None if plain is None else plain.to(weight.dtype)
    return functional.linear(x.to(weight.dtype), weight, rounded).to(x.dtype)


def prepare_decode(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """`decoded` [N, K], the coded part, and the two factors, all in the compute dtype.

    Takes tensors as in the module's table.
    """
    return {
        "decoded": decode_to(decode_main, tensors, scheme, dtype),
        "proj_down": tensors["proj_down"].to(dtype),
        "proj_up": tensors["proj_up"].to(dtype),
        **keep_shift(tensors, scheme),
    }


def run_decode(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """A plain linear layer, and the low-rank branch as two small ones.

    x [..., K] -> [..., N] in x's dtype, computed in the weight's; `bias` is [N] as stored.
    """
    weight = buffers["decoded"]
    plain = add_shift(bias, buffers)
    rounded = None if plain is None else plain.to(weight.dtype)
    raw = x.to(weight.dtype)
    low = functional.linear(functional.linear(raw, buffers["proj_down"]), buffers["proj_up"])
    return functional.linear(raw, weight, rounded).add_(low).to(x.dtype)


def prepare_packed(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """Codes and scales as stored; `unsmooth` and the two factors of the low-rank branch.

    `unsmooth` is 1 / smooth, float32 [K]; the factors are in the compute dtype. Takes tensors as in
    the module's table.
    """
    return {
        **{name: tensors[name] for name in ("weight", "weight_scale", "channel_scale")},
        "unsmooth": 1 / tensors["smooth"].float(),
        "proj_down": tensors["proj_down"].to(dtype),
        "proj_up": tensors["proj_up"].to(dtype),
        **keep_shift(tensors, scheme),
    }


def run_packed(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """As `merged`, the weight being made for the call: x [..., K] -> [..., N] in x's dtype."""
    from quantmatrix.kernels import packed_triton

    up, down = buffers["proj_up"], buffers["proj_down"]
    coded = packed_triton.decode_smoothed(
        buffers["weight"],
        buffers["weight_scale"],
        buffers["channel_scale"],
        buffers["unsmooth"],
        up.dtype,
        int4=scheme.weight == "int4",
    )
    return run_merged(x, {**buffers, "merged": coded.addmm_(up, down)}, bias, scheme)


def measure_stored(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the canonical tensors, a bias included."""
    scale_bytes = 2 if scheme.weight == "int4" else 1
    scales = out_features * (in_features // scheme.group_size) * scale_bytes
    vectors = 4 * out_features + 2 * in_features + item * out_features
    factors = 2 * scheme.rank * (in_features + out_features)
    return out_features * in_features // 2 + scales + vectors + factors


def measure_packed(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of the stored tensors, of float32 smoothing and of the sums of a shift."""
    more = 2 * in_features + 4 * out_features * scheme.unsigned
    return measure_stored(scheme, out_features, in_features, item) + more


def measure_merged(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of a dense weight, a bias and the sums of a shift."""
    return out_features * (item * (in_features + 1) + 4 * scheme.unsigned)


def measure_decoded(scheme: Scheme, out_features: int, in_features: int, item: int) -> int:
    """Bytes of a dense weight, two factors, a bias and the sums of a shift."""
    factors = item * scheme.rank * (in_features + out_features)
    return measure_merged(scheme, out_features, in_features, item) + factors


KERNELS = (
    Kernel(
        op=OP,
        backend="merged",
        numerics="W4A16",
        needs=Needs(rule="svdq-merged"),
        prepare=prepare_merged,
        run=run_merged,
        footprint=measure_merged,
    ),
    Kernel(
        op=OP,
        backend="decode",
        numerics="W4A16",
        needs=Needs(rule="svdq-decode"),
        prepare=prepare_decode,
        run=run_decode,
        footprint=measure_decoded,
    ),
    Kernel(
        op=OP,
        backend="packed",
        numerics="W4A16",
        needs=Needs(
            rule="svdq-packed",
            vendors=TRITON,
            package="triton",
            remedy="--backend merged or --backend decode run anywhere",
        ),
        prepare=prepare_packed,
        run=run_packed,
        footprint=measure_packed,
    ),
    Kernel(
        op=OP,
        backend="reference",
        numerics="W4A4",
        needs=Needs(rule="svdq-reference"),
        prepare=keep_all,
        run=run_exactly(reference),
        footprint=measure_stored,
    ),
    Kernel(
        op=OP,
        backend="nunchaku",
        numerics="W4A4",
        needs=svdq_engines.NUNCHAKU,
        prepare=svdq_engines.prepare_nunchaku,
        run=svdq_engines.run_nunchaku,
        footprint=measure_stored,
        matmul=(),
    ),
    Kernel(
        op=OP,
        backend="comfy-kitchen",
        numerics="W4A4",
        needs=svdq_engines.COMFY_KITCHEN,
        prepare=svdq_engines.prepare_comfy,
        run=svdq_engines.run_comfy,
        footprint=measure_stored,
        matmul=(),
    ),
)

ENGINE_FIRST = ("nunchaku", "merged", "decode", "reference")
ORDER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*svdq_engines.SM8X, *svdq_engines.SM12X), ENGINE_FIRST),
    "*": ("merged", "decode", "reference"),
}
