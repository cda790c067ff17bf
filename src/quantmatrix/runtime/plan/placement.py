"""Placement: where each tensor of a checkpoint goes in the model, decided from names and shapes.

A plan holds the whole of it, and the loader does nothing but follow it: every tensor belongs to a
quantized layer, is plain and has a parameter in the model, or is left aside for a reason of the
family's. Whatever headers show to be wrong is refused here, before a tensor is read: layers and
tensors that the model does not have, has in another shape, or would get twice, and those that the
checkpoint lacks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantmatrix import families, kernels
from quantmatrix.checkpoints.name_prefixes import find_common_prefix
from quantmatrix.checkpoints.original_names import explain_original
from quantmatrix.errors import CheckpointError
from quantmatrix.models.dialect import DIFFUSERS, Dialect, Target
from quantmatrix.runtime.plan.dialects import find_code
from quantmatrix.scheme import BLOCKS, Scheme, measure_features

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader
    from quantmatrix.runtime.empty_model import ModelShapes

FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes of a tensor in full precision; anything else is codes, or damage."""
SHOWN = 8
"""Names that an error lists at most."""


@dataclass(frozen=True)
class Part:
    """One layer on disk that serves a module, or some of its rows or columns."""

    layer: str
    target: Target
    scheme: Scheme
    out_features: int
    """Rows that the module takes."""
    in_features: int


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is stored plainly, and the parameter or buffer that takes it."""

    name: str
    """On disk."""
    parameter: str
    """In the model."""
    target: Target
    """Which of its rows are taken."""
    shape: tuple[int, ...] = ()
    """The parameter's."""


@dataclass(frozen=True)
class Site:
    """A checkpoint and the model that it is meant for, as errors name them."""

    checkpoint: Checkpoint
    dialect: Dialect
    shapes: ModelShapes
    class_name: str
    config_from: str
    family: str | None = None
    online: bool = False
    """Its layers are quantized while loading, from full precision."""
    numbers: tuple[str, ...] = ()
    """Dtypes of codes that are the numbers themselves, beside those of full precision."""

    @property
    def model(self) -> str:
        """The model and the file of its configuration, as text."""
        return f"{self.class_name} ({self.config_from})"

    def find_code(self, layer: str) -> TensorHeader:
        """The tensor that holds the codes of a quantized layer."""
        assert self.family is not None  # nothing is quantized without one
        return find_code(self.checkpoint, layer, self.family)

    def find_biases(self, layer: str) -> list[TensorHeader]:
        """The tensors that hold the bias of a quantized layer."""
        assert self.family is not None
        return find_biases(self.checkpoint, layer, self.family)


def sort_layers(
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    family: str | None,
    *,
    online: bool = False,
) -> tuple[dict[str, list[Part]], list[str]]:
    """(parts of each quantized module, names of the tensors that are stored plainly).

    A layer that is quantized while loading (`online`) has a weight and a bias, and nothing else.
    Raises CheckpointError for codes that are no matrix.
    """
    parts: dict[str, list[Part]] = {}
    for layer, scheme in schemes.items():
        assert family is not None  # nothing is quantized without one
        code = find_code(checkpoint, layer, family)
        if len(code.shape) != 2:
            raise CheckpointError(
                f"{code.file}: tensor {code.name} has shape {list(code.shape)}: expected codes of "
                f"a linear layer, which have two dimensions ({scheme.name}); keep other layers in "
                "full precision"
            )
        out, into = code.shape if online else measure_features(scheme, code.shape)
        for target in dialect.layer_targets(layer):
            kind = families.load(family).after_gelu(scheme) if target.unsigned else scheme
            start, stop, of = target.rows
            rows = out // of * (stop - start)
            parts.setdefault(target.module, []).append(Part(layer, target, kind, rows, into))
    ignored = ignored_names(checkpoint, family, dialect)
    wrappers = families.load(family).WRAPPERS if family else ()
    own = {f"{layer}.{leaf}" for layer in schemes for leaf in ("weight", "bias")}
    plain = [
        name
        for name in checkpoint.tensors
        if name not in ignored
        and not (name in own if online else is_below(name, schemes, wrappers))
    ]
    return parts, plain


def list_names(
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    family: str | None,
    *,
    online: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a model by their names on disk: a weight, and a bias, for each layer.

    How a quantized layer is stored is not among them; one that is quantized while loading (`online`)
    is stored plainly. Raises CheckpointError for one without codes.
    """
    _, plain = sort_layers(checkpoint, schemes, DIFFUSERS, family, online=online)
    names = {name: checkpoint.tensors[name].shape for name in plain}
    for layer, scheme in schemes.items():
        assert family is not None  # nothing is quantized without one
        shape = find_code(checkpoint, layer, family).shape
        features = shape if online else measure_features(scheme, shape)
        names[f"{layer}.weight"] = features
        if find_biases(checkpoint, layer, family):
            names[f"{layer}.bias"] = features[:1]
    return names


def ignored_names(
    checkpoint: Checkpoint, family: str | None, dialect: Dialect = DIFFUSERS
) -> dict[str, str]:
    """Tensors that the family, or the dialect, says are never loaded, each with its reason."""
    dropped = {name: why for name, why in dialect.dropped().items() if name in checkpoint.tensors}
    if family is None:
        return dropped
    ignored = families.load(family).ignored
    return dropped | {name: why for name in checkpoint.tensors if (why := ignored(name))}


def is_below(name: str, layers: Collection[str], wrappers: Collection[str]) -> bool:
    """Whether a tensor belongs to one of the layers: it lies right below it, or in a wrapper."""
    above, _, last = name.rpartition(".")[0].rpartition(".")
    return name.rpartition(".")[0] in layers or (last in wrappers and above in layers)


def place(
    site: Site, parts: Mapping[str, Sequence[Part]], plain: Collection[str]
) -> tuple[PlainTensor, ...]:
    """Where the plain tensors go; CheckpointError for all that headers show to be wrong.

    `parts` are those of each quantized module. Each module and tensor of the model must be served
    exactly once.
    """
    for module, own in parts.items():
        check_module(site, module, own)
    placed = place_plain(site, parts, plain)
    served = {tensor.parameter for tensor in placed}
    for module in parts:
        served |= {f"{module}.weight", f"{module}.bias"}
    missing = sorted(site.shapes.required - served)
    if missing:
        raise CheckpointError(
            f"{site.checkpoint.reference}: {len(missing)} tensors of {site.class_name} are not in "
            f"{', '.join(site.checkpoint.files)}: {shorten(missing)}. A quantized checkpoint must "
            "hold the layers that it leaves in full precision, too"
        )
    return placed


def check_module(site: Site, module: str, parts: Sequence[Part]) -> None:
    """The parts of a quantized module must make up one linear layer; else raises CheckpointError."""
    first = parts[0]
    linear = site.shapes.linears.get(module)
    if linear is None:
        found = site.shapes.modules.get(module)
        what = f"a {found}" if found else "nothing of that name"
        original = explain_original(site.checkpoint.tensors, site.class_name)
        raise CheckpointError(
            f"{site.checkpoint.reference}: quantized layer {first.layer} should be the linear layer "
            f"{module} of {site.model}, which has {what} there. "
            f"{original or 'Is this checkpoint of another model?'}"
        )
    columns = [part.target.columns for part in parts]
    if len(parts) > 1 and len(set(columns)) < len(parts):
        raise CheckpointError(
            f"{site.find_code(first.layer).file}: layers {parts[0].layer} and "
            f"{parts[1].layer} are both {module} of {site.class_name}: expected one of them; names "
            "of two layouts are mixed, write the checkpoint again"
        )
    for part in parts:
        code = site.find_code(part.layer)
        if site.online and code.dtype not in FLOATS:
            raise describe_codes(code, f"{module}.weight")
        check_rows(site, part)
    into = sum(part.in_features for part in parts)
    wrong = [part for part in parts if part.out_features != linear.out_features]
    if wrong or into != linear.in_features:
        worst = wrong[0] if wrong else first
        raise CheckpointError(
            f"{site.checkpoint.reference}: layer {worst.layer} is {worst.out_features} x {into} "
            f"(out x in), {site.model} expects {linear.out_features} x {linear.in_features} for "
            f"{module}: is this checkpoint of another model, or of another size?"
        )
    check_bias(site, module, parts, biased=linear.biased)


def check_rows(site: Site, part: Part) -> None:
    """A module's rows must be there, and no scale be cut; else raises CheckpointError."""
    code = site.find_code(part.layer)
    out = measure_features(part.scheme, code.shape)[0]
    what = explain_rows(part.target, out)
    if not what and part.scheme.scale == "block":
        rows = select_rows(part.target, out)
        try:
            kernels.check_rows(part.scheme, rows, out)
        except ValueError as error:
            what = str(error)
    if what:
        raise CheckpointError(
            f"{code.file}: layer {part.layer} holds the rows of {part.target.module} in the "
            f"{site.dialect.name} layout, and {what}: expected whole parts and whole blocks; "
            "quantize with one scale per channel, or with diffusers' names"
        )


def explain_rows(target: Target, stored_rows: int) -> str:
    """Why a layer with so many rows on disk cannot be cut as its dialect has it, or ''."""
    count = target.rows[2] * (2 if target.swap_halves else max(target.interleave, 1))
    return f"its {stored_rows} rows are no {count} equal parts" if stored_rows % count else ""


def check_bias(site: Site, module: str, parts: Sequence[Part], *, biased: bool) -> None:
    """A module with a bias needs one, every bias one number per row on disk.

    Where the model has none a bias of zeros may be stored: numbers decide, when they are read.
    Raises CheckpointError for a bias that is missing, of codes or of another length.
    """
    own = {part.layer: site.find_biases(part.layer) for part in parts}
    for part in parts:
        out = measure_features(part.scheme, site.find_code(part.layer).shape)[0]
        for header in own[part.layer]:
            folded = header.name.endswith("quant_bias")
            if not folded and header.dtype not in (*FLOATS, *site.numbers):
                raise describe_codes(header, f"{module}.bias")
            if header.shape != (out,):
                raise CheckpointError(
                    f"{header.file}: tensor {header.name} is a bias of shape {list(header.shape)}: "
                    f"expected [{out}], one number for each row of layer {part.layer}; the "
                    "checkpoint is damaged"
                )
    if biased and not any(own.values()):
        raise CheckpointError(
            f"{site.checkpoint.reference}: layer {parts[0].layer} has no bias, {site.model} expects "
            f"one in {module}: is the checkpoint of another model, or incomplete?"
        )


def find_biases(checkpoint: Checkpoint, layer: str, family: str) -> list[TensorHeader]:
    """The bias tensors of a layer on disk; a family may have several names for them."""
    names = (f"{layer}.{leaf}" for leaf in families.load(family).BIAS_LEAVES)
    return [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]


def place_plain(
    site: Site, parts: Mapping[str, Sequence[Part]], plain: Collection[str]
) -> tuple[PlainTensor, ...]:
    """Where each plain tensor goes.

    Raises CheckpointError for unknown names, two tensors for one parameter, and other shapes.
    """
    tensors = site.checkpoint.tensors
    layers = {
        f"{module}.{leaf}": own[0].layer
        for module, own in parts.items()
        for leaf in ("weight", "bias")
    }
    placed: dict[str, PlainTensor] = {}
    unknown = []
    for name in plain:
        for target, parameter in plain_targets(site, name):
            if parameter not in site.shapes.tensors:
                unknown.append(name)
                continue
            other = placed[parameter].name if parameter in placed else layers.get(parameter)
            if other is not None:
                raise CheckpointError(
                    f"{tensors[name].file}: tensors {other} and {name} are both {parameter} of "
                    f"{site.class_name}: expected one of them; names of two layouts are mixed, "
                    "write the checkpoint again"
                )
            shape = site.shapes.tensors[parameter]
            placed[parameter] = PlainTensor(name, parameter, target, shape)
    if unknown:
        raise CheckpointError(explain_names(site, unknown))
    for tensor in placed.values():
        check_shape(site, tensor)
    return tuple(placed.values())


def plain_targets(site: Site, name: str) -> Iterator[tuple[Target, str]]:
    """(target, parameter name in the model) of a tensor that is stored plainly.

    Raises CheckpointError for a layer whose rows the dialect interleaves.
    """
    whole = site.dialect.tensor_targets(name)
    if whole is not None:
        for target in whole:
            yield target, target.module
        return
    layer, _, leaf = name.rpartition(".")
    for target in site.dialect.layer_targets(layer):
        if target.interleave > 1:
            raise CheckpointError(
                f"{site.checkpoint.tensors[name].file}: tensor {name} is stored plainly, and the "
                f"{site.dialect.name} layout has {layer} as AWQ codes only: whether its rows are "
                "interleaved and 1 is added to its scale cannot be known"
            )
        yield target, f"{target.module}.{leaf}" if target.module else leaf


def check_shape(site: Site, tensor: PlainTensor) -> None:
    """A plain tensor must hold numbers, in its parameter's shape; else raises CheckpointError."""
    header = site.checkpoint.tensors[tensor.name]
    if header.dtype not in (*FLOATS, *site.numbers) and header.dtype not in BLOCKS:
        raise describe_codes(header, tensor.parameter)
    target, expected = tensor.target, site.shapes.tensors[tensor.parameter]
    what = ""
    start, stop, of = target.rows
    if of > 1 or target.swap_halves:
        rows = header.shape[0] if header.shape else 1
        what = explain_rows(target, rows)
        taken: tuple[int, ...] = (rows // of * (stop - start), *header.shape[1:])
    else:
        taken = header.shape
    fits = math.prod(taken) == math.prod(expected) if target.reshaped else taken == expected
    if what or not fits:
        rows_of = f", {stop - start} of {of} parts of the rows," if of > 1 else ""
        raise CheckpointError(
            f"{header.file}: tensor {tensor.name} has shape {list(header.shape)}, {site.model} "
            f"expects {list(expected)}{rows_of} for {tensor.parameter}: is this checkpoint of "
            "another model, or of another size?"
        )


def describe_codes(header: TensorHeader, parameter: str) -> CheckpointError:
    """The error about codes that stand where numbers belong."""
    return CheckpointError(
        f"{header.file}: tensor {header.name} holds {header.dtype} codes, but the checkpoint "
        f"describes {parameter} as full precision: its scale is missing, or its exclusion list is "
        "wrong; expected BF16, F16 or F32"
    )


def explain_names(site: Site, unknown: Sequence[str]) -> str:
    """The error about tensors that the model does not have; a prefix of theirs is named."""
    known = site.shapes.tensors
    text = (
        f"{site.checkpoint.reference}: {len(unknown)} tensors are unknown to {site.model}: "
        f"{shorten(unknown)}. "
    )
    if original := explain_original(site.checkpoint.tensors, site.class_name):
        return text + original
    prefix = find_common_prefix(
        unknown, lambda name: any(p in known for p in list_parameters(site, name))
    )
    if not prefix:
        return text + "Is this checkpoint of another model, or of another size?"
    count = sum(name.startswith(prefix) for name in site.checkpoint.tensors)
    return text + (
        f"{count} of its {len(site.checkpoint.tensors)} names begin with {prefix!r}, without which "
        "the model has them: such a prefix is taken off where every tensor of the transformer has "
        "it, and it is a known one; rename the tensors"
    )


def list_parameters(site: Site, name: str) -> list[str]:
    """Parameters that a name on disk stands for."""
    with_codes = name.rpartition(".")[0]
    found = [f"{target.module}.weight" for target in site.dialect.layer_targets(with_codes)]
    whole = site.dialect.tensor_targets(name)
    return [*found, *(target.module for target in whole or ()), name]


def select_rows(target: Target, stored_rows: int) -> torch.Tensor | slice | None:
    """Rows of the layer on disk that a module takes, in the module's order; None: all of them.

    A slice where they lie together, else int64 [rows].
    """
    start, stop, of = target.rows
    first, end = start * (stored_rows // of), stop * (stored_rows // of)
    if target.swap_halves:
        half = (first + end) // 2
        return torch.cat([torch.arange(half, end), torch.arange(first, half)])
    if target.interleave > 1:
        return torch.arange(first, end).view(-1, target.interleave).T.flatten()
    return None if of == 1 else slice(first, end)


def count_plain_linears(checkpoint: Checkpoint, plain: Sequence[str], dialect: Dialect) -> int:
    """Linear layers in full precision: the five models keep only those as 2-D `.weight`s."""
    count = 0
    for name in plain:
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(checkpoint.tensors[name].shape) == 2:
            count += len(dialect.layer_targets(layer))
    return count


def shorten(names: Sequence[str], most: int = SHOWN) -> str:
    """The first names, and how many there are beside them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
