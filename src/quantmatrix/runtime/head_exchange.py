"""Head exchange: attention over tokens that several processes hold, in two exchanges (Ulysses).

Around an attention every process gives its tokens' heads away and gets all tokens of its own heads.
diffusers exchanges queries, keys and values one after the other, and copies each before and after.
Here they travel together: one exchange there and one back, and what arrives is read as it lies. GPUs that
reach each other's memory write it there (`quantmatrix.runtime.peer_memory`). Others send it, and so are
heads sent whose width D is no power of two, which the kernels there do not take:

| step | layout |
| ---- | ------ |
| given | query, key, value [B, S, H, D], S tokens of this process |
| sent | [P, S, B, 3, h, D]: a part for each of P processes, h = H/P rounded up |
| received | [all tokens, B, 3, h, D], in the order of the processes |
| attention | [B, all tokens, h, D], views of what was received where B is 1 |
| sent back | [all tokens, B, h, D]; received [P, S, B, h, D] and joined to [B, S, H, D] |

Processes may hold different numbers of tokens; `quantmatrix.runtime.token_shares` knows them.
Where P does not divide H the last process has fewer heads, and zeros are sent in their place; it computes
nothing with them.

Processes of too few heads (`quantmatrix.runtime.plan.context_parallel.choose_degrees`) exchange them in groups,
and gather keys and values of all groups for the attention of their own tokens. That is diffusers' ring,
whose parts arrive at once, too, but it is one attention instead of one for each part: it needs no
log-sum-exp, which torch's own attention does not give, and rounds as one process does. Cross-attention
gathers as well, whatever the heads: its keys are few, and its queries stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed
from torch.nn import functional

from quantmatrix.runtime import peer_memory
from quantmatrix.runtime.plan.context_parallel import split_heads


def exchange(
    x: torch.Tensor, received: Sequence[int], sent: Sequence[int], group: Any
) -> torch.Tensor:
    """x [sum(sent), ...], of any dtype, parted along its rows among processes: [sum(received), ...]."""
    from torch.distributed import _functional_collectives as collectives

    even = len({*received, *sent}) == 1
    to, of = (None, None) if even else (list(received), list(sent))
    found = collectives.all_to_all_single(x.contiguous(), to, of, group)
    if isinstance(found, collectives.AsyncCollectiveTensor):
        found = found.wait()
    return found


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: Sequence[int],
    group: Any,
    attention: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention of this process's tokens over all tokens, as [B, S, H, D].

    Query, key and value are [B, S, H, D] of one dtype; `shares` says how many tokens each process
    holds. `attention` takes three [B, T, h, D], h the heads of this process (`split_heads`).
    """
    batch, tokens, heads, width = query.shape
    count = len(shares)
    if peer_memory.is_connected(group.group_name) and width & (width - 1) == 0:
        known = (list(shares), distributed.get_rank(group), group.group_name)
        arrived = peer_memory.exchange_heads(query, key, value, *known)
        mixed = attention(*(x.transpose(0, 1) for x in arrived.unbind(2)))
        found: torch.Tensor = peer_memory.exchange_tokens(mixed, heads, *known)
        return found
    held = split_heads(heads, count)
    most, missing = held[0], held[0] - held[-1]
    if missing:
        query, key, value = (functional.pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    parts = [
        x.reshape(batch, tokens, count, most, width).permute(2, 1, 0, 3, 4)
        for x in (query, key, value)
    ]
    packed = torch.stack(parts, dim=3).flatten(0, 1)
    arrived = exchange(packed, shares, [tokens] * count, group)
    own = held[distributed.get_rank(group)] if missing else most
    mixed = attention(*(x[:, :, :own].transpose(0, 1) for x in arrived.unbind(2)))
    if own < most:
        mixed = functional.pad(mixed, (0, 0, 0, most - own))
    back = exchange(mixed.transpose(0, 1), [tokens] * count, shares, group)
    joined = back.view(count, tokens, batch, most, width).permute(2, 1, 0, 3, 4)
    return joined.reshape(batch, tokens, most * count, width)[:, :, :heads]


def attend_in_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: Sequence[int],
    config: Any,
    attention: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """What `attend` gives, with heads exchanged in groups of `config.ulysses_degree` processes alone.

    Query, key and value are as there, [B, S, H, D] of one dtype; `config` is diffusers'
    `ContextParallelConfig`. `attention` takes a query [B, T, h, D] of the T tokens of the group, and keys and
    values of all tokens.
    """
    size, ring = config.ulysses_degree, config._ring_mesh.get_group()
    groups = [shares[first : first + size] for first in range(0, len(shares), size)]
    counts = [sum(group) for group in groups]

    def attend_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_to_all(query, key, value, counts, ring, attention)

    if size == 1:
        return attend_own(query, key, value)
    own = groups[config._ring_local_rank]
    return attend(query, key, value, own, config._ulysses_mesh.get_group(), attend_own)


def attend_to_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: Sequence[int],
    group: Any,
    attention: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention of a query [B, S, H, D] to the keys of all processes of a group, as [B, S, H, D].

    Key and value are [B, T, H, D] of the same dtype; `counts` says how many of T each process holds.
    """
    both = torch.stack((key.transpose(0, 1), value.transpose(0, 1)), 1)
    every = gather(both, counts, group)
    return attention(query, *(x.transpose(0, 1) for x in every.unbind(1)))


def gather(x: torch.Tensor, counts: Sequence[int], group: Any) -> torch.Tensor:
    """x [S, ...] of any dtype, and what the other processes of a group hold: [sum(counts), ...]."""
    most = max(counts)
    missing = most - len(x)
    padded = torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x.contiguous()
    own = torch.ops._c10d_functional
    found: torch.Tensor = own.wait_tensor(
        own.all_gather_into_tensor(padded, len(counts), group.group_name)
    )
    if len(set(counts)) == 1:
        return found
    parts = zip(found.split(most), counts, strict=True)
    return torch.cat([part[:count] for part, count in parts])


def replace_attention(find_shares: Callable[[int], Sequence[int] | None]) -> None:
    """Let diffusers' context-parallel attention take this way wherever it can.

    `find_shares` gives the tokens of every process by those of this one, None where it cannot
    tell. Log-sum-exps stay with diffusers; so do masks of keys, and tokens of which `find_shares` cannot tell,
    where all processes exchange heads. Masks of heads or queries are taken with the queries of this process.
    """
    from diffusers.models import attention_dispatch

    original = attention_dispatch._templated_context_parallel_attention
    if hasattr(original, "original"):
        return

    def templated(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        *,
        forward_op: Callable[..., torch.Tensor],
        backward_op: Callable[..., torch.Tensor],
        _parallel_config: Any = None,
    ) -> Any:
        config = _parallel_config.context_parallel_config
        one_group = config.ring_degree == 1
        shares = find_shares(key.shape[1])
        plain = not (dropout_p or is_causal or enable_gqa or return_lse)
        alone = query.shape != key.shape or (
            attn_mask is not None and any(size > 1 for size in attn_mask.shape[1:-1])
        )
        stays = one_group and not alone and (shares is None or attn_mask is not None)
        if stays or not plain or key.shape != value.shape:
            return original(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
                forward_op=forward_op, backward_op=backward_op, _parallel_config=_parallel_config,
            )  # fmt: skip

        mask, tokens = attn_mask, key.shape[1]
        everyone = config._flattened_mesh
        if shares is None:
            shares = list(attention_dispatch.gather_size_by_comm(tokens, everyone.get_group()))
        if mask is not None and mask.shape[-1] == tokens:
            mask = gather(mask.movedim(-1, 0), shares, everyone.get_group()).movedim(0, -1)

        def attention(*parts: torch.Tensor) -> torch.Tensor:
            return forward_op(
                None, *parts, mask, 0.0, False, scale, False, False,
                _save_ctx=False, _parallel_config=_parallel_config,
            )  # fmt: skip

        if alone:
            return attend_to_all(query, key, value, shares, everyone.get_group(), attention)
        if one_group:
            return attend(query, key, value, shares, config._ulysses_mesh.get_group(), attention)
        return attend_in_groups(query, key, value, shares, config, attention)

    templated.original = original  # type: ignore[attr-defined]
    attention_dispatch._templated_context_parallel_attention = templated
