"""Config limits: values in a model's config.json that no model of its weights has.

A constructor believes its configuration: with `num_layers` of 2^63 it never ends, and with
`rope_max_seq_len` of 2^31 it fills the memory with a table. The weights tell what can be true: every
layer has a tensor of its own, and every width is a dimension of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote_json

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

COUNTS = re.compile("layers|blocks|depth")
HEADS = re.compile("head_dim|axes_dim")
WIDTHS = re.compile("dim|head|size|channels|width|features")
LENGTHS = re.compile("len|position|frames")
DESCRIPTIONS = ("quantization_config", "compression_config")
LEAST_WIDTH = 4096
"""Widths up to this one are taken of any model: some shape no tensor of a checkpoint."""
FEWEST_LAYERS, MOST_LAYERS = 64, 1024
"""Blocks of one kind that are taken of any model, and of none; real ones have 20 to 60."""
WIDEST_HEAD = 1024
"""Columns of a head; models have 64 to 128."""
MOST_POSITIONS = 2**17
"""Rows of a table of positions; models have 512 to 8,192, OmniGen 131,072."""
MOST_ENTRIES = 2**24
"""Positions times the widest head: numbers in a table of positions."""
LARGEST = 2**24
"""What no other whole number of a transformer's configuration exceeds."""


def check_config(config: Mapping[str, Any], file: str, checkpoint: Checkpoint) -> None:
    """CheckpointError for a number that would make a model too large to be built, or never end."""
    shapes = [header.shape for header in checkpoint.tensors.values()]
    width = max((max(shape) for shape in shapes if shape), default=0)
    limits = {
        COUNTS: (
            min(max(len(shapes), FEWEST_LAYERS), MOST_LAYERS),
            "a layer has tensors of its own",
        ),
        HEADS: (WIDEST_HEAD, "no model has wider heads"),
        LENGTHS: (MOST_POSITIONS, "no model has more positions"),
        WIDTHS: (max(width, LEAST_WIDTH), "the weights have no wider tensor"),
    }
    head = longest = 1
    for key, value in list_numbers(config):
        most, why = next(
            (limits[p] for p in limits if p.search(key)), (LARGEST, "no model has more")
        )
        if abs(value) > most:
            raise CheckpointError(
                f"{file}: {key} is {quote_json(value)}, expected at most {most} ({why}): the file is "
                "damaged, or not of these weights; compare it with the base model's config.json"
            )
        head = max(head, value) if HEADS.search(key) else head
        longest = max(longest, value) if LENGTHS.search(key) else longest
    if head * longest > MOST_ENTRIES:
        raise CheckpointError(
            f"{file}: a table of {longest} positions for heads of {head} would have more than "
            f"{MOST_ENTRIES} numbers: the file is damaged; compare it with the base model's config.json"
        )


def list_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(key, number) of every number inside, without fractions; what describes codes is left out."""
    for key, value in config.items():
        pending = [] if key in DESCRIPTIONS else [value]
        while pending:
            found = pending.pop()
            if isinstance(found, Mapping):
                pending += found.values()
            elif isinstance(found, list):
                pending += found
            elif isinstance(found, int | float) and not isinstance(found, bool):
                yield key, int(found)
