"""Load: from a component plan to a diffusers model whose planned layers are quantized.

The model is built without memory, quantized linears are put in place, and every other tensor is
assigned straight from the safetensors mapping: what is used as stored is never copied. Which tensor
goes where stands in the plan, which has compared every name and shape with the model; numbers that
cannot be meant are refused here. A census at the end counts the quantized layers that stand in the
model against the plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from quantmatrix import families, kernels
from quantmatrix.checkpoint import Checkpoint
from quantmatrix.empty_model import build_empty
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.layers import QuantizedLinear, SplitInputLinear, share_inputs
from quantmatrix.placement import PlainTensor, select_rows, shorten
from quantmatrix.planning import ComponentPlan, Piece, Refusal, plan_transformers
from quantmatrix.references import fetch
from quantmatrix.request import WEIGHTS_ALIASES, Request
from quantmatrix.stored_values import check_plain, check_stored, check_values

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class TensorReader:
    """Tensors of a checkpoint by name, mapped lazily from its files."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        """Open nothing yet; `close` (or leaving the with block) closes the files."""
        self._checkpoint = checkpoint
        self._device = device
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        """Use as a with block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; tensors that were read stay valid."""
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the device; on a CPU it is a view of the mapped file."""
        from safetensors import safe_open

        header = self._checkpoint.tensors[name]
        file = header.file
        if file not in self._files:
            handle = safe_open(file, framework="pt", device=self._device)
            self._files[file] = self._stack.enter_context(handle)
        tensor: torch.Tensor = self._files[file].get_tensor(header.on_disk)
        return tensor


def load_transformer(
    model_path: str,
    *,
    component: str = "transformer",
    transformer_path: str | None = None,
    transformer_weights_path: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    **fields: Any,
) -> nn.Module:
    """A diffusers transformer, ready for `forward`, with the checkpoint's layers quantized.

    `model_path` is a hub id, a pipeline folder or a bare component folder; only its `config.json`
    is needed where the override holds every tensor. Further keyword arguments are Request's
    fields. What the plan warns of is a Python warning here. Raises CheckpointError for a bad
    checkpoint and RefusedError where no kernel fits.
    """
    aliased = [fields.pop(name) for name in WEIGHTS_ALIASES if fields.get(name)]
    weights = next((path for path in (transformer_weights_path, *aliased) if path), None)
    request = Request(
        model_path=model_path,
        component_paths={component: transformer_path} if transformer_path else {},
        weights_paths={component: weights} if weights else {},
        backend=backend,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        **fields,
    )
    made = plan_transformers(request)
    if isinstance(made, Refusal):
        raise RefusedError(made.rule, made.message)
    for text in made.warnings:
        warnings.warn(text, stacklevel=2)
    if component not in made.components:
        raise UsageError(
            f"{model_path} has no transformer component {component!r}; "
            f"it has {', '.join(made.components)}"
        )
    return load_component(made.components[component], made.request, device=device)


def load_component(
    component: ComponentPlan,
    request: Request,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> nn.Module:
    """Build one planned component on `device`; `progress` is called with bytes as they are read."""
    from quantmatrix import witness

    checkpoint = fetch(component.checkpoint, request.hub)
    proof = witness.confirm(component, request)
    dtype = DTYPES[request.dtype]
    model = build_empty(component.class_name, component.config, component.config_from)
    full_precision = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def dtype_of(name: str) -> torch.dtype:
        kept = any(part in name for part in full_precision)
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
    check_complete(component, model)
    check_census(component, model)
    share_inputs(model)
    model.to(device)  # what is computed when the model is built: Wan's rotary tables
    model.witness = proof  # type: ignore[assignment]
    model.eval().requires_grad_(False)
    return model


def place_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
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


def read_piece(
    component: ComponentPlan, piece: Piece, reader: TensorReader
) -> dict[str, torch.Tensor]:
    """Canonical tensors of a piece, read (or quantized from what is read) and checked."""
    assert component.family is not None
    family = families.load(component.family)
    stored = read_layer(component.checkpoint, piece.layer, reader)
    if component.online:
        name = f"{piece.layer}.weight"
        check_plain(component.checkpoint, name, name, stored["weight"])
        stored = family.quantize(stored["weight"], piece.scheme, bias=stored.get("bias"))
    check_stored(component.checkpoint, piece.layer, piece.scheme, stored)
    check_values(component, piece, stored)
    return take_part(component, piece, family.canonical(stored, piece.scheme))


def read_layer(checkpoint: Checkpoint, layer: str, reader: TensorReader) -> dict[str, torch.Tensor]:
    """Every tensor on disk below a layer's name, by suffix."""
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): reader.read(name)
        for name in checkpoint.tensors
        if name.startswith(prefix)
    }


def take_part(
    component: ComponentPlan, piece: Piece, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The rows of a layer's canonical tensors that a piece takes, in the module's order."""
    rows = select_rows(piece.target, piece.out_features * piece.target.part[1])
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


def read_plain(component: ComponentPlan, plain: PlainTensor, reader: TensorReader) -> torch.Tensor:
    """The rows of a plain tensor that its parameter takes, as they are stored.

    Its numbers are looked at once: with the first of the parts that it is cut into.
    """
    tensor = reader.read(plain.name)
    if plain.target.part[0] == 0:
        check_plain(component.checkpoint, plain.name, plain.parameter, tensor)
    rows = select_rows(plain.target, tensor.shape[0] if tensor.ndim else 0)
    return tensor if rows is None else tensor[rows]


def assign(model: nn.Module, parameter: str, tensor: torch.Tensor) -> None:
    """Put a tensor in a parameter's or buffer's place."""
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name) if owner_name else model
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def check_complete(component: ComponentPlan, model: nn.Module) -> None:
    """Nothing of the model may be left without a tensor, whatever the plan said."""
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
    """The quantized layers found in the model must be those that were planned."""
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
