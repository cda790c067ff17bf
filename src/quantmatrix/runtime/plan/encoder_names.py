"""Encoder names: tensors of a text encoder's files, and the parameters of transformers' model for them.

transformers renames what it loads: files of Qwen2.5-VL have `model.layers.0...` where the module is
`model.language_model.layers.0...`. Its own table of conversions is asked, name by name, and so are
these lists of a class:

| list of the class | a tensor of it |
| ----------------- | -------------- |
| `all_tied_weights_keys` | is one with another (T5's `encoder.embed_tokens` with `shared`): one is read |
| `_keys_to_ignore_on_load_unexpected` | is left aside: the decoder of a whole T5 |

ComfyUI keeps the vocabulary beside the weights (`spiece_model`, `tekken_model`); the pipeline has a
tokenizer of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import CheckpointError
from quantmatrix.models.dialect import Target
from quantmatrix.quoting import quote
from quantmatrix.runtime.empty_model import build_empty
from quantmatrix.runtime.plan.learned_names import WEIGHT, LearnedDialect

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

VOCABULARIES = ("spiece_model", "tekken_model", "tokenizer_json")
"""Tensors in which ComfyUI keeps a vocabulary."""


@dataclass(frozen=True)
class EncoderNames(LearnedDialect):
    """The names of one text encoder's files."""

    aside: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are no part of the model, each with the reason."""

    def dropped(self) -> dict[str, str]:
        """Tensors on disk that are no part of the model here, each with the reason."""
        return dict(self.aside)


def learn_names(
    checkpoint: Checkpoint, class_name: str, config: Mapping[str, Any], config_from: str
) -> EncoderNames:
    """Where the tensors of a text encoder go; a name that the model lacks keeps its spelling.

    Raises CheckpointError where the configuration makes no model, and for a tensor that transformers
    takes apart or joins with others.
    """
    model: Any = build_empty(class_name, config, config_from)
    known = model.state_dict()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = tuple(model._keys_to_ignore_on_load_unexpected or ())
    rename = find_renaming(model, known)
    table: dict[str, tuple[Target, ...]] = {}
    aside: dict[str, str] = {}
    found = {name: choose_name(checkpoint, name, rename, known) for name in checkpoint.tensors}
    for name, parameter in found.items():
        source = tied.get(parameter)
        if name in VOCABULARIES:
            aside[name] = "a vocabulary: the pipeline has a tokenizer of its own"
        elif source is not None and source in found.values():
            aside[name] = f"it is one with {source}"
        elif parameter not in known and any(re.search(p, parameter) for p in ignored):
            aside[name] = f"transformers leaves it out of a {class_name}, too"
        else:
            table[name] = (Target(source or parameter),)
    return EncoderNames("transformers", "^", table=table, source=class_name, aside=aside)


def choose_name(
    checkpoint: Checkpoint, name: str, rename: Callable[[str], str], known: Iterable[str]
) -> str:
    """The parameter of a tensor: by its name in the file, or without the prefix that was taken off.

    What stands below a layer besides its weight goes by the layer.
    """
    header = checkpoint.tensors[name]
    for spelling in dict.fromkeys((header.on_disk, name)):
        if (parameter := rename(spelling)) in known:
            return parameter
    layer, _, leaf = name.rpartition(".")
    if leaf and leaf != "weight" and f"{layer}{WEIGHT}" in checkpoint.tensors:
        above = choose_name(checkpoint, f"{layer}{WEIGHT}", rename, known)
        return f"{above.removesuffix(WEIGHT)}.{leaf}"
    return rename(name)


def find_renaming(model: Any, known: Mapping[str, Any]) -> Callable[[str], str]:
    """What transformers calls the parameter of a tensor, by the tensor's name in a file."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    others = [one for one in conversions if not isinstance(one, WeightRenaming)]

    def rename(name: str) -> str:
        renamed: str
        renamed, pattern = rename_source_key(
            name, renamings, others, model.base_model_prefix, known
        )
        if pattern is not None:
            raise CheckpointError(
                f"tensor {quote(name)}: transformers takes it apart, or joins it with others, in a "
                f"{type(model).__name__}, which is not followed here: name a text encoder in full precision"
            )
        return renamed

    return rename
