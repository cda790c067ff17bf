"""Faults: the ways in which a quantized checkpoint goes wrong, injected on purpose.

Each is put into one layer, the middle one of those that it can happen to, because that is where it
is hardest to see. Three parts:

| part    | what is changed |
| ------- | --------------- |
| tensors | the layer's tensors on disk; names, dtypes and shapes stay, unless something is dropped |
| files   | the checkpoint is written again, from another declaration or other base weights |
| model   | modules of the model that was loaded: what a wrong loader would have built |

A fault that cannot happen to a row (nibbles of FP8, the second expert of a model with one), or that
changes no bit there, is not injected and not counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantmatrix.families.protocol import Calibration
from quantmatrix.files import share_file
from quantmatrix.models.dialect import Dialect
from quantmatrix.runtime.plan.types import ComponentPlan, Plan
from quantmatrix.scheme import Scheme
from quantmatrix.tables.rows import CheckpointRow

Tensors = dict[str, torch.Tensor]
CODES = ("weight", "qweight", "linear.weight")
LOW_RANK = ("proj_up", "svdquant_lora_b")
MUST = ("swapped-nibbles", "dropped-scales", "transposed-scales", "wrong-scale-layout",
        "low-rank-skipped", "excluded-layer-quantized")  # fmt: skip
"""Faults that no row may ever miss."""
WITNESSED = ("swapped-nibbles", "dropped-scales", "transposed-scales", "wrong-scale-layout",
             "low-rank-skipped", "wrong-expert")  # fmt: skip
"""Faults that the witness alone must tell of, wherever headers do not show them."""


@dataclass(frozen=True)
class Fault:
    """A fault; exactly one of the three functions is given."""

    name: str
    what: str
    tensors: Callable[[Tensors], Tensors | None] | None = None
    """New tensors of a layer, by suffix, or None where it cannot happen."""
    files: Callable[[CheckpointRow, Path, Path], tuple[CheckpointRow, Path] | None] | None = None
    """(row, base folder) to write the checkpoint from; gets row, base and an empty folder."""
    exporting: Callable[[], AbstractContextManager[None]] = nullcontext
    """What is wrong with the exporter while the files are written."""
    model: Callable[[Any, Plan, Plan], bool] | None = None
    """Changes a pipeline; gets its plan and the base model's, says whether it could."""


def find_codes(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Suffix of the codes of a layer, among its tensors on disk of any shape and dtype."""
    return next((name for name in CODES if name in tensors), None)


def find_scales(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Suffixes of the weight scales of a layer, the most detailed first.

    Among its tensors on disk, of any shape and dtype; those of inputs and of smoothing are left
    out.
    """
    others = ("input", "pre_quant", "smooth", "quant_bias")
    names = [
        name
        for name in tensors
        if ("scale" in name.rpartition(".")[2] or name.endswith("scales"))
        and not any(part in name for part in others)
    ]
    return sorted(names, key=lambda name: -tensors[name].numel())


def swap_nibbles(tensors: Tensors) -> Tensors | None:
    """Low and high half of every byte exchanged, where two codes share a byte.

    Codes are uint8 or int8 [out, in/2]; None where the layer has none such.
    """
    codes = find_codes(tensors)
    if codes is None or tensors[codes].is_floating_point():
        return None
    packed = tensors[codes]
    if packed.dtype == torch.int8 and not codes.startswith("q"):
        return None  # one code per byte
    raw = packed.contiguous().view(torch.uint8)
    swapped = ((raw & 15) << 4) | (raw >> 4)
    return {**tensors, codes: swapped.view(packed.dtype)}


def drop_scales(tensors: Tensors) -> Tensors | None:
    """The most detailed weight scale, of any shape and dtype, is not in the file."""
    names = find_scales(tensors)
    return {n: x for n, x in tensors.items() if n != names[0]} if names else None


def unit_scales(tensors: Tensors) -> Tensors | None:
    """The most detailed weight scale, of any shape and dtype, is taken as one."""
    names = find_scales(tensors)
    return {**tensors, names[0]: torch.ones_like(tensors[names[0]])} if names else None


def transpose_scales(tensors: Tensors) -> Tensors | None:
    """A matrix of scales [rows, columns] with its rows written as columns; shape and dtype stay."""
    names = [name for name in find_scales(tensors) if is_matrix(tensors[name])]
    if not names:
        return None
    scales = tensors[names[0]]
    return {**tensors, names[0]: scales.T.contiguous().reshape(scales.shape)}


def is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and dtype has two dimensions of more than one element."""
    return tensor.ndim == 2 and min(tensor.shape) > 1


def misplace_scales(tensors: Tensors) -> Tensors | None:
    """Scales in another layout: their two halves interleaved, as a tiled layout would be.

    They may have any shape and dtype, which stay.
    """
    names = find_scales(tensors)
    if not names or tensors[names[0]].numel() < 2:
        return None
    scales = tensors[names[0]]
    halves = scales.flatten().reshape(2, -1) if scales.numel() % 2 == 0 else None
    if halves is None:
        return None
    return {**tensors, names[0]: halves.T.contiguous().reshape(scales.shape)}


def skip_low_rank(tensors: Tensors) -> Tensors | None:
    """The low-rank branch adds nothing: its second factor [out, rank], of any float dtype, is zero."""
    name = next((name for name in LOW_RANK if name in tensors), None)
    return {**tensors, name: torch.zeros_like(tensors[name])} if name else None


def stale_scale(tensors: Tensors) -> Tensors | None:
    """The activation scale is of another calibration: an eighth of what it should be.

    It is float32, [] or [1].
    """
    name = "input_scale"
    return {**tensors, name: tensors[name] / 8} if name in tensors else None


def corrupt(tensors: Tensors) -> Tensors | None:
    """The codes begin in the middle of the tensor, as after a torn write.

    They may have any shape and dtype, which stay.
    """
    codes = find_codes(tensors)
    if codes is None:
        return None
    raw = tensors[codes].contiguous().view(torch.uint8).flatten()
    moved = raw.roll(raw.numel() // 2).view(tensors[codes].dtype).reshape(tensors[codes].shape)
    return {**tensors, codes: moved}


def keep_base(row: CheckpointRow, base: Path, _: Path) -> tuple[CheckpointRow, Path] | None:
    """The row as it is, if it keeps layers in full precision."""
    return (row, base) if row.kept else None


@contextmanager
def quantizing_excluded() -> Iterator[None]:
    """The exporter quantizes, and declares, one of the layers that the row keeps."""
    from quantmatrix.tiny import checkpoints
    from quantmatrix.tools.packing import split

    original = checkpoints.choose_schemes

    def choose(
        row: CheckpointRow, packed: Mapping[str, torch.Tensor], dialect: Dialect
    ) -> dict[str, Scheme]:
        found = original(row, packed, dialect)
        kept = checkpoints.find_kept(row)
        scheme = found[min(found)]
        for name in sorted(packed):
            layer, leaf = split(name)
            weight = packed[name]
            if leaf != "weight" or weight.ndim != 2 or layer in found or weight.shape[1] % 64:
                continue
            if any(kept(target.module) for target in dialect.layer_targets(layer)):
                return {**found, layer: scheme}
        return found

    checkpoints.choose_schemes = choose
    try:
        yield
    finally:
        checkpoints.choose_schemes = original


def exchange_experts(
    row: CheckpointRow, base: Path, empty: Path
) -> tuple[CheckpointRow, Path] | None:
    """The checkpoint holds the other expert's weights."""
    pair = ("transformer", "transformer_2")
    if not all((base / name).is_dir() for name in pair):
        return None

    def share(source: str, target: str) -> None:
        share_file(Path(source), Path(target))

    for path in base.iterdir():
        other = dict(zip(pair, reversed(pair), strict=True)).get(path.name, path.name)
        if path.is_dir():
            shutil.copytree(path, empty / other, copy_function=share)
        else:
            share_file(path, empty / other)
    return row, empty


def load_plain(pipeline: Any, plan: Plan, base: Plan) -> bool:
    """Every quantized layer computes with the base model's weights, and looks as planned."""
    from torch.nn import functional

    from quantmatrix.runtime.load import load_component

    for name, part in plan.components.items():
        if not part.layers:
            continue
        plain = load_component(base.components[name], base.request)
        transformer = getattr(pipeline, name)
        for module in part.layers:
            linear = plain.get_submodule(module)

            def forward(x: torch.Tensor, linear: Any = linear) -> torch.Tensor:
                return functional.linear(x, linear.weight, linear.bias)

            transformer.get_submodule(module).forward = forward
    return True


def ignore_fallbacks(pipeline: Any, plan: Plan, base: Plan) -> bool:
    """The loader quantizes a layer that the checkpoint keeps in full precision."""
    from quantmatrix import families, kernels
    from quantmatrix.runtime.load import place_module
    from quantmatrix.runtime.quantized_linear import QuantizedLinear

    for name, part in plan.components.items():
        transformer = getattr(pipeline, name)
        like = find_quantizable(part, transformer)
        if like is None:
            continue
        module, linear, piece = like
        family = families.load(str(part.family))
        high = torch.full((linear.in_features,), 4.0)
        bias = None if linear.bias is None else linear.bias.detach()
        stored = family.quantize(
            linear.weight.detach().float(),
            piece.scheme,
            bias=bias,
            calibration=Calibration(-high, high),
        )
        canonical = family.canonical(stored, piece.scheme)
        kernel = next(k for k in kernels.kernels_of(piece.scheme.op) if k.backend == piece.backend)
        sizes = (linear.in_features, linear.out_features)
        dtype = linear.weight.dtype
        layer = QuantizedLinear(*sizes, kernel, piece.scheme, canonical, dtype)
        place_module(transformer, module, layer)
        return True
    return False


def find_quantizable(part: ComponentPlan, transformer: Any) -> tuple[str, Any, Any] | None:
    """(name, module, a piece like it) of a layer in full precision as large as a quantized one."""
    by_size = {(p.out_features, p.in_features): p for p in part.pieces() if not p.scheme.rank}
    for name, module in transformer.named_modules():
        if type(module) is torch.nn.Linear:
            piece = by_size.get((module.out_features, module.in_features))
            if piece is not None:
                return name, module, piece
    return None


FAULTS = (
    Fault("swapped-nibbles", "the two codes of every byte exchanged", tensors=swap_nibbles),
    Fault("dropped-scales", "the weight scales are not in the file", tensors=drop_scales),
    Fault("transposed-scales", "rows of scales written as columns", tensors=transpose_scales),
    Fault("wrong-scale-layout", "scales in the order of another layout", tensors=misplace_scales),
    Fault("low-rank-skipped", "the low-rank branch adds nothing", tensors=skip_low_rank),
    Fault(
        "excluded-layer-quantized",
        "a kept layer is quantized",
        files=keep_base,
        exporting=quantizing_excluded,
    ),
    Fault("unit-scales", "weight scales taken as one", tensors=unit_scales),
    Fault("bf16-under-label", "quantized layers compute with base weights", model=load_plain),
    Fault("wrong-expert", "the weights of the other expert", files=exchange_experts),
    Fault("stale-activation-scale", "input scale of another calibration", tensors=stale_scale),
    Fault("corrupted-tensor", "codes of one layer torn in the middle", tensors=corrupt),
    Fault("fallback-list-ignored", "the loader quantizes a kept layer", model=ignore_fallbacks),
)
"""Every fault, those that must never be missed first."""
