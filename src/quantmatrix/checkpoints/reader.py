"""Reader: tensors of a checkpoint by name, mapped lazily."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    import torch

    from quantmatrix.checkpoints.checkpoint import Checkpoint


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
        `checkpoints.dtypes`.
        """
        from safetensors import safe_open

        header = self._checkpoint.tensors[name]
        file = header.file
        if file not in self._files:
            handle = safe_open(file, framework="pt", device=self._device)
            self._files[file] = self._stack.enter_context(handle)
        tensor: torch.Tensor = self._files[file].get_tensor(header.on_disk)
        return tensor
