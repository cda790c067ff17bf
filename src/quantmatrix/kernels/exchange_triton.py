"""Triton kernels that write heads and tokens of an attention into the memory of other GPUs.

An exchange through a library packs what it sends, sends it, and reads it again into the order that is
needed. GPUs of one host that reach each other's memory need one pass: each number is read once and
written where the other process reads it. `quantmatrix.runtime.peer_memory` lends the memory and waits.

| kernel | reads | writes into process p |
| ------ | ----- | --------------------- |
| `send_heads` | query, key, value [B, S, H, D] of its tokens | [T, B, 3, h, D], the h heads of p of them |
| `send_tokens` | [B, T, h, D] of its heads | [B, S, H, D], the S tokens of p of them |

T are the tokens of all processes; process p has heads p m to (p + 1) m, m = H / P rounded up, the last
what is left. Numbers are copied as they are, of one float dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from quantmatrix.kernels.launching import can_launch, launch

WARPS = 4


@dataclass(frozen=True)
class Landing:
    """Memory of every process of a group that the others write into, in the order of the processes."""

    parts: tuple[torch.Tensor, ...]
    """uint8 [bytes] each, as this process reaches it."""
    addresses: torch.Tensor
    """Of the parts, int64 [P], on the device."""


@cache
def compile_kernels() -> tuple[Any, Any]:
    """The kernels, defined where triton is."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def send_heads(  # type: ignore
        query, key, value, own, addresses, starts,
        rank, batch, heads, most,
        query_batch, query_token, query_head, key_batch, key_token, key_head,
        value_batch, value_token, value_head,
        WIDTH: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        number, process = tl.program_id(0).to(tl.int64), tl.program_id(1)
        token, sample = number // batch, number % batch
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        count = tl.minimum(most, heads - process * most)
        inside = head < count
        first = process * most + head
        q = query + sample * query_batch + token * query_token + first * query_head + column
        k = key + sample * key_batch + token * key_token + first * key_head + column
        v = value + sample * value_batch + token * value_token + first * value_head + column
        there = tl.load(addresses + process)
        address = tl.where(process == rank, own.to(tl.int64), there)
        target = tl.multiple_of(address.to(tl.pointer_type(own.dtype.element_ty)), 16)
        row = ((tl.load(starts + rank) + token) * batch + sample) * 3
        target += row * count * WIDTH + head * WIDTH + column
        tl.store(target, tl.load(q, mask=inside), mask=inside)
        tl.store(target + count * WIDTH, tl.load(k, mask=inside), mask=inside)
        tl.store(target + 2 * count * WIDTH, tl.load(v, mask=inside), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def send_tokens(  # type: ignore
        x, addresses, starts,
        rank, batch, heads, most, x_batch, x_token, x_head,
        WIDTH: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        number, process = tl.program_id(0).to(tl.int64), tl.program_id(1)
        token, sample = number // batch, number % batch
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        start, end = tl.load(starts + process), tl.load(starts + process + 1)
        inside = head < tl.where(token < end - start, tl.minimum(most, heads - rank * most), 0)
        given = x + sample * x_batch + (start + token) * x_token + head * x_head + column
        address = tl.load(addresses + process)
        target = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
        row = (sample * (end - start) + token) * heads + rank * most + head
        tl.store(target + row * WIDTH + column, tl.load(given, mask=inside), mask=inside)

    return send_heads, send_tokens


def launch_send_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: torch.Tensor,
    landing: Landing,
    shares: Sequence[int],
    rank: int,
) -> None:
    """Write [B, S, H, D] of three into the [T, B, 3, h, D] of every process; into `own` for this one.

    All of one float dtype. `shares` are the tokens of every process, S those of this `rank`; D is a
    power of two.
    """
    batch, tokens, heads, width = query.shape
    most = -(-heads // len(shares))
    if not can_launch(query):
        start = sum(shares[:rank])
        for process, part in enumerate(landing.parts):
            mine = slice(process * most, min((process + 1) * most, heads))
            sent = torch.stack([x[:, :, mine] for x in (query, key, value)], dim=2)
            shape = (sum(shares), batch, 3, sent.shape[3], width)
            target = own if process == rank else view_numbers(part, query.dtype, shape)
            target[start : start + tokens] = sent.transpose(0, 1)
        return
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    launch(
        compile_kernels()[0],
        (tokens * batch, len(shares)),
        (query, key, value, own, landing.addresses, list_starts(tuple(shares), query.device)),
        (rank, batch, heads, most, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        (width, 1 << (most - 1).bit_length()),
        num_warps=WARPS,
    )


def launch_send_tokens(
    x: torch.Tensor, heads: int, landing: Landing, shares: Sequence[int], rank: int
) -> None:
    """Write [B, T, h, D], T the tokens of all `shares`, into the [B, S, H, D] of every process.

    Any float dtype. `heads` is H; D is a power of two.
    """
    batch, _, held, width = x.shape
    most = -(-heads // len(shares))
    if not can_launch(x):
        for part, sent in zip(landing.parts, x.split(list(shares), dim=1), strict=True):
            target = view_numbers(part, x.dtype, (batch, sent.shape[1], heads, width))
            target[:, :, rank * most : rank * most + held] = sent
        return
    x = x if x.stride(3) == 1 else x.contiguous()
    launch(
        compile_kernels()[1],
        (max(shares) * batch, len(shares)),
        (x, landing.addresses, list_starts(tuple(shares), x.device)),
        (rank, batch, heads, most, *x.stride()[:3]),
        (width, 1 << (most - 1).bit_length()),
        num_warps=WARPS,
    )


def view_numbers(part: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The first bytes of a uint8 [bytes] as numbers of a dtype and shape."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return part[:size].view(dtype).view(tuple(shape))


@cache
def list_starts(shares: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """First token of every process, and the number of all: int64 [P + 1]."""
    return torch.tensor(list(accumulate(shares, initial=0)), device=device)
