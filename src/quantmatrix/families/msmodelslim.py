"""msmodelslim: transformers that Ascend's MindStudio-ModelSlim quantized to int8, int4 or MXFP8.

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
| any | `bias`; under `W8A8` a copy of what `quant_bias` holds | F32 [N] |
| any | `mul_scale`: inputs are multiplied by it before they are quantized | [K] |

Before `wan_repack` a smoothed layer is two: `<layer>.linear.weight` and `<layer>.div.mul_scale`.
An int64 `deq_scale` is decided by its stored dtype: the writer's choice does not follow the model.
Other scales of older writers may have the model's own dtype.
Both writers (MindIE and AscendV1) are read; `quantize` writes what AscendV1 writes, with F32
`deq_scale`. Rotations `q_rot` and `k_rot` cancel out in attention scores and are left aside;
anything else beside these tensors (FlatQuant, SVD residuals, quantized attention, MXFP4,
embeddings) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import mx_blocks
from quantmatrix.families.msmodelslim_values import WRAPPERS, decode_deq_scale, plain_suffix
from quantmatrix.families.msmodelslim_values import find_fault as find_fault
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_fp8, linear_int8
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoint import Checkpoint, TensorHeader

ID = "msmodelslim"
DESCRIPTION = "quant_model_description.json"
FLOAT = "FLOAT"
FLOATS = ("F32", "BF16", "F16")
"""Dtypes of scales: float32, or the model's own from older writers."""
SCHEMES: Mapping[str, Scheme] = {
    "W8A8": Scheme("linear.int8", "W8A8", "int8", "channel", "tensor-static"),
    "W8A8_DYNAMIC": Scheme("linear.int8", "W8A8_DYNAMIC", "int8", "channel", "token-dynamic"),
    "W4A4_DYNAMIC": Scheme("linear.int8", "W4A4_DYNAMIC", "int4", "channel", "token-dynamic"),
    "W8A8_MXFP8": Scheme(
        "linear.fp8", "W8A8_MXFP8", "e4m3", "block", "group-power", (1, mx_blocks.BLOCK)
    ),
}
CACHE_SETTINGS = ("fa_quant_type", "kv_cache_type", "kv_quant_type")
"""Keys of a description that say how attention is quantized."""
ROTATING_SETTINGS = ("metadata", "optional")
"""Keys of a description that are empty unless activations are rotated (QuaRot)."""
ROTATION = re.compile(r"\.(to_)?[qk]_rot$")
EMBEDDING = re.compile(
    r"^(patch_embedding|condition_embedder|(text|time|img)_emb(edding)?|time_projection)(\.|$)"
)
REFUSED_SUFFIXES = {
    "left_trans": "FlatQuant",
    "right_trans": "FlatQuant",
    "clip_ratio": "FlatQuant",
    "svd_lowrank_l1": "an SVD residual",
    "svd_lowrank_l2": "an SVD residual",
    "weight_dual_scale": "dual-scale MXFP4",
}
REFUSED_SCHEMES = {
    "MXFP4": "MXFP4",
    "FLATQUANT": "FlatQuant",
    "SVD": "an SVD residual",
    "MIX": "a prefill/decode mix",
}
EPSILON = torch.finfo(torch.float32).eps
"""The smallest scale that the writer stores."""


def detect(checkpoint: Checkpoint) -> str | None:
    """The description file's name and schemes, or None when it quantizes nothing.

    A description without layers is ours, too: to load what stands beside it in full precision would
    hide that it is damaged, or of another kind.
    """
    if checkpoint.description is None:
        return None
    name = PurePath(checkpoint.description_file or DESCRIPTION).name
    words = {word for _, word in _layer_words(checkpoint.description)}
    if quantized := sorted(words - {FLOAT}):
        return f"{name} describes layers as {', '.join(quantized)}"
    return None if words else f"{name} describes no layer at all"


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each quantized layer; refuses by name whatever would be computed wrongly.

    A smoothed layer of a folder that was not repacked is named without its `linear` level.
    """
    described = checkpoint.description or {}
    _refuse_settings(described, checkpoint)
    found: dict[str, Scheme] = {}
    for name, word in _layer_words(described):
        if word == FLOAT:
            continue
        scheme = _find_scheme(name, word, checkpoint)
        if EMBEDDING.match(name):
            raise CheckpointError(
                f"{checkpoint.description_file}: {name} is {word}, but quantized embeddings are "
                "not supported: quantize again without them (they must be FLOAT)"
            )
        found[_find_layer(name, checkpoint)] = scheme
    _refuse_strangers(found, checkpoint)
    _check_layers(found, checkpoint)
    return found


def check_known(checkpoint: Checkpoint) -> None:
    """Refuse what is wrong with layers of the schemes served here, for tools that copy all schemes."""
    words = _layer_words(checkpoint.description or {})
    _check_layers(
        {
            _find_layer(name, checkpoint): _find_scheme(name, word, checkpoint)
            for name, word in words
            if word in SCHEMES
        },
        checkpoint,
    )


def ignored(name: str) -> str | None:
    """Why a tensor on disk is left aside, or None when it is not."""
    if ROTATION.search(name):
        return "rotates queries and keys alike, which attention scores do not see"
    return None


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    rows, column = (out_features,), (out_features, 1)
    static = scheme.activation == "tensor-static"
    if scheme.weight == "e4m3":
        blocks = -(-in_features // mx_blocks.BLOCK)
        return {
            "weight": TensorSpec(("F8_E4M3",), ((out_features, in_features),)),
            "weight_scale": TensorSpec(("U8",), ((out_features, blocks),)),
        }
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


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with weight [N, K]; static activations need a calibration.

    Scales are symmetric per row for weights, and the whole calibrated range (zero included)
    spreads over 255 steps for static activations. Raises UsageError without a calibration.
    """
    if scheme.weight == "e4m3":
        return _quantize_blocks(weight) | ({} if bias is None else {"bias": bias.float()})
    exact = weight.float()
    largest = linear_int8.LARGEST[scheme.weight]
    scale = (exact.abs().amax(dim=1, keepdim=True) / largest).clamp(min=EPSILON)
    codes = (exact / scale).round().clamp(-largest - 1, largest).to(torch.int8)
    stored = {"weight": codes}
    if scheme.activation == "tensor-static":
        stored |= _quantize_input(codes, scale, bias, calibration)
    else:
        stored |= {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    return stored if bias is None else stored | {"bias": bias.float()}


def canonical(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """On-disk tensors of one layer as canonical tensors of linear.int8 (MXFP8: linear.fp8)."""
    stored = {plain_suffix(suffix): tensor for suffix, tensor in tensors.items()}
    scales = ("deq_scale", "input_scale", "input_offset", "quant_bias")
    needed = scales if scheme.activation == "tensor-static" else ("weight_scale",)
    if missing := [name for name in needed if name not in stored]:
        raise CheckpointError(f"a {scheme.name} layer has no {missing[0]}; it has {list(stored)}")
    if scheme.weight == "e4m3":
        return stored | {"weight_scale": mx_blocks.decode_exponents(stored["weight_scale"])}
    offset = stored.get("weight_offset")
    if offset is not None and bool(offset.any()):
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
    if scheme.weight == "e4m3":
        return linear_fp8.decode(canonical(tensors, scheme), scheme)
    return linear_int8.decode(canonical(tensors, scheme), scheme)


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on on-disk tensors, activations quantized too."""
    if scheme.weight == "e4m3":
        return linear_fp8.reference(x, canonical(tensors, scheme), scheme)
    return linear_int8.reference(x, canonical(tensors, scheme), scheme)


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


def _layer_words(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(layer as named in the description, scheme word) of every `<layer>.weight` entry."""
    for key, word in described.items():
        if key.endswith(".weight"):
            yield key.removesuffix(".weight"), str(word)


def _find_scheme(name: str, word: str, checkpoint: Checkpoint) -> Scheme:
    """The scheme of one layer, its smoothing recognised from the tensors beside it."""
    if word not in SCHEMES:
        why = next((text for part, text in REFUSED_SCHEMES.items() if part in word), "unknown")
        raise CheckpointError(
            f"{checkpoint.description_file}: {name}.weight is {word} ({why}), which is not "
            f"supported; supported are FLOAT, {', '.join(SCHEMES)}"
        )
    if f"{name}.weight" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.description_file}: {name}.weight is {word}, but no such tensor is in "
            f"{', '.join(checkpoint.files)}: is the description of another folder?"
        )
    smoothings = _name_smoothings(_find_layer(name, checkpoint))
    smoothed = any(smoothing in checkpoint.tensors for smoothing in smoothings)
    return replace(SCHEMES[word], smoothed=smoothed)


def _find_layer(name: str, checkpoint: Checkpoint) -> str:
    """The layer of a description's name: without the `linear` level, where smoothing made it.

    FLUX.1 has layers that are called `linear` themselves.
    """
    outer = name.removesuffix(".linear")
    known = (checkpoint.tensors, checkpoint.description or {})
    smoothed = any(smoothing in names for smoothing in _name_smoothings(outer) for names in known)
    return outer if smoothed else name


def _name_smoothings(layer: str) -> tuple[str, str]:
    """Names that a layer's smoothing may have: after `wan_repack`, and before."""
    return f"{layer}.mul_scale", f"{layer}.div.mul_scale"


def _refuse_settings(described: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Quantized attention and rotated activations are computations that nobody here does."""
    for key, value in described.items():
        attention = key.endswith(".quant_type") or key in CACHE_SETTINGS
        if attention and value and value != FLOAT:
            raise CheckpointError(
                f"{checkpoint.description_file}: {key} is {value}: quantized attention is not "
                "supported, and its rotations would not cancel out; quantize again without "
                "fa3_quant"
            )
    for key in ROTATING_SETTINGS:
        if value := described.get(key):
            held = ", ".join(map(str, value)) if isinstance(value, (dict, list)) else value
            raise CheckpointError(
                f"{checkpoint.description_file}: {key} holds {held}: rotated "
                "activations (QuaRot) are not supported; quantize again without them"
            )


def _refuse_strangers(found: Mapping[str, Scheme], checkpoint: Checkpoint) -> None:
    """Every tensor must be described, and be one that the arithmetic knows."""
    described = checkpoint.description or {}
    for name, header in checkpoint.tensors.items():
        layer, suffix = _split(name, found)
        what = REFUSED_SUFFIXES.get(name.rpartition(".")[2])
        if layer is None and suffix == "mul_scale":
            what = "smoothing of a FLOAT layer"
        known = (*tensors(found[layer], 1, 1), "bias") if layer is not None else (suffix,)
        if what is None and suffix not in known:
            what = "smoothing of MXFP8" if suffix == "mul_scale" else "an unknown attachment"
        if what is not None:
            raise CheckpointError(
                f"{header.file}: tensor {name} belongs to {what}, which is not supported: quantize "
                "again without it, per channel, as one of " + ", ".join(SCHEMES)
            )
        if header.dtype in ("I8", "F8_E4M3") and described.get(name, FLOAT) == FLOAT:
            raise CheckpointError(
                f"{header.file}: tensor {name} holds {header.dtype} codes, but "
                f"{checkpoint.description_file} calls it {described.get(name, 'nothing')}: "
                "expected the name of its scheme there"
            )


def _check_layers(found: Mapping[str, Scheme], checkpoint: Checkpoint) -> None:
    """Each layer's tensors must be there once, in the form and under the word of its scheme."""
    layers: dict[str, dict[str, TensorHeader]] = {layer: {} for layer in found}
    for name, header in checkpoint.tensors.items():
        layer, suffix = _split(name, found)
        if layer is None:
            continue
        if twin := layers[layer].get(suffix):
            raise CheckpointError(
                f"{header.file}: tensors {twin.name} and {name} are both the {suffix} of "
                f"{layer}: expected one of them; write the checkpoint again"
            )
        layers[layer][suffix] = header
    for layer, own in layers.items():
        _check_layer(layer, found[layer], own, checkpoint)
    _check_description(found, checkpoint)


def _check_layer(
    layer: str, scheme: Scheme, own: Mapping[str, TensorHeader], checkpoint: Checkpoint
) -> None:
    """A layer must have every tensor of its scheme, in the dtype and shape of the format."""
    weight = own["weight"]
    if len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.name} has shape {list(weight.shape)}, but "
            f"{checkpoint.description_file} calls it {scheme.name}: only linear layers, whose "
            "weights have two dimensions, are quantized; it should be FLOAT"
        )
    if weight.name == f"{layer}.linear.weight" and not scheme.smoothed:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.name} lies in a level that only smoothing makes, but "
            f"{layer}.div.mul_scale is missing: without it the layer would give other numbers; "
            "download the weights again"
        )
    out, into = weight.shape
    bias = TensorSpec(FLOATS, ((out,),), optional=True)
    for suffix, spec in {**tensors(scheme, out, into), "bias": bias}.items():
        header = own.get(suffix)
        if header is None and spec.optional:
            continue
        if header is not None and header.dtype in spec.dtypes and header.shape in spec.shapes:
            continue
        if header is None:
            problem = f"{weight.file}: tensor {layer}.{suffix} is missing"
        else:
            problem = f"{header.file}: tensor {header.name} is {header.dtype} {list(header.shape)}"
            grouped = suffix == "weight_scale" and scheme.scale == "channel"
            if grouped and header.shape[:1] == (out,) and header.shape[1:] > (1,):
                problem += " per group of columns"
        raise CheckpointError(
            f"{problem}: expected {' or '.join(spec.dtypes)} "
            f"{' or '.join(str(list(shape)) for shape in spec.shapes)} in a layer that "
            f"{checkpoint.description_file} calls {scheme.name}, with a weight of "
            f"{list(weight.shape)}; the two are not of one checkpoint, or it is damaged: download "
            "both again, or quantize again per channel"
        )


def _check_description(found: Mapping[str, Scheme], checkpoint: Checkpoint) -> None:
    """What is described of a quantized layer must be there, under the layer's own scheme.

    Entries for what a layer may do without are harmless: its bias, and the weight scales that only
    older writers store beside `deq_scale`.
    """
    for name, word in (checkpoint.description or {}).items():
        layer, suffix = _split(name, found)
        if layer is None:
            continue
        static = found[layer].activation == "tensor-static"
        spare = ("bias", "weight_scale", "weight_offset") if static else ("bias",)
        if name not in checkpoint.tensors and suffix not in spare:
            raise CheckpointError(
                f"{checkpoint.description_file}: describes {name} ({word}) of the quantized layer "
                f"{layer}, but no such tensor is in {', '.join(checkpoint.files)}: without it the "
                "layer would give other numbers; download the weights again"
            )
        if word not in (FLOAT, found[layer].name):
            raise CheckpointError(
                f"{checkpoint.description_file}: {name} is {word}, but the weight of {layer} is "
                f"{found[layer].name}: expected one scheme per layer; the description is of "
                "another checkpoint, or was edited"
            )


def _split(name: str, found: Mapping[str, Scheme]) -> tuple[str | None, str]:
    """(quantized layer, suffix without wrapper) of a tensor name; (None, leaf) for others."""
    layer, _, leaf = name.rpartition(".")
    if layer in found:
        return layer, leaf
    outer, _, wrapper = layer.rpartition(".")
    if outer in found and f"{wrapper}." in WRAPPERS:
        return outer, leaf
    return None, leaf


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


def _quantize_blocks(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """MXFP8 codes and exponents."""
    if weight.shape[1] % mx_blocks.BLOCK:
        raise UsageError(
            f"W8A8_MXFP8 takes layers whose inputs are a multiple of {mx_blocks.BLOCK}, not "
            f"{weight.shape[1]}: keep the layer in full precision, or use W8A8_DYNAMIC"
        )
    codes, exponents = mx_blocks.encode_blocks(weight)
    return {"weight": codes, "weight_scale": exponents}


def _unfold_bias(found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The bias float32 [N] that `quant_bias` holds, for arithmetic on plain activations.

    Zeros when the layer has none: `quant_bias` does not tell the two apart.
    """
    correction = found["input_offset"].double() * found["weight"].sum(dim=1)
    folded = found["quant_bias"] + correction
    folded[folded.abs() <= correction.abs() * 2**-22] = 0  # what the writer's float32 loses
    return (folded * found["deq_scale"]).float()
