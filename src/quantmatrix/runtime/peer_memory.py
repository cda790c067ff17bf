"""Peer memory: heads and tokens go straight into the memory of the other GPUs of a host.

torch's symmetric memory gives each process of a group memory that the others can write. Around an
attention the kernels of `quantmatrix.kernels.exchange_triton` write there, all processes wait for each
other on the GPU, and what arrived is copied out:

| | heads | tokens |
| - | - | - |
| 1 | write into [T, B, 3, h, D] of every process | write into [B, S, H, D] of every process |
| 2 | wait for all | wait for all |
| 3 | copy what others wrote | copy all |

Heads and tokens take turns, in memory of their own. So the second wait also says that all have copied
the heads of this attention, before the next one writes over them; and the first wait of the next one that
all have copied the tokens. Nothing waits on the host, so a CUDA graph holds all of it.

Where a GPU does not reach the memory of another one, `connect` says why, and the exchange stays with the
library of the group (NCCL).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed

from quantmatrix.kernels.exchange_triton import (
    Landing,
    launch_send_heads,
    launch_send_tokens,
    view_numbers,
)
from quantmatrix.kernels.launching import has_triton
from quantmatrix.runtime.plan.context_parallel import split_heads

TIMEOUT = 600_000
"""Milliseconds that a GPU waits for the others, as long as NCCL does; then its process fails."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Area:
    """Memory that all processes of a group write into, and their meeting."""

    landing: Landing
    own: torch.Tensor
    """uint8 [bytes] of this process."""
    handle: Any
    """torch's `_SymmetricMemory`."""

    def wait(self) -> None:
        """Let the GPU wait until all processes have come here and their writes are seen."""
        self.handle.barrier(channel=0, timeout_ms=TIMEOUT)


@dataclass(frozen=True)
class PeerMemory:
    """The areas of one group of processes."""

    group: Any
    rank: int
    device: torch.device
    areas: dict[str, list[Area]] = field(default_factory=dict)
    """By what they are for, growing; CUDA graphs go on to use the smaller ones."""

    def reserve(self, name: str, size: int) -> Area:
        """Memory of at least `size` bytes in every process; all of them ask for the same in the same order."""
        areas = self.areas.setdefault(name, [])
        if not areas or areas[-1].own.numel() < size:
            areas.append(self.allocate(size))
        return areas[-1]

    def allocate(self, size: int) -> Area:
        """New memory of `size` bytes in every process.

        torch sets the marks of a meeting to zero on the GPU. Where it is still busy that would come late, and
        wipe the mark of a process that is there already; so the host waits once.
        """
        from torch.distributed import _symmetric_memory as symmetric

        own = symmetric.empty(size, dtype=torch.uint8, device=self.device)
        torch.cuda.synchronize(self.device)
        handle = symmetric.rendezvous(own, self.group)
        count = distributed.get_world_size(self.group)
        parts = tuple(handle.get_buffer(rank, (size,), torch.uint8) for rank in range(count))
        addresses = torch.tensor([part.data_ptr() for part in parts], device=own.device)
        area = Area(Landing(parts, addresses), own, handle)
        _areas.add(area)
        return area


_connected: dict[str, PeerMemory] = {}
_areas: WeakSet[Area] = WeakSet()
"""All that are in use; torch's allocator does not count them."""


def connect(group: Any, device: torch.device) -> PeerMemory | None:
    """Let the processes of a group on a GPU each exchange through each other's memory, if they can.

    All of them call it. Where they cannot the first says why, and all get None.
    """
    name = group.group_name
    known = _connected.pop(name, None)
    if (
        known is not None and known.group is group
    ):  # a later group may have the name of an earlier one
        _connected[name] = known
        return known
    rank = distributed.get_rank(group)
    peers = PeerMemory(group, rank, device)
    problem = find_obstacle(peers)
    said: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(said, problem, group)
    problems = sorted({text for text in said if text})
    if not problems:
        problems = sorted({text for text in try_out(peers) if text})
    if not problems:
        _connected[name] = peers
    elif rank == 0:
        logger.warning(
            "the GPUs exchange through NCCL, which takes longer than through their memory: %s",
            "; ".join(problems),
        )
    return _connected.get(name)


def find_obstacle(peers: PeerMemory) -> str | None:
    """Why this process cannot reach the memory of the others, as far as one can say without trying."""
    if not has_triton():
        return "triton is not installed"
    own, count = peers.device.index or 0, distributed.get_world_size(peers.group)
    if count > torch.cuda.device_count():
        return f"this host has {torch.cuda.device_count()} GPUs for {count} processes"
    for other in range(count):
        if other != own and not torch.cuda.can_device_access_peer(own, other):
            return f"GPU {own} does not reach the memory of GPU {other}"
    return None


def try_out(peers: PeerMemory) -> list[str | None]:
    """What every process found when each wrote a number into the memory of all."""
    count = distributed.get_world_size(peers.group)
    found: str | None = None
    try:
        area = peers.allocate(8 * count)
        for part in area.landing.parts:
            part.view(torch.int64)[peers.rank] = peers.rank + 1
        area.wait()
        arrived = area.own.view(torch.int64).tolist()
        if arrived != list(range(1, count + 1)):
            found = f"process {peers.rank} got {arrived} from processes 1 to {count}"
    except RuntimeError as error:
        found = str(error).splitlines()[0]
    said: list[Any] = [None] * count
    distributed.all_gather_object(said, found, peers.group)
    return said


def count_bytes() -> int:
    """Bytes of this process that the others read or write, beside those of torch's allocator."""
    return sum(area.own.numel() for area in _areas)


def release() -> None:
    """Give back the areas of all groups; what was captured with them may not run again."""
    for peers in _connected.values():
        peers.areas.clear()


def is_connected(group: str) -> bool:
    """Whether a group, by its name in torch, exchanges through peer memory."""
    return group in _connected


def send_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: Sequence[int],
    rank: int,
    group: str,
) -> torch.Tensor:
    """[T, B, 3, h, D], all tokens of this process's heads, from [B, S, H, D] of its tokens.

    One dtype; `shares` are the tokens of every process, S those of this `rank`.
    """
    own = draw_heads(query, shares, rank)
    batch, _, heads, width = query.shape
    most = split_heads(heads, len(shares))[0]
    numbers = sum(shares) * batch * 3 * most * width
    area = _connected[group].reserve("heads", numbers * query.element_size())
    launch_send_heads(query, key, value, own, area.landing, shares, rank)
    area.wait()
    arrived = view_numbers(area.own, own.dtype, own.shape)
    start = sum(shares[:rank])
    for others in (slice(0, start), slice(start + shares[rank], None)):
        own[others].copy_(arrived[others])
    return own


def send_tokens(
    x: torch.Tensor, heads: int, shares: Sequence[int], rank: int, group: str
) -> torch.Tensor:
    """[B, S, H, D], all `heads` of this process's tokens, from [B, T, h, D] of its heads, in its dtype."""
    batch, _, _, width = x.shape
    numbers = max(shares) * batch * heads * width
    area = _connected[group].reserve("tokens", numbers * x.element_size())
    launch_send_tokens(x, heads, area.landing, shares, rank)
    area.wait()
    return view_numbers(area.own, x.dtype, (batch, shares[rank], heads, width)).clone()


exchange_heads = torch.library.custom_op("quantmatrix::exchange_heads", send_heads, mutates_args=())
exchange_tokens = torch.library.custom_op(
    "quantmatrix::exchange_tokens", send_tokens, mutates_args=()
)


@exchange_heads.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: Sequence[int],
    rank: int,
    group: str,
) -> torch.Tensor:
    return draw_heads(query, shares, rank)


@exchange_tokens.register_fake
def _(x: torch.Tensor, heads: int, shares: Sequence[int], rank: int, group: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], shares[rank], heads, x.shape[3])


def draw_heads(query: torch.Tensor, shares: Sequence[int], rank: int) -> torch.Tensor:
    """Memory for all tokens of a process's heads: [T, B, 3, h, D] of the query's dtype."""
    batch, _, heads, width = query.shape
    held = split_heads(heads, len(shares))[rank]
    return query.new_empty(sum(shares), batch, 3, held, width)
