"""Scaled fp8: ComfyUI's first form of FP8 with scales, read under the names of its later ones.

| tensor | dtype, shape | meaning |
| ------ | ------------ | ------- |
| `scaled_fp8` | F8_E4M3, F8_E5M2 or F32, [0] or [2] | there are scales; its dtype is that of the codes |
|              |                                     | (F32: E4M3), two items: no input is ever rounded |
| `X.weight` | F8 [N, K] | codes |
| `X.scale_weight` | F32, BF16 or F16, [], [1] or [N, 1] | weight = code x scale |
| `X.scale_input` | F32 [] or [1] | inputs are divided by it; exactly 1: it was never measured |

ComfyUI itself reads such a file under the names `weight_scale` and `input_scale`, with a list of the
layers (`convert_old_quants` of its `comfy/utils.py`); so it is here, before anything else is decided.
A layer without a scale of its inputs has a weight in codes, and inputs that are left alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.checkpoints.comfyui import ReadTensors
    from quantmatrix.checkpoints.header import TensorHeader

MARK = "scaled_fp8"
NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""Suffixes of a layer as this form has them, and as they are read."""
FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""What a list of layers calls codes of a dtype."""
UNPACK = {"F32": "<f", "F16": "<e"}
"""How `struct` reads a number of a dtype; BF16 is the upper half of F32."""


def find_form(tensors: Mapping[str, TensorHeader]) -> str | None:
    """The tensor by which a file is of this form, or None."""
    if MARK in tensors:
        return MARK
    return next((name for name in tensors if name.endswith(".scale_weight")), None)


def rename(
    tensors: Mapping[str, TensorHeader], read: ReadTensors
) -> tuple[dict[str, TensorHeader], dict[str, Any], str]:
    """(tensors under the later names, the list of layers, where it is from) of a file of this form.

    Tensors of other files are given back as they are, with an empty list. `read` gets the name of
    a file and the tensors of one number in it that are needed.
    """
    first = find_form(tensors)
    if first is None:
        return dict(tensors), {}, ""
    mark = tensors.get(MARK)
    alone = mark is not None and mark.shape == (2,)
    spelled = "F8_E5M2" if mark is not None and mark.dtype == "F8_E5M2" else "F8_E4M3"
    unmeasured = {MARK, *find_ones(tensors, read)}
    found: dict[str, TensorHeader] = {}
    for name, header in tensors.items():
        layer, _, suffix = name.rpartition(".")
        later = f"{layer}.{NAMES[suffix]}" if suffix in NAMES else name
        if name not in unmeasured:
            later = name if later in tensors else later
            found[later] = replace(header, name=later, stored_name=header.on_disk)
    layers: dict[str, Any] = {}
    for name, header in found.items():
        layer, _, suffix = name.rpartition(".")
        coded = suffix == "weight" and len(header.shape) == 2 and header.dtype in FORMATS
        if not coded and f"{layer}.scale_weight" not in tensors:
            continue
        layers[layer] = {"format": FORMATS[spelled]}
        if alone or f"{layer}.input_scale" not in found:
            layers[layer]["full_precision_matrix_mult"] = True
    return found, layers, f"{tensors[first].file}: tensor {tensors[first].on_disk}"


def find_ones(tensors: Mapping[str, TensorHeader], read: ReadTensors) -> set[str]:
    """Scales of inputs that are exactly 1: what the writer puts where nothing was measured."""
    by_file: dict[str, list[str]] = {}
    for name, header in tensors.items():
        known = header.dtype == "BF16" or header.dtype in UNPACK
        if name.endswith(".scale_input") and known and header.shape in ((), (1,)):
            by_file.setdefault(header.file, []).append(name)
    return {
        name
        for file, names in by_file.items()
        for name, content in read(file, names).items()
        if unpack(tensors[name].dtype, content) == 1.0
    }


def unpack(dtype: str, content: bytes) -> float:
    """One number from its bytes; `dtype` is F32, F16 or BF16."""
    if dtype == "BF16":
        dtype, content = "F32", bytes(2) + content
    return float(struct.unpack(UNPACK[dtype], content)[0])
