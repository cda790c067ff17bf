"""Reader: tensors of a checkpoint by name, mapped lazily."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.checkpoints.dtypes import to_torch
from quantmatrix.scheme import BLOCKS

if TYPE_CHECKING:
    from typing import Any

    import torch

    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader


class TensorReader:
    """Tensors of a checkpoint by name, mapped lazily from its files."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        """Open nothing yet; `close` (or leaving the with block) closes the files."""
        self._checkpoint = checkpoint
        self._device = device
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        """Use as a with block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; tensors that were read stay valid."""
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the device; on a CPU it is a view of the mapped file.

        It has the shape and dtype that the checkpoint's header states: any shape, any dtype of
        `checkpoints.dtypes`. A GGUF tensor of blocks is their bytes, uint8 [..., bytes of a row];
        where rows of its model are no whole blocks, [bytes].
        """
        from safetensors import safe_open

        header = self._checkpoint.tensors[name]
        file = header.file
        if header.start is not None:
            return self._view(header, header.start).to(self._device)
        if file not in self._files:
            handle = safe_open(file, framework="pt", device=self._device)
            self._files[file] = self._stack.enter_context(handle)
        tensor: torch.Tensor = self._files[file].get_tensor(header.on_disk)
        return tensor

    def _view(self, header: TensorHeader, start: int) -> torch.Tensor:
        """A tensor of a GGUF file, whose bytes begin at `start`: a view of the mapped file."""
        import torch

        file, size = header.file, header.nbytes
        if file not in self._files:
            whole = Path(file).stat().st_size
            self._files[file] = torch.from_file(file, shared=False, size=whole, dtype=torch.uint8)
        data: torch.Tensor = self._files[file][start : start + size]
        if header.dtype in BLOCKS:
            columns, per_block = BLOCKS[header.dtype]
            if header.shape[-1] % columns:
                return data
            return data.view(*header.shape[:-1], header.shape[-1] // columns * per_block)
        dtype = to_torch(header.dtype)
        if start % dtype.itemsize:
            data = data.clone()  # a file may be aligned to less than its items
        return data.view(dtype).view(header.shape)
