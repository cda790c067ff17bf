"""Working memory: the most that one call holds at once on top of what was there before.

On an accelerator it is the allocator's own counter. A CPU has no such counter, and the process's
resident size says nothing about megabytes (the C library keeps and reuses what was freed), so there
every operation of the call is watched, and the tensors that it made and that still live are added
up. What an operation takes and gives back inside itself is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

LIVE_TENSORS, ALLOCATOR = "live tensors", "allocator"
"""How a number of bytes was found."""


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; what it was given was there before, what is new counts."""
        kwargs = kwargs or {}
        self._note((args, kwargs), count=False)
        result = func(*args, **kwargs)
        self._note(result, count=True)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result

    def _note(self, values: Any, *, count: bool) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                if storage not in self._sizes:
                    self._sizes[storage] = storage.nbytes() if count else 0


def measure_working(call: Callable[[], Any], device: str) -> tuple[int, str]:
    """(bytes that a call holds at most on top of what was there, how they were counted)."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        with LiveTensors() as live:
            call()
        return live.peak, LIVE_TENSORS
    accelerator: Any = getattr(torch, kind)
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    call()
    accelerator.synchronize()
    return int(accelerator.max_memory_allocated() - before), ALLOCATOR
