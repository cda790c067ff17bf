"""Adapters: files of factors that go on top of a model (LoRA and its kin), and are none.

Names of their tensors end differently with each writer:

| writer | tensors of a layer |
| ------ | ------------------ |
| PEFT, diffusers | `X.lora_A.weight`, `X.lora_B.weight`, perhaps with `default.` before the end |
| kohya | `X.lora_down.weight`, `X.lora_up.weight`, `X.alpha`, `X.dora_scale` |
| older diffusers | `X.lora.down.weight`, `X.lora.up.weight` |
| LyCORIS | `X.lokr_w1`, `X.hada_w1_a`, `X.oft_blocks`, `X.diff` ... |
| SVDQuant's engine | `X.lora_down`, `X.lora_up`; in its older models beside `X.qweight` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

FACTOR = re.compile(
    r"(^|[._])(lora_(down|up|mid|A|B)|lora\.(down|up)|lokr_[wt][12](_[ab])?|hada_[wt][12](_[ab])?"
    r"|oft_(blocks|diag))(\.|$)"
)
COMPANION = re.compile(r"\.(alpha|dora_scale|lora_magnitude_vector(\.weight)?|diff|diff_b)$")
"""What may stand beside factors."""
CODES = {"qweight", "wscales"}
"""Beside these, factors are the low-rank branch of an SVDQuant layer."""


def find_factor(names: Iterable[str]) -> str | None:
    """The first name that is a factor's, or None."""
    return next((name for name in names if FACTOR.search(name)), None)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a file with these tensors holds factors, and nothing of a model."""
    listed = list(names)
    others = [name for name in listed if not FACTOR.search(name) and not COMPANION.search(name)]
    return not others and find_factor(listed) is not None


def explain_adapter(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint with factors is not a model's weights; None: it has none, or is SVDQuant."""
    found = find_factor(checkpoint.tensors)
    if found is None or any(suffixes >= CODES for suffixes in checkpoint.layers().values()):
        return None
    file = checkpoint.tensors[found].file
    if is_adapter(checkpoint.tensors):
        return (
            f"{file}: tensor {found} and no weights of a model: this is a LoRA, which adds to a "
            "model. Name the model's own weights here"
        )
    return (
        f"{file}: tensor {found} beside the weights of a model is a factor of a LoRA, which is not "
        "applied: leaving it out would give another model without an error. Name weights without "
        "it, or merge it first (in diffusers fuse_lora, then save_pretrained)"
    )
