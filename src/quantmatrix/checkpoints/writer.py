"""A safetensors writer that streams: one tensor in memory at a time, the same bytes every time.

The library's own writer wants every tensor at once. The format is simple enough to write: eight
bytes with the header's length, the header as JSON (padded with spaces to a multiple of 8), then the
tensors without gaps. Like the library, tensors are ordered by item size, widest first, then by
name, so that each one is aligned to its items.
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.dtypes import ITEM_BITS
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Item:
    """A tensor to be written: dtype in safetensors spelling, and how to get it when it is due."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return TensorHeader(self.name, self.dtype, self.shape, "").nbytes


def write_file(
    path: str | Path, items: Iterable[Item], metadata: Mapping[str, str] | None = None
) -> int:
    """Write items to a safetensors file and return its size in bytes.

    Raises CheckpointError when a tensor that was loaded is not what its item announced.
    """
    ordered = sorted(items, key=lambda item: (-ITEM_BITS[item.dtype], item.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for item in ordered:
        start, end = end, end + item.nbytes
        if item.name in header:
            raise CheckpointError(f"{path}: tensor {item.name} would be written twice")
        header[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for item in ordered:
            view_bytes(item, path).tofile(file)
    return 8 + len(text) + end


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of tensors by name, of any shape and dtype that the format has.

    It may be read by whom other new files may: the library lets its owner alone read it. Raises
    OSError for what the system refuses, as any other writer does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(stat.S_IMODE(mode))


def view_bytes(item: Item, path: str | Path) -> Any:
    """The bytes of an item's tensor, as the file wants them, in a numpy array: uint8 [bytes].

    Raises CheckpointError where the tensor has another size than the item announced.
    """
    import torch

    tensor = item.load()
    found = tensor.numel() * tensor.element_size()
    if found != item.nbytes:
        raise CheckpointError(
            f"{path}: tensor {item.name} was announced as {item.dtype} {list(item.shape)}, but is "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
