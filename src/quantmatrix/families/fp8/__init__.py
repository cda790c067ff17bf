"""fp8: transformers whose linear layers are stored as codes of eight-bit floats.

Tensors of a quantized linear layer with N outputs and K inputs:

| variant | `weight` | scale tensor | activations |
| ------- | -------- | ------------ | ----------- |
| per tensor | F8_E4M3 [N, K] | `weight_scale`, one number | dynamic, or static: `input_scale`, too |
| per channel | F8_E4M3 [N, K] | `weight_scale` [N] or [N, 1] | per token, or static `input_scale` |
| block | F8_E4M3 [N, K] | `weight_scale_inv` [ceil(N/bn), ceil(K/bk)] | dynamic, per token and bk columns |
| online | any float, quantized while loading | made at load | dynamic, per tensor |
| weights only | F8_E4M3 [N, K] | as per tensor, channel or block | not quantized |
| plain cast | F8_E4M3 [N, K] | none: the code is the number | not quantized |
| E5M2 | F8_E5M2 [N, K] | any of these | not quantized |
| MXFP8 | F8_E4M3 [N, K] | `weight_scale` F8_E8M0 or U8 [N, K/32], in tiles | a power of two per token and 32 columns |

Scales are F32, BF16 or F16; one number is [], [1] or [1, 1], and blocks' scales, which `weight_scale`
may be called, too, may lack sides of 1, as `squeeze` leaves them. Real weight = stored value x scale
in every variant; `_inv` is historical. ComfyUI's MXFP8 pads its scales to tiles of 128 x 4; the power of
two of inputs is that of the OCP formats here, of which ComfyUI takes the next one where codes would saturate.

| declared by | means |
| ----------- | ----- |
| `quant_method: fp8` | `weight_block_size`: blocks; `activation_scheme`: static or dynamic inputs; |
|                     | `ignored_layers`, `modules_to_not_convert`: layers that were left alone |
| header's `layers`, or `<layer>.comfy_quant` | ComfyUI: each with a float8 format; inputs with a scale are |
|                     | static, and left alone with `full_precision_matrix_mult` |
| `layers` with `quant_configs` (1.1) | row-wise: their `scale_recipe` |
| `scaled_fp8`, `<layer>.scale_weight` | ComfyUI's first form (`quantmatrix.checkpoints.scaled_fp8`) |
| header's `quantization: fp8r` | diffusers' conversion script: a scale a row, dynamic inputs |
| `compressed-tensors`, `float-quantized` | groups of layers (`producers.compressed_tensors`) |
| nothing, and no tensor is a scale | a plain cast; biases, norms and other tensors may be cast, too |

A list with a layer of NVFP4 makes the file `modelopt-nvfp4`, one with INT8 `comfyui-int8`.
Sources: vLLM's and SGLang's fp8 checkpoints, diffusers, ComfyUI, compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.fp8.casts import (
    CASTS,
    describe_cast,
    find_saturated,
    is_plain_cast,
    list_coded,
)
from quantmatrix.families.fp8.checks import check_others, check_plain, check_tensors
from quantmatrix.families.fp8.layers import (
    BLOCK,
    CAST,
    CHANNEL,
    CODES,
    STATIC,
    TENSOR,
    canonical,
    cut_rows,
    is_cast,
    tensors,
)
from quantmatrix.families.fp8.reading import find_scheme
from quantmatrix.families.producers import compressed_tensors
from quantmatrix.families.producers.comfyui import (
    FP8R,
    is_fp8r,
    names_codes,
    read_declaration,
    read_formats,
)
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_fp8
from quantmatrix.kernels.number_formats import E4M3_MAX, expand_blocks, find_block_amax, round_e4m3
from quantmatrix.scheme import Scheme

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

__all__ = (
    "ID",
    "ONLINE",
    "SCHEMES",
    "canonical",
    "cut_rows",
    "declare",
    "dequantize",
    "detect",
    "doubts",
    "find_fault",
    "plain_codes",
    "quantize",
    "reference",
    "schemes",
    "tensors",
)

ID = "fp8"
SCHEMES: Mapping[str, Scheme] = {
    "tensor-dynamic": TENSOR,
    "tensor-static": STATIC["tensor"],
    "channel-dynamic": CHANNEL,
    "channel-static": STATIC["channel"],
    "block-dynamic": BLOCK,
    "cast": CAST,
}
ONLINE = "tensor-dynamic"
NUMBERED = re.compile(r"\.\d+\.")
"""A block's number in a layer's name."""


def detect(checkpoint: Checkpoint) -> str | None:
    """The reason why a checkpoint is of this family, or None."""
    block = checkpoint.quantization or {}
    if block.get("quant_method") == "fp8":
        return f"quant_method fp8 in {checkpoint.quantization_from}"
    if is_fp8r(checkpoint):
        return f"quantization {FP8R} in the header of {checkpoint.files[0]}"
    declared_formats = set(read_formats(block).values())
    formats = {name for name in declared_formats if names_codes(name)}
    others = {"nvfp4", "int8_tensorwise"} & declared_formats
    if "quant_method" not in block and formats and not others:
        return f"layers of format {', '.join(sorted(formats))} in {checkpoint.quantization_from}"
    if compressed_tensors.is_float_quantized(block):
        method = f"{compressed_tensors.METHOD}, format {compressed_tensors.FORMAT}"
        return f"quant_method {method} in {checkpoint.quantization_from}"
    return describe_cast(checkpoint) if is_plain_cast(checkpoint) else None


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of every layer with codes.

    Raises CheckpointError for a declaration that is not known, and where it and the tensors
    contradict each other.
    """
    if is_plain_cast(checkpoint):
        coded = {layer: checkpoint.tensors[f"{layer}.weight"] for layer in list_coded(checkpoint)}
        return {layer: CASTS[header.dtype] for layer, header in coded.items()}
    declared = read_declaration(checkpoint)
    layers = checkpoint.layers()
    found: dict[str, Scheme] = {}
    for layer, suffixes in layers.items():
        header = checkpoint.tensors.get(f"{layer}.weight")
        if header is None or header.dtype not in CODES:
            check_plain(checkpoint, declared, layer, suffixes)
            continue
        if declared.is_left_alone(layer):
            raise CheckpointError(
                f"{declared.source}: says that {layer} is left alone, but {header.file} stores it "
                f"as {header.dtype}: correct the list, or quantize again"
            )
        found[layer] = find_scheme(checkpoint, declared, layer, suffixes)
        if is_fp8r(checkpoint) and found[layer].scale != "channel":
            found[layer] = CHANNEL  # what was declared; check_tensors names the scale that is there
        check_tensors(checkpoint, layer, found[layer], suffixes)
    absent = [layer for layer in declared.formats if declared.is_coded(layer)]
    absent = [layer for layer in absent if layer not in layers]
    if absent:
        raise CheckpointError(
            f"{declared.source}: lists {absent[0]} as {declared.formats[absent[0]]}, but "
            f"{', '.join(checkpoint.files)} have no such layer: expected the names of the tensors"
        )
    check_others(checkpoint, found)
    return found


def doubts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """Warnings: of a plain cast, and of layers in full precision that nothing leaves alone.

    That their like in other blocks is quantized tells these from layers of which none ever is.
    """
    if any(map(is_cast, schemes.values())):
        return [f"{checkpoint.reference} is read as {describe_cast(checkpoint)}"]
    declared = read_declaration(checkpoint)
    kinds = {NUMBERED.sub(".N.", layer) for layer in schemes}
    forgotten = [
        header
        for name, header in checkpoint.tensors.items()
        if (layer := name.removesuffix(".weight")) != name
        and layer not in schemes
        and NUMBERED.sub(".N.", layer) in kinds
        and not declared.is_left_alone(layer)
    ]
    if not forgotten:
        return []
    first = forgotten[0]
    return [
        f"{first.file}: {first.name} is {first.dtype}, while its like in other blocks is quantized "
        f"and {declared.source} does not leave it alone; {len(forgotten)} such layers are computed "
        "in full precision"
    ]


def find_fault(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds) of exponents that mean NaN, and of a cast that needs a scale, or None.

    Takes tensors as in the module's table.
    """
    if scheme.tiled_scales and bool((tensors["weight_scale"].view(torch.uint8) == 0xFF).any()):
        return "weight_scale", "holds exponents of 255, which mean NaN: expected 0 to 254"
    return find_saturated(tensors, scheme)


def plain_codes(schemes: Iterable[Scheme]) -> tuple[str, ...]:
    """Dtypes whose codes are numbers outside the layers: a plain cast may hold any tensor so."""
    return tuple(CODES) if any(map(is_cast, schemes)) else ()


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with this weight [N, K]; scales are amax / 448.

    The weight has any float dtype, the scales are float32; gives tensors as in the module's table.
    Raises UsageError for static activations without a calibration.
    """
    exact = weight.float()
    if is_cast(scheme):
        cast = {"weight": round_e4m3(exact)}
        return cast if bias is None else {**cast, "bias": bias}
    if scheme.scale == "block":
        amax = find_block_amax(exact, scheme.block)
    elif scheme.scale == "channel":
        amax = exact.abs().amax(dim=1)
    else:
        amax = exact.abs().amax()
    scale = torch.where(amax > 0, amax, 1.0) / E4M3_MAX
    if scheme.scale == "block":
        spread = expand_blocks(scale, scheme.block, (exact.shape[0], exact.shape[1]))
    else:
        spread = scale.unsqueeze(-1) if scale.ndim else scale
    suffix = "weight_scale_inv" if scheme.scale == "block" else "weight_scale"
    stored_form = {"weight": round_e4m3(exact / spread), suffix: scale}
    if scheme.activation == "tensor-static":
        if calibration is None:
            raise UsageError("static activation scales need a calibration")
        stored_form["input_scale"] = calibration.amax.float().amax().clamp_min(1e-12) / E4M3_MAX
    return stored_form if bias is None else {**stored_form, "bias": bias}


def dequantize(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    return linear_fp8.decode(canonical(stored, scheme), scheme)


def reference(x: torch.Tensor, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype.

    `stored` are tensors as in the module's table.
    """
    return linear_fp8.reference(x, canonical(stored, scheme), scheme)


def declare(
    schemes: Mapping[str, Scheme],
    kept: Sequence[str],
    tensors: Sequence[str] = (),
) -> Declaration:
    """`quantization_config` of config.json; the same block goes into a single file's header.

    A plain cast declares nothing.
    """
    scheme = next(iter(schemes.values()))
    if is_cast(scheme):
        return Declaration()
    static = scheme.activation == "tensor-static"
    config: dict[str, Any] = {
        "activation_scheme": "static" if static else "dynamic",
        "ignored_layers": sorted(kept),
        "quant_method": "fp8",
    }
    if scheme.scale == "block":
        config["weight_block_size"] = list(scheme.block)
    return Declaration(config=config)
