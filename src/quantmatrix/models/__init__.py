"""The base models: one module per id, and the types with which they describe tensor names.

A *dialect* is one way of naming (and packing) a model's tensors. Its rules lead from a name on disk
to diffusers' module names, so that a checkpoint can be described from its headers alone. `{i}`
stands for a block number. Every model has the dialect `diffusers`, the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from quantmatrix.errors import UsageError
from quantmatrix.models import further
from quantmatrix.models.dialect import DIFFUSERS

if TYPE_CHECKING:
    from quantmatrix.models.dialect import Dialect
    from quantmatrix.models.forward import Draw, Step
    from quantmatrix.models.stand_in import StandIn

IDS = ("flux-1", "flux-2", "wan-2-2", "qwen-image", "z-image")


@dataclass(frozen=True)
class Defaults:
    """What a request takes when the user says nothing; sizes in pixels, frames in frames."""

    height: int
    width: int
    steps: int
    guidance: float
    frames: int = 1
    negative_prompt: str = ""
    fps: int = 16


class Model(Protocol):
    """The names that every module in `quantmatrix.models` has."""

    ID: str
    NAME: str
    """Short name, as `--model-id` takes it (`FLUX.1-dev`)."""
    REPO: str
    PIPELINE: str
    """Class name of the diffusers pipeline."""
    TRANSFORMER: str
    """Class name of the diffusers transformer."""
    COMPONENTS: tuple[str, ...]
    """Transformer components, primary first."""
    DEFAULTS: Defaults
    TINY_DEFAULTS: Defaults
    DIALECTS: tuple[Dialect, ...]
    FALLBACKS: Mapping[str, tuple[str, ...]]
    """Named sets of regular expressions over module names that a checkpoint keeps in BF16."""
    BLOCKS: tuple[str, ...]
    """Attribute names of the transformer's block lists, in forward order (layerwise offload)."""
    TINY: Mapping[str, Any]
    """Options of the transformer of the stand-in."""
    FULL: Mapping[str, Any]
    """Options of the published transformer beyond the defaults of its class in diffusers."""
    ONE_BLOCK: Mapping[str, Any]
    """Options that leave one block of each kind."""
    STEP: Step
    STAND_IN: StandIn
    """The parts of the tiny stand-in pipeline."""

    def call_arguments(self, request: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline call for a request (size, steps, guidance ...).

        Raises UsageError for a flag that the model does not take.
        """

    def forward_inputs(self, config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
        """Arguments of one forward at the model's usual size, or (tiny) at a small one."""


def refuse_flags(request: Any, name: str, *fields: str) -> None:
    """Raise UsageError for a field that is set although the model has no use for it."""
    for field in fields:
        if getattr(request, field) is not None:
            raise UsageError(f"--{field.replace('_', '-')}: {name} takes none; leave the flag out")


def load(model: str) -> Model:
    """The module of a model id, or what stands for it; raises KeyError for an unknown one.

    An id `MODEL/CLASS` is that of a pipeline without a module (see `quantmatrix.models.generic`), one
    of `further.IDS` that of a model which has a stand-in alone.
    """
    if model in further.IDS:
        return load_further(model)
    if "/" in model:
        from quantmatrix.models import generic

        name = model.partition("/")[0]
        own = None if name == generic.UNKNOWN else load_file(name)
        return cast("Model", generic.describe(model, own))
    return load_file(model)


def load_further(model: str) -> Model:
    """A model of `quantmatrix.models.further`, with all that the model of its pipeline says."""
    described = further.load_module(model)
    pipeline, transformer = described.PIPELINE, described.TRANSFORMER
    used = by_class(pipeline) or by_transformer(pipeline, transformer)
    assert used is not None, f"{model}: diffusers has no {pipeline} with a {transformer}"
    return cast("Model", further.Further(described, load(used)))


def load_file(model: str) -> Model:
    """The module of a model that has one; raises KeyError for an unknown one."""
    if model not in IDS:
        raise KeyError(f"no such base model: {model}; known: {', '.join(IDS)}")
    return cast("Model", import_module(f"quantmatrix.models.{model.replace('-', '_')}"))


def by_class(class_name: str) -> str | None:
    """Model id of a transformer or pipeline class name, or None."""
    for name in IDS:
        model = load(name)
        if class_name in (model.TRANSFORMER, model.PIPELINE):
            return name
    return None


def by_transformer(class_name: str, transformer: str) -> str | None:
    """Model id of a pipeline of another class with a transformer of this class, or None.

    `class_name` may be the transformer's own, of a component alone. None stands for a pipeline or
    a transformer that diffusers does not have.
    """
    from quantmatrix.models import generic

    if not generic.is_transformer(transformer):
        return None
    if class_name != transformer and generic.find_pipeline(class_name) is None:
        return None
    return f"{by_class(transformer) or generic.UNKNOWN}/{class_name}"


def by_short_name(short_name: str) -> str | None:
    """Model id of a `--model-id` value (the hub id's last part, any case), or None."""
    for name in IDS:
        if short_name.lower() in (
            load(name).NAME.lower(),
            load(name).REPO.rsplit("/", 1)[-1].lower(),
        ):
            return name
    return None


def dialect_of(model: str, names: Iterable[str]) -> Dialect:
    """The dialect that a set of tensor names is written in; `diffusers` when no other matches."""
    listed = list(names)
    others = [d for d in load(model).DIALECTS if d.name != "diffusers"]
    return next((d for d in others if d.matches(listed)), DIFFUSERS)
