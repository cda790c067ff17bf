"""Load: from a component plan to a diffusers model whose planned layers are quantized.

The model is built without memory, quantized linears are put in place, and every other tensor is
assigned straight from the safetensors mapping: what is used as stored is never copied. Every tensor
name of the checkpoint and of the model is accounted for, or the error names it; a census at the end
counts the quantized layers that stand in the model against the plan.
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
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.layers import QuantizedLinear, SplitInputLinear, share_inputs
from quantmatrix.models import Target
from quantmatrix.planning import ComponentPlan, Piece, Refusal, ignored_names, is_below, plan
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

        file = self._checkpoint.tensors[name].file
        if file not in self._files:
            handle = safe_open(file, framework="pt", device=self._device)
            self._files[file] = self._stack.enter_context(handle)
        tensor: torch.Tensor = self._files[file].get_tensor(name)
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
    made = plan(request)
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
    checkpoint = fetch(component.checkpoint, request.hub)
    dtype = DTYPES[request.dtype]
    model = build_empty(component)
    full_precision = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def dtype_of(name: str) -> torch.dtype:
        kept = any(part in name for part in full_precision)
        return torch.float32 if kept and dtype != torch.float32 else dtype

    report = progress or (lambda _: None)
    expected = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    placed: set[str] = set()
    with TensorReader(checkpoint, device) as reader:
        for module, pieces in component.layers.items():
            linear = find_linear(model, module, checkpoint)
            layer = build_layer(component, pieces, reader, dtype_of(module), linear)
            place_module(model, module, layer)
            placed |= {f"{module}.weight", f"{module}.bias"} & expected
            report(sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers()))
        assign_plain(component, checkpoint, reader, model, expected - placed, dtype_of, report)
    check_complete(component, checkpoint, model)
    check_census(component, model)
    share_inputs(model)
    model.eval().requires_grad_(False)
    return model


def build_empty(component: ComponentPlan) -> nn.Module:
    """The diffusers model of a component on the meta device (its computed buffers are real)."""
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    model_class = getattr(diffusers, component.class_name, None)
    if model_class is None:
        raise CheckpointError(
            f"{component.config_from}: _class_name {component.class_name!r} is no diffusers model"
        )
    config = {k: v for k, v in component.config.items() if k != "quantization_config"}
    try:
        with no_init_weights(), init_empty_weights():
            model: nn.Module = model_class.from_config(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{component.config_from}: no {component.class_name} can be built from it ({error}): a "
            "value is of a wrong kind or missing; compare it with the base model's config.json"
        ) from error
    return model


def find_linear(model: nn.Module, module: str, checkpoint: Checkpoint) -> nn.Linear:
    """The linear layer that a quantized layer replaces."""
    try:
        found = model.get_submodule(module)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        what = "nothing of that name" if found is None else f"a {type(found).__name__}"
        raise CheckpointError(
            f"{checkpoint.reference}: quantized layer {module} should be a linear layer of "
            f"{type(model).__name__}, which has {what} there: is this checkpoint of another model?"
        )
    return found


def place_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def build_layer(
    component: ComponentPlan,
    pieces: tuple[Piece, ...],
    reader: TensorReader,
    dtype: torch.dtype,
    linear: nn.Linear,
) -> nn.Module:
    """The quantized module of one linear layer, from one piece or several."""
    into = sum(piece.in_features for piece in pieces)
    if (pieces[0].out_features, into) != (linear.out_features, linear.in_features):
        raise CheckpointError(
            f"{component.checkpoint.reference}: layer {pieces[0].layer} is "
            f"{pieces[0].out_features} x {into} (out x in), {component.class_name} of "
            f"{component.config_from} expects {linear.out_features} x {linear.in_features}: is this "
            "checkpoint of another model, or of another size?"
        )
    parts = [build_piece(component, piece, reader, dtype) for piece in pieces]
    bare = linear._parameters.get("bias") is None
    for part in parts:
        if bare and part.bias is not None and not part.bias.any():
            part.bias = None  # where a bias is stored folded, zeros say that there is none
    biased = any(part.bias is not None for part in parts)
    if biased == bare:
        raise CheckpointError(
            f"{component.checkpoint.reference}: layer {pieces[0].layer} "
            f"{'has a' if biased else 'has no'} bias, {component.class_name} of "
            f"{component.config_from} expects the opposite: is it of another model, or incomplete?"
        )
    return parts[0] if len(parts) == 1 else SplitInputLinear(parts)


def build_piece(
    component: ComponentPlan, piece: Piece, reader: TensorReader, dtype: torch.dtype
) -> QuantizedLinear:
    """One quantized layer, from its tensors on disk to the buffers of its kernel."""
    canonical = read_piece(component, piece, reader)
    kernel = next(k for k in kernels.kernels_of(piece.scheme.op) if k.backend == piece.backend)
    bias = canonical.get("bias")
    if bias is not None and bias.shape != (piece.out_features,):
        raise CheckpointError(
            f"{component.checkpoint.reference}: layer {piece.layer} has a bias of shape "
            f"{list(bias.shape)}: expected [{piece.out_features}]; the checkpoint is damaged"
        )
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
        if not torch.isfinite(stored["weight"]).all():
            raise CheckpointError(
                f"{component.checkpoint.tensors[name].file}: tensor {name} holds NaN or infinite "
                "numbers: expected finite ones to quantize; the checkpoint is damaged"
            )
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


def select_rows(target: Target, stored_rows: int) -> torch.Tensor | slice | None:
    """Rows of the layer on disk that a module takes, in the module's order; None: all of them."""
    index, count = target.part
    each = stored_rows // count
    if target.swap_halves:
        half = each // 2
        return torch.cat([torch.arange(half, each), torch.arange(half)]) + index * each
    if target.interleave > 1:
        return torch.arange(each).view(-1, target.interleave).T.flatten() + index * each
    return None if count == 1 else slice(index * each, (index + 1) * each)


def assign_plain(
    component: ComponentPlan,
    checkpoint: Checkpoint,
    reader: TensorReader,
    model: nn.Module,
    expected: set[str],
    dtype_of: Callable[[str], torch.dtype],
    report: Callable[[int], object],
) -> None:
    """Assign every tensor that is stored plainly; unknown and quantized ones are errors."""
    quantized = {piece.layer for piece in component.pieces()}
    ignored = ignored_names(checkpoint, component.family)
    unknown = []
    taken: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in ignored or is_below(name, quantized):
            continue
        for target, parameter in plain_targets(component, name):
            if parameter not in expected:
                unknown.append(name)
                continue
            if parameter in taken:
                raise CheckpointError(
                    f"{checkpoint.tensors[name].file}: tensors {taken[parameter]} and {name} are "
                    f"both {parameter} of {component.class_name}: expected one of them; names of "
                    "two layouts are mixed, write the checkpoint again"
                )
            taken[parameter] = name
            tensor = reader.read(name)
            check_plain(checkpoint, name, parameter, tensor)
            rows = select_rows(target, tensor.shape[0] if tensor.ndim else 0)
            tensor = tensor if rows is None else tensor[rows]
            assign(model, parameter, tensor.to(dtype_of(parameter)), checkpoint, name)
            report(tensor.numel() * tensor.element_size())
    if unknown:
        raise CheckpointError(
            f"{checkpoint.reference}: {len(unknown)} tensors are unknown to "
            f"{component.class_name} ({component.config_from}): {_shorten(unknown)}. "
            "Is this checkpoint of another model, or of another size?"
        )


def plain_targets(component: ComponentPlan, name: str) -> Iterator[tuple[Target, str]]:
    """(target, parameter name in the model) of a tensor that is stored plainly."""
    whole = component.dialect.tensor_targets(name)
    if whole is not None:
        for target in whole:
            yield target, target.module
        return
    layer, _, leaf = name.rpartition(".")
    for target in component.dialect.layer_targets(layer):
        if target.interleave > 1:
            raise CheckpointError(
                f"{component.checkpoint.tensors[name].file}: tensor {name} is stored plainly, and "
                f"the {component.dialect.name} layout has {layer} as AWQ codes only: whether its "
                "rows are interleaved and 1 is added to its scale cannot be known"
            )
        yield target, f"{target.module}.{leaf}" if target.module else leaf


def assign(
    model: nn.Module, parameter: str, tensor: torch.Tensor, checkpoint: Checkpoint, name: str
) -> None:
    """Put a tensor in a parameter's or buffer's place."""
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name) if owner_name else model
    old = getattr(owner, leaf)
    if old.shape != tensor.shape:
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: tensor {name} has shape {list(tensor.shape)}, "
            f"{type(model).__name__} expects {list(old.shape)} for {parameter}"
        )
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def check_complete(component: ComponentPlan, checkpoint: Checkpoint, model: nn.Module) -> None:
    """Nothing of the model may be left without a tensor."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"{checkpoint.reference}: {len(missing)} tensors of {component.class_name} are not in "
            f"{', '.join(checkpoint.files)}: {_shorten(missing)}. A quantized checkpoint must hold "
            "the layers that it leaves in full precision, too"
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
            f"found {len(found)} in the model; they differ at {_shorten(wrong)}"
        )


def _shorten(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
