"""comfyui-int8: transformers in ComfyUI's INT8, with rotated weights (ConvRot) or without.

Every layer has an entry, in the header's `_quantization_metadata` or in a tensor `<layer>.comfy_quant`
beside it (`quantmatrix.checkpoints.comfyui`). Tensors of a layer with N outputs and K inputs:

| entry | tensor | dtype, shape |
| ----- | ------ | ------------ |
| `int8_tensorwise` | `weight` | I8 [N, K] |
| | `weight_scale` | F32, BF16 or F16: one number, or one a row, [N] or [N, 1] |
| with `convrot`, `convrot_groupsize` (256 where it is absent) | as above | so many columns were rotated |
| any | `bias` | any float [N] |

Real weight = code x scale, rotated back. Inputs are rotated, too, and rounded to int8 with one scale
per token; with `full_precision_matrix_mult` they are left alone. `per_row` in an entry says what the
scales' shape says. Its other integer formats (blocks, ConvRot W4A4 and W4A8) are refused by name.
Sources: comfy-kitchen 0.2 (`TensorWiseINT8Layout`, eager backend), convert-to-quant 1.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.checkpoints.comfyui import ROTATION
from quantmatrix.checkpoints.dtypes import FLOATS
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.producers.comfyui import PLAIN_FORMATS, WHOLE_INPUTS, read_formats
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_convrot
from quantmatrix.quoting import quote_json
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

ID = "comfyui-int8"
FORMAT = "int8_tensorwise"
GROUP, GROUP_KEY = 256, "convrot_groupsize"
"""Columns that are rotated together where an entry does not say how many, and the key that does."""
INT8 = Scheme("linear.convrot", FORMAT, "int8", "tensor", "token-dynamic")
CONVROT = replace(INT8, name=f"{FORMAT}-convrot", scale="channel", group_size=64)
SCHEMES: Mapping[str, Scheme] = {"int8": INT8, "convrot": CONVROT}
KNOWN = ("format", "params", "per_row", WHOLE_INPUTS, ROTATION, GROUP_KEY)
"""Keys of an entry that are read."""
BESIDE = ("bias", "comfy_quant")
AGAIN = "Correct the file with what wrote it, or quantize again"


def detect(checkpoint: Checkpoint) -> str | None:
    """The reason why a checkpoint is of this family, or None."""
    if FORMAT not in read_formats(checkpoint.quantization or {}).values():
        return None
    return f"layers of format {FORMAT} in {checkpoint.quantization_from}"


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of every layer with codes; CheckpointError where entries and tensors do not fit."""
    listed = (checkpoint.quantization or {})["layers"]
    source, layers = checkpoint.quantization_from, checkpoint.layers()
    found: dict[str, Scheme] = {}
    for layer, form in read_formats(checkpoint.quantization or {}).items():
        if form in PLAIN_FORMATS:
            continue
        if form != FORMAT:
            raise CheckpointError(
                f"{source}: {layer} has the format {form} beside layers of {FORMAT}: expected {FORMAT} or "
                "full precision in every layer. Quantize with one format"
            )
        if layer not in layers:
            raise CheckpointError(
                f"{source}: lists {layer} as {form}, but {', '.join(checkpoint.files)} have no such "
                f"layer: expected the names of the tensors. {AGAIN}"
            )
        found[layer] = read_scheme(f"{source}: {layer}", listed[layer])
        check_layer(checkpoint, layer, found[layer], layers[layer])
        found[layer] = replace(found[layer], scale=find_granularity(checkpoint, layer))
    for name, header in checkpoint.tensors.items():
        if header.dtype == "I8" and name.rpartition(".")[0] not in found:
            raise CheckpointError(
                f"{header.file}: tensor {name} (I8 {list(header.shape)}) has no entry in {source}: expected "
                f"one for every layer with codes. {AGAIN}"
            )
    return found


def read_scheme(where: str, entry: Any) -> Scheme:
    """The scheme that an entry describes; CheckpointError for what is not in the module's table."""
    flat: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {}
    nested = flat.get("params")
    flat |= nested if isinstance(nested, Mapping) else {}
    unknown = sorted(key for key, value in flat.items() if value and key not in KNOWN)
    if unknown:
        raise CheckpointError(
            f"{where} has {unknown[0]} {quote_json(flat[unknown[0]], 80)} in its entry: known are "
            f"{', '.join(KNOWN)}. Quantize without it"
        )
    scheme = INT8
    if flat.get(ROTATION):
        size = flat.get(GROUP_KEY, GROUP)
        if type(size) is not int or size not in linear_convrot.SIZES:
            raise CheckpointError(
                f"{where} has {GROUP_KEY} {quote_json(size, 80)}: expected a power of 4 up to "
                f"{linear_convrot.SIZES[-1]}, as 256. {AGAIN}"
            )
        scheme = replace(CONVROT, group_size=size)
    if flat.get(WHOLE_INPUTS) is True:
        return replace(scheme, name=f"{scheme.name}-weights", activation="none")
    return scheme


def find_granularity(checkpoint: Checkpoint, layer: str) -> str:
    """`tensor` where a layer has one scale, `channel` where it has one a row."""
    alone = math.prod(checkpoint.tensors[f"{layer}.weight_scale"].shape) == 1
    return "tensor" if alone else "channel"


def check_layer(
    checkpoint: Checkpoint, layer: str, scheme: Scheme, suffixes: frozenset[str]
) -> None:
    """A layer has the tensors of the module's table and no others; else raises CheckpointError."""
    header = checkpoint.tensors.get(f"{layer}.weight")
    if header is None or header.dtype != "I8" or len(header.shape) != 2:
        what = f"is {header.dtype} {list(header.shape)}" if header else "is missing"
        raise CheckpointError(
            f"{header.file if header else checkpoint.files[0]}: tensor {layer}.weight {what}: "
            f"{checkpoint.quantization_from} lists the layer as {FORMAT}, expected I8 [N, K]. {AGAIN}"
        )
    out, into = header.shape
    if scheme.group_size and into % scheme.group_size:
        raise CheckpointError(
            f"{header.file}: {layer} has {into} inputs, which is not a whole number of groups of the "
            f"{scheme.group_size} columns that {checkpoint.quantization_from} says were rotated "
            f"together. {AGAIN}"
        )
    for suffix, spec in tensors(scheme, out, into).items():
        found = checkpoint.tensors.get(f"{layer}.{suffix}")
        if found is None or found.dtype not in spec.dtypes or found.shape not in spec.shapes:
            what = f"is {found.dtype} {list(found.shape)}" if found else "is missing"
            shapes = " or ".join(str(list(shape)) for shape in spec.shapes)
            raise CheckpointError(
                f"{header.file}: tensor {layer}.{suffix} {what}: expected {' or '.join(spec.dtypes)} "
                f"{shapes}. {AGAIN}"
            )
    for suffix in sorted(suffixes - {*tensors(scheme, 1, 1), *BESIDE}):
        raise CheckpointError(
            f"{header.file}: tensor {layer}.{suffix} stands beside the codes of {layer}, expected no more "
            f"than {', '.join([*tensors(scheme, 1, 1), *BESIDE])}: leaving it out would give other numbers "
            "without an error. Quantize without it"
        )


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    shapes = ((out_features, 1), (out_features,), (), (1,), (1, 1))
    return {
        "weight": TensorSpec(("I8",), ((out_features, in_features),)),
        "weight_scale": TensorSpec(FLOATS, tuple(dict.fromkeys(shapes))),
    }


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with this weight [N, K] of any float dtype, as in the module's table.

    There is one scale, or one a row if the weight is rotated.

    Raises UsageError for a layer whose columns are no whole groups of the rotation.
    """
    if scheme.group_size and weight.shape[1] % scheme.group_size:
        raise UsageError(
            f"{scheme.name} rotates groups of {scheme.group_size} columns, and a layer has "
            f"{weight.shape[1]}: keep it in full precision, or use --scheme int8"
        )
    exact = linear_convrot.rotate(weight.float(), scheme.group_size)
    rows = exact.abs().amax(dim=1, keepdim=True)
    scale = ((rows if scheme.group_size else rows.amax()) / 127).clamp(min=1e-30)
    stored = {
        "weight": (exact / scale).round().clamp(-128, 127).to(torch.int8),
        "weight_scale": scale,
    }
    return stored if bias is None else {**stored, "bias": bias}


def cut_rows(
    stored: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table.
    """
    cut = dict(stored)
    for suffix in ("weight", "bias", "weight_scale"):
        if suffix in stored and stored[suffix].numel() > 1:
            cut[suffix] = stored[suffix][start:stop]
    return cut


def canonical(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Canonical tensors of linear.convrot; takes tensors as in the module's table."""
    rows = stored["weight"].shape[0]
    scale = stored["weight_scale"].float().flatten().expand(rows).contiguous()
    bias = {"bias": stored["bias"]} if "bias" in stored else {}
    return {"weight": stored["weight"], "weight_scale": scale, **bias}


def dequantize(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K], rotated back."""
    return linear_convrot.decode(canonical(stored, scheme), scheme)


def reference(x: torch.Tensor, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype.

    `stored` are tensors as in the module's table.
    """
    return linear_convrot.reference(x, canonical(stored, scheme), scheme)


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """The header's list of layers."""
    entries: dict[str, Any] = {}
    for layer, scheme in schemes.items():
        entries[layer] = {"format": FORMAT}
        if scheme.group_size:
            entries[layer] |= {ROTATION: True, GROUP_KEY: scheme.group_size}
    text = json.dumps({"format_version": "1.0", "layers": entries}, sort_keys=True)
    return Declaration(metadata={"_quantization_metadata": text})
