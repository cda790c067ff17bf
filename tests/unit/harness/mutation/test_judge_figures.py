"""What the gates of a fault say, and which tensors a fault takes, on made-up plans."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.harness.mutation import faults, judge
from quantmatrix.measure import latents
from quantmatrix.proof import limit_classes
from quantmatrix.runtime import media
from quantmatrix.runtime.witness import verdict


class Named:
    """An object of some attributes."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("degenerate", "far", "errors", "found"),
    [
        (None, [], {"t": {"a": 0.25}}, {}),
        ("white", ["x", "y"], {"t": {"a": 0.2501, "b": float("nan")}, "u": {"c": 0.1}},
         {"generate": "white", "latents": "x; y",
          "layers": "t.a: relative error 0.2501, the limit is 0.25; "
                    "t.b: relative error nan, the limit is 0.25"}),
    ],
)  # fmt: skip
def test_gates_of_a_run(
    degenerate: str | None, far: list[str], errors: Any, found: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(limit_classes, "name_run", lambda parts: f"class {list(parts)}")
    monkeypatch.setattr(media, "stack_frames", lambda frames: frames)
    monkeypatch.setattr(media, "find_degeneration", lambda frames: frames and degenerate)
    monkeypatch.setattr(latents, "compare_trajectories", lambda *sides: sides)
    monkeypatch.setattr(latents, "judge", lambda steps, allowed: far if steps == (1, 2) else ["?"])
    allowed = Named(layer_error=0.25)
    mutator: Any = judge.Mutator.__new__(judge.Mutator)
    mutator.limits = Named(find=lambda *asked: {("class [7]", "m", "h"): allowed}[asked])
    cell: Any = Named(model="m", hardware="h")
    plan: Any = Named(components={"t": 7})
    runs: Any = Named(latents=1), Named(latents=2, media="frames")
    said: Any = Named(found=errors)
    assert mutator.judge_run(cell, plan, *runs, said) == found


def make_part(*layers: str, family: str = "fp8") -> Any:
    return Named(layers=dict.fromkeys(layers), family=family)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"t": make_part("a.9")}, ""), ({"t": make_part("a.9"), "u": make_part()}, ""),
        ({"t": make_part()}, "quantized components are [], the row has ('t',)"),
        ({"t": make_part("a.9"), "s": make_part("b")},
         "quantized components are ['s', 't'], the row has ('t',)"),
        ({"t": make_part("a.9", family="gguf")}, "t was taken for gguf"),
        ({"t": make_part("k.1", "a", "k.2", "l", "k.3", "k.4")},
         "quantized, although the row keeps one two: k.1, k.2, l, k.3"),
        ({"t": make_part("k.1.b", "xl", "m")}, ""),
    ],
    ids=list("abcdefg"),
)  # fmt: skip
def test_a_plan_beside_its_row(
    parts: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"one": (r"k\.\d",), "two": ("l",), "three": ("m",)}
    monkeypatch.setattr(models, "load", lambda _: Named(FALLBACKS=sets))
    row: Any = Named(components=("t",), family="fp8", model="m", kept="one two")
    plan: Any = Named(components=parts)
    assert judge.judge_plan(row, plan) == said


@pytest.mark.parametrize(
    ("problems", "found"), [([], {}), ([[], []], {}), ([["a"], ["b", "c"]], {"witness": "a; b; c"})]
)
def test_what_a_witness_objects_to(
    problems: list[list[str]], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmatrix.request import Request

    asked = []

    def examine(plan: Any) -> list[Any]:
        asked.append(plan)
        return [Named(problems=one) for one in problems]

    monkeypatch.setattr(verdict, "examine_plan", examine)
    monkeypatch.setattr(judge, "replace", lambda _, **changes: changes)
    plan: Any = Named(request=Request(model_path="x"))
    assert judge.judge_witness(plan) == found
    assert asked == [{"request": {"witness": "require"}}]


def test_gates_by_name() -> None:
    every = ("plan", "witness", "load", "weights", "generate", "latents", "layers")
    assert judge.choose_gates([]) == every
    for names in (["plan"], ["witness"], ["witness", "plan"]):
        assert judge.choose_gates(names) == ("plan", "witness")
    words = (
        "--gates load: expected plan witness, which need no model; the others come together, when "
        "the flag is left out"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        judge.choose_gates(["plan", "load", "latents"])


def test_faults_by_name() -> None:
    assert judge.choose_faults([]) == list(faults.FAULTS)
    assert [f.name for f in judge.choose_faults(["unit-scales", "swapped-nibbles"])] == [
        "unit-scales", "swapped-nibbles"
    ]  # fmt: skip
    known = ", ".join(fault.name for fault in faults.FAULTS)
    words = f"--faults x: no such fault; known: {known}"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        judge.choose_faults(["unit-scales", "x", "y"])


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({}, False), ({"b": torch.tensor([1.0])}, True), ({"a": torch.tensor([[1.0, 2.5]])}, True),
        ({"a": torch.tensor([[1.0, 2.0]])}, False), ({"c": torch.tensor([-0.0])}, True),
        ({"a": torch.tensor([[0, 1.0], [0, 2.0]])[:, 1:].T}, False),
    ],
    ids=list("abcdef"),
)  # fmt: skip
def test_any_bit_that_is_different(change: dict[str, Any], other: bool) -> None:
    own = {"a": torch.tensor([[1.0, 2.0]]), "c": torch.tensor([0.0])}
    assert judge.is_other(own, {**own, **change}) is other
    assert judge.is_other(own, {"a": own["a"]})


# --- faults ----------------------------------------------------------------------------------------


def test_scales_of_a_layer_the_most_detailed_first() -> None:
    tensors = {
        "weight_scale_2": torch.ones(1), "weight_scale": torch.ones(3, 2), "wscales": torch.ones(4),
        "input_scale": torch.ones(99), "pre_quant_scale": torch.ones(99), "smooth_scale": torch.ones(99),
        "quant_bias_scale": torch.ones(99), "scale.weight": torch.ones(99), "a.scale": torch.ones(2),
        "weight": torch.ones(99),
    }  # fmt: skip
    assert faults.find_scales(tensors) == ["weight_scale", "wscales", "a.scale", "weight_scale_2"]
    assert faults.find_codes(tensors) == "weight"
    assert (
        faults.find_codes({"linear.weight": tensors["weight"], "qweight": tensors["weight"]})
        == "qweight"
    )
    assert faults.find_codes({"weights": tensors["weight"]}) is None


@pytest.mark.parametrize(
    ("shape", "found"),
    [((2, 2), True), ((2, 1), False), ((1, 2), False), ((4,), False), ((2, 2, 2), False), ((3, 2), True)],
)  # fmt: skip
def test_matrices(shape: tuple[int, ...], found: bool) -> None:
    assert faults.is_matrix(torch.ones(shape)) is found


@pytest.mark.parametrize("fault", [faults.drop_scales, faults.unit_scales, faults.misplace_scales])
def test_faults_of_scales_need_scales(fault: Any) -> None:
    assert fault({"weight": torch.ones(4)}) is None


@pytest.mark.parametrize(
    ("scales", "found"),
    [
        ([1.0], None), ([1.0, 2.0, 3.0], None), ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]),
    ],
)  # fmt: skip
def test_halves_of_scales_are_interleaved(scales: list[float], found: list[float] | None) -> None:
    changed = faults.misplace_scales({"weight_scale": torch.tensor(scales)})
    assert (changed and changed["weight_scale"].tolist()) == found


@pytest.mark.parametrize(
    ("scales", "found"),
    [([[1.0, 2.0]], None), ([[1.0], [2.0]], None), ([[1.0, 2, 3], [4, 5, 6]], [[1.0, 4, 2], [5, 3, 6]])],
)  # fmt: skip
def test_rows_of_scales_as_columns(scales: Any, found: Any) -> None:
    changed = faults.transpose_scales({"weight_scale": torch.tensor(scales)})
    assert (changed and changed["weight_scale"].tolist()) == found


def test_nibbles_low_rank_and_torn_codes() -> None:
    codes = torch.tensor([[0x1F, 0xA0, 0x37]], dtype=torch.uint8)
    changed = faults.swap_nibbles({"weight": codes, "x": codes})
    assert changed is not None
    assert changed["weight"].tolist() == [[0xF1, 0x0A, 0x73]]
    assert changed["x"] is codes
    signed = faults.swap_nibbles({"qweight": codes.view(torch.int8)})
    assert signed is not None
    assert signed["qweight"].dtype == torch.int8
    assert signed["qweight"].view(torch.uint8).tolist() == [[0xF1, 0x0A, 0x73]]
    torn = faults.corrupt({"weight": torch.tensor([1, 2, 3, 4, 5], dtype=torch.int8)})
    assert torn is not None
    assert torn["weight"].tolist() == [4, 5, 1, 2, 3]
    for name in ("proj_up", "svdquant_lora_b"):
        skipped = faults.skip_low_rank({name: torch.ones(2), "weight": torch.ones(2)})
        assert skipped is not None
        assert [skipped[one].tolist() for one in (name, "weight")] == [[0, 0], [1, 1]]
    assert faults.skip_low_rank({"proj_down": torch.ones(2)}) is None
    stale = faults.stale_scale({"input_scale": torch.tensor([24.0]), "weight": codes})
    assert stale is not None
    assert stale["input_scale"].tolist() == [3.0]


def test_a_layer_in_full_precision_of_a_quantized_ones_size() -> None:
    def piece(rows: int, columns: int, rank: int = 0) -> Any:
        return Named(out_features=rows, in_features=columns, scheme=Named(rank=rank))

    model = torch.nn.ModuleDict({
        "a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(7, 11), "c": torch.nn.Linear(5, 3),
    })  # fmt: skip
    for pieces, found in (
        ([piece(3, 5)], "c"), ([piece(11, 7), piece(3, 5)], "b"), ([piece(5, 3, 4)], None),
        ([piece(9, 9)], None), ([piece(5, 3)], "a"),
    ):  # fmt: skip
        part: Any = Named(pieces=lambda pieces=pieces: pieces)
        like = faults.find_quantizable(part, model)
        assert (like and like[0]) == found
        if like:
            assert like[1] is model[found]
            assert like[2] in pieces
