"""Learned names: a model's original names, learned from diffusers' own converter.

For every model with files in original names diffusers has a function that takes such a state dict
and gives its own (`SINGLE_FILE_LOADABLE_CLASSES`). It is run once, before any weight is read, over
stand-ins of tensors (`Rows`) which know no numbers, only which rows of which tensor they are: what
comes out says where each tensor goes, how a fused one is cut, and which has its halves swapped.

| converter does | stands for |
| -------------- | ---------- |
| `d[new] = d.pop(old)` | another name |
| `a, b, c = torch.chunk(w, 3)` | three modules of equal sizes, in this order |
| `torch.split(w, (3072, 3072, 3072, 12288))` | four modules in this order, of the model's own sizes |
| `shift, scale = w.chunk(2); torch.cat([scale, shift])` | halves that are swapped |
| `w.reshape(6, -1)`, `w[0, :, 0, 0]` | a plain tensor in another shape |
| `d.pop(old)` alone | a tensor that is left aside |

A converter that does anything else is not learned. The sizes of a split are the model's, since
converters name those of the published one. A tensor that the file lacks is none in the result, and
the plan says which ones of the model's are missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantmatrix.models.dialect import Dialect, Target

if TYPE_CHECKING:
    from collections.abc import Callable

Shape = tuple[int, ...]
WEIGHT = ".weight"


@dataclass(frozen=True)
class LearnedDialect(Dialect):
    """The names of one file, tensor by tensor."""

    table: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    """Targets of each tensor on disk (module = tensor name); those of a dropped one are none."""
    source: str = ""
    """The class of diffusers whose converter was asked."""

    def layer_targets(self, layer: str) -> tuple[Target, ...]:
        """Diffusers modules of a layer on disk, those that its weight goes to."""
        targets = self.table.get(layer + WEIGHT)
        if targets is None or not all(t.module.endswith(WEIGHT) for t in targets):
            return (Target(layer),)
        return tuple(replace(t, module=t.module.removesuffix(WEIGHT)) for t in targets)

    def tensor_targets(self, name: str) -> tuple[Target, ...] | None:
        """Targets of a tensor; None where the converter left its name as it is."""
        return self.table.get(name)

    def dropped(self) -> dict[str, str]:
        """Tensors that the converter leaves aside, each with the reason."""
        why = f"diffusers leaves it out of a {self.source}, too"
        return {name: why for name, targets in self.table.items() if not targets}


class LearningError(Exception):
    """A converter that does what stand-ins cannot follow, or that these names do not suit."""


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a tensor on disk: one of the pieces into which it was cut."""

    source: str
    index: int = 0
    count: int = 1
    sizes: tuple[int, ...] = ()
    """Rows of each piece, as a converter has them; empty: all are equal."""


@dataclass(frozen=True)
class Rows:
    """What a converter sees in parameter of a tensor: runs of rows, and a shape."""

    runs: tuple[Run, ...]
    shape: Shape
    reshaped: bool = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """torch.chunk, torch.split and torch.cat as methods of the stand-in."""
        name, kwargs = func.__name__, kwargs or {}
        if name == "cat":
            [pieces, dim] = [*args, kwargs.get("dim", 0)][:2]
            if dim != 0:
                raise LearningError(f"{describe(pieces[0])} is joined, and not by rows")
            return cls.join(pieces)
        if name not in ("chunk", "split"):
            raise LearningError(f"{name} is applied to {describe(args[0])}")
        return getattr(args[0], name)(*args[1:], **kwargs)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def chunk(self, chunks: int, dim: int = 0) -> list[Rows]:
        """Equal pieces."""
        rows = self.shape[0] // chunks
        return self._cut(dim, chunks, (), [rows] * chunks)

    def split(self, split_size_or_sections: Any, dim: int = 0) -> list[Rows]:
        """Pieces of these sizes."""
        sizes = split_size_or_sections
        if isinstance(sizes, int):
            return self.chunk(-(-self.shape[0] // sizes), dim)
        return self._cut(dim, len(sizes), tuple(sizes), [max(1, size) for size in sizes])

    def _cut(self, dim: int, count: int, sizes: Shape, rows: Sequence[int]) -> list[Rows]:
        [run] = self.runs
        if dim != 0 or run.count > 1 or self.reshaped:
            raise LearningError(f"{describe(self)} is cut twice, or not by rows")
        if not run.source:
            return [self] * count
        return [
            Rows((Run(run.source, index, count, sizes),), (rows[index], *self.shape[1:]))
            for index in range(count)
        ]

    @staticmethod
    def join(pieces: Sequence[Rows]) -> Rows:
        """Pieces one below the other."""
        runs = tuple(run for piece in pieces for run in piece.runs)
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        return Rows(runs, shape, any(piece.reshaped for piece in pieces))

    def __getitem__(self, key: Any) -> Rows:
        """Some rows, or the whole without dimensions of 1."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self.shape[0])
            sizes = (start, stop - start, self.shape[0] - stop)
            kept = [size for size in sizes if size > 0]
            if step != 1 or stop <= start:
                raise LearningError(f"rows {key} of {describe(self)}")
            return self._cut(0, len(kept), tuple(kept), kept)[1 if start > 0 else 0]
        keys = key if isinstance(key, tuple) else (key,)
        pairs = list(zip(keys, self.shape, strict=False))
        if any(k != slice(None) and (k != 0 or size != 1) for k, size in pairs):
            raise LearningError(f"[{key}] of {describe(self)}")
        left = [size for k, size in pairs if k == slice(None)]
        return self.reshape(*left, *self.shape[len(keys) :])

    def reshape(self, *shape: Any) -> Rows:
        """The same numbers in another shape."""
        wanted = list(shape[0] if isinstance(shape[0], Sequence) else shape)
        if -1 in wanted:
            wanted[wanted.index(-1)] = math.prod(self.shape) // -math.prod(wanted)
        return replace(self, shape=tuple(wanted), reshaped=True)

    view = reshape

    def contiguous(self) -> Rows:
        """The same: how numbers lie in memory is nothing here."""
        return self

    clone = contiguous


LOST = Rows((Run(""),), (1, 1))
"""What stands for a tensor that the file lacks; nothing that comes of it is kept."""


class StateDict(dict[str, Any]):
    """The state dict that a converter takes apart; it has every name that is asked for."""

    def pop(self, key: str, *default: Any) -> Any:
        """The tensor of that name, the default, or what stands for a missing one."""
        return super().pop(key, default[0] if default else LOST)

    def __missing__(self, key: str) -> Any:
        return LOST


def describe(rows: Any) -> str:
    """A stand-in as errors name it."""
    runs = rows.runs if isinstance(rows, Rows) else ()
    return runs[0].source if runs else type(rows).__name__


def find_converter(class_name: str) -> Callable[..., Any] | None:
    """The function by which diffusers converts a model's original state dict, if it has one."""
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    for base in getattr(diffusers, class_name, object).__mro__:
        if found := SINGLE_FILE_LOADABLE_CLASSES.get(base.__name__):
            converter: Callable[..., Any] = found["checkpoint_mapping_fn"]
            return converter
    return None


def learn(
    class_name: str,
    config: Mapping[str, Any],
    names: Mapping[str, Shape],
    model: Mapping[str, Shape],
) -> LearnedDialect | None:
    """The dialect of tensors with these names and shapes, for a model of this class.

    `names` are those on disk, one `.weight` for each quantized layer; `model` has the shapes of the
    model, by diffusers name. None where there is no converter, or where it makes of them no more
    names of the model than there are. Raises LearningError where a converter cannot be followed.
    """
    converter = find_converter(class_name)
    if converter is None:
        return None
    state = StateDict({name: Rows((Run(name),), shape) for name, shape in names.items()})
    try:
        converted = converter(checkpoint=state, config=config)
    except Exception as error:  # whatever a converter does with names that it was not made for
        raise LearningError(f"{type(error).__name__}: {error}") from error
    led: dict[str, dict[str, Rows]] = {}
    for parameter, rows in converted.items():
        if isinstance(rows, Rows) and rows.runs[0].source:
            led.setdefault(rows.runs[0].source, {})[parameter] = rows
    table = {name: name_targets(found, model) for name, found in led.items()}
    left = {name for name in state if state[name] == Rows((Run(name),), names.get(name, ()))}
    table |= {name: () for name in names if name not in table and name not in left}
    gained = sum(target.module in model for targets in table.values() for target in targets)
    if gained <= sum(name in model for name in names):
        return None
    return LearnedDialect("original", "", table=table, source=class_name)


def name_targets(found: Mapping[str, Rows], model: Mapping[str, Shape]) -> tuple[Target, ...]:
    """Where the rows of one tensor on disk go, in their order there.

    Raises LearningError for what a `Target` cannot say.
    """
    parameters = sorted(found, key=lambda parameter: found[parameter].runs[0].index)
    whole = [
        parameter
        for parameter in parameters
        if len(found[parameter].runs) > 1 or found[parameter].runs[0].count == 1
    ]
    if whole:
        return tuple(name_whole(parameter, found[parameter]) for parameter in whole)
    first = found[parameters[0]].runs[0]
    if [found[parameter].runs[0].index for parameter in parameters] != list(range(first.count)):
        raise LearningError(f"{first.source} is cut into pieces, of which some go nowhere or twice")
    sizes = [1] * first.count
    if first.sizes:
        own = [model.get(parameter, ()) for parameter in parameters]
        sizes = [s[0] if s else max(1, size) for s, size in zip(own, first.sizes, strict=True)]
    unit, ends = math.gcd(*sizes), list(itertools.accumulate(sizes, initial=0))
    return tuple(
        Target(
            parameter,
            rows=(ends[index] // unit, ends[index + 1] // unit, ends[-1] // unit),
            reshaped=found[parameter].reshaped,
        )
        for index, parameter in enumerate(parameters)
    )


def name_whole(parameter: str, rows: Rows) -> Target:
    """Where all rows of a tensor go together; LearningError for another order than of two halves."""
    run, order = rows.runs[0], [r.index for r in rows.runs]
    same = {replace(r, index=0) for r in rows.runs} == {replace(run, index=0)}
    if not same or sorted(order) != list(range(run.count)):
        raise LearningError(f"{parameter} is made of several tensors, or of a part of {run.source}")
    if order != sorted(order) and (order != [1, 0] or run.sizes):
        raise LearningError(f"{parameter} has the rows of {run.source} in another order")
    return Target(parameter, swap_halves=order != sorted(order), reshaped=rows.reshaped)
