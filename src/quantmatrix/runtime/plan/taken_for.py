"""Taken for: what a checkpoint is, and how its layers are stored, in one line of English.

`40 layers FP8: e4m3 codes, one scale, inputs by a stored scale; a safetensors file of a
FluxTransformer2DModel in the names of diffusers`: the same words for every family, out of the fields
of its schemes, so that a new one is described without a line here.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.scheme import Scheme

SCALES = {"tensor": "one scale", "channel": "a scale per channel"}
INPUTS = {
    "none": "inputs left alone",
    "tensor-static": "inputs by a stored scale",
    "tensor-dynamic": "inputs by one scale, found while running",
    "token-dynamic": "inputs by a scale per token",
    "group-dynamic": "inputs by a scale per group",
    "group-power": "inputs by a power of two per group",
    "group-dual": "inputs by a power of two per group and a coarse scale",
}
"""`Scheme.activation` in words."""


def summarize(checkpoint: Checkpoint, schemes: Iterable[Scheme], names: Sequence[str]) -> str:
    """One line: layers per scheme with what it means, then the files and whose names they are in.

    `names` are name spaces as `inspect` gives them.
    """
    counted = Counter((scheme.name, describe_codes(scheme)) for scheme in schemes)
    layers = [
        f"{count} {'layer' if count == 1 else 'layers'} {name}: {codes}"
        for (name, codes), count in counted.items()
    ]
    return "; ".join([*layers, describe_files(checkpoint, names)])


def describe_codes(scheme: Scheme) -> str:
    """What a layer holds and what its inputs become: `e2m1 codes, a scale per 16 columns, ...`."""
    if scheme.scale == "block":
        scale = f"a scale per block of {scheme.block[0]} x {scheme.block[1]}"
    elif scheme.scale == "group":
        scale = f"a scale per {scheme.group_size} columns"
    else:
        scale = SCALES[scheme.scale]
    rotated = bool(scheme.group_size) and scheme.scale != "group"
    parts = (
        f"{scheme.weight} codes",
        scale,
        f"{scheme.group_size} columns rotated together" if rotated else "",
        f"a branch of rank {scheme.rank}" if scheme.rank else "",
        INPUTS[scheme.activation],
    )
    return ", ".join(filter(None, parts))


def describe_files(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """`2 safetensors files of a FluxTransformer2DModel in the names of diffusers after ...`."""
    kind = "GGUF" if checkpoint.files[0].lower().endswith(".gguf") else "safetensors"
    many = len(checkpoint.files)
    files = f"a {kind} file" if many == 1 else f"{many} {kind} files"
    stated = (checkpoint.config or {}).get("_class_name")
    model = f" of a {quote(stated, 60)}" if isinstance(stated, str) and stated else ""
    after = f" after the prefix {checkpoint.prefix}" if checkpoint.prefix else ""
    return f"{files}{model} in the names of {', '.join(names)}{after}"
