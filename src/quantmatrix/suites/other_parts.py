"""Other parts: VAE and text encoders of a stand-in's pipeline, loaded once while rows of one base model
follow each other.

A row is about its transformers, and the text encoders that its flags name: those are loaded for every
row, and never taken from here. The others are the same files for each row of a base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEPT = dict[tuple[Path, str, str], Any]
"""Modules by their folder, their class in the pipeline's index, and dtype."""


def share_parts(real: Any, kept: KEPT) -> Any:
    """A classmethod in the place of `DiffusionPipeline.from_pretrained`, that is given `real`, its function.

    Modules of the pipeline before are passed on where this one would load the same.
    """

    def load(cls: Any, /, folder: str, **given: Any) -> Any:
        index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
        keys = {
            name: (Path(folder, name).resolve(), str(named), str(given.get("dtype")))
            for name, named in index.items()
            if name not in given and Path(folder, name).is_dir()
        }
        again = {name: kept[key] for name, key in keys.items() if key in kept}
        pipeline = real(cls, folder, **given, **again)
        kept.clear()
        kept.update(
            {
                key: getattr(pipeline, name)
                for name, key in keys.items()
                if is_module(pipeline, name)
            }
        )
        return pipeline

    return classmethod(load)


def is_module(pipeline: Any, name: str) -> bool:
    """Whether a part holds weights; a scheduler has a state of its own and is no such part."""
    from torch import nn

    return isinstance(getattr(pipeline, name), nn.Module)
