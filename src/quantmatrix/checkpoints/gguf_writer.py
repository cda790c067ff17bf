"""GGUF writer: tensors as one GGUF file, the same bytes every time.

The layout is that of `quantmatrix.checkpoints.gguf`. Tensors of blocks go in as they are; of the others
the matrices of linear layers keep their dtype, and everything else becomes F32, which costs little
and is what readers take where they do not decode (diffusers' GGUF loader decodes linear layers only).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.dtypes import from_torch
from quantmatrix.checkpoints.gguf import ALIGNMENT, MAGIC, STRING, TYPES
from quantmatrix.scheme import BLOCKS

if TYPE_CHECKING:
    import torch

VERSION = 3
NUMBERS = {name: number for number, name in TYPES.items()}
UINT32 = 4
QUANTIZATION_VERSION = 2
"""`general.quantization_version` of all files since the K types."""


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, str],
    metadata: Mapping[str, str | int],
) -> None:
    """Write tensors of any shape; those in `blocks`, uint8 [N, bytes of a row], have that type.

    Metadata are texts and whole numbers of 32 bits.
    """
    entries = {**metadata, "general.quantization_version": QUANTIZATION_VERSION}
    infos = {name: describe(name, tensor, blocks.get(name)) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(entries)))
        for key, value in entries.items():
            file.write(pack_text(key) + pack_value(value))
        position = 0
        for name, (kind, shape, data) in sorted(infos.items()):
            sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            file.write(pack_text(name) + sizes + struct.pack("<IQ", NUMBERS[kind], position))
            position += -(-data.nbytes // ALIGNMENT) * ALIGNMENT
        file.write(bytes(-file.tell() % ALIGNMENT))
        for _, (_, _, data) in sorted(infos.items()):
            view_bytes(data).tofile(file)
            file.write(bytes(-data.nbytes % ALIGNMENT))


def describe(
    name: str, tensor: torch.Tensor, kind: str | None
) -> tuple[str, tuple[int, ...], torch.Tensor]:
    """(type, shape, what is written) of a tensor of any shape and dtype; `kind` is that of blocks."""
    shape = tuple(tensor.shape)
    if kind is not None:
        columns, size = BLOCKS[kind]
        return kind, (*shape[:-1], shape[-1] // size * columns), tensor
    plain = tensor if name.endswith(".weight") and tensor.ndim == 2 else tensor.float()
    return from_torch(plain.dtype), shape, plain


def view_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor of any shape and dtype in a numpy array: uint8 [bytes]."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def pack_text(text: str) -> bytes:
    """A text behind its length."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pack_value(value: str | int) -> bytes:
    """A value of the metadata behind its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + pack_text(value)
    return struct.pack("<II", UINT32, value)
