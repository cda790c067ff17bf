"""Checkpoint: what a set of weight files is, read from headers and JSON, not from weights.

A safetensors file starts with eight bytes, the little-endian length of a JSON header, then the
header: tensor names with dtype, shape and byte range, and `__metadata__` with strings. What the
files say about their quantization may appear in four locations: config.json beside them
(`quantization_config`), the header's metadata (`_quantization_metadata`, `quantization_config`), a
description file (`quant_model_description*.json`), or `hf_quant_config.json`. Two of them that
disagree about one key are an error. ComfyUI's files may say it in small tensors, a fifth location
(`quantmatrix.checkpoints.comfyui`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from quantmatrix.checkpoints.header import TensorHeader


@dataclass(frozen=True)
class RemoteFiles:
    """Files of a hub repository that are not here yet, pinned to one commit."""

    repo: str
    commit: str
    files: tuple[str, ...]
    """Names in the repository."""
    revision: str = "main"
    """The branch, tag or commit that led to the commit."""

    def address(self, name: str) -> str:
        """How a file of the repository is named until it is here."""
        return f"hf://{self.repo}@{self.commit}/{name}"


@dataclass(frozen=True)
class Checkpoint:
    """A set of weight files and everything they say about themselves."""

    reference: str
    """What the user wrote."""
    files: tuple[str, ...]
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    config_file: str | None = None
    quantization: Mapping[str, Any] | None = None
    quantization_from: str | None = None
    description: Mapping[str, Any] | None = None
    description_file: str | None = None
    prefix: str = ""
    """What every tensor name of the transformer begins with in the files; it was taken off."""
    aside: Mapping[str, int] = field(default_factory=dict)
    """Tensors of other parts of a whole checkpoint, which are no part of this: number by prefix."""
    remote: RemoteFiles | None = None
    left_out: tuple[str, ...] = ()
    """Files of the folder that hold a LoRA: no part of the weights, and not applied."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Values for what the files leave open (`nibble_order`, `nvfp4_layout`), and `why` these."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.tensors.values())

    def layers(self) -> dict[str, frozenset[str]]:
        """Suffixes of every layer, a layer's name being what stands before the last dot.

        A tensor without a dot in its name belongs to no layer.
        """
        found: dict[str, set[str]] = {}
        for name in self.tensors:
            layer, dot, suffix = name.rpartition(".")
            if not dot:
                continue
            found.setdefault(layer, set()).add(suffix)
        return {layer: frozenset(suffixes) for layer, suffixes in found.items()}


def find_offsets(file: BinaryIO) -> dict[str, int]:
    """First byte of every tensor in an open safetensors file, by its name there."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    return {n: 8 + length + e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}
