"""modelopt-nvfp4: transformers whose linear layers hold NVFP4 codes, by ModelOpt or in its formats.

Tensors of a quantized linear layer with N outputs and K inputs:

| tensor | dtype | shape | meaning |
| ------ | ----- | ----- | ------- |
| `weight` | U8 | [N, K/2] | two e2m1 codes per byte |
| `weight_scale` | F8_E4M3 | [N, K/16] | one scale per 16 columns |
| `weight_scale_2` | F32 | [] or [1] | scale of the whole weight, amax / (6 * 448) |
| `input_scale` | F32 | [] or [1] | scale of the whole input, amax / (6 * 448), from calibration |
| `pre_quant_scale` | BF16 | [K] | NVFP4_AWQ and NVFP4_SVD: multiplies the input first |
| `svdquant_lora_a`, `_b` | BF16 | [R, K], [N, R] | NVFP4_SVD: low-rank branch beside the codes |
| `weight`, `weight_scale`, `input_scale` | F8_E4M3, F32, F32 | [N, K], [], [] | an FP8 layer |

Layers in full precision, FP8 and NVFP4 lie side by side, so the tensors decide about each layer;
`ignore` lists in configurations go stale. Codes and block scales lie in one of several layouts,
which have the same shapes: ModelOpt's (even column in the low nibble, scales in rows), the raw one
of BFL's and ComfyUI's files (high nibble, tiles: `scale_layouts`), or a mixture; `layouts`
has what declares them. A raw file may leave `input_scale` out (FLUX.2's `-mixed` file does, for
layers whose calibrated scale is far above 1): then the scale is found per call from the input's
largest magnitude, as the runtime that the file was made for does. Taking 1.0 instead saturates
those layers. Anywhere else a missing `input_scale` is an error, unless the configuration says that
inputs are not quantized (W4A16_NVFP4). A header may say so of single layers
(`full_precision_matrix_mult`). Sources: ModelOpt 0.47 exports, BFL's FLUX.2 files, ComfyUI's,
SGLang 0.5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.checkpoints.declaration import parse_block
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.modelopt_nvfp4.layouts import find_layout, require_layout
from quantmatrix.families.producers.comfyui import read_whole_inputs
from quantmatrix.families.producers.modelopt import (
    MIXED,
    NVFP4_ALGORITHMS,
    WEIGHT_ONLY,
    StoredLayer,
    is_nvfp4,
    judge_layer,
    list_tensors,
    read_block,
    read_method,
)
from quantmatrix.families.producers.modelopt_faults import check_export, list_doubts
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_fp8, linear_nvfp4
from quantmatrix.kernels.number_formats import E2M1_MAX, E4M3_MAX, round_e4m3, swap_nibbles
from quantmatrix.kernels.nvfp4_arithmetic import GROUP, encode, find_scale
from quantmatrix.kernels.scale_layouts import TILE_ROWS, tile_scales, untile_scales
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.families.layouts import Layout

ID = "modelopt-nvfp4"
NVFP4 = Scheme("linear.nvfp4", "NVFP4", "e2m1", "group", "group-dynamic", group_size=GROUP)
SCHEMES: Mapping[str, Scheme] = {
    "NVFP4": NVFP4,
    "NVFP4_SVD": replace(NVFP4, name="NVFP4_SVD", rank=32, smoothed=True),
    WEIGHT_ONLY: replace(NVFP4, name=WEIGHT_ONLY, activation="none"),
}
ALGORITHMS = (*NVFP4_ALGORITHMS, MIXED)
FORMATS = {"linear.nvfp4": "nvfp4", "linear.fp8": "float8_e4m3fn"}
"""Names that a raw file's header gives its layers' formats."""


def detect(checkpoint: Checkpoint) -> str | None:
    """What declares NVFP4, or the first layer whose tensors show it."""
    block = read_block(checkpoint)
    method, algorithm = read_method(block)
    if method.startswith("modelopt"):
        return judge_declaration(checkpoint, method, algorithm)
    if method or checkpoint.description is not None:
        return None
    for name, suffixes in checkpoint.layers().items():
        if "weight_scale" in suffixes and is_nvfp4(StoredLayer(checkpoint, name, suffixes)):
            return f"{name} holds U8 codes with one F8_E4M3 scale per {GROUP} columns"
    return None


def judge_declaration(checkpoint: Checkpoint, method: str, algorithm: str) -> str | None:
    """The reason as text when method and algorithm mean this family, or None.

    Raises CheckpointError where the two contradict each other.
    """
    source = checkpoint.quantization_from or checkpoint.reference
    ours = algorithm in ALGORITHMS or (method == "modelopt_fp4" and not algorithm)
    if (method, algorithm) == ("modelopt_fp4", "FP8") or (method == "modelopt_fp8" and ours):
        raise CheckpointError(
            f"{source}: quant_method {method} and quant_algo {algorithm} contradict each other"
        )
    if not ours:
        return None
    return f"quant_method {method}, quant_algo {algorithm or 'not given'} in {source}"


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each layer that holds codes, over all files.

    A layer may be declared and yet stored in full precision: ModelOpt lists convolutions that it
    simulates but cannot write. Raises CheckpointError for what cannot be right, and where nothing
    declares the layout.
    """
    block = read_block(checkpoint)
    whole = read_method(block)[1]
    declared, whole_inputs = read_layer_algorithms(block), read_whole_inputs(block)
    coded = any(h.dtype == "U8" and n.endswith(".weight") for n, h in checkpoint.tensors.items())
    swap, tiled = require_layout(checkpoint) if coded else (False, False)
    layout = replace(NVFP4, swap_nibbles=swap, tiled_scales=tiled)
    found = {}
    for name, suffixes in checkpoint.layers().items():
        layer = StoredLayer(checkpoint, name, suffixes)
        scheme = judge_layer(layer, layout, declared.get(name, whole))
        if scheme is None:
            continue
        if name in whole_inputs:
            scheme = replace(scheme, activation="none")
        if declared.get(name, scheme.name) != scheme.name:
            source = checkpoint.quantization_from or checkpoint.reference
            raise layer.wrong(f"is {scheme.name}, but {source} declares it {declared[name]}")
        found[name] = scheme
    if "NVFP4" in whole and found and all(s.op != NVFP4.op for s in found.values()):
        raise CheckpointError(
            f"{checkpoint.quantization_from}: quant_algo is {whole}, but all {len(found)} quantized "
            "layers are FP8: one of the two is wrong; FP8 exports declare FP8"
        )
    return found


def check(checkpoint: Checkpoint) -> None:
    """Refuse what an export declares of layers and no family takes; CheckpointError."""
    if detect(checkpoint):
        check_export(checkpoint)


def doubts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """Warnings about what an export leaves open: its layout, inputs, keys and values."""
    tiles = doubt_tiles(checkpoint)
    return [*([tiles] if tiles else []), *list_doubts(checkpoint, schemes)]


def doubt_tiles(checkpoint: Checkpoint) -> str | None:
    """What a header leaves open: whether ModelOpt was asked to put its block scales into tiles.

    Neither shapes nor config.json tell (`enable_swizzle_layout`), but only exports with this option
    or one of its neighbours repeat the configuration in the header. Our builders write it, too, and
    with it the nibble order.
    """
    header = parse_block(checkpoint.metadata.get("quantization_config", ""))
    producer = header.get("producer")
    by_modelopt = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    if not by_modelopt or "swap_weight_nibbles" in header or checkpoint.chosen:
        return None
    if find_layout(checkpoint).scales != "rows":
        return None
    return (
        f"{checkpoint.files[0]}: ModelOpt repeats the quantization_config in a header when it "
        "exports for single-file runtimes. Block scales are read as rows; if the export was made "
        "with enable_swizzle_layout they are not, which no header or shape shows, and the result "
        "is noise: export again without it"
    )


def layout(checkpoint: Checkpoint) -> Layout | None:
    """Where NVFP4 codes lie, the user's choice included; None where a file has none."""
    tensors = checkpoint.tensors.items()
    coded = any(h.dtype == "U8" and name.endswith(".weight") for name, h in tensors)
    return find_layout(checkpoint) if coded else None


def read_layer_algorithms(block: Mapping[str, Any]) -> dict[str, str]:
    """quant_algo of each layer that a MIXED_PRECISION block lists."""
    listed = block.get("quantized_layers") or {}
    return {layer: str(entry.get("quant_algo") or "").upper() for layer, entry in listed.items()}


def ignored(name: str) -> str | None:
    """Why a tensor on disk is left aside, or None when it is not."""
    if "_quantizer." in name:
        return "calibration state of ModelOpt, not part of the weights"
    if name.endswith(".comfy_quant"):
        return "a format marker; the tensors themselves say the same"
    if name.endswith(".input_scale"):
        return "a calibrated range: unused where the layer is kept in full precision"
    return None


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    return list_tensors(scheme, out_features, in_features)


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with weight [N, K], in the scheme's layout.

    The weight has any float dtype; gives tensors as in the module's table. Coded inputs need a
    calibration, save in the raw layout, which may do without `input_scale`. Smoothing moves half of
    the inputs' range (in logarithms) into the weight; the low-rank branch takes the largest
    singular directions and the codes hold the rest. Raises UsageError where a calibration is
    missing.
    """
    if scheme.op == "linear.fp8":
        stored = quantize_fp8(weight, calibration)
        return stored if bias is None else {**stored, "bias": bias}
    if calibration is None and scheme.activation != "none" and not scheme.tiled_scales:
        raise UsageError(f"a {scheme.name} layer has coded inputs: give quantize a calibration")
    rest = weight.float()
    extra = {}
    if scheme.smoothed:
        smoothing = find_smoothing(rest, calibration, weight.dtype)
        extra["pre_quant_scale"] = smoothing
        rest = rest / smoothing.float()
    if scheme.rank:
        down, up = split_low_rank(rest, scheme.rank, weight.dtype)
        extra |= {"svdquant_lora_a": down, "svdquant_lora_b": up}
        rest = (rest - up.double() @ down.double()).float()
    codes, scales, whole = encode(rest)
    stored = {
        "weight": swap_nibbles(codes) if scheme.swap_nibbles else codes,
        "weight_scale": tile_scales(scales) if scheme.tiled_scales else scales,
        "weight_scale_2": whole,
        **extra,
    }
    if calibration is not None and scheme.activation != "none":
        amax = calibration.amax.float()
        if scheme.smoothed:
            amax = amax * extra["pre_quant_scale"].float()
        stored["input_scale"] = find_scale(amax, E2M1_MAX * E4M3_MAX)
    return stored if bias is None else {**stored, "bias": bias}


def quantize_fp8(weight: torch.Tensor, calibration: Calibration | None) -> dict[str, torch.Tensor]:
    """An FP8 layer: one scale for the weight, and one for the input when it is calibrated.

    The weight is [N, K] of any float dtype; codes are float8_e4m3fn [N, K], scales float32 [].
    """
    scale = find_scale(weight, E4M3_MAX)
    stored = {"weight": round_e4m3(weight.float() / scale), "weight_scale": scale}
    if calibration is not None:
        stored["input_scale"] = find_scale(calibration.amax, E4M3_MAX)
    return stored


def find_smoothing(
    weight: torch.Tensor, calibration: Calibration | None, dtype: torch.dtype
) -> torch.Tensor:
    """Input multipliers [K]: sqrt(weight range / input range) per column, about 1 on average.

    The weight is float32 [N, K], the multipliers are of `dtype`. Sums here and in `split_low_rank`
    are float64, so that rounding hides the order of additions. Raises UsageError without a
    calibration.
    """
    if calibration is None:
        raise UsageError("smoothing needs a calibration: the range of each input column")
    ranges = weight.abs().amax(dim=0).clamp(min=1e-5), calibration.amax.float().clamp(min=1e-5)
    ratio = (ranges[0] / ranges[1]).sqrt()
    return (ratio / ratio.double().log().mean().exp()).to(dtype)


def split_low_rank(
    weight: torch.Tensor, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [rank, K], b [N, rank]) of the largest singular directions; zeros past the full rank.

    The weight is [N, K] of any float dtype, the factors are of `dtype`.
    """
    left, size, right = torch.linalg.svd(weight.double(), full_matrices=False)
    found = min(rank, len(size))
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    left, right = left * largest.sign().T, right * largest.sign()
    down = torch.zeros(rank, weight.shape[1], dtype=dtype)
    up = torch.zeros(weight.shape[0], rank, dtype=dtype)
    down[:found] = right[:found].to(dtype)
    up[:, :found] = (left[:, :found] * size[:found]).to(dtype)
    return down, up


def cut_rows(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table.
    """
    suffixes = ["weight", "bias", "svdquant_lora_b"]
    cut = {name: t[start:stop] if name in suffixes else t for name, t in tensors.items()}
    if scheme.op == "linear.nvfp4":
        end = stop if not scheme.tiled_scales else -(-stop // TILE_ROWS) * TILE_ROWS
        cut["weight_scale"] = tensors["weight_scale"][start:end]
    return cut


def canonical(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """On-disk tensors of one layer as canonical tensors of `scheme.op`; what fits is not copied.

    Takes tensors as in the module's table.
    """
    scalars = ("weight_scale_2", "input_scale")
    found = {name: tensors[name].float().reshape(()) for name in scalars if name in tensors}
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if scheme.op == "linear.fp8":
        found |= {"weight": weight, "weight_scale": scale.float().reshape(())}
    else:
        rows, columns = weight.shape[0], 2 * weight.shape[1] // GROUP
        found["weight"] = swap_nibbles(weight) if scheme.swap_nibbles else weight
        found["weight_scale"] = (
            untile_scales(scale, rows, columns) if scheme.tiled_scales else scale
        )
    for name, own in (
        ("pre_quant_scale", "pre_quant_scale"),
        ("svdquant_lora_a", "lora_a"),
        ("svdquant_lora_b", "lora_b"),
        ("bias", "bias"),
    ):
        if name in tensors:
            found[own] = tensors[name]
    return found


def dequantize(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight that multiplies the layer's input, float32 [N, K], smoothing and branch merged."""
    decode = linear_fp8.decode if scheme.op == "linear.fp8" else linear_nvfp4.decode
    return decode(canonical(tensors, scheme), scheme)


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on on-disk tensors, activations quantized too.

    x [..., K] gives [..., N] in x's dtype; tensors as in the module's table.
    """
    compute = linear_fp8.reference if scheme.op == "linear.fp8" else linear_nvfp4.reference
    return compute(x, canonical(tensors, scheme), scheme)


def scheme_of(
    layer: str, scheme: Scheme, *, raw: bool, gelu: bool, interleaved: bool, columns: int
) -> Scheme | None:
    """The scheme of a layer: under original names NVFP4 lies as in the model's first release."""
    if raw and scheme.op == "linear.nvfp4":
        return replace(scheme, swap_nibbles=True, tiled_scales=True)
    return scheme


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """A ModelOpt block for config.json, or the format list of a raw file's header."""
    if any(scheme.tiled_scales for scheme in schemes.values()):
        layers = {layer: {"format": FORMATS[s.op]} for layer, s in sorted(schemes.items())}
        listed = {"format_version": "1.0", "layers": layers}
        return Declaration(metadata={"_quantization_metadata": json.dumps(listed)})
    names = sorted({scheme.name for scheme in schemes.values()})
    block: dict[str, Any] = {
        "config_groups": {
            f"group_{i}": describe_group(name, schemes) for i, name in enumerate(names)
        },
        "ignore": sorted(kept),
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_algo": names[0] if len(names) == 1 else MIXED,
        "quant_method": "modelopt",
    }
    if len(names) > 1:
        block["quantized_layers"] = {
            layer: {"quant_algo": scheme.name} for layer, scheme in sorted(schemes.items())
        }
    if any(scheme.swap_nibbles for scheme in schemes.values()):
        block["swap_weight_nibbles"] = True
    return Declaration(config=block)


def describe_group(name: str, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """One entry of `config_groups`: the layers whose scheme has this name."""
    layers = {layer: scheme for layer, scheme in schemes.items() if scheme.name == name}
    scheme = next(iter(layers.values()))
    number: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if scheme.op == "linear.nvfp4":
        number |= {"num_bits": 4, "group_size": scheme.group_size}
    group: dict[str, Any] = {"weights": number}
    if scheme.activation != "none":
        group["input_activations"] = number
    if scheme.rank:
        group |= {"has_zero_point": False, "pre_quant_scale": True, "lora_rank": scheme.rank}
    group["targets"] = ["Linear"] if len(layers) == len(schemes) else sorted(layers)
    return group
