"""Blocks whose bytes are shared among processes: the same outputs, a share of the memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import context_parallel
import pytest
import torch
from torch import distributed, nn

from quantmatrix.errors import UsageError
from quantmatrix.kernels.exchange_triton import Landing
from quantmatrix.runtime import sharded_weights
from quantmatrix.runtime.peer_memory import Area


class Block(nn.Module):
    """A weight that is transposed in memory, codes of another dtype, and one tensor at two places."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            torch.randn(width, 6, generator=generator).t(), requires_grad=False
        )
        self.register_buffer("codes", torch.randint(-9, 9, (6, width), generator=generator).char())
        self.register_buffer("scale", torch.rand((), generator=generator))
        self.register_buffer("again", self.scale)
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x @ self.weight + (x @ self.codes.float()) * self.scale
        return torch.tanh(hidden @ self.codes.float().t() * self.again)


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(seed, 5) for seed in range(2))
        self.second = nn.ModuleList(Block(seed + 10, 40) for seed in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, *self.second):
            x = block(x)
        return x


@pytest.mark.parametrize(("count", "lent"), [(0, False), (1, False), (3, False), (3, True)])
def test_sharded_blocks_give_the_same_numbers_again_and_again(
    count: int, lent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares are sent, or read where they lie in memory that the processes share."""
    memory = torch.full((2, 1 << 16), 255, dtype=torch.uint8).share_memory_()

    meetings: list[dict[str, int]] = []

    def meet(**options: int) -> None:
        meetings.append(options)
        distributed.barrier()

    def lend(group: Any, device: Any, size: int) -> Area:
        parts = tuple(part[:size] for part in memory)
        meeting = SimpleNamespace(barrier=meet)
        return Area(Landing(parts, torch.empty(0)), parts[distributed.get_rank()], meeting)

    if lent:
        monkeypatch.setattr(sharded_weights, "lend_memory", lend)
        monkeypatch.setattr(distributed, "all_gather_into_tensor", None)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected = Model(count)(x)

    def act() -> None:
        distributed.init_process_group("gloo")
        model = Model(count)
        before = [(b.weight.stride(), b.codes.dtype) for b in (*model.first, *model.second)]
        sharded = sharded_weights.shard(model, ("first", "second"))
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(x), expected)
        assert len(meetings) == lent, "all have written before one reads, and nobody waits later"
        after = [(b.weight.stride(), b.codes.dtype) for b in (*model.first, *model.second)]
        assert after == before
        assert all(block.scale is block.again for block in model.first)
        whole = [sum(slot.size for slot in sharded_weights.lay_out(b)) for b in Model(count).second]
        for share, size in zip(sharded.shares[2:], whole, strict=True):
            assert share.numel() < 0.5 * size + 4 * sharded_weights.ALIGNMENT
        distributed.destroy_process_group()

    assert context_parallel.fork(act, 2) == [0, 0]


def test_the_next_block_is_gathered_while_one_runs() -> None:
    seen: list[tuple[str, int]] = []

    class Waiting:
        def wait(self) -> None:
            seen.append(("waited", -1))

    sharded = sharded_weights.ShardedBlocks.__new__(sharded_weights.ShardedBlocks)
    sharded.shares, sharded.pending = [torch.empty(0)] * 4, None

    def gather(index: int) -> None:
        seen.append(("gathered", index))
        sharded.pending = (index, Waiting())

    sharded._gather = gather  # type: ignore[method-assign]
    waited = ("waited", -1)
    for index, acts in (
        (0, [("gathered", 0), waited, ("gathered", 1)]),
        (1, [waited, ("gathered", 2)]),
        (2, [waited, ("gathered", 3)]),
        (3, [waited]),
        (0, [("gathered", 0), waited, ("gathered", 1)]),
        (3, [waited, ("gathered", 3), waited]),
        (1, [("gathered", 1), waited, ("gathered", 2)]),
        (0, [waited, ("gathered", 0), waited, ("gathered", 1)]),
    ):
        seen.clear()
        sharded._before(index, torch.nn.Identity(), ())
        assert seen == acts


def test_memory_is_lent_where_gpus_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.device]] = []
    peers = SimpleNamespace(allocate=lambda size: f"{size} bytes")

    def connect(group: str, device: torch.device) -> Any:
        asked.append((group, device))
        return peers if group == "near" else None

    monkeypatch.setattr(sharded_weights, "connect", connect)
    gpu = torch.device("cuda:1")
    assert sharded_weights.lend_memory("near", gpu, 7) == "7 bytes"
    assert sharded_weights.lend_memory("far", gpu, 7) is None
    assert sharded_weights.lend_memory("near", torch.device("cpu"), 7) is None
    assert asked == [("near", gpu), ("far", gpu)]


def test_a_block_that_comes_out_of_turn_is_gathered_all_the_same() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected = [block(x) for block in Model(1).second]

    def act() -> None:
        distributed.init_process_group("gloo")
        model = Model(1)
        sharded_weights.shard(model, ("first", "second"))
        with torch.no_grad():
            model.first[0](x)
            assert torch.equal(model.second[0](x), expected[0])
        distributed.destroy_process_group()

    assert context_parallel.fork(act, 2) == [0, 0]


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(4, 3), True),
        (torch.empty(4, 3).t(), True),
        (torch.empty(2, 1, 3).permute(2, 0, 1), True),
        (torch.empty(4, 3)[:, :2], False),
        (torch.empty(1).expand(4), False),
        (torch.empty(()), True),
    ],
)
def test_dense_is_what_fills_its_memory(tensor: torch.Tensor, dense: bool) -> None:
    assert sharded_weights.is_dense(tensor) is dense


def test_a_model_without_known_blocks_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="no blocks are known of Model"):
        sharded_weights.shard(Model(1), ())
