"""Sharded weights: every process keeps a share of each block's bytes (`--shard-weights`).

A transformer whose tokens are parted among processes still holds all its weights in each of them.
Here a block's tensors, codes and scales as they are, lie end to end in one buffer of bytes, of which
a process keeps its share. Before a block runs, all shares are gathered into one of two buffers that
blocks take in turn, while the block before it runs: the next block is gathered as soon as the
one before the present has ended. Tensors of a block are views of its buffer and never move, so
nothing is allocated in a step.

GPUs that reach each other's memory (`quantmatrix.runtime.peer_memory`) read the shares where they lie:
weights do not change, so nobody waits for anybody, and copies take none of the multiprocessors that the
blocks compute on. Others send them (NCCL).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import distributed, nn

from quantmatrix.errors import UsageError
from quantmatrix.runtime.peer_memory import Area, connect

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
        flat = buffer[self.start :].view(self.tensor.dtype)
        return flat.as_strided(self.tensor.shape, self.tensor.stride())


class ShardedBlocks:
    """Blocks of one transformer in the order in which they run."""

    def __init__(self, blocks: list[nn.Module], group: Any) -> None:
        """Take the blocks' tensors away, and keep this process's share of them."""
        self.group = group
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        laid = [lay_out(block) for block in blocks]
        unit = ALIGNMENT * self.count
        sizes = [-(-(slots[-1].start + slots[-1].size) // unit) * unit for slots in laid]
        device = laid[0][0].tensor.device
        self.buffers = [
            torch.empty(max(sizes[slot::SLOTS]), dtype=torch.uint8, device=device)
            for slot in range(min(SLOTS, len(blocks)))
        ]
        ends = list(accumulate(size // self.count for size in sizes))
        self.area = lend_memory(group, device, ends[-1])
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.ranges = [
            slice(end - size // self.count, end) for end, size in zip(ends, sizes, strict=True)
        ]
        self.shares: list[torch.Tensor] = []
        self.pending: tuple[int, Any] | None = None
        for index, (block, slots) in enumerate(zip(blocks, laid, strict=True)):
            buffer = self.buffers[index % SLOTS][: sizes[index]]
            for slot in slots:
                slot.view(buffer).copy_(slot.tensor)
            self.shares.append(self._keep(index, buffer.chunk(self.count)[self.rank]))
            for slot in slots:
                take_home(slot, buffer)
            block.register_forward_pre_hook(partial(self._before, index))
        if self.area is not None:
            self.area.wait()

    def _before(self, index: int, block: nn.Module, args: Any) -> None:
        if self.pending is None or self.pending[0] != index:
            self._wait()
            self._gather(index)
        self._wait()
        if index + 1 < len(self.shares):
            self._gather(index + 1)

    def _keep(self, index: int, share: torch.Tensor) -> torch.Tensor:
        if self.area is None:
            return share.clone()
        return self.area.own[self.ranges[index]].copy_(share)

    def _gather(self, index: int) -> None:
        share = self.shares[index]
        buffer = self.buffers[index % SLOTS][: share.numel() * self.count]
        if self.area is None:
            work = distributed.all_gather_into_tensor(
                buffer, share, group=self.group, async_op=True
            )
        else:
            work = self._read(index, self.area, buffer.chunk(self.count))
        self.pending = (index, work)

    def _read(self, index: int, area: Area, chunks: tuple[torch.Tensor, ...]) -> Any:
        """Copy the shares of all processes beside what runs, from the one after this process on."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for step in range(1, self.count + 1):
                process = (self.rank + step) % self.count
                chunks[process].copy_(area.landing.parts[process][self.ranges[index]])
        return Reading(self.stream)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending[1].wait()
            self.pending = None


@dataclass(frozen=True)
class Reading:
    """Shares that are copied meanwhile."""

    stream: Any
    """A CUDA stream; None where they are there already."""

    def wait(self) -> None:
        """Let what runs next come after them."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def lend_memory(group: Any, device: torch.device, size: int) -> Area | None:
    """Memory of `size` bytes that the other processes read; None where they cannot."""
    peers = connect(group, device) if device.type == "cuda" else None
    return None if peers is None else peers.allocate(size)


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
