"""Pieces: the tensors of one quantized layer, read and joined as a plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix import families, kernels
from quantmatrix.errors import CheckpointError
from quantmatrix.runtime.plan.placement import select_rows
from quantmatrix.runtime.stored_values import check_plain, check_stored, check_values

if TYPE_CHECKING:
    import torch

    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.reader import TensorReader
    from quantmatrix.runtime.plan.types import ComponentPlan, Piece


def read_piece(
    component: ComponentPlan, piece: Piece, reader: TensorReader
) -> dict[str, torch.Tensor]:
    """Canonical tensors of a piece, read (or quantized from what is read) and checked.

    Shapes and dtypes are those of the table of the scheme's op in `kernels`, with the piece's rows:
    [rows, in] or packed. Raises CheckpointError for values that cannot be meant.
    """
    assert component.family is not None
    family = families.load(component.family)
    stored = read_layer(component.checkpoint, piece.layer, reader)
    if component.online:
        name = f"{piece.layer}.weight"
        check_plain(component.checkpoint, name, name, stored["weight"])
        stored = family.quantize(stored["weight"], piece.scheme, bias=stored.get("bias"))
    for leaf in set(family.BIAS_LEAVES) & set(stored):
        stored[leaf] = widen(component, f"{piece.layer}.{leaf}", stored[leaf])
    check_stored(component.checkpoint, piece.layer, piece.scheme, stored)
    check_values(component, piece, stored)
    return take_part(component, piece, family.canonical(stored, piece.scheme))


def widen(component: ComponentPlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on disk, of any shape: in float32 where its codes are the numbers, else as it is."""
    coded = component.checkpoint.tensors[name].dtype in component.numbers
    return tensor.float() if coded else tensor


def read_layer(checkpoint: Checkpoint, layer: str, reader: TensorReader) -> dict[str, torch.Tensor]:
    """Every tensor on disk below a layer's name, by suffix: any shape and dtype, as stored."""
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): reader.read(name)
        for name in checkpoint.tensors
        if name.startswith(prefix)
    }


def take_part(
    component: ComponentPlan, piece: Piece, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The rows of a layer's canonical tensors that a piece takes, in the module's order.

    Shapes and dtypes are those of the op's table, before with [out, ...], after with [rows, ...].
    Raises CheckpointError where the rows part blocks that share a scale.
    """
    rows = select_rows(piece.target, piece.target.count_stored(piece.out_features))
    if rows is None:
        return tensors
    try:
        return kernels.take_rows(piece.scheme, tensors, rows)
    except ValueError as error:
        raise CheckpointError(
            f"{component.checkpoint.reference}: layer {piece.layer} holds the rows of "
            f"{piece.target.module} in the {component.dialect.name} layout, and {error}: expected "
            "whole blocks; quantize with one scale per channel, or with diffusers' names"
        ) from error
