"""Describe: what a checkpoint is, from its headers alone (`quantmatrix inspect`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from quantmatrix import families, models
from quantmatrix.checkpoints import original_names
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.opening import (
    is_whole,
    open_compat,
    open_component,
    open_pipeline,
    open_weights,
)
from quantmatrix.errors import CheckpointError
from quantmatrix.families.layouts import Layout
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.request import Hub
from quantmatrix.runtime.plan.layouts import describe_layouts
from quantmatrix.runtime.plan.sources import COMPATIBLE_BASES
from quantmatrix.runtime.plan.taken_for import summarize
from quantmatrix.scheme import Scheme


def inspect(path: str, hub: Hub | None = None) -> dict[str, Any]:
    """Family, reason, schemes per layer, sizes and header facts of every transformer in a path.

    `path` is a weight file, a component folder, a whole pipeline or a hub id of one of these.
    Raises CheckpointError for a path where no checkpoint is, and for a file that is damaged or
    empty.
    """
    found = open_any(path, hub or Hub())
    for checkpoint in found.values():
        if not checkpoint.tensors:
            raise CheckpointError(
                f"{', '.join(checkpoint.files)}: no tensor in it: expected weights; name the file that "
                "holds them"
            )
    return {
        "reference": path,
        "components": {name: describe(checkpoint) for name, checkpoint in found.items()},
    }


def open_any(path: str, hub: Hub) -> dict[str, Checkpoint]:
    """The checkpoints that a path holds: transformer components, or one set of weights."""
    named = any(marker in path for marker in COMPATIBLE_BASES)
    if named and not path.endswith(".safetensors") and not is_whole(path, hub):
        return {"transformer": open_compat(path, hub)}
    if path.endswith((".safetensors", ".safetensors.index.json")):
        return {"transformer": open_weights(path, hub)}
    try:
        pipeline = open_pipeline(path, hub)
    except CheckpointError:
        return {"transformer": open_weights(path, hub)}
    if not pipeline.components:
        return {"transformer": open_component(path, hub)}
    names = [name for name in pipeline.components if name.startswith("transformer")]
    return {name: open_component(path, hub, name) for name in names}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """One checkpoint as plain data."""
    unknown = explain_unknown(checkpoint)
    detected = None if unknown else families.detect(checkpoint)
    family, why = detected or (None, unknown or "nothing in it is quantized")
    families.check(checkpoint)
    layout = families.load(family).layout(checkpoint) if family else None
    schemes = read_schemes(checkpoint, family, layout) if family else {}
    names = find_names(checkpoint)
    dtypes: Counter[str] = Counter()
    for header in checkpoint.tensors.values():
        dtypes[header.dtype] += header.nbytes
    return {
        "family": family,
        "why": why,
        "unknown": unknown is not None,
        "summary": summarize(checkpoint, schemes.values(), names),
        "files": list(checkpoint.files),
        "left_out": list(checkpoint.left_out),
        "prefix": checkpoint.prefix,
        "aside": dict(checkpoint.aside),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "bytes_per_dtype": dict(dtypes),
        "config_file": checkpoint.config_file,
        "quantization_from": checkpoint.quantization_from,
        "quantization": checkpoint.quantization,
        "description_file": checkpoint.description_file,
        "metadata": dict(checkpoint.metadata),
        "quantized_layers": len(schemes),
        "schemes": dict(Counter(scheme.name for scheme in schemes.values())),
        "layouts": describe_layouts(schemes, layout),
        "layout_from": layout and layout.why,
        "names": names,
        "names_note": find_note(checkpoint),
        "layers": {layer: describe_scheme(scheme, layout) for layer, scheme in schemes.items()},
    }


def describe_scheme(scheme: Scheme, layout: Layout | None) -> dict[str, Any]:
    """A scheme as plain data, without what is not so, and without a layout that is open."""
    fields = {k: v for k, v in asdict(scheme).items() if v not in (0, "", False, (0, 0))}
    if layout is not None and not layout.known:
        fields = {k: v for k, v in fields.items() if k not in ("swap_nibbles", "tiled_scales")}
    return fields


def read_schemes(checkpoint: Checkpoint, family: str, layout: Layout | None) -> dict[str, Scheme]:
    """The schemes of a checkpoint; under the first reading that fits where its layout is open.

    Raises CheckpointError, the first reading's, where none fits.
    """
    if layout is None or layout.known:
        return families.load(family).schemes(checkpoint)
    errors = []
    for reading in layout.readings:
        try:
            return families.load(family).schemes(replace(checkpoint, chosen=reading))
        except CheckpointError as error:
            errors.append(error)
    raise errors[0]


def find_names(checkpoint: Checkpoint) -> list[str]:
    """The name spaces that the tensors are in, as `dialect (model)`; `diffusers` for its own.

    A model's first names that have no dialect are `original (model)`, and nobody else's.
    """
    original = original_names.find_original(checkpoint.tensors)
    found = [
        f"{dialect.name} ({model})"
        for model in models.IDS
        for dialect in models.load(model).DIALECTS
        if dialect.name != "diffusers" and dialect.matches(checkpoint.tensors)
        if original is None or original.model == model
    ]
    return found or ([f"original ({original.model})"] if original else ["diffusers"])


def find_note(checkpoint: Checkpoint) -> str | None:
    """What the names say beyond whose they are: a model that is none of the base models here."""
    found = original_names.find_original(checkpoint.tensors)
    if found is None or found.model in models.IDS:
        return None
    return f"These are {found.title}'s original names. It is none of the base models here"
