"""Heads and tokens written into the memory of other processes, held against attention in one process.

Processes on a CPU share memory that was mapped before they were forked, and meet over gloo; what writes
there is plain torch. The kernels that do it on a GPU are held against the same in `interpreted.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import context_parallel
import diffusers
import pytest
import torch
from torch import distributed
from torch.nn import functional

from quantmatrix import models
from quantmatrix.kernels.exchange_triton import Landing
from quantmatrix.measure.bench.synthetic import make_inputs
from quantmatrix.runtime import head_exchange, parallel, peer_memory, token_shares
from quantmatrix.runtime.acceleration import compile_blocks
from quantmatrix.runtime.plan.context_parallel import split_heads

CPU = torch.device("cpu")
MEETINGS: list[dict[str, int]] = []


def share_memory(
    processes: int, heads: int = 1 << 20, tokens: int = 1 << 20
) -> dict[str, torch.Tensor]:
    """Bytes of all processes, none of which is a number before something arrives."""
    return {
        name: torch.full((processes, size), 255, dtype=torch.uint8).share_memory_()
        for name, size in (("heads", heads), ("tokens", tokens))
    }


def meet(**options: int) -> None:
    MEETINGS.append(options)
    distributed.barrier()


def lend(memory: dict[str, torch.Tensor]) -> Any:
    """Let this process and the others exchange through memory that they share; their group."""
    group, rank = distributed.group.WORLD, distributed.get_rank()
    peers = peer_memory.PeerMemory(group, rank, CPU)
    for name, whole in memory.items():
        parts = tuple(whole)
        landing = Landing(parts, torch.tensor([part.data_ptr() for part in parts]))
        peers.areas[name] = [peer_memory.Area(landing, parts[rank], SimpleNamespace(barrier=meet))]
    peer_memory._connected[group.group_name] = peers
    return group


def run_in_processes(act: Callable[[int], None], processes: int) -> None:
    def start() -> None:
        distributed.init_process_group("gloo")
        act(distributed.get_rank())
        distributed.destroy_process_group()

    assert context_parallel.fork(start, processes) == [0] * processes


def attend_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(*parts).transpose(1, 2)


@pytest.mark.parametrize(
    ("tokens", "batch", "heads", "processes", "dtype"),
    [
        (6, 1, 4, 2, torch.float32),
        (7, 2, 4, 2, torch.bfloat16),
        (7, 2, 3, 2, torch.float32),
        (11, 2, 5, 3, torch.float32),
    ],
)
def test_three_attentions_in_turn_are_those_of_one_process(
    tokens: int, batch: int, heads: int, processes: int, dtype: torch.dtype
) -> None:
    """The second and third write over what the first has left; keys of a wider tensor, too.

    The memory has exactly the bytes that are needed; no more can be allocated on a CPU.
    """
    generator = torch.Generator().manual_seed(tokens)
    layers = [
        [torch.randn(batch, tokens, heads, 8, generator=generator).to(dtype) for _ in range(3)]
        for _ in range(3)
    ]
    expected = [attend_alone(*layer) for layer in layers]
    shares, number = token_shares.share_out(tokens, processes), 8 * batch * dtype.itemsize
    memory = share_memory(
        processes,
        heads=3 * tokens * split_heads(heads, processes)[0] * number,
        tokens=shares[0] * heads * number,
    )

    def act(rank: int) -> None:
        group, seen, kept = lend(memory), [], []

        def attend_own(*parts: torch.Tensor) -> torch.Tensor:
            seen.append(parts[0].shape)
            return attend_alone(*parts)

        for layer in layers:
            query, key, value = (x.tensor_split(processes, dim=1)[rank] for x in layer)
            wide = torch.cat([key, key], dim=3)[..., 8:]
            kept.append(head_exchange.attend(query, wide, value, shares, group, attend_own))
        for found, whole in zip(kept, expected, strict=True):
            mine = whole.tensor_split(processes, dim=1)[rank]
            assert found.dtype == dtype
            assert torch.allclose(found, mine, atol=1e-6, rtol=1e-2), (found - mine).abs().max()
        assert seen == [(batch, tokens, split_heads(heads, processes)[rank], 8)] * 3
        assert MEETINGS == [{"channel": 0, "timeout_ms": peer_memory.TIMEOUT}] * 6

    run_in_processes(act, processes)


def test_compiled_blocks_exchange_through_peer_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced as `--compile` does, with the shapes that the ops say they give."""
    torch.manual_seed(0)
    texts, known = 13, models.load("flux-1")
    parts = {**known.STAND_IN.transformer, "num_attention_heads": 3, "num_single_layers": 1}
    transformer = getattr(diffusers, known.TRANSFORMER)(**parts).eval().requires_grad_(False)
    inputs = make_inputs("flux-1", transformer, "cpu", torch.float32, size="tiny")
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :texts]
    inputs["txt_ids"] = inputs["txt_ids"][:texts]
    expected, memory = transformer(**inputs)[0], share_memory(2)
    monkeypatch.setattr(head_exchange, "exchange", None)

    def act(rank: int) -> None:
        component = SimpleNamespace(config=parts)
        plan = SimpleNamespace(
            machine=SimpleNamespace(device="cpu"), components={"transformer": component}
        )
        parallel.split(SimpleNamespace(transformer=transformer), plan, 2)
        config = transformer._parallel_config.context_parallel_config
        assert lend(memory).group_name == config._ulysses_mesh.get_group().group_name
        compile_blocks(transformer, backend="aot_eager", fullgraph=True)
        found = transformer(**inputs)[0]
        assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
        assert len(MEETINGS) == 2 * (parts["num_layers"] + parts["num_single_layers"])

    run_in_processes(act, 2)


def test_a_head_whose_width_is_no_power_of_two_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "exchange_heads", None)
    group = SimpleNamespace(group_name="seen")
    monkeypatch.setitem(peer_memory._connected, "seen", None)
    monkeypatch.setattr(head_exchange, "exchange", lambda x, *_: x)
    monkeypatch.setattr(head_exchange.distributed, "get_rank", lambda group: 0)
    q = torch.ones(1, 3, 2, 6)
    assert head_exchange.attend(q, q, q, [3, 3], group, lambda *x: x[0]).equal(q)
    with pytest.raises(TypeError):  # 8 is a power of two
        head_exchange.attend(*[torch.ones(1, 3, 2, 8)] * 3, [3, 3], group, lambda *x: x[0])


def test_memory_grows_and_the_smaller_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = peer_memory.PeerMemory(None, 0, CPU)

    def allocate(self: Any, size: int) -> Any:
        return SimpleNamespace(own=torch.empty(size, dtype=torch.uint8))

    monkeypatch.setattr(peer_memory.PeerMemory, "allocate", allocate)
    first = peers.reserve("heads", 8)
    assert peers.reserve("heads", 8) is peers.reserve("heads", 7) is first
    second = peers.reserve("heads", 9)
    assert peers.areas["heads"] == [first, second]
    assert peers.reserve("heads", 9) is peers.reserve("heads", 1) is second
    assert peers.reserve("tokens", 1) is not first


def test_bytes_that_others_write_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And given back with their areas. The GPU has nothing left to do when the processes meet."""
    asked: list[str] = []

    def rendezvous(own: torch.Tensor, group: Any) -> Any:
        asked.append("rendezvous")
        return SimpleNamespace(
            get_buffer=lambda rank, shape, dtype: torch.empty(shape, dtype=dtype)
        )

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append(f"{size} bytes on {device}")
        return torch.empty(size, dtype=dtype)

    symmetric = SimpleNamespace(empty=empty, rendezvous=rendezvous)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", symmetric)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: asked.append(f"wait for {device}")
    )
    monkeypatch.setattr(peer_memory.distributed, "get_world_size", lambda group: 2)
    peers = peer_memory.PeerMemory(None, 1, torch.device("cuda:1"))
    before = peer_memory.count_bytes()
    monkeypatch.setitem(peer_memory._connected, "counted", peers)
    area = peers.reserve("heads", 24)
    assert asked == ["24 bytes on cuda:1", "wait for cuda:1", "rendezvous"]
    assert [tuple(part.shape) for part in area.landing.parts] == [(24,)] * 2
    assert area.landing.addresses.tolist() == [part.data_ptr() for part in area.landing.parts]
    peers.reserve("tokens", 8)
    assert peer_memory.count_bytes() == before + 32
    peer_memory.release()
    assert peer_memory.count_bytes() == before + 24  # one is still held here
    del area
    assert peer_memory.count_bytes() == before


def test_a_later_group_of_the_same_name_connects_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (SimpleNamespace(group_name="0") for _ in range(2))
    old = peer_memory.PeerMemory(first, 0, CPU)
    monkeypatch.setattr(peer_memory, "_connected", {"0": old})
    monkeypatch.setattr(peer_memory.distributed, "get_rank", lambda group: 1)
    monkeypatch.setattr(peer_memory.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peer_memory.distributed, "all_gather_object", lambda said, own, group: None)
    monkeypatch.setattr(peer_memory, "find_obstacle", lambda peers: None)
    monkeypatch.setattr(peer_memory, "try_out", lambda peers: [None, None])
    assert peer_memory.connect(first, CPU) is old
    new = peer_memory.connect(second, CPU)
    assert new is not None
    assert (new.group, new.rank) == (second, 1)
    assert peer_memory._connected == {"0": new}
    monkeypatch.setattr(peer_memory, "try_out", lambda peers: [None, "far"])
    assert peer_memory.connect(first, CPU) is None
    assert not peer_memory.is_connected("0")


# --- who can ---------------------------------------------------------------------------------


def try_to_connect(
    caplog: Any, obstacles: list[str | None], memory: torch.Tensor | None
) -> Callable[[int], None]:
    """What processes with these obstacles say, with memory that is shared, or none at all."""

    def act(rank: int) -> None:
        peer_memory.find_obstacle = lambda peers: obstacles[rank]
        if memory is not None:
            parts = tuple(memory)
            area = peer_memory.Area(
                Landing(parts, torch.empty(0)), parts[rank], SimpleNamespace(barrier=meet)
            )
            peer_memory.PeerMemory.allocate = lambda self, size: area
        group = distributed.group.WORLD
        with caplog.at_level(logging.WARNING):
            peer_memory.connect(group, CPU)
        said = [record.getMessage() for record in caplog.records]
        if memory is None:
            assert not peer_memory.is_connected(group.group_name)
            assert len(said) == (rank == 0)
            problem = [text for text in obstacles if text] or ["on CPU"]
            assert rank or problem[0].lower() in said[0].lower(), said
        else:
            assert said == []
            peers = peer_memory._connected[group.group_name]
            peer_memory.connect(group, CPU)
            assert peer_memory._connected[group.group_name] is peers
            assert peers.rank == rank

    return act


def test_processes_connect_where_a_number_of_each_arrives(caplog: Any) -> None:
    memory = torch.zeros(3, 24, dtype=torch.uint8).share_memory_()
    run_in_processes(try_to_connect(caplog, [None] * 3, memory), 3)
    assert memory.view(torch.int64).tolist() == [[1, 2, 3]] * 3


def test_one_process_that_cannot_speaks_for_all(caplog: Any) -> None:
    run_in_processes(try_to_connect(caplog, [None, "GPU 1 does not reach it"], None), 2)


def test_numbers_that_do_not_arrive_are_named_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process sees memory of its own only."""

    def allocate(self: Any, size: int) -> Any:
        parts = tuple(torch.zeros(2, size, dtype=torch.uint8))
        return peer_memory.Area(
            Landing(parts, torch.empty(0)), parts[self.rank], SimpleNamespace(barrier=meet)
        )

    monkeypatch.setattr(peer_memory.PeerMemory, "allocate", allocate)

    def act(rank: int) -> None:
        peers = peer_memory.PeerMemory(distributed.group.WORLD, rank, CPU)
        assert peer_memory.try_out(peers) == [
            "process 0 got [1, 0] from processes 1 to 2",
            "process 1 got [0, 2] from processes 1 to 2",
        ]

    run_in_processes(act, 2)


def test_memory_that_cannot_be_allocated_is_named_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(self: Any, size: int) -> Any:
        raise RuntimeError(f"no {size} bytes\nand more")

    monkeypatch.setattr(peer_memory.PeerMemory, "allocate", allocate)

    def act(rank: int) -> None:
        peers = peer_memory.PeerMemory(distributed.group.WORLD, rank, CPU)
        assert peer_memory.try_out(peers) == ["no 16 bytes"] * 2

    run_in_processes(act, 2)


@pytest.mark.parametrize(
    ("triton", "gpus", "reached", "found"),
    [
        (False, 3, {1, 2}, "triton is not installed"),
        (True, 2, {1, 2}, "this host has 2 GPUs for 3 processes"),
        (True, 3, {1}, "GPU 0 does not reach the memory of GPU 2"),
        (True, 3, {1, 2}, None),
    ],
)
def test_what_keeps_a_gpu_from_the_memory_of_others(
    triton: bool, gpus: int, reached: set[int], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_memory, "has_triton", lambda: triton)
    monkeypatch.setattr(peer_memory.distributed, "get_world_size", lambda group: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other in reached)
    peers = peer_memory.PeerMemory(None, 0, torch.device("cuda:0"))
    assert peer_memory.find_obstacle(peers) == found
