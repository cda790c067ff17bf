"""What `quant_model_description.json` says of each layer, held against the tensors beside it.

The file names a scheme per tensor; a layer that is described as quantized must have the tensors of
its scheme, each once, and every tensor must be described. Whatever is a computation that nobody
here does (rotations, quantized attention, low-rank residuals) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import CheckpointError
from quantmatrix.families.msmodelslim.layers import FLOATS, SCHEMES, WRAPPERS, tensors
from quantmatrix.quoting import quote
from quantmatrix.scheme import Scheme, TensorSpec, measure_features

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader

DESCRIPTION = "quant_model_description.json"
FLOAT = "FLOAT"
CACHE_SETTINGS = ("fa_quant_type", "kv_cache_type", "kv_quant_type")
"""Keys of a description that say how attention is quantized."""
ROTATING_SETTINGS = ("metadata", "optional")
"""Keys of a description that are empty unless activations are rotated (QuaRot)."""
EMBEDDING = re.compile(
    r"^(patch_embedding|condition_embedder|(text|time|img)_emb(edding)?|time_projection)(\.|$)"
)
REFUSED_SUFFIXES = {
    "left_trans": "FlatQuant",
    "right_trans": "FlatQuant",
    "clip_ratio": "FlatQuant",
    "svd_lowrank_l1": "an SVD residual",
    "svd_lowrank_l2": "an SVD residual",
    "weight_dual_scale": "dual-scale MXFP4 (W4A4_MXFP4_DUALSCALE)",
}
REFUSED_SCHEMES = {
    "FLATQUANT": "FlatQuant",
    "SVD": "an SVD residual",
    "MXFP": "another MX format",
    "MIX": "a prefill/decode mix",
}


def detect(checkpoint: Checkpoint) -> str | None:
    """The description file's name and schemes, or None when it quantizes nothing.

    A description without layers is ours, too: to load what stands beside it in full precision would
    hide that it is damaged, or of another kind.
    """
    if checkpoint.description is None:
        return None
    name = PurePath(checkpoint.description_file or DESCRIPTION).name
    quant_types = {quant_type for _, quant_type in list_layer_types(checkpoint.description)}
    if quantized := sorted(quant_types - {FLOAT}):
        return f"{name} describes layers as {', '.join(quantized)}"
    return None if quant_types else f"{name} describes no layer at all"


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each quantized layer; refuses by name whatever would be computed wrongly.

    A smoothed layer of a folder that was not repacked is named without its `linear` level. Raises
    CheckpointError for what is refused, and where description and tensors disagree.
    """
    described = checkpoint.description or {}
    refuse_settings(described, checkpoint)
    found: dict[str, Scheme] = {}
    for name, quant_type in list_layer_types(described):
        if quant_type == FLOAT:
            continue
        scheme = find_scheme(name, quant_type, checkpoint)
        if EMBEDDING.match(name):
            raise CheckpointError(
                f"{checkpoint.description_file}: {name} is {quote(quant_type)}, but quantized embeddings are "
                "not supported: quantize again without them (they must be FLOAT)"
            )
        found[find_layer(name, checkpoint)] = scheme
    refuse_unknown(found, checkpoint)
    check_layers(found, checkpoint)
    return found


def check_known(checkpoint: Checkpoint) -> None:
    """Refuse what is wrong with layers of the schemes served here, for tools that copy all schemes."""
    quant_types = list_layer_types(checkpoint.description or {})
    check_layers(
        {
            find_layer(name, checkpoint): find_scheme(name, quant_type, checkpoint)
            for name, quant_type in quant_types
            if quant_type in SCHEMES
        },
        checkpoint,
    )


def list_layer_types(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(layer as named in the description, quant type) of every `<layer>.weight` entry."""
    for key, quant_type in described.items():
        if key.endswith(".weight"):
            yield key.removesuffix(".weight"), str(quant_type)


def find_scheme(name: str, quant_type: str, checkpoint: Checkpoint) -> Scheme:
    """The scheme of one layer, its smoothing recognised from the tensors beside it.

    Raises CheckpointError for a scheme that is not supported, and for a layer that is not there.
    """
    if quant_type not in SCHEMES:
        why = next(
            (text for part, text in REFUSED_SCHEMES.items() if part in quant_type), "unknown"
        )
        raise CheckpointError(
            f"{checkpoint.description_file}: {name}.weight is {quote(quant_type)} ({why}), which is not "
            f"supported; supported are FLOAT, {', '.join(SCHEMES)}"
        )
    if f"{name}.weight" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.description_file}: {name}.weight is {quote(quant_type)}, but no such tensor is in "
            f"{', '.join(checkpoint.files)}: is the description of another folder?"
        )
    smoothings = name_smoothings(find_layer(name, checkpoint))
    smoothed = any(smoothing in checkpoint.tensors for smoothing in smoothings)
    return replace(SCHEMES[quant_type], smoothed=smoothed)


def find_layer(name: str, checkpoint: Checkpoint) -> str:
    """The layer of a description's name: without the `linear` level, where smoothing made it.

    FLUX.1 has layers that are called `linear` themselves.
    """
    outer = name.removesuffix(".linear")
    known = (checkpoint.tensors, checkpoint.description or {})
    smoothed = any(smoothing in names for smoothing in name_smoothings(outer) for names in known)
    return outer if smoothed else name


def name_smoothings(layer: str) -> tuple[str, str]:
    """Names that a layer's smoothing may have: after `wan_repack`, and before."""
    return f"{layer}.mul_scale", f"{layer}.div.mul_scale"


def refuse_settings(described: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Quantized attention and rotated activations are computations that nobody here does.

    Raises CheckpointError where the description holds one.
    """
    for key, value in described.items():
        attention = key.endswith(".quant_type") or key in CACHE_SETTINGS
        if attention and value and value != FLOAT:
            raise CheckpointError(
                f"{checkpoint.description_file}: {key} is {quote(value)}: quantized attention is not "
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


def refuse_unknown(found: Mapping[str, Scheme], checkpoint: Checkpoint) -> None:
    """Every tensor must be described, and be one that the arithmetic knows.

    Raises CheckpointError for one that is not.
    """
    described = checkpoint.description or {}
    for name, header in checkpoint.tensors.items():
        layer, suffix = split_name(name, found)
        what = REFUSED_SUFFIXES.get(name.rpartition(".")[2])
        if layer is None and suffix == "mul_scale":
            what = "smoothing of a FLOAT layer"
        known = (*tensors(found[layer], 1, 1), "bias") if layer is not None else (suffix,)
        if layer is not None and suffix in known:
            what = None
        if what is None and suffix not in known:
            what = "smoothing of MXFP8" if suffix == "mul_scale" else "an unknown attachment"
        if what is not None:
            raise CheckpointError(
                f"{header.file}: tensor {name} belongs to {what}, which is not supported: quantize "
                "again without it, per channel, as one of " + ", ".join(SCHEMES)
            )
        if header.dtype in ("I8", "U8", "F8_E4M3") and described.get(name, FLOAT) == FLOAT:
            raise CheckpointError(
                f"{header.file}: tensor {name} holds {header.dtype} codes, but "
                f"{checkpoint.description_file} calls it {described.get(name, 'nothing')}: "
                "expected the name of its scheme there"
            )


def check_layers(found: Mapping[str, Scheme], checkpoint: Checkpoint) -> None:
    """Each layer's tensors must be there once, in the form and under the name of its scheme.

    Raises CheckpointError for a layer whose tensors are not.
    """
    layers: dict[str, dict[str, TensorHeader]] = {layer: {} for layer in found}
    for name, header in checkpoint.tensors.items():
        layer, suffix = split_name(name, found)
        if layer is None:
            continue
        if twin := layers[layer].get(suffix):
            raise CheckpointError(
                f"{header.file}: tensors {twin.name} and {name} are both the {suffix} of "
                f"{layer}: expected one of them; write the checkpoint again"
            )
        layers[layer][suffix] = header
    for layer, own in layers.items():
        check_layer(layer, found[layer], own, checkpoint)
    check_description(found, checkpoint)


def check_layer(
    layer: str, scheme: Scheme, own: Mapping[str, TensorHeader], checkpoint: Checkpoint
) -> None:
    """A layer must have every tensor of its scheme, in the dtype and shape of the format.

    Raises CheckpointError where it does not.
    """
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
            "quantize again, or name a folder that was written completely"
        )
    out, into = measure_features(scheme, weight.shape)
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


def check_description(found: Mapping[str, Scheme], checkpoint: Checkpoint) -> None:
    """What is described of a quantized layer must be there, under the layer's own scheme.

    Entries for what a layer may do without are harmless: its bias, and the weight scales that only
    older writers store beside `deq_scale`. Raises CheckpointError for any other.
    """
    for name, quant_type in (checkpoint.description or {}).items():
        layer, suffix = split_name(name, found)
        if layer is None:
            continue
        static = found[layer].activation == "tensor-static"
        spare = ("bias", "weight_scale", "weight_offset") if static else ("bias",)
        if name not in checkpoint.tensors and suffix not in spare:
            raise CheckpointError(
                f"{checkpoint.description_file}: describes {name} ({quote(quant_type)}) of the quantized layer "
                f"{layer}, but no such tensor is in {', '.join(checkpoint.files)}: without it the "
                "layer would give other numbers; download the weights again"
            )
        if quant_type not in (FLOAT, found[layer].name):
            raise CheckpointError(
                f"{checkpoint.description_file}: {name} is {quote(quant_type)}, but the weight of {layer} is "
                f"{found[layer].name}: expected one scheme per layer; the description is of "
                "another checkpoint, or was edited"
            )


def split_name(name: str, found: Mapping[str, Scheme]) -> tuple[str | None, str]:
    """(quantized layer, suffix without wrapper) of a tensor name; (None, leaf) for others."""
    layer, _, leaf = name.rpartition(".")
    if layer in found:
        return layer, leaf
    outer, _, wrapper = layer.rpartition(".")
    if outer in found and wrapper in WRAPPERS:
        return outer, leaf
    return None, leaf
