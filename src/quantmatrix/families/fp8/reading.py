"""Reading: the scheme of each layer of an fp8 file, from what is declared and how its scales lie."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantmatrix.errors import CheckpointError
from quantmatrix.families.fp8.checks import AGAIN, check_matrix
from quantmatrix.families.fp8.layers import (
    BLOCK,
    CHANNEL,
    CODES,
    MXFP8,
    STATIC,
    TENSOR,
    find_scale_name,
    fit_granularity,
)
from quantmatrix.families.producers import comfyui

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.families.producers.comfyui import Declared
    from quantmatrix.scheme import Scheme


def find_scheme(
    checkpoint: Checkpoint, declared: Declared, layer: str, suffixes: frozenset[str]
) -> Scheme:
    """Scheme of one layer, from the declaration and the shape of its scales.

    Raises CheckpointError for codes of another format than is declared, and for a static scale
    where dynamic activations are declared.
    """
    form = CODES[check_codes(checkpoint, declared, layer)]
    scheme = find_granularity(checkpoint, declared, layer, suffixes)
    if form != "e4m3":
        return replace(scheme, name=f"{scheme.name}-{form}", weight=form, activation="none")
    if layer in declared.whole_inputs or scheme.activation == "none":
        return replace(scheme, name=f"{scheme.name}-weights", activation="none")
    if "input_scale" in suffixes and scheme.activation != "tensor-static":
        name = f"{layer}.input_scale"
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: tensor {name} is a static activation scale, but "
            f"{declared.source} declares dynamic activations: declare activation_scheme static, or "
            "leave the scales out"
        )
    return scheme


def check_codes(checkpoint: Checkpoint, declared: Declared, layer: str) -> str:
    """The dtype of a layer's codes; CheckpointError where another format is declared."""
    header = checkpoint.tensors[f"{layer}.weight"]
    said = declared.name_codes(layer)
    if said and ("e5m2" in said) != (header.dtype == "F8_E5M2"):
        raise CheckpointError(
            f"{declared.source}: says that {layer} has codes in {said}, but {header.file} stores "
            f"{header.name} as {header.dtype}: expected one format. {AGAIN}"
        )
    return header.dtype


def find_granularity(
    checkpoint: Checkpoint, declared: Declared, layer: str, suffixes: frozenset[str]
) -> Scheme:
    """How a layer's scales lie and its inputs are treated, whatever the format of its codes.

    Raises CheckpointError for a layer that no declared group holds, and for codes that are no matrix.
    """
    if declared.formats.get(layer) == comfyui.MXFP8:
        return MXFP8
    if declared.groups:
        return find_group(checkpoint, declared, layer)
    if declared.block is not None:
        return replace(BLOCK, block=declared.block)
    static = declared.static or (not declared.method and "input_scale" in suffixes)
    name = find_scale_name(BLOCK, suffixes)
    scale = checkpoint.tensors.get(f"{layer}.{name}")
    kind = "tensor"
    if scale is not None:
        weight = checkpoint.tensors[f"{layer}.weight"]
        check_matrix(weight)
        kind = fit_granularity(scale.shape, weight.shape)
    if kind == "block" and not static:
        return BLOCK
    if layer in declared.rowwise or (kind == "channel" and name == "weight_scale"):
        return STATIC["channel"] if static else CHANNEL
    return STATIC["tensor"] if static else TENSOR


def find_group(checkpoint: Checkpoint, declared: Declared, layer: str) -> Scheme:
    """The scheme of the group that a layer is in; CheckpointError where none holds it."""
    group = next((group for group in declared.groups if group.holds(layer)), None)
    if group is None:
        header = checkpoint.tensors[f"{layer}.weight"]
        raise CheckpointError(
            f"{declared.source}: no targets of its config_groups hold {layer}, but {header.file} "
            f"stores it as {header.dtype}: correct the groups, or quantize again"
        )
    scheme = {"tensor": TENSOR, "channel": CHANNEL, "block": BLOCK}[group.scale]
    return replace(scheme, block=group.block, activation=group.activation)
