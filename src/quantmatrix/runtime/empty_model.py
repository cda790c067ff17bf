"""Empty model: a diffusers transformer without memory, and the names and shapes that it has.

Built from its configuration on the meta device, a model of any size takes a tenth of a second. A
plan compares the headers of a checkpoint with it, and the loader fills one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantmatrix import models
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.quoting import quote
from quantmatrix.runtime.library_logs import escaped

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Linear:
    """What a linear layer of a model takes."""

    out_features: int
    in_features: int
    biased: bool


@dataclass(frozen=True)
class ModelShapes:
    """What a model is made of, by diffusers name."""

    tensors: Mapping[str, tuple[int, ...]]
    """Shape of every parameter and buffer that a checkpoint may hold."""
    required: frozenset[str]
    """Those that a checkpoint must hold: the rest is computed when the model is built."""
    linears: Mapping[str, Linear]
    modules: Mapping[str, str]
    """Class of every module."""
    repeated: tuple[str, ...] = ()
    """Classes of blocks, as far as the model's class declares them."""


def build_empty(class_name: str, config: Mapping[str, Any], config_from: str) -> nn.Module:
    """The diffusers model of a configuration on the meta device (its computed buffers are real).

    Raises CheckpointError naming `config_from`, the file of the configuration.
    """
    import diffusers

    model_class = find_model_class(class_name)
    if model_class is None:
        raise CheckpointError(
            f"{config_from}: _class_name {class_name!r} is not a diffusers model: expected the class "
            f"of a transformer that diffusers {diffusers.__version__} has"
        )
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with escaped(), without_memory():
            model: nn.Module = construct(model_class, own)
    except Exception as error:  # whatever a constructor of diffusers does with a damaged value
        why = quote(f"{type(error).__name__}: {error}")
        raise CheckpointError(
            f"{config_from}: no {class_name} can be built from it ({why}): a value is of a wrong "
            "kind or missing; compare it with the base model's config.json"
        ) from error
    return model


@contextmanager
def without_memory() -> Iterator[None]:
    """A context in which a model's parameters have no memory, and nobody fills them.

    transformers keeps torch's functions that fill as they are when it is imported. Imported in this context,
    as by a class of diffusers, it would have ones that do nothing, for as long as the process lives: buffers
    of text encoders that no file has (Gemma's scale of its embeddings) would be whatever lies in memory.
    """
    import transformers.initialization  # noqa: F401
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights(), init_empty_weights():
        yield


def find_model_class(class_name: str) -> Any:
    """The class of a model: one of diffusers, else a model of transformers; None: neither has it."""
    import diffusers

    if (found := getattr(diffusers, class_name, None)) is not None:
        return found
    import transformers

    found = getattr(transformers, class_name, None)
    whole = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if whole else None


def construct(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A model of a configuration, as its library makes one."""
    if hasattr(model_class, "config_class") and model_class.config_class is not None:
        return model_class(model_class.config_class.from_dict(dict(config)))
    return model_class.from_config(dict(config))


def measure_model(class_name: str, config: Mapping[str, Any], config_from: str) -> ModelShapes:
    """Names and shapes of the model of a configuration; built once per process."""
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    key = (class_name, json.dumps(own, sort_keys=True))
    if key not in _MEASURED:
        _MEASURED[key] = list_shapes(build_empty(class_name, own, config_from))
    return _MEASURED[key]


_MEASURED: dict[tuple[str, str], ModelShapes] = {}
"""What was built before, by class and configuration."""


def list_shapes(model: nn.Module) -> ModelShapes:
    """Names and shapes of an empty model."""
    from torch import nn

    modules = dict(model.named_modules())
    every = [*model.named_parameters(), *model.named_buffers()]
    stored = {**dict(model.named_parameters()), **model.state_dict()}
    tied = dict(
        getattr(model, "all_tied_weights_keys", None) or {}
    )  # transformers': by their source
    return ModelShapes(
        tensors={name: tuple(tensor.shape) for name, tensor in stored.items()},
        required=frozenset(name for name, tensor in every if tensor.is_meta and name not in tied),
        linears={
            name: Linear(module.out_features, module.in_features, module.bias is not None)
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
        },
        modules={name: type(module).__name__ for name, module in modules.items()},
        repeated=tuple(getattr(model, "_repeated_blocks", None) or ()),
    )


def list_block_layers(model: str, shapes: ModelShapes) -> frozenset[str]:
    """Linear layers of the blocks of a model id, by diffusers name."""
    blocks = find_blocks(model, shapes)
    return frozenset(name for name in shapes.linears if name.split(".")[0] in blocks)


def find_blocks(model: str, shapes: ModelShapes) -> tuple[str, ...]:
    """Names of a model's lists of blocks, in forward order.

    Without a model file that has them, they are the lists of modules at the model's top: those of
    the classes that it declares as repeated, where any of these stand there.
    """
    if named := models.load(model).BLOCKS:
        return named
    lists = [n for n, kind in shapes.modules.items() if kind == "ModuleList" and "." not in n]
    repeated = [n for n in lists if shapes.modules.get(f"{n}.0") in shapes.repeated]
    return tuple(repeated or lists)


def build_plain(model: str, size: str) -> nn.Module:
    """The diffusers transformer without memory (its computed buffers are real).

    `size` is `full`, `tiny`, or `blocks`: one block of each kind at true width. Raises UsageError
    for any other.
    """
    import diffusers

    module: Any = models.load(model)
    if size not in ("full", "blocks", "tiny"):
        raise UsageError(f"synthetic size {size!r}: expected full, blocks or tiny")
    options = dict(module.TINY if size == "tiny" else module.FULL)
    options |= module.ONE_BLOCK if size == "blocks" else {}
    with without_memory():
        module_built: nn.Module = getattr(diffusers, module.TRANSFORMER)(**options)
    return module_built
