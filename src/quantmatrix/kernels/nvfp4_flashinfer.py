"""linear.nvfp4 through flashinfer's `mm_fp4`: both operands in e2m1 on the FP4 matrix units.

The activation is quantized by `nvfp4_quantize` with scales in 128 x 4 tiles; the three backends
differ in how the weight [N, K/2] and its scales must lie (see `scale_layouts`):

| backend | weight | weight scales | hardware |
| ------- | ------ | ------------- | -------- |
| `cutlass`, `cudnn` | as stored | tiled | sm100, sm103, sm120, sm121 |
| `trtllm` | rows shuffled | rows shuffled, then tiled | sm100, sm103 |

    y = (codes of x) (codes of weight)^T * (input_scale * weight_scale_2) + bias

Scales laid out for another backend give plausible but wrong results and never an error, so the
preparation is tested against a plain evaluation. `mm_fp4` rounds its result to bfloat16. Without a
calibrated `input_scale` it is found per call from the largest magnitude of x.

The quantization guide reports that a CUTLASS path rejects the large-M shapes of Wan2.2 at call
time. `max_rows` states the largest M that the cutlass backend is given, so that the plan chooses
another backend before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from quantmatrix.kernels import Needs, Tensors
from quantmatrix.kernels.nvfp4_arithmetic import find_input_scale
from quantmatrix.kernels.scale_layouts import shuffle_rows, shuffle_scales, tile_scales
from quantmatrix.scheme import Scheme

RULE = "nvfp4-flashinfer-sm100"
KEPT = ("weight_scale_2", "input_scale", "pre_quant_scale", "lora_a", "lora_b")
CUTLASS_ROWS = 65536
REMEDY = "--backend decode runs anywhere, --backend fp8-recode wherever there are fp8 units"


def prepare_tiled(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """Weight as stored, scales in tiles [N padded to 128, K/16 padded to 4].

    Takes tensors as in the table of `kernels.linear_nvfp4`; codes stay uint8, scales float8_e4m3fn.
    """
    return {
        "weight": tensors["weight"].contiguous(),
        "weight_scale": tile_scales(tensors["weight_scale"]),
        **keep_scales(tensors, dtype),
    }


def prepare_shuffled(tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> Tensors:
    """Weight and scales in the row order of the TRT-LLM kernels, scales in tiles.

    Takes tensors as in the table of `kernels.linear_nvfp4`; N is padded to a multiple of 128.
    """
    return {
        "weight": shuffle_rows(tensors["weight"]),
        "weight_scale": shuffle_scales(tensors["weight_scale"]),
        **keep_scales(tensors, dtype),
    }


def keep_scales(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Everything but codes and group scales: scalars in float32, vectors in the compute dtype.

    Takes tensors as in the table of `kernels.linear_nvfp4`.
    """
    kept = {name: tensors[name] for name in KEPT if name in tensors}
    return {name: t.float() if t.ndim == 0 else t.to(dtype) for name, t in kept.items()}


def run_flashinfer(
    x: torch.Tensor,
    buffers: Tensors,
    bias: torch.Tensor | None,
    scheme: Scheme,
    *,
    gemm: str,
) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype through `mm_fp4` with the backend `gemm`.

    `bias` is [N] of any float dtype, `buffers` what the backend's preparation kept.
    """
    import flashinfer

    rows = x.reshape(-1, x.shape[-1])
    if scheme.smoothed:
        rows = rows * buffers["pre_quant_scale"].to(rows.dtype)
    input_scale = find_input_scale(rows, buffers)
    codes, scales = flashinfer.nvfp4_quantize(
        rows.to(torch.bfloat16).contiguous(),
        (1.0 / input_scale).reshape(1),
        sfLayout=flashinfer.SfLayout.layout_128x4,
        do_shuffle=False,
    )
    y: torch.Tensor = flashinfer.mm_fp4(
        codes,
        buffers["weight"].T,
        scales,
        buffers["weight_scale"].T,
        alpha=(input_scale * buffers["weight_scale_2"]).reshape(1),
        out_dtype=torch.bfloat16,
        block_size=16,
        use_8x4_sf_layout=False,
        backend=gemm,
    )
    y = y.to(x.dtype)
    if scheme.rank:
        low = functional.linear(rows, buffers["lora_a"].to(rows.dtype))
        y = y + functional.linear(low, buffers["lora_b"].to(rows.dtype))
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


PREPARE: dict[str, Callable[[Tensors, Scheme, torch.dtype], Tensors]] = {
    "trtllm": prepare_shuffled,
    "cutlass": prepare_tiled,
    "cudnn": prepare_tiled,
}
RUN: dict[str, Callable[[torch.Tensor, Tensors, torch.Tensor | None, Scheme], torch.Tensor]] = {
    name: partial(run_flashinfer, gemm=name) for name in PREPARE
}

NEEDS = {
    "trtllm": Needs(
        rule=RULE,
        vendors=("nvidia",),
        arches=("sm100", "sm103"),
        package="flashinfer",
        activations=("group-dynamic",),
        out_multiple=128,
        in_multiple=64,
        remedy=REMEDY,
    ),
    "cutlass": Needs(
        rule=RULE,
        vendors=("nvidia",),
        arches=("sm100", "sm103", "sm120", "sm121"),
        package="flashinfer",
        activations=("group-dynamic",),
        out_multiple=32,
        in_multiple=32,
        max_rows=CUTLASS_ROWS,
        remedy=REMEDY,
    ),
    "cudnn": Needs(
        rule=RULE,
        vendors=("nvidia",),
        arches=("sm100", "sm103", "sm120", "sm121"),
        package="flashinfer",
        activations=("group-dynamic",),
        out_multiple=32,
        in_multiple=32,
        remedy=REMEDY,
    ),
}
