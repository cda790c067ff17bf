"""Other people's kernels for SVDQuant layers: the nunchaku engine, and comfy-kitchen.

Both get what they want from canonical tensors: the engine its own tile order (`svdq_packing`),
comfy-kitchen rows and columns with the scales turned. Their arithmetic is 16-bit where `reference`
is exact, and the engine's low-rank sums differ from run to run.

| | engine | comfy-kitchen |
| - | ------ | ------------- |
| weights | int4 on SM8x, nvfp4 on SM12x | int4 |
| unsigned layers | run as signed ones | coded unsigned |
| AWQ layers | at most 8 rows a call | any number of rows |

The engine codes inputs without a sign only inside its fused GELU, which a diffusers block does not
reach. So an unsigned layer gives it signed inputs, and the shift that its file folded into the bias
is taken out again.
"""

from __future__ import annotations

import torch

from quantmatrix.kernels import Needs, Tensors
from quantmatrix.kernels import svdq_packing as packing
from quantmatrix.kernels.svdq_arithmetic import SHIFT, sum_shift
from quantmatrix.scheme import Scheme

SM8X = ("sm80", "sm86", "sm89")
SM12X = ("sm120", "sm121")
PORTABLE = "--backend merged, decode and reference run anywhere"
AWQ_ROWS = 8

NUNCHAKU = Needs(
    rule="svdq-engine-arch",
    vendors=("nvidia",),
    arches=(*SM8X, *SM12X),
    remedy=PORTABLE,
    further=(
        Needs(
            rule="svdq-nvfp4-ada",
            only_on=SM8X,
            weights=("int4", "uint4"),
            remedy="take the svdq-int4 file of the model here",
        ),
        Needs(
            rule="svdq-int4-blackwell",
            only_on=SM12X,
            weights=("e2m1", "uint4"),
            remedy="take the svdq-fp4 file of the model here",
        ),
        Needs(
            rule="svdq-engine-package",
            package="nunchaku",
            remedy=(
                "the SVDQuant engine is not the package `nunchaku` of the public index: take the "
                "wheel for your Python, torch and CUDA from the engine's releases"
            ),
        ),
        Needs(rule="svdq-engine-shape", out_multiple=128, in_multiple=128, remedy=PORTABLE),
    ),
)
"""What the engine's kernels run on; `uint4` are AWQ layers, which it has for all of these."""

COMFY_KITCHEN = Needs(
    rule="svdq-comfy-kitchen",
    vendors=("cpu", "nvidia"),
    package="comfy_kitchen",
    weights=("int4", "uint4"),
    out_multiple=128,
    in_multiple=128,
    remedy=PORTABLE,
)


def find_narrow(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype that an engine computes in; bfloat16 stands in for float32."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def prepare_nunchaku(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """The tensors in the engine's tile order and 16-bit dtype, ready for its functions.

    Takes tensors as in the table of `kernels.linear_svdq`; gives the stored shapes of
    `svdq_packing`.
    """
    narrow = find_narrow(dtype)
    kept = {
        "qweight": packing.pack_codes(tensors["weight"]),
        "smooth": packing.pack_channels(tensors["smooth"].to(narrow)),
        "proj_down": packing.pack_down(tensors["proj_down"].to(narrow)),
        "proj_up": packing.pack_up(tensors["proj_up"].to(narrow)),
    }
    if scheme.weight == "int4":
        kept["wscales"] = packing.pack_scales(tensors["weight_scale"].to(narrow))
    else:
        kept["wscales"] = packing.pack_scales(tensors["weight_scale"])
        kept["wcscales"] = packing.pack_channels(tensors["channel_scale"].to(narrow))
    if scheme.unsigned:
        kept["shift"] = sum_shift(tensors, scheme)
    return kept


def run_nunchaku(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Code the input and form its low-rank products in one kernel, multiply in another.

    x [..., K] of any float dtype -> [..., N] in x's dtype; `bias` [N] as stored, `buffers` what
    `prepare_nunchaku` made.
    """
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    fp4 = scheme.weight == "e2m1"
    rows = x.reshape(-1, x.shape[-1]).to(buffers["proj_up"].dtype)
    codes, scales, low = svdq_quantize_w4a4_act_fuse_lora_cuda(
        rows, lora_down=buffers["proj_down"], smooth=buffers["smooth"], fp4=fp4
    )
    y = torch.empty(rows.shape[0], buffers["qweight"].shape[0], dtype=rows.dtype, device=x.device)
    plain = add_shift(bias, buffers)
    svdq_gemm_w4a4_cuda(
        act=codes,
        wgt=buffers["qweight"],
        out=y,
        ascales=scales,
        wscales=buffers["wscales"],
        lora_act_in=low,
        lora_up=buffers["proj_up"],
        bias=None if plain is None else packing.pack_channels(plain).to(rows.dtype),
        act_unsigned=False,
        fp4=fp4,
        alpha=1.0,
        wcscales=buffers.get("wcscales"),
    )
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def add_shift(bias: torch.Tensor | None, buffers: Tensors) -> torch.Tensor | None:
    """The bias [N] of an unsigned layer without the fold of its file, float32; any other as it is."""
    if "shift" not in buffers:
        return bias
    return buffers["shift"] if bias is None else bias.float() + buffers["shift"]


def prepare_nunchaku_awq(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """AWQ tensors in the engine's order: codes int32 [N/4, K/2], scales and zeros 16-bit [K/64, N].

    Takes tensors as in the table of `kernels.linear_w4a16`.
    """
    narrow = find_narrow(dtype)
    return {
        "qweight": packing.pack_awq(tensors["weight"]),
        "wscales": tensors["weight_scale"].to(narrow).T.contiguous(),
        "wzeros": tensors["weight_zero"].to(narrow).T.contiguous(),
    }


def run_nunchaku_awq(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """The engine's matrix-vector product, eight rows at a time.

    x [..., K] of any float dtype -> [..., N] in x's dtype; `bias` [N] or None.
    """
    from nunchaku.ops.gemv import awq_gemv_w4a16_cuda

    rows = x.reshape(-1, x.shape[-1]).to(buffers["wscales"].dtype)
    out_features = buffers["wscales"].shape[1]
    parts = [
        awq_gemv_w4a16_cuda(
            in_feats=part.contiguous(),
            kernel=buffers["qweight"],
            scaling_factors=buffers["wscales"],
            zeros=buffers["wzeros"],
            m=part.shape[0],
            n=out_features,
            k=rows.shape[1],
            group_size=scheme.group_size,
        )
        for part in rows.split(AWQ_ROWS)
    ]
    y = torch.cat(parts).view(*x.shape[:-1], out_features)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def prepare_comfy(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """Row-major codes int8 [N, K/2], scales [K/64, N], `proj_down` [K, R], all but codes 16-bit.

    Takes tensors as in the table of `kernels.linear_svdq`.
    """
    narrow = find_narrow(dtype)
    channel = tensors["channel_scale"].unsqueeze(1)
    return {
        "qweight": tensors["weight"].view(torch.int8),
        "wscales": (tensors["weight_scale"].float() * channel).to(narrow).T.contiguous(),
        "smooth": tensors["smooth"].to(narrow),
        "proj_down": tensors["proj_down"].to(narrow).T.contiguous(),
        "proj_up": tensors["proj_up"].to(narrow).contiguous(),
    }


def run_comfy(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Code the input, shifted by us where it is unsigned, then multiply.

    x [..., K] of any float dtype -> [..., N] in x's dtype; `bias` [N] as stored, `buffers` what
    `prepare_comfy` made.
    """
    import comfy_kitchen

    raw = x.reshape(-1, x.shape[-1]).to(buffers["proj_up"].dtype)
    codes, scales, low = comfy_kitchen.quantize_svdquant_w4a4(
        raw + SHIFT if scheme.unsigned else raw,
        buffers["smooth"],
        buffers["proj_down"],
        act_unsigned=scheme.unsigned,
        lora_x=raw,
    )
    y: torch.Tensor = comfy_kitchen.scaled_mm_svdquant_w4a4(
        codes,
        buffers["qweight"],
        scales,
        buffers["wscales"],
        low,
        buffers["proj_up"],
        None if bias is None else bias.to(raw.dtype),
        scheme.unsigned,
    )
    return y[: raw.shape[0]].view(*x.shape[:-1], -1).to(x.dtype)


def prepare_comfy_awq(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """Row-major codes, and zeros that belong to code 8 instead of code 0.

    Codes are int8 [N, K/2], scales and zeros 16-bit [K/64, N]. Takes tensors as in the table of
    `kernels.linear_w4a16`.
    """
    narrow = find_narrow(dtype)
    scale, zero = tensors["weight_scale"].float(), tensors["weight_zero"].float()
    return {
        "qweight": tensors["weight"].view(torch.int8),
        "wscales": scale.to(narrow).T.contiguous(),
        "wzeros": (zero + 8 * scale).to(narrow).T.contiguous(),
    }


def run_comfy_awq(
    x: torch.Tensor, buffers: Tensors, bias: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """comfy-kitchen's weight-only product: x [..., K] -> [..., N] in x's dtype, `bias` [N] or None."""
    import comfy_kitchen

    rows = x.reshape(-1, x.shape[-1]).to(buffers["wscales"].dtype)
    y: torch.Tensor = comfy_kitchen.gemv_awq_w4a16(
        rows,
        buffers["qweight"],
        buffers["wscales"],
        buffers["wzeros"],
        None if bias is None else bias.to(rows.dtype),
        scheme.group_size,
    )
    return y.view(*x.shape[:-1], -1).to(x.dtype)
