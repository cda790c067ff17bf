"""Started by torchrun on two GPUs: attentions of many sizes through each other's memory, alone and in graphs.

The memory grows while the GPUs are busy, and graphs go on to use the smaller one. One head cannot be
exchanged: its keys and values are gathered through NCCL. Prints JSON: attentions
compared with those of one GPU, the largest difference, and how often the memory grew.
"""

from __future__ import annotations

import json
import os
from typing import Any

import diffusers
import torch
from torch import distributed
from torch.nn import functional

from quantmatrix.runtime import head_exchange, peer_memory
from quantmatrix.runtime.acceleration import GraphedForward, free_graphs
from quantmatrix.runtime.token_shares import share_out

TOKENS = (64, 513, 4608, 700, 9000, 33)
FORMS = (
    (1, 24, 128, torch.bfloat16),
    (2, 5, 64, torch.float16),
    (1, 40, 128, torch.float32),
    (2, 3, 128, torch.bfloat16),
    (2, 1, 64, torch.bfloat16),
)
"""Samples, heads, width of a head, dtype."""


def attend_alone(*parts: torch.Tensor) -> torch.Tensor:
    turned = (x.transpose(1, 2) for x in parts)
    return functional.scaled_dot_product_attention(*turned).transpose(1, 2)


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl")
    group: Any = distributed.group.WORLD
    peers = peer_memory.connect(group, torch.device("cuda", rank))
    assert peers is not None
    ring = diffusers.ContextParallelConfig(ring_degree=2)
    mesh = distributed.init_device_mesh("cuda", ring.mesh_shape, mesh_dim_names=ring.mesh_dim_names)
    ring.setup(rank, 2, torch.device("cuda", rank), mesh)
    differences, calls = [], []
    for number, (tokens, form) in enumerate((t, f) for t in TOKENS for f in FORMS):
        *shape, dtype = form
        generator = torch.Generator().manual_seed(number)
        batch, heads, width = shape
        whole = [
            torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).cuda()
            for _ in range(3)
        ]
        exact = attend_alone(*whole).tensor_split(2, dim=1)[rank]
        shares = share_out(tokens, 2)

        def exchange(*parts: torch.Tensor, shares: list[int] = shares) -> torch.Tensor:
            return head_exchange.attend(*parts, shares, group, attend_alone)

        def collect(*parts: torch.Tensor, shares: list[int] = shares) -> torch.Tensor:
            return head_exchange.attend_in_groups(*parts, shares, ring, attend_alone)

        act = exchange if heads > 1 else collect
        run = GraphedForward(act) if number % 2 else act
        mine = [x.tensor_split(2, dim=1)[rank] for x in whole]
        mine[1] = torch.cat([mine[1]] * 2, dim=3)[..., width:]  # keys of a wider tensor
        calls.append((run, mine, exact))
        differences.append(float((run(*mine) - exact).abs().max()))
    for _ in range(3):
        differences += [float((run(*mine) - exact).abs().max()) for run, mine, exact in calls]
    if rank == 0:
        grown = {name: len(areas) for name, areas in peers.areas.items()}
        seen = {"compared": len(differences), "largest": max(differences), "areas": grown}
        print(json.dumps(seen))
    distributed.barrier()
    free_graphs()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
