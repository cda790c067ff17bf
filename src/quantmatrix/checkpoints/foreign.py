"""Foreign: files and class names that other projects write, and what they are here."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING

from quantmatrix.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from quantmatrix.checkpoints.checkpoint import Checkpoint


SVDQUANT_PAIR = ["transformer_blocks.safetensors", "unquantized_layers.safetensors"]
"""An SVDQuant checkpoint of the older form: a folder with these two, which are one."""

ENGINE_CLASS = re.compile(r"Nunchaku(\w+?)Transformer2[dD]Model(V\d+)?")
"""Transformer classes of the SVDQuant engine; each stands for one of diffusers."""

ORIGINAL_WAN = ("WanModel", "high_noise_model")
"""Class and first folder of Wan2.2 as its authors, and msmodelslim, lay it out."""


def plain_class(name: Any) -> Any:
    """The class of diffusers that a class of the SVDQuant engine stands for; others as they are.

    Its `save_pretrained` writes its own names into config.json and model_index.json.
    """
    match = ENGINE_CLASS.fullmatch(name) if isinstance(name, str) else None
    return f"{match[1]}Transformer2DModel" if match else name


def explain_original(found: Iterable[str]) -> str:
    """A hint for the end of an error about a folder with these entries, or of this class."""
    if not set(ORIGINAL_WAN) & set(found):
        return ""
    return (
        "; this is Wan2.2 in its original layout, as msmodelslim writes it: convert it with "
        "`python -m quantmatrix.tools.wan_repack` first"
    )


def check_halves(checkpoint: Checkpoint) -> None:
    """Refuse one of the two files of an older folder where the whole checkpoint is wanted.

    Raises CheckpointError for one.
    """
    names = {PurePath(file).name for file in checkpoint.files}
    others = set(SVDQUANT_PAIR) - names
    inside = {"transformer_blocks." in name for name in checkpoint.tensors}
    if len(names) == len(others) == len(inside) == 1:
        what = "the blocks" if True in inside else "what is outside the blocks"
        raise CheckpointError(
            f"{checkpoint.files[0]}: this is one of the two files of an older SVDQuant folder, "
            f"with {what} only: expected {others.pop()} beside it. Name the folder that holds both"
        )
