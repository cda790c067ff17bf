"""Sharded weights: every process keeps a share of each block's bytes (`--shard-weights`).

A transformer whose tokens are parted among processes still holds all its weights in each of them.
Here a block's tensors, codes and scales as they are, lie end to end in one buffer of bytes, of which
a process keeps its share. Before a block runs, all shares are gathered into one of two buffers that
blocks take in turn, while the block before it runs: the next block is gathered as soon as the
one before the present has ended. Tensors of a block are views of its buffer and never move, so
nothing is allocated in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from quantmatrix.errors import UsageError

ALIGNMENT = 256
"""Tensors begin at multiples of so many bytes, as allocated ones do."""
SLOTS = 2


@dataclass
class Slot:
    """One tensor of a block: where its modules keep it, and where it lies in the block's buffer."""

    tensor: torch.Tensor
    start: int
    homes: list[tuple[dict[str, Any], str]]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor's shape, strides and dtype over a buffer of bytes."""
        flat = buffer[self.start : self.start + self.size].view(self.tensor.dtype)
        return flat.as_strided(self.tensor.shape, self.tensor.stride())


class ShardedBlocks:
    """Blocks of one transformer in the order in which they run."""

    def __init__(self, blocks: list[nn.Module], group: Any) -> None:
        """Take the blocks' tensors away, and keep this process's share of them."""
        self.group = group
        self.rank, count = distributed.get_rank(group), distributed.get_world_size(group)
        laid = [lay_out(block) for block in blocks]
        unit = ALIGNMENT * count
        sizes = [-(-(slots[-1].start + slots[-1].size) // unit) * unit for slots in laid]
        device = laid[0][0].tensor.device
        self.buffers = [
            torch.empty(max(sizes[slot::SLOTS]), dtype=torch.uint8, device=device)
            for slot in range(min(SLOTS, len(blocks)))
        ]
        self.shares: list[torch.Tensor] = []
        self.pending: tuple[int, Any] | None = None
        for index, (block, slots) in enumerate(zip(blocks, laid, strict=True)):
            buffer = self.buffers[index % SLOTS][: sizes[index]]
            for slot in slots:
                slot.view(buffer).copy_(slot.tensor)
            self.shares.append(buffer.chunk(count)[self.rank].clone())
            for slot in slots:
                take_home(slot, buffer)
            block.register_forward_pre_hook(partial(self._before, index))

    def _before(self, index: int, block: nn.Module, args: Any) -> None:
        if self.pending is None or self.pending[0] != index:
            self._wait()
            self._gather(index)
        self._wait()
        if index + 1 < len(self.shares):
            self._gather(index + 1)

    def _gather(self, index: int) -> None:
        share = self.shares[index]
        size = share.numel() * distributed.get_world_size(self.group)
        buffer = self.buffers[index % SLOTS][:size]
        work = distributed.all_gather_into_tensor(buffer, share, group=self.group, async_op=True)
        self.pending = (index, work)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending[1].wait()
            self.pending = None


def lay_out(block: nn.Module) -> list[Slot]:
    """Places of a block's parameters and buffers, each once, end to end."""
    slots: dict[int, Slot] = {}
    start = 0
    for homes, name, tensor in tensors_of(block):
        known = slots.get(id(tensor))
        if known is not None:
            known.homes.append((homes, name))
            continue
        dense = tensor if is_dense(tensor) else tensor.contiguous()
        slots[id(tensor)] = Slot(dense.detach(), start, [(homes, name)])
        start += -(-slots[id(tensor)].size // ALIGNMENT) * ALIGNMENT
    return list(slots.values())


def tensors_of(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """(dictionary, name, tensor) of everything that a block's modules keep, except empty ones.

    Tensors of any shape and dtype.
    """
    for module in block.modules():
        homes: dict[str, Any]
        for homes in (module._parameters, module._buffers):
            for name, tensor in homes.items():
                if tensor is not None and tensor.numel():
                    yield homes, name, tensor


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor, of any shape and dtype, fill its memory in some order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def take_home(slot: Slot, buffer: torch.Tensor) -> None:
    """Let the modules keep the view over a buffer of bytes, uint8 [size], in place of a tensor."""
    view = slot.view(buffer)
    for homes, name in slot.homes:
        if isinstance(homes[name], nn.Parameter):
            homes[name].data = view
        else:
            homes[name] = view
    slot.tensor = view


def shard(transformer: nn.Module, blocks: tuple[str, ...]) -> ShardedBlocks:
    """Shard the blocks of a transformer, in the lists of modules with these names, in their order.

    Every process of the default group takes part, with the same weights on its device. Raises
    UsageError where no list is known, as of a model without a file of its own.
    """
    found = [block for name in blocks for block in transformer.get_submodule(name).children()]
    if not found:
        raise UsageError(
            f"--shard-weights: no blocks are known of {type(transformer).__name__}: leave it out"
        )
    return ShardedBlocks(found, distributed.new_group())
