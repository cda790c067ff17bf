"""Witness base: the base model's own weights of a component, where they lie on this machine.

| looked for in turn | is |
| ------------------ | -- |
| the model that the request names, `--model-path`; it may be quantized itself | certain |
| the repository that the checkpoint's config.json names, `_name_or_path` | certain |
| the model's own repository | a guess: the checkpoint may be of a finetune |

A folder that the request names counts, and so does the hub's cache; nothing is ever downloaded, and a
path of another machine in a config is never opened. Looked at are headers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix import models
from quantmatrix.checkpoints.dtypes import FLOATS
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.errors import CheckpointError, QuantmatrixError

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.request import Hub, Request
    from quantmatrix.runtime.plan.sources import Source

BY_NAME = "a file of FLUX.2-dev-NVFP4"
"""What `modelopt_nvfp4.layouts` says of a layout that is known by a file's name."""
NAMED = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""A repository's name."""
CACHED = re.compile(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+?)(?:[/\\]|$)")
"""A repository's folder in a hub's cache."""


@dataclass(frozen=True)
class Base:
    """The base model's weights of a component and of its siblings, or why there are none."""

    name: str = ""
    """The component."""
    weights: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Weights in full precision by component, this one's first; empty where they are not here."""
    reference: str = ""
    certain: bool = True
    """Whether the request or the checkpoint's config names this model; otherwise it is a guess."""
    missing: str = ""
    """Why there are none."""


def find_base(name: str, source: Source, model: str, request: Request) -> Base:
    """The weights that a component's decoded layers are compared with.

    With `--witness require` CheckpointError where there are none.
    """
    if request.witness == "off":
        return Base(name, missing="--witness off")
    found = look_for_base(name, source, model, replace(request.hub, offline=True))
    if request.witness == "require" and not found.weights:
        raise CheckpointError(explain_missing(source.checkpoint.reference, found))
    return found


def explain_missing(reference: str, base: Base) -> str:
    """The error of `--witness require` where there is nothing to compare with."""
    return (
        f"{reference}: --witness require, but the weights of the base model's {base.name} are not "
        f"at hand ({base.missing}): name a --model-path whose weights lie on this machine, or leave "
        "the flag out"
    )


def list_unproved(base: Base, layout: str) -> list[str]:
    """A warning of a layout that only a file's name tells, where nothing can confirm it."""
    if base.weights or BY_NAME not in layout:
        return []
    return [
        f"the layout of NVFP4 codes is taken from a name ({layout}), and the base model's weights "
        f"are not at hand to confirm it ({base.missing})"
    ]


def look_for_base(name: str, source: Source, model: str, offline: Hub) -> Base:
    """The first source that has the component in full precision."""
    missing = []
    for reference, siblings, certain in list_candidates(name, source, model):
        try:
            own = open_plain(reference, offline, siblings[name], source)
        except (QuantmatrixError, OSError) as error:
            missing.append(str(error).partition("\n")[0])
            continue
        weights = {name: own}
        for other, folder in siblings.items():
            if other != name:
                try:
                    weights[other] = open_plain(reference, offline, folder, source)
                except (QuantmatrixError, OSError):
                    continue
        return Base(name, weights, reference, certain)
    return Base(name, missing="; ".join(missing))


def list_candidates(
    name: str, source: Source, model: str
) -> Iterator[tuple[str, Mapping[str, str], bool]]:
    """(reference, folder of each component, whether it is certain) to look at, best first."""
    yield source.base, source.siblings, True
    module = models.load(model)
    if name not in module.COMPONENTS:
        return
    folders = {part: part for part in module.COMPONENTS}
    declared = find_declared(source.checkpoint)
    if declared not in ("", source.base):
        yield declared, folders, True
    if module.REPO not in ("", declared, source.base):
        yield module.REPO, folders, False


def find_declared(checkpoint: Checkpoint) -> str:
    """The repository that a checkpoint's own config says it was made from, `org/name`; or ''.

    `_name_or_path` is what was passed to `from_pretrained`: a repository's name, or a path in a
    hub's cache. Any other path is of the machine where the checkpoint was made.
    """
    stated = (checkpoint.config or {}).get("_name_or_path")
    if not isinstance(stated, str):
        return ""
    if cached := CACHED.search(stated):
        return f"{cached[1]}/{cached[2]}"
    return stated if NAMED.fullmatch(stated) and not Path(stated).exists() else ""


def open_plain(reference: str, hub: Hub, folder: str, source: Source) -> Checkpoint:
    """A component in full precision whose files are all here; QuantmatrixError for any other."""
    found = open_component(reference, hub, folder)
    if found.remote is not None:
        raise QuantmatrixError(f"{reference}: the weights of {folder} are not on this machine")
    if set(found.files) & set(source.checkpoint.files):
        raise QuantmatrixError(f"{reference}: {folder} is the checkpoint itself")
    coded = next((h for h in found.tensors.values() if is_coded(h.name, h.dtype)), None)
    if coded is not None:
        raise QuantmatrixError(f"{coded.file}: {coded.name} is {coded.dtype}, quantized, too")
    return found


def is_coded(name: str, dtype: str) -> bool:
    """Whether a tensor is a weight that is not in full precision."""
    return name.endswith("weight") and dtype not in FLOATS
