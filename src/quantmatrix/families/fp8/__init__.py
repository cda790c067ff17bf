"""fp8: transformers whose linear layers are stored as e4m3 codes, declared by `quant_method: fp8`.

The declaration stands in config.json (`quantization_config`) or in the safetensors header. Tensors
of a quantized linear layer with N outputs and K inputs:

| variant | `weight` | scale tensor | activations |
| ------- | -------- | ------------ | ----------- |
| per tensor | F8_E4M3 [N, K] | `weight_scale` F32 [] or [1] | dynamic, or static: `input_scale` F32 [] or [1] |
| per channel | F8_E4M3 [N, K] | `weight_scale` F32 [N] or [N, 1] | per token, or static `input_scale` |
| block | F8_E4M3 [N, K] | `weight_scale_inv` F32 [ceil(N/bn), ceil(K/bk)] | dynamic, per token and bk columns |
| online | any float, quantized while loading | made at load | dynamic, per tensor |
| weights only | F8_E4M3 [N, K] | as per tensor, or per channel | not quantized |

Scales per channel and block may have the model's own dtype, too. Real weight = stored value x scale
in every variant; `_inv` is historical. `weight_block_size` declares blocks, `activation_scheme`
static or dynamic inputs, `ignored_layers` (or `modules_to_not_convert`) the layers that were left
alone. Three header forms without `quant_method` are known: `layers` of a float8 format (one of NVFP4
among them makes the file `modelopt-nvfp4`), `quantization: fp8r` (diffusers' script: one scale a
row, dynamic inputs), and the row-wise form (version 1.1) whose
`quant_configs` name the scale recipe. A layer that the first lists with
`full_precision_matrix_mult` has codes for its weight only. Instead of the list, ComfyUI's files may
have an entry in a tensor `<layer>.comfy_quant` beside each layer (`quantmatrix.checkpoints.comfyui`).
Sources: vLLM's and SGLang's fp8 checkpoints, diffusers, ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.producers.comfyui import (
    FP8R,
    Declared,
    is_fp8r,
    read_declaration,
    read_formats,
)
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_fp8
from quantmatrix.kernels.number_formats import E4M3_MAX, expand_blocks, find_block_amax, round_e4m3
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader

ID = "fp8"
TENSOR = Scheme("linear.fp8", "fp8", "e4m3", "tensor", "tensor-dynamic")
CHANNEL = Scheme("linear.fp8", "fp8-channel", "e4m3", "channel", "token-dynamic")
BLOCK = Scheme("linear.fp8", "fp8-block", "e4m3", "block", "group-dynamic", block=(128, 128))
SCHEMES: Mapping[str, Scheme] = {
    "tensor-dynamic": TENSOR,
    "tensor-static": replace(TENSOR, activation="tensor-static"),
    "channel-dynamic": CHANNEL,
    "channel-static": replace(CHANNEL, activation="tensor-static"),
    "block-dynamic": BLOCK,
}
ONLINE = "tensor-dynamic"
SCALES = ("weight_scale", "weight_scale_inv")
FLOATS = ("F32", "BF16", "F16")
"""Dtypes of scales per block or channel: float32, or the model's own."""
BESIDE = ("bias", "comfy_quant")
"""Suffixes that may stand in any layer."""
AGAIN = "Correct the file with what wrote it, or quantize again"
"""Headers that are whole and do not fit together came so from their writer."""
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
    formats = {name for name in declared_formats if "float8" in name}
    if "quant_method" not in block and formats and "nvfp4" not in declared_formats:
        return f"layers of format {', '.join(sorted(formats))} in {checkpoint.quantization_from}"
    return None


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of every layer with e4m3 codes.

    Raises CheckpointError for a declaration that is not known, and where it and the tensors
    contradict each other.
    """
    declared = read_declaration(checkpoint)
    layers = checkpoint.layers()
    found: dict[str, Scheme] = {}
    for layer, suffixes in layers.items():
        header = checkpoint.tensors.get(f"{layer}.weight")
        if header is None or header.dtype != "F8_E4M3":
            check_plain(checkpoint, declared, layer, suffixes)
            continue
        if declared.is_left_alone(layer):
            raise CheckpointError(
                f"{declared.source}: says that {layer} is left alone, but {header.file} stores it "
                "as F8_E4M3: correct the list, or quantize again"
            )
        found[layer] = find_scheme(checkpoint, declared, layer, suffixes)
        if is_fp8r(checkpoint) and found[layer].scale != "channel":
            found[layer] = CHANNEL  # what was declared; check_tensors names the scale that is there
        check_tensors(checkpoint, layer, found[layer], header)
    absent = [layer for layer in declared.formats if declared.is_coded(layer)]
    absent = [layer for layer in absent if layer not in layers]
    if absent:
        raise CheckpointError(
            f"{declared.source}: lists {absent[0]} as {declared.formats[absent[0]]}, but "
            f"{', '.join(checkpoint.files)} have no such layer: expected the names of the tensors"
        )
    check_others(checkpoint, found)
    return found


def check_plain(
    checkpoint: Checkpoint, declared: Declared, layer: str, suffixes: frozenset[str]
) -> None:
    """A layer without e4m3 codes has no scales, and nothing may say that it has codes.

    Raises CheckpointError for one that does.
    """
    header = checkpoint.tensors.get(f"{layer}.weight")
    dtype = header.dtype if header else "missing"
    scaled = sorted(suffixes & {*SCALES, "input_scale"})
    if scaled:
        raise CheckpointError(
            f"{checkpoint.tensors[f'{layer}.{scaled[0]}'].file}: tensor {layer}.{scaled[0]} "
            f"is a scale, but {layer}.weight is {dtype}: expected F8_E4M3. {AGAIN}"
        )
    if declared.is_coded(layer):
        raise CheckpointError(
            f"{declared.source}: lists {layer} as {declared.formats[layer]}, but its "
            f"weight is {dtype}: expected F8_E4M3. {AGAIN}"
        )


def find_scheme(
    checkpoint: Checkpoint, declared: Declared, layer: str, suffixes: frozenset[str]
) -> Scheme:
    """Scheme of one layer, from the declaration and the shape of its scales.

    Raises CheckpointError for a static scale where dynamic activations are declared.
    """
    whole = layer in declared.whole_inputs
    static = declared.static or (not declared.method and "input_scale" in suffixes)
    if declared.block is not None:
        scheme = replace(BLOCK, block=declared.block)
    else:
        rows = checkpoint.tensors[f"{layer}.weight"].shape[:1]
        scale = checkpoint.tensors.get(f"{layer}.weight_scale")
        shapes = [(*rows, 1)] if rows == (1,) else [rows, (*rows, 1)]
        rowwise = layer in declared.rowwise or (scale is not None and scale.shape in shapes)
        kind = "channel" if rowwise else "tensor"
        scheme = SCHEMES[f"{kind}-{'static' if static else 'dynamic'}"]
    if whole:
        return replace(scheme, name=f"{scheme.name}-weights", activation="none")
    if "input_scale" in suffixes and not static:
        name = f"{layer}.input_scale"
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: tensor {name} is a static activation scale, but "
            f"{declared.source} declares dynamic activations: declare activation_scheme static, or "
            "leave the scales out"
        )
    return scheme


def check_tensors(checkpoint: Checkpoint, layer: str, scheme: Scheme, header: TensorHeader) -> None:
    """Every tensor that the scheme needs must be there, in the right dtype and shape.

    Raises CheckpointError for one that is not.
    """
    if len(header.shape) != 2:
        raise CheckpointError(
            f"{header.file}: tensor {header.name} is {list(header.shape)}, not 2-D: expected codes "
            "of a linear layer; leave other layers in full precision"
        )
    for suffix, spec in tensors(scheme, *header.shape).items():
        found = checkpoint.tensors.get(f"{layer}.{suffix}")
        expected = f"{' or '.join(spec.dtypes)} {' or '.join(str(list(s)) for s in spec.shapes)}"
        if found is None:
            raise CheckpointError(
                f"{header.file}: tensor {layer}.{suffix} is missing beside {layer}.weight "
                f"({header.dtype}): expected {expected}; a missing scale is never assumed to be 1. "
                f"{hint_older_name(checkpoint, layer)}{AGAIN}"
            )
        if found.dtype not in spec.dtypes or found.shape not in spec.shapes:
            raise CheckpointError(
                f"{found.file}: tensor {found.name} is {found.dtype} {list(found.shape)}, "
                f"expected {expected}. {AGAIN}"
            )


def hint_older_name(checkpoint: Checkpoint, layer: str) -> str:
    """A hint where a layer's scale has the name that older ComfyUI files give it."""
    if f"{layer}.scale_weight" not in checkpoint.tensors:
        return ""
    return (
        f"{layer}.scale_weight is ComfyUI's older scaled fp8, which is not taken: rename it to "
        "weight_scale, as newer files have it. "
    )


def check_others(checkpoint: Checkpoint, found: Mapping[str, Scheme]) -> None:
    """A tensor of a quantized layer that nothing would use changes its numbers in unknown ways.

    Raises CheckpointError for one.
    """
    for name, header in checkpoint.tensors.items():
        layer, _, suffix = name.rpartition(".")
        above = layer.rpartition(".")[0]
        scheme = found.get(layer)
        known = () if scheme is None else (*tensors(scheme, 1, 1), *BESIDE)
        if scheme is not None and scheme.activation == "none":
            known = (*known, "input_scale")
        if above in found or (scheme is not None and suffix not in known):
            raise CheckpointError(
                f"{header.file}: tensor {name} ({header.dtype} {list(header.shape)}) stands beside "
                f"the codes of {above if above in found else layer}, expected no more than "
                f"{', '.join(known or ('weight', 'bias', *SCALES))}: leaving it out would give "
                "other numbers without an error. Quantize with a scheme that is known"
            )


def doubts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """A warning of layers that nothing leaves alone, and that still are in full precision.

    That their like in other blocks is quantized tells them from layers of which none ever is.
    """
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


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    scalar = TensorSpec(("F32",), ((), (1,)))
    specs = {"weight": TensorSpec(("F8_E4M3",), ((out_features, in_features),))}
    if scheme.scale == "block":
        blocks = (-(-out_features // scheme.block[0]), -(-in_features // scheme.block[1]))
        specs["weight_scale_inv"] = TensorSpec(FLOATS, (blocks,))
    elif scheme.scale == "channel":
        specs["weight_scale"] = TensorSpec(FLOATS, ((out_features,), (out_features, 1)))
    else:
        specs["weight_scale"] = scalar
    if scheme.activation == "tensor-static":
        specs["input_scale"] = scalar
    return specs


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


def cut_rows(
    stored: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table.
    """
    cut = dict(stored)
    suffixes = ["weight", "bias", *(["weight_scale"] if scheme.scale == "channel" else [])]
    for suffix in suffixes:
        if suffix in stored:
            cut[suffix] = stored[suffix][start:stop]
    if scheme.scale == "block":
        height = scheme.block[0]
        cut["weight_scale_inv"] = stored["weight_scale_inv"][start // height : -(-stop // height)]
    return cut


def canonical(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Canonical tensors of linear.fp8; takes tensors as in the module's table."""
    name = "weight_scale_inv" if scheme.scale == "block" else "weight_scale"
    scale = stored[name].float()
    if scheme.scale != "block":
        scale = scale.reshape(-1, 1) if scheme.scale == "channel" else scale.reshape(())
    stored_form = {"weight": stored["weight"], "weight_scale": scale}
    if scheme.activation == "tensor-static":
        stored_form["input_scale"] = stored["input_scale"].float().reshape(())
    if "bias" in stored:
        stored_form["bias"] = stored["bias"]
    return stored_form


def dequantize(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    return linear_fp8.decode(canonical(stored, scheme), scheme)


def reference(x: torch.Tensor, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype.

    `stored` are tensors as in the module's table.
    """
    return linear_fp8.reference(x, canonical(stored, scheme), scheme)


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """`quantization_config` of config.json; the same block goes into a single file's header."""
    scheme = next(iter(schemes.values()))
    static = scheme.activation == "tensor-static"
    config: dict[str, Any] = {
        "activation_scheme": "static" if static else "dynamic",
        "ignored_layers": sorted(kept),
        "quant_method": "fp8",
    }
    if scheme.scale == "block":
        config["weight_block_size"] = list(scheme.block)
    return Declaration(config=config)
