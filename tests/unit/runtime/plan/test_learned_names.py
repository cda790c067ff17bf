"""Learned names: diffusers' own converter is the oracle, on real tensors, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from original_states import MORE_SPACES, SPACES

from quantmatrix import models
from quantmatrix.models.dialect import Dialect, Target
from quantmatrix.runtime.plan import learned_names
from quantmatrix.runtime.plan.learned_names import LearnedDialect, LearningError, Rows, Run, learn
from quantmatrix.runtime.plan.placement import select_rows

FLUX, HUNYUAN = "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"
SMALL = {
    FLUX: {"num_attention_heads": 2, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    HUNYUAN: {"num_attention_heads": 2, "attention_head_dim": 128},
}
"""Options of small models, whose widths diffusers' converters do not know."""


EVERY = {**SPACES, **MORE_SPACES}


@cache
def measure(space: str, small: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of the model of a space, by diffusers name."""
    import diffusers
    from accelerate import init_empty_weights

    class_name = space.split()[0]
    options = {**EVERY[space].options, **(SMALL[class_name] if small else {})}
    with init_empty_weights():
        model = getattr(diffusers, class_name)(**options)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def follow(dialect: Dialect, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a state dict under the names to which a dialect leads, cut as it says."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        targets = dialect.tensor_targets(name)
        layer, _, leaf = name.rpartition(".")
        if targets is None:
            targets = tuple(
                Target(f"{t.module}.{leaf}".lstrip("."), t.rows, swap_halves=t.swap_halves)
                for t in dialect.layer_targets(layer)
            )
        for target in targets:
            rows = select_rows(target, tensor.shape[0])
            assert target.module not in found
            found[target.module] = tensor if rows is None else tensor[rows]
    return found


def learn_space(space: str, **changes: Any) -> LearnedDialect:
    """The dialect of a space, of which names may be left out or added."""
    names: dict[str, Any] = {**EVERY[space].shapes_by_name(), **changes}
    names = {name: shape for name, shape in names.items() if shape is not None}
    found = learn(space.split()[0], {}, names, measure(space))
    assert found is not None
    return found


@pytest.mark.parametrize("space", EVERY)
def test_every_tensor_is_where_diffusers_puts_it(space: str) -> None:
    state = EVERY[space].draw()
    converter = learned_names.find_converter(space.split()[0])
    assert converter is not None
    expected = converter(checkpoint=dict(state), config={})
    model = measure(space)
    assert set(expected) == set(model)  # the names of the space are those of a release
    assert {n: t.shape[0] for n, t in expected.items()} == {n: s[0] for n, s in model.items()}
    dialect = learn_space(space)
    got = follow(dialect, state)
    assert set(got) == set(expected)
    got = {name: tensor.reshape(expected[name].shape) for name, tensor in got.items()}
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert set(dialect.dropped()) == set(EVERY[space].dropped)


@pytest.mark.parametrize("space", [FLUX, HUNYUAN])
def test_sizes_are_the_models_where_a_converter_names_published_ones(space: str) -> None:
    """diffusers cannot convert a small FLUX.1: its converter says 3072."""
    own, model = SPACES[space].resize(D=256), measure(space, small=True)
    state = own.draw()
    with pytest.raises(RuntimeError, match="split"):
        learned_names.find_converter(space)(checkpoint=dict(state))  # type: ignore[misc]
    dialect = learn(space, {}, own.shapes_by_name(), model)
    assert dialect is not None
    got = follow(dialect, state)
    assert {n: t.shape[0] for n, t in got.items()} == {n: s[0] for n, s in model.items()}
    block = "single_transformer_blocks.1"
    parts = [*(f"{block}.attn.to_{x}" for x in "qkv"), f"{block}.proj_mlp"]
    for leaf in ("weight", "bias"):
        joined = torch.cat([got[f"{part}.{leaf}"] for part in parts])
        assert torch.equal(joined, state[f"single_blocks.1.linear1.{leaf}"])
    assert [t.rows for t in dialect.layer_targets("single_blocks.1.linear1")] == [
        *((0, 1, 7), (1, 2, 7), (2, 3, 7), (3, 7, 7)),
    ]


@pytest.mark.parametrize(
    ("model", "name", "space"),
    [("flux-2", "bfl", "Flux2Transformer2DModel"), ("wan-2-2", "wan-original", "WanTransformer3DModel image to video")],
)  # fmt: skip
def test_written_dialects_say_what_diffusers_does(model: str, name: str, space: str) -> None:
    written = next(d for d in models.load(model).DIALECTS if d.name == name)
    state = SPACES[space].draw()
    expected, got = follow(learn_space(space), state), follow(written, state)
    assert set(got) == set(expected)
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []


def test_a_tensor_that_the_file_lacks_is_in_no_place() -> None:
    lost = "double_blocks.1.img_attn.qkv.bias"
    dialect = learn_space(FLUX, **{lost: None})
    places = {target.module for targets in dialect.table.values() for target in targets}
    missing = {f"transformer_blocks.1.attn.to_{x}.bias" for x in "qkv"}
    assert set(measure(FLUX)) - places == missing


def test_a_name_that_the_converter_does_not_know_stays() -> None:
    dialect = learn_space(FLUX, **{"double_blocks.0.extra.weight": (4, 4)})
    assert dialect.tensor_targets("double_blocks.0.extra.weight") is None
    assert dialect.layer_targets("double_blocks.0.extra") == (Target("double_blocks.0.extra"),)
    assert dialect.dropped() == {}


def test_names_that_gain_nothing_are_left_alone() -> None:
    model = measure(FLUX)
    assert learn("WanTransformer3DModel", {}, model, measure("WanTransformer3DModel")) is None
    assert (
        learn("QwenImageTransformer2DModel", {}, {"x.weight": (2, 2)}, {"y.weight": (2, 2)}) is None
    )
    assert learn("AutoModel", {}, {"x.weight": (2, 2)}, {"y.weight": (2, 2)}) is None
    with pytest.raises(LearningError, match="IndexError"):
        learn(FLUX, {}, model, model)  # no double_blocks in it


def cut_twice(state: dict[str, Any]) -> Any:
    return {"a": state["x"].chunk(2)[0].chunk(2)[0]}


def join_two(state: dict[str, Any]) -> Any:
    return {"a": torch.cat([state["x"], state["y"]])}


def take_half(state: dict[str, Any]) -> Any:
    return {"a": state["x"].chunk(2)[1]}


def turn_thirds(state: dict[str, Any]) -> Any:
    return {"a": torch.cat(torch.chunk(state["x"], 3)[::-1])}


def cut_columns(state: dict[str, Any]) -> Any:
    return {"a": torch.chunk(state["x"], 2, 1)[0]}


def add(state: dict[str, Any]) -> Any:
    return {"a": torch.add(state["x"], 1)}


def step(state: dict[str, Any]) -> Any:
    return {"a": state["x"][::2]}


def pick(state: dict[str, Any]) -> Any:
    return {"a": state["x"][1]}


@pytest.mark.parametrize(
    "converter", [cut_twice, join_two, take_half, turn_thirds, cut_columns, add, step, pick]
)
def test_what_stand_ins_cannot_follow_is_an_error(
    converter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(checkpoint: dict[str, Any], **_: Any) -> Any:
        return converter(checkpoint)

    monkeypatch.setattr(learned_names, "find_converter", lambda _: convert)
    with pytest.raises(LearningError):
        learn("Any", {}, {"x": (12, 4), "y": (12, 4)}, {"a": (6, 4)})


@pytest.mark.parametrize(
    ("converter", "target"),
    [
        (lambda d: {"a": d["x"][0, :, 0, 0]}, Target("a", reshaped=True)),
        (lambda d: {"a": d["x"].reshape(6, -1)}, Target("a", reshaped=True)),
        (lambda d: {"a": torch.cat([d["x"]])}, Target("a")),
        (lambda d: {"a": d.pop("x", None), "b": d.pop("z", None)}, Target("a")),
    ],
)
def test_shapes_and_the_rest(
    converter: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(checkpoint: dict[str, Any], **_: Any) -> Any:
        return converter(checkpoint)

    monkeypatch.setattr(learned_names, "find_converter", lambda _: convert)
    found = learn("Any", {}, {"x": (1, 12, 1, 1)}, {"a": (6, 2)})
    assert found is not None
    assert found.table == {"x": (target,)}


def test_slices_are_pieces() -> None:
    rows = Rows((Run("x"),), (12, 4))
    assert [r.runs[0].index for r in (rows[:4], rows[4:])] == [0, 1]
    assert rows[:4].runs[0].sizes == rows[4:].runs[0].sizes == (4, 8)
    assert rows[4:8].runs[0] == Run("x", 1, 3, (4, 4, 4))
    assert rows.reshape((6, -1)).shape == (6, 8)
    assert rows.size() == (12, 4)
    for pieces in (rows.chunk(3), rows.split(4)):
        assert [piece.runs for piece in pieces] == [(Run("x", n, 3),) for n in range(3)]
        assert [piece.shape for piece in pieces] == [(4, 4)] * 3
