"""Load: from a component plan to a diffusers model whose planned layers are quantized.

The model is built without memory, quantized linears are put in place, and every other tensor is
assigned straight from the safetensors mapping: what is used as stored is never copied. Which tensor
goes where stands in the plan, which has compared every name and shape with the model; numbers that
cannot be meant are refused here. A census at the end counts the quantized layers that stand in the
model against the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantmatrix import kernels
from quantmatrix.checkpoints.opening import fetch
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.errors import CheckpointError
from quantmatrix.kernels.gguf_arithmetic import decode_blocks
from quantmatrix.request import Request
from quantmatrix.runtime.empty_model import build_empty
from quantmatrix.runtime.pieces import read_piece, widen
from quantmatrix.runtime.plan.placement import PlainTensor, select_rows, shorten
from quantmatrix.runtime.plan.types import ComponentPlan, Piece
from quantmatrix.runtime.quantized_linear import QuantizedLinear, SplitInputLinear, share_inputs
from quantmatrix.runtime.stored_values import check_plain
from quantmatrix.scheme import BLOCKS

if TYPE_CHECKING:
    from quantmatrix.checkpoints.header import TensorHeader

logger = logging.getLogger(__name__)


def load_component(
    component: ComponentPlan,
    request: Request,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> nn.Module:
    """Build one planned component on `device`; `progress` is called with bytes as they are read.

    Raises CheckpointError for weights that cannot be had, are damaged or not as planned, and
    WitnessError for decoded layers that are not the base model's.
    """
    from quantmatrix.runtime.witness import verdict

    checkpoint = fetch(component.checkpoint, request.hub)
    proof = verdict.confirm(component, request)
    dtype = getattr(torch, request.dtype)
    model = build_empty(component.class_name, component.config, component.config_from)
    full_precision = list_full_precision(model, dtype)

    def dtype_of(name: str) -> torch.dtype:
        kept = any(part in f"{name}." for part in full_precision)
        return torch.float32 if kept and dtype != torch.float32 else dtype

    report = progress or (lambda _: None)
    with TensorReader(checkpoint, device) as reader:
        for module, pieces in component.layers.items():
            bare = model.get_submodule(module)._parameters.get("bias") is None
            layer = build_layer(component, pieces, reader, dtype_of(module), bare=bare)
            place_module(model, module, layer)
            report(sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers()))
        for plain in component.plain:
            tensor = read_plain(component, plain, reader).to(dtype_of(plain.parameter))
            assign(model, plain.parameter, tensor)
            report(tensor.numel() * tensor.element_size())
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:  # of a text encoder
        tie()
    check_complete(component, model)
    check_census(component, model)
    share_inputs(model)
    model.to(device)  # what is computed when the model is built: Wan's rotary tables
    model.witness = proof  # type: ignore[assignment]
    model.eval().requires_grad_(False)
    logger.debug(
        "loaded %s on %s: %d quantized linear layers, %d other tensors, family %s",
        checkpoint.reference, device, len(component.layers), len(component.plain), component.family,
    )  # fmt: skip
    return model


def list_full_precision(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of parameters' names that stay in float32, as the model's library has them.

    transformers keeps some from float16 alone.
    """
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    if hasattr(model, "_keep_in_fp32_modules_strict"):
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        names = {*strict, *(names if dtype == torch.float16 else ())}
        return tuple(f".{name}." for name in names)
    return tuple(names)


def place_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module by another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def build_layer(
    component: ComponentPlan,
    pieces: tuple[Piece, ...],
    reader: TensorReader,
    dtype: torch.dtype,
    *,
    bare: bool,
) -> nn.Module:
    """The quantized module of one linear layer, from one piece or several; `bare`: it has no bias.

    Where a bias is stored folded, or for a layer that has none, zeros say that there is none.
    Raises CheckpointError for a bias that the model's layer does not have.
    """
    parts = [build_piece(component, piece, reader, dtype) for piece in pieces]
    for part in parts if bare else ():
        if part.bias is not None and part.bias.any():
            raise CheckpointError(
                f"{component.checkpoint.reference}: layer {pieces[0].layer} has a bias, "
                f"{component.class_name} of {component.config_from} expects none: is it of another "
                "model?"
            )
        part.bias = None
    return parts[0] if len(parts) == 1 else SplitInputLinear(parts)


def build_piece(
    component: ComponentPlan, piece: Piece, reader: TensorReader, dtype: torch.dtype
) -> QuantizedLinear:
    """One quantized layer, from its tensors on disk to the buffers of its kernel."""
    canonical = read_piece(component, piece, reader)
    kernel = next(k for k in kernels.kernels_of(piece.scheme.op) if k.backend == piece.backend)
    bias = canonical.get("bias")
    if piece.target.plus_one and bias is not None:
        width = piece.out_features // piece.target.interleave
        chunks = bias.float().clone().view(-1, width)
        chunks[list(piece.target.plus_one)] -= 1
        canonical["bias"] = chunks.flatten()
    return QuantizedLinear(
        piece.in_features, piece.out_features, kernel, piece.scheme, canonical, dtype
    )


def read_plain(component: ComponentPlan, plain: PlainTensor, reader: TensorReader) -> torch.Tensor:
    """The rows of a plain tensor that its parameter takes, as they are stored.

    They are of any float dtype and in the parameter's shape; codes that are the numbers become
    float32. The numbers are looked at once: with the first of the parts that the tensor is cut into.
    Raises CheckpointError for codes and for numbers that are not finite.
    """
    stored = decode_plain(component.checkpoint.tensors[plain.name], reader.read(plain.name))
    tensor = widen(component, plain.name, stored)
    if plain.target.rows[0] == 0:
        check_plain(component.checkpoint, plain.name, plain.parameter, tensor)
    rows = select_rows(plain.target, tensor.shape[0] if tensor.ndim else 0)
    tensor = tensor if rows is None else tensor[rows]
    return tensor.reshape(plain.shape) if plain.target.reshaped else tensor


def decode_plain(header: TensorHeader, stored: torch.Tensor) -> torch.Tensor:
    """A plain tensor in numbers: as it is stored, unless it is blocks, uint8 of any shape.

    These decode to float32 in the shape of the header.
    """
    if header.dtype not in BLOCKS:
        return stored
    return decode_blocks(stored, header.dtype).view(header.shape)


def assign(model: nn.Module, parameter: str, tensor: torch.Tensor) -> None:
    """Put a tensor, of any shape and dtype, in a parameter's or buffer's place."""
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name) if owner_name else model
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def check_complete(component: ComponentPlan, model: nn.Module) -> None:
    """Nothing of the model may be left without a tensor, whatever the plan said.

    Raises CheckpointError where something is.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"{component.checkpoint.reference}: {len(missing)} tensors of {component.class_name} "
            f"were planned and not filled: {shorten(missing)}"
        )


def count_quantized(model: nn.Module) -> dict[str, str]:
    """Backend of every quantized module that stands in a model, by name."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitInputLinear):
            part = module.parts[0]
            assert isinstance(part, QuantizedLinear)
            found[name] = part.kernel.backend
        elif isinstance(module, QuantizedLinear) and ".parts." not in f".{name}":
            found[name] = module.kernel.backend
    return found


def check_census(component: ComponentPlan, model: nn.Module) -> None:
    """The quantized layers found in the model must be those that were planned.

    Raises CheckpointError where they are not.
    """
    found = count_quantized(model)
    if set(found) != set(component.layers):
        wrong = sorted(set(found) ^ set(component.layers))
        raise CheckpointError(
            f"{component.checkpoint.reference}: planned {len(component.layers)} quantized layers, "
            f"found {len(found)} in the model; they differ at {shorten(wrong)}"
        )


@contextmanager
def show_progress(component: ComponentPlan, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of a component, on standard error."""
    from tqdm import tqdm

    with tqdm(
        total=component.bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc=f"loading {component.name}",
        disable=not shown,
    ) as bar:
        yield bar.update
