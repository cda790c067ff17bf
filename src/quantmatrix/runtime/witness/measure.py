"""Witness measurements: decoded rows of a few layers beside the same rows of the base model.

Layers fall into *kinds*: one scheme, one naming rule (the layer's name with its block's number left
open, and the module that takes its rows). Of each kind a few layers are taken, spread over the
depth, and of each a run of whole tiles of rows, spread over its height. They go the loader's own
way: tensors on disk, the family's canonical form, the rows that the module takes, the op's decoding
into float32 [rows, columns]. With `d` the decoded rows and `b` the base model's:

| number        | is | shows |
| ------------- | -- | ----- |
| `cosine`      | d.b / (|d| |b|) | swapped nibbles, tiles read as rows, another model, no low-rank branch |
| `coded_cosine` | the same without the low-rank branch (its product taken from both) | the same |
|               | where the branch holds most of a weight; else equal to `cosine` |
| `relative_l2` | |d - b| / |b| | all of it |
| `gain`        | |d| / |b| | a scale that is wrong as a whole |
| `scale_error` | the distance of the lengths of the groups that share a scale, both sides at unit |
|               | length | scales in another order, at whatever distance the weights are |

`gain` and `scale_error` are of the coded part, too. A finetune moves single weights and hardly the
length of a group, so they tell its weights from wrong scales. Of the base only these rows are read
(`row_reader`); the checkpoint's file is mapped, and will be read whole by the loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantmatrix import families, kernels
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.checkpoints.row_reader import RowReader
from quantmatrix.runtime.pieces import read_layer
from quantmatrix.runtime.plan.placement import select_rows
from quantmatrix.runtime.plan.types import ComponentPlan, Piece
from quantmatrix.scheme import Scheme

if TYPE_CHECKING:
    from quantmatrix.scheme import Scheme

LAYERS = 3
"""Layers of each kind."""
TILE = 128
"""Rows that lie together in every format on disk."""
ELEMENTS = 2**17
"""Weights of one layer that are looked at, or those of one tile if it has more."""
BRANCH = ("proj_up", "lora_b")
"""Canonical tensors without which a low-rank branch adds nothing."""
TINY = 1e-30
NUMBER = re.compile(r"\.\d+(?=\.)")
"""A block's number in a layer's name."""


@dataclass(frozen=True)
class Sample:
    """Some rows of a layer on disk, and where they lie in the base model's weight."""

    module: str
    piece: Piece
    kind: str
    start: int
    """First row on disk."""
    stop: int
    column: int
    """First column of the module's weight that the layer serves."""


@dataclass(frozen=True)
class Likeness:
    """How near decoded rows are to the base model's."""

    cosine: float
    coded_cosine: float
    relative_l2: float
    gain: float
    scale_error: float
    nbytes: int
    """Bytes that were looked at, on both sides."""


def name_kind(piece: Piece) -> str:
    """The naming rule of a layer: `double_blocks.{i}.img_attn.qkv -> ...attn.to_k`."""
    layer = NUMBER.sub(".{i}", piece.layer, count=1)
    module = NUMBER.sub(".{i}", piece.target.module, count=1)
    return layer if layer == module else f"{layer} -> {module}"


def choose_samples(component: ComponentPlan) -> Iterator[Sample]:
    """The rows to look at, the same ones every time: a few layers of each kind and scheme."""
    kinds: dict[tuple[Scheme, str], list[tuple[str, Piece, int]]] = {}
    for module, pieces in component.layers.items():
        column = 0
        for piece in pieces:
            found = kinds.setdefault((piece.scheme, name_kind(piece)), [])
            found.append((module, piece, column))
            column += piece.in_features
    for (_, kind), found in kinds.items():
        for index, (module, piece, column) in enumerate(spread(found, LAYERS)):
            yield Sample(module, piece, kind, *choose_rows(piece, index), column)


def spread(items: list[tuple[str, Piece, int]], count: int) -> list[tuple[str, Piece, int]]:
    """The first, the last, and some between them."""
    if len(items) <= count:
        return items
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def choose_rows(piece: Piece, index: int) -> tuple[int, int]:
    """First row on disk of a run of tiles, and its end; which run depends on `index`."""
    height = find_height(piece.scheme)
    count = max(1, ELEMENTS // piece.in_features // height) * height
    start, stop, _ = piece.target.rows
    each = piece.out_features
    first = each * start // (stop - start)
    if count >= each:
        return first, first + each
    start = first + (each - count) * index // (LAYERS - 1)
    start = max(first, start // height * height)
    return start, min(start + count, first + each)


def find_height(scheme: Scheme) -> int:
    """Rows that have to be read together: whole tiles, and whole blocks that share a scale."""
    return math.lcm(TILE, max(1, scheme.block[0]))


def find_cut(piece: Piece, start: int, stop: int) -> tuple[int, int]:
    """The whole tiles that hold some rows on disk."""
    height, total = find_height(piece.scheme), piece.target.count_stored(piece.out_features)
    return start // height * height, min(total, -(-stop // height) * height)


def compare_sample(
    component: ComponentPlan,
    sample: Sample,
    scheme: Scheme,
    stored: TensorReader,
    base: RowReader,
) -> Likeness:
    """Decode a sample under a scheme, and compare it with the base model's rows."""
    piece = sample.piece
    family = families.load(str(component.family))
    tensors = read_layer(component.checkpoint, piece.layer, stored)
    first, end = find_cut(piece, sample.start, sample.stop)
    cut = family.cut_rows(tensors, scheme, first, end)
    canonical = family.canonical(cut, scheme)
    rows, order = find_rows(piece, sample.start, sample.stop)
    decoded = [kernels.decode(scheme, canonical)[0]]
    for name in BRANCH:
        if scheme.rank and name in canonical:
            bare = canonical | {name: torch.zeros_like(canonical[name])}
            decoded.append(kernels.decode(scheme, bare)[0])
    plain = base.read(f"{sample.module}.weight", rows)
    plain = plain[:, sample.column : sample.column + piece.in_features].float()
    nbytes = sum(tensor.nbytes for tensor in cut.values()) + plain.numel() * 2
    own = slice(sample.start - first, sample.stop - first)
    found = [weight[own] if order is None else weight[own][order] for weight in decoded]
    return measure_likeness(found[0], plain, scheme, found[-1], nbytes)


def find_rows(
    piece: Piece, start: int, stop: int
) -> tuple[torch.Tensor | slice, torch.Tensor | None]:
    """(rows of the module that lie in [start, stop) on disk, their order there; None: the same).

    Both are int64 [rows], the first also a slice.
    """
    order = select_rows(piece.target, piece.target.count_stored(piece.out_features))
    if order is None or isinstance(order, slice):
        first = 0 if order is None else order.start
        return slice(start - first, stop - first), None
    rows = ((order >= start) & (order < stop)).nonzero().flatten()
    return rows, order[rows] - start


def measure_likeness(
    decoded: torch.Tensor,
    base: torch.Tensor,
    scheme: Scheme,
    coded: torch.Tensor | None = None,
    nbytes: int = 0,
) -> Likeness:
    """Cosines and distances of two float32 [rows, columns].

    `coded` is what the codes alone decode to. The branch beside them (`decoded - coded`) is taken
    from both sides for what is said of codes and scales. NaN counts as infinitely far. `nbytes` is
    how many bytes of the base were read for it.
    """
    size, length = float(base.norm()), float(decoded.norm())
    cosine = find_cosine(float(decoded.flatten() @ base.flatten()), length, size)
    distance = float((decoded - base).norm()) / max(size, TINY)
    rest, beside = base, cosine
    if coded is None or coded is decoded:
        coded = decoded
    else:
        rest = base - (decoded - coded)
        product = float(coded.flatten() @ rest.flatten())
        beside = find_cosine(product, float(coded.norm()), float(rest.norm()))
    own, expected = (split_groups(weight, scheme).norm(dim=1) for weight in (coded, rest))
    whole, aim = float(own.norm()), float(expected.norm())
    gain = whole / max(aim, TINY) if whole or aim else 1.0
    unit = float((own / max(whole, TINY) - expected / max(aim, TINY)).norm())
    numbers = (cosine, beside, distance, gain, unit)
    if not all(math.isfinite(number) for number in numbers):
        return Likeness(0.0, 0.0, math.inf, math.inf, math.inf, nbytes)
    return Likeness(*numbers, nbytes)


def find_cosine(product: float, one: float, other: float) -> float:
    """The cosine of two tensors of these lengths; 1 of two that are zero."""
    return product / max(one * other, TINY) if max(one, other) else 1.0


def split_groups(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A view or copy [groups, elements] of [out, in], in its dtype, each group having one scale."""
    rows, columns = weight.shape
    if scheme.scale == "tensor":
        return weight.reshape(1, -1)
    if scheme.scale == "channel":
        return weight
    if scheme.scale == "block":
        high, wide = scheme.block
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
        tall, broad = padded.shape[0] // high, padded.shape[1] // wide
        return padded.view(tall, high, broad, wide).transpose(1, 2).reshape(tall * broad, -1)
    return weight.reshape(-1, scheme.group_size)
