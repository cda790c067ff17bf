"""Which tokens each process holds, and an exchange of heads against attention in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import context_parallel
import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from torch import distributed
from torch.nn import functional

from quantmatrix import models
from quantmatrix.measure.bench.synthetic import make_inputs
from quantmatrix.runtime import head_exchange, parallel, token_shares
from quantmatrix.runtime.acceleration import compile_blocks
from quantmatrix.runtime.plan import context_parallel as sharing


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 4608])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shares_are_those_of_tensor_split(tokens: int, processes: int) -> None:
    parts = torch.empty(tokens).tensor_split(processes)
    assert token_shares.share_out(tokens, processes) == [len(part) for part in parts]


def test_every_process_finds_the_tokens_of_all_by_its_own() -> None:
    for rank, (text, picture) in enumerate([(4, 8), (3, 8)]):
        known = token_shares.name_shares([7, 16], 2, rank)
        assert known == {text: [4, 3], picture: [8, 8], text + picture: [12, 11]}


def test_where_one_process_could_confuse_two_sequences_none_answers() -> None:
    """7 tokens are 4 and 3, 8 are 4 and 4: the first process would see 4 of either."""
    for lengths in ([7, 8], [8, 7]):
        assert [token_shares.name_shares(lengths, 2, rank) for rank in range(2)] == [{}, {}]
    assert token_shares.name_shares([8, 8], 2, 0) == {4: [4, 4], 8: [8, 8]}


def test_tokens_of_texts_pictures_and_videos_are_counted() -> None:
    flux = SimpleNamespace(
        _cp_plan={"": {"hidden_states": 1, "encoder_hidden_states": 1}, "out": 2}
    )
    given: dict[str, Any] = {
        "hidden_states": torch.empty(1, 12, 5),
        "encoder_hidden_states": torch.empty(1, 7, 3),
        "timestep": torch.empty(1),
    }
    assert token_shares.count_tokens(flux, given) == [12, 7]
    wan = SimpleNamespace(
        _cp_plan={"rope": {0: 1}, "blocks.0": {"hidden_states": 1}},
        config=SimpleNamespace(patch_size=(1, 2, 2)),
    )
    given["hidden_states"] = torch.empty(1, 16, 3, 4, 10)
    assert token_shares.count_tokens(wan, given) == [3 * 2 * 5]


@pytest.mark.parametrize(
    ("tokens", "batch", "heads", "processes"),
    [
        (6, 1, 4, 2),
        (6, 2, 4, 2),
        (7, 1, 4, 2),
        (7, 2, 4, 2),
        (6, 1, 3, 2),
        (7, 2, 3, 2),
        (7, 1, 5, 3),
    ],
)
def test_exchanged_heads_give_the_attention_of_one_process(
    tokens: int, batch: int, heads: int, processes: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    whole = [torch.randn(batch, tokens, heads, 8, generator=generator) for _ in range(3)]
    expected = attend_alone(*whole)
    shares = token_shares.share_out(tokens, processes)

    def act() -> None:
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        seen = []

        def attend_own(*parts: torch.Tensor) -> torch.Tensor:
            seen.append(parts[0].shape[2])
            return attend_alone(*parts)

        parts = [x.tensor_split(processes, dim=1)[rank].contiguous() for x in whole]
        found = head_exchange.attend(*parts, shares, distributed.group.WORLD, attend_own)
        assert torch.allclose(found, expected.tensor_split(processes, dim=1)[rank], atol=1e-6)
        assert seen == [sharing.split_heads(heads, processes)[rank]]
        distributed.destroy_process_group()

    assert context_parallel.fork(act, processes) == [0] * processes


@pytest.mark.parametrize(
    ("tokens", "batch", "heads", "ulysses", "ring", "own"),
    [
        (8, 2, 2, 2, 2, [1, 1, 1, 1]),
        (9, 1, 3, 2, 2, [2, 1, 2, 1]),
        (11, 2, 4, 2, 2, [2, 2, 2, 2]),
        (6, 1, 2, 1, 3, [2, 2, 2]),
        (7, 2, 1, 1, 3, [1, 1, 1]),
    ],
)
def test_gathered_keys_give_the_attention_of_one_process(
    tokens: int, batch: int, heads: int, ulysses: int, ring: int, own: list[int]
) -> None:
    """Groups that hold as many tokens and others; both degrees as diffusers numbers their processes."""
    generator = torch.Generator().manual_seed(tokens)
    whole = [torch.randn(batch, tokens, heads, 8, generator=generator) for _ in range(3)]
    expected = attend_alone(*whole)
    processes = ulysses * ring
    shares = token_shares.share_out(tokens, processes)

    def act() -> None:
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        config = diffusers.ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
        mesh = distributed.init_device_mesh(
            "cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names
        )
        config.setup(rank, processes, torch.device("cpu"), mesh)
        seen = []

        def attend_own(*parts: torch.Tensor) -> torch.Tensor:
            seen.extend(part.shape[1:3] for part in parts)
            return attend_alone(*parts)

        parts = [x.tensor_split(processes, dim=1)[rank].contiguous() for x in whole]
        found = head_exchange.attend_in_groups(*parts, shares, config, attend_own)
        assert torch.allclose(found, expected.tensor_split(processes, dim=1)[rank], atol=1e-6)
        first = rank - rank % ulysses
        queries = sum(shares[first : first + ulysses])
        assert seen == [(queries, own[rank]), (tokens, own[rank]), (tokens, own[rank])]
        distributed.destroy_process_group()

    assert context_parallel.fork(act, processes) == [0] * processes


@pytest.mark.parametrize(("processes", "queries", "keys"), [(2, 7, 4), (3, 6, 7)])
def test_cross_attention_gives_that_of_one_process(processes: int, queries: int, keys: int) -> None:
    """With a mask of each head, as LTX-Video gives it, of which diffusers takes those of no process."""
    generator = torch.Generator().manual_seed(keys)
    whole = [torch.randn(2, n, 6, 8, generator=generator) for n in (queries, keys, keys)]
    mask = torch.randn(2, 6, 1, keys, generator=generator)
    expected = attend_alone(*whole, mask)
    shares = token_shares.share_out(keys, processes)

    def act() -> None:
        distributed.init_process_group("gloo")
        config = diffusers.ContextParallelConfig(ulysses_degree=processes)
        mesh = distributed.init_device_mesh(
            "cpu", (1, processes), mesh_dim_names=("ring", "ulysses")
        )
        rank = distributed.get_rank()
        config.setup(rank, processes, torch.device("cpu"), mesh)
        head_exchange.replace_attention({shares[rank]: shares}.get)
        parts = [x.tensor_split(processes, dim=1)[rank] for x in whole]
        found = attention_dispatch._native_attention(
            *parts, mask.tensor_split(processes, dim=3)[rank],
            _parallel_config=SimpleNamespace(context_parallel_config=config),
        )  # fmt: skip
        assert torch.allclose(found, expected.tensor_split(processes, dim=1)[rank], atol=1e-6)
        distributed.destroy_process_group()

    assert context_parallel.fork(act, processes) == [0] * processes


@pytest.mark.parametrize(
    ("heads", "processes", "shares"),
    [(24, 2, [12, 12]), (3, 2, [2, 1]), (30, 4, [8, 8, 8, 6]), (24, 7, [4] * 6 + [0])],
)
def test_the_last_process_has_what_is_left_of_the_heads(
    heads: int, processes: int, shares: list[int]
) -> None:
    assert sharing.split_heads(heads, processes) == shares


@pytest.mark.parametrize(
    ("model", "heads", "processes", "texts", "masked", "compiled"),
    [
        ("flux-1", 3, 2, 16, False, False),
        ("flux-1", 3, 2, 13, False, True),
        (
            "flux-1",
            3,
            2,
            15,
            False,
            False,
        ),  # 8 tokens of either sequence: all ask, as diffusers does
        ("qwen-image", 3, 2, 15, False, False),
        ("qwen-image", 3, 2, 16, True, False),
        ("flux-1", 3, 3, 13, False, False),  # a picture of 16 tokens is 6, 5 and 5
        ("flux-1", 2, 4, 16, False, True),  # two groups of two that exchange heads
        ("flux-1", 2, 3, 13, False, True),
        ("flux-1", 1, 2, 15, False, False),
        ("qwen-image", 2, 3, 16, True, False),
        ("qwen-image", 2, 4, 16, True, False),
    ],
)
def test_a_transformer_is_shared_by_processes_that_its_heads_do_not_divide_by(
    model: str, heads: int, processes: int, texts: int, masked: bool, compiled: bool
) -> None:
    """Even and uneven tokens; attention with a mask stays with diffusers, which pads heads, too.

    Where the last process would have no head, keys, values and masks are gathered.

    Blocks are traced as `--compile` does, without generating code, and no graph breaks.
    """
    torch.manual_seed(0)
    known = models.load(model)
    parts = {**known.STAND_IN.transformer, "num_attention_heads": heads}
    transformer = getattr(diffusers, known.TRANSFORMER)(**parts).eval().requires_grad_(False)
    inputs = make_inputs(model, transformer, "cpu", torch.float32, size="tiny")
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :texts]
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][:texts]
    if masked:
        inputs["encoder_hidden_states_mask"] = torch.arange(texts)[None] < texts - 3
    expected = transformer(**inputs)[0]

    def act() -> None:
        distributed.init_process_group("gloo")
        component = SimpleNamespace(config=parts)
        plan = SimpleNamespace(
            machine=SimpleNamespace(device="cpu"), components={"transformer": component}
        )
        parallel.split(SimpleNamespace(transformer=transformer), plan, processes)
        if compiled:
            compile_blocks(transformer, backend="eager", fullgraph=True)
        found = transformer(**inputs)[0]
        assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
        distributed.destroy_process_group()

    assert context_parallel.fork(act, processes) == [0] * processes


def attend_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(*parts, mask).transpose(1, 2)
