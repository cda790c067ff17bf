"""Layer lists: what ComfyUI's writers say of each quantized layer, and where they say it.

Either the header's `_quantization_metadata` has one entry per layer under `layers`, or a tensor
`<layer>.comfy_quant` (U8 [bytes of the text]) beside the codes holds the same entry as JSON:

    {"format": "float8_e4m3fn", "full_precision_matrix_mult": true, "orig_dtype": "torch.bfloat16"}

Where the header lists a layer, that counts, as it does in ComfyUI; the tensors of other layers are
read, though they are no header: nothing else says what an FP8 layer does with its inputs. Files
whose quantization has a method (`quant_method`, `quant_algo`) need none of this. Sources: ComfyUI's
QUANTIZATION.md and `convert_old_quants`, the pages of comfy-quants, files of `convert-to-quant`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantmatrix.checkpoints.declaration import METHOD_KEYS, parse_block
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError

MARKER = ".comfy_quant"
LONGEST = 4096
"""Bytes of the longest text that is taken for an entry; real ones have about a hundred."""
NOTES = ("orig_dtype", "orig_shape")
"""Keys of an entry that tell where a layer came from, and nothing about how it is stored."""
ROTATION = "convrot"
ROTATED = ("int8_tensorwise",)
"""Formats whose rotated weights are read."""

ReadTensors = Callable[[str, list[str]], Mapping[str, bytes]]
"""Contents of some tensors of a file, by name."""


def complete(
    block: Mapping[str, Any] | None,
    source: str | None,
    tensors: Mapping[str, TensorHeader],
    read: ReadTensors,
) -> tuple[dict[str, Any] | None, str | None]:
    """A quantization block with an entry for every layer that has one, and where it was found.

    `read` gets the name of a file and the markers in it that are needed. One that holds no JSON
    object says nothing. Raises CheckpointError for rotated weights that no family takes.
    """
    if block is not None and has_method(block):
        return dict(block), source
    listed = block.get("layers") if block else None
    entries = {str(k): v for k, v in listed.items()} if isinstance(listed, Mapping) else {}
    for file, markers in find_markers(tensors, entries).items():
        source = source or f"{file}: tensors *{MARKER}"
        for name, content in read(file, markers).items():
            entry = parse_block(content.decode("utf-8", "replace"))
            if entry:
                entries[name.removesuffix(MARKER)] = entry
    if not entries:
        return (None, None) if block is None else (dict(block), source)
    checked = {layer: read_entry(layer, entry, str(source)) for layer, entry in entries.items()}
    return {"format_version": "1.0", **(block or {}), "layers": checked}, source


def has_method(block: Mapping[str, Any]) -> bool:
    """Whether a block names its quantization as a whole, so that no list decides about it."""
    nested = block.get("quantization")
    inner = nested if isinstance(nested, Mapping) else {}
    return any(key in block or key in inner for key in METHOD_KEYS)


def find_markers(
    tensors: Mapping[str, TensorHeader], listed: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Names of the markers of layers that are not listed, by file."""
    found: dict[str, list[str]] = {}
    for name, header in tensors.items():
        layer = name.removesuffix(MARKER)
        text = header.dtype == "U8" and header.nbytes <= LONGEST
        if layer != name and layer not in listed and text:
            found.setdefault(header.file, []).append(name)
    return found


def read_entry(layer: str, entry: Any, source: str) -> Any:
    """An entry without its notes; a plain string is kept as it is.

    Raises CheckpointError for a weight that was rotated (ConvRot) in a format of which no family
    takes such.
    """
    if not isinstance(entry, Mapping):
        return entry
    nested = entry.get("params")
    rotated = entry.get(ROTATION) or (isinstance(nested, Mapping) and nested.get(ROTATION))
    if rotated and entry.get("format") not in ROTATED:
        raise CheckpointError(
            f"{source}: the weight of {layer} was rotated before it was quantized (ConvRot, "
            f"{entry.get('format')} with {ROTATION}), which no quant family takes: without the same "
            "rotation of its inputs a layer gives other numbers. Quantize without it, or name a "
            "file in float8_e4m3fn, int8_tensorwise or nvfp4, or in full precision"
        )
    return {key: value for key, value in entry.items() if key not in NOTES}
