"""Token shares: which tokens of a forward each process holds, known to all of them by a rule.

diffusers' context parallelism has two ways. *Even* shares need every sequence that is parted (picture
and text) to divide by the number of processes; then nothing but heads and tokens is exchanged.
*Uneven* shares take any length and any number of heads, but each of their exchanges first asks every
process for its length, and the host waits for the answer: four times in every attention, which made two
GPUs slower than one and cannot be captured in a CUDA graph.

Nobody needs to ask: all processes see the whole input before it is parted, and parts follow
`torch.tensor_split`. So the way is chosen for each forward from its lengths, and where shares are
uneven the lengths of all processes come from the rule. Where the rule would be ambiguous (two
sequences of which one process holds equally many tokens and another does not), it is so for all
processes, and all of them ask as diffusers does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import distributed, nn

from quantmatrix.errors import UsageError
from quantmatrix.runtime.head_exchange import gather, replace_attention
from quantmatrix.runtime.peer_memory import connect

PARTED = ("hidden_states", "encoder_hidden_states")
"""Arguments of a transformer whose tokens diffusers' plans part."""

_known: dict[int, list[int]] = {}
"""Tokens of every process, by those of this one, for the forward that runs."""


def count_tokens(transformer: Any, arguments: Mapping[str, Any]) -> list[int]:
    """Lengths of the sequences that diffusers parts in a forward, from its arguments.

    A sequence is [B, S, C]; a video [B, C, F, H, W] has a token per patch of the model's config.
    """
    parted = {name for part in transformer._cp_plan.values() for name in names_of(part)}
    found = []
    for name in PARTED:
        value = arguments.get(name)
        if name in parted and isinstance(value, torch.Tensor):
            found.append(value.shape[1] if value.ndim == 3 else count_patches(transformer, value))
    return found


def names_of(part: Any) -> Iterable[str]:
    """Arguments that a part of diffusers' plan names; an output has none."""
    return (name for name in part if isinstance(name, str)) if isinstance(part, Mapping) else ()


def count_patches(transformer: Any, video: torch.Tensor) -> int:
    """Tokens of latents [B, C, F, H, W], of any dtype."""
    return math.prod(
        size // patch
        for size, patch in zip(video.shape[2:], transformer.config.patch_size, strict=True)
    )


def share_out(tokens: int, processes: int) -> list[int]:
    """Tokens of each process, as `torch.tensor_split` parts them: the first hold one more."""
    least, more = divmod(tokens, processes)
    return [least + (rank < more) for rank in range(processes)]


def name_shares(lengths: Sequence[int], processes: int, rank: int) -> dict[int, list[int]]:
    """Tokens of every process, by those of one `rank`, of each sequence and of sequences joined.

    Empty, for all ranks alike, where a process could not tell two of them apart.
    """
    parts = [share_out(length, processes) for length in lengths]
    joined = [
        [sum(column) for column in zip(*chosen, strict=True)]
        for count in range(1, len(parts) + 1)
        for chosen in combinations(parts, count)
    ]
    for one, other in combinations(joined, 2):
        if one != other and any(a == b for a, b in zip(one, other, strict=True)):
            return {}
    return {shares[rank]: shares for shares in joined}


def follow_tokens(transformer: nn.Module, config: Any, processes: int) -> None:
    """Choose even or uneven shares before every forward of a transformer that diffusers parts.

    `config` is its `ContextParallelConfig`, changed in place. A forward raises UsageError where a sequence
    has fewer tokens than there are processes.
    """
    rank = distributed.get_rank()
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]
    one_group = config.ring_degree == 1
    uneven_heads = bool(getattr(transformer.config, "num_attention_heads", 0) % processes)

    def choose(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        lengths = count_tokens(module, dict(zip(names, args, strict=False)) | kwargs)
        if few := [length for length in lengths if length < processes]:
            raise UsageError(
                f"--nproc-per-node {processes}: {few[0]} tokens cannot be shared by {processes} processes: "
                "give a larger --height and --width (a longer prompt, where they are its), or fewer processes"
            )
        uneven = any(length % processes for length in lengths)
        config.ulysses_anything = uneven or (one_group and uneven_heads)
        _known.clear()
        _known.update(name_shares(lengths, processes, rank))

    transformer.register_forward_pre_hook(choose, with_kwargs=True)
    device = next(transformer.parameters(), torch.empty(0)).device
    if device.type == "cuda" and one_group:
        connect(config._ulysses_mesh.get_group(), device)
    answer_by_rule()
    replace_attention(find_shares)


def find_shares(tokens: int) -> list[int] | None:
    """Tokens of every process where this one holds so many; None where nobody can tell."""
    return _known.get(tokens)


def answer_by_rule() -> None:
    """Let diffusers take the tokens of all processes from the rule, where it tells them.

    An output whose parts are not equally long is padded and gathered at once: diffusers sends one part
    after the other, which gloo refuses.
    """
    from diffusers.hooks import context_parallel
    from diffusers.models import attention_dispatch

    ask = attention_dispatch.gather_size_by_comm
    if hasattr(ask, "by_rule"):
        return

    def answer(size: int, group: Any) -> list[int]:
        known = find_shares(size)
        found: list[int] = ask(size, group) if known is None else known
        return found

    def gather_output(part: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        counts = answer(part.shape[dim], group)
        return gather(part.movedim(dim, 0), counts, group).movedim(0, dim)

    answer.by_rule = True  # type: ignore[attr-defined]
    attention_dispatch.gather_size_by_comm = answer
    context_parallel.gather_size_by_comm = answer
    context_parallel._all_gather_anything = gather_output
