"""Which tokens each process holds, and an exchange of heads against attention in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import context_parallel
import pytest
import torch
from torch import distributed
from torch.nn import functional

from quantmatrix.runtime import head_exchange, token_shares


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
    assert token_shares.name_shares([7, 8], 2, 0) == token_shares.name_shares([7, 8], 2, 1) == {}
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


@pytest.mark.parametrize("tokens", [6, 7])
@pytest.mark.parametrize("batch", [1, 2])
def test_exchanged_heads_give_the_attention_of_one_process(tokens: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    whole = [torch.randn(batch, tokens, 4, 8, generator=generator) for _ in range(3)]
    expected = attend_alone(*whole)
    shares = token_shares.share_out(tokens, 2)

    def act() -> None:
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        parts = [x.tensor_split(2, dim=1)[rank].contiguous() for x in whole]
        found = head_exchange.attend(*parts, shares, distributed.group.WORLD, attend_alone)
        assert torch.allclose(found, expected.tensor_split(2, dim=1)[rank], atol=1e-6)
        distributed.destroy_process_group()

    assert context_parallel.fork(act, 2) == [0, 0]


def attend_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(*parts).transpose(1, 2)
