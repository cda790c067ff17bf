"""Witness: numbers of two weights, limits that decide, and the words for what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import WitnessError
from quantmatrix.models.dialect import Target
from quantmatrix.runtime.plan.types import Piece
from quantmatrix.runtime.witness import base as witness_base
from quantmatrix.runtime.witness import inspect_against, measure, verdict
from quantmatrix.runtime.witness.base import Base
from quantmatrix.runtime.witness.measure import Likeness, Sample
from quantmatrix.scheme import Scheme

FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")
NVFP4 = Scheme("linear.nvfp4", "NVFP4", "e2m1", "group", "group-dynamic", group_size=16)


def piece(
    layer: str = "a", scheme: Scheme = FP8, out: int = 384, into: int = 64, **target: Any
) -> Piece:
    return Piece(
        layer, Target(**{"module": layer, **target}), scheme, out, into, "decode", "W8A8", 1
    )


def bounds() -> Any:
    found = {"cosine": 0.9, "coded_cosine": 0.8, "relative_l2": 0.5, "gain": (0.75, 1.25)}
    return SimpleNamespace(**found, scale_error=0.125, source="here")


def finding(limits: Any = "usual", scheme: Scheme = FP8, kind: str = "a", **numbers: float) -> Any:
    given = {"cosine": 0.95, "coded_cosine": 0.9, "relative_l2": 0.25, "gain": 1.0,
             "scale_error": 0.0625, "nbytes": 10, **numbers}  # fmt: skip
    sample = Sample("m", piece("a", scheme), kind, 128, 256, 0)
    limits = bounds() if limits == "usual" else limits
    return verdict.Finding(sample, Likeness(**given), limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numbers", "agrees"),
    [
        ({}, True),
        ({"cosine": 0.9}, True), ({"cosine": 0.8999}, False), ({"cosine": 1.0}, True),
        ({"coded_cosine": 0.8}, True), ({"coded_cosine": 0.7999}, False),
        ({"gain": 0.75}, True), ({"gain": 0.7499}, False),
        ({"gain": 1.25}, True), ({"gain": 1.2501}, False),
        ({"scale_error": 0.125}, True), ({"scale_error": 0.1251}, False),
        ({"relative_l2": 9.0}, True),
    ],
)  # fmt: skip
def test_each_limit_from_both_sides(numbers: Mapping[str, float], agrees: bool) -> None:
    assert finding(**numbers).verdict == ("agrees" if agrees else "disagrees")
    assert finding(None, **numbers).verdict == "not judged"


def test_a_finding_as_data() -> None:
    found = finding(cosine=0.98765432, relative_l2=math.inf, gain=1.23456789).to_json()
    assert found == {
        "layer": "a",
        "module": "m",
        "rows": [128, 256],
        "reading": "e4m3 per tensor",
        "cosine": 0.987654,
        "coded_cosine": 0.9,
        "relative_l2": 1e9,
        "gain": 1.234568,
        "scale_error": 0.0625,
        "verdict": "agrees",
        "limits": {
            "cosine": {"at_least": 0.9},
            "relative_l2": {"at_most": 0.5},
            "gain": {"at_least": 0.75, "at_most": 1.25},
            "scale_error": {"at_most": 0.125},
            "source": "here",
        },
    }
    assert finding(None).to_json()["limits"] is None
    raw = replace(NVFP4, swap_nibbles=True, tiled_scales=True)
    assert finding(scheme=raw).to_json()["reading"] == (
        "even column in the high nibble, block scales in 128 x 4 tiles"
    )


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ([], "no base weights"), (["agrees"], "agrees"), (["agrees", "not judged"], "not judged"),
        (["not judged", "disagrees", "agrees"], "disagrees"), (["disagrees"], "disagrees"),
    ],
)  # fmt: skip
def test_the_worst_verdict_counts(verdicts: list[str], worst: str) -> None:
    made = {"agrees": finding(), "not judged": finding(None), "disagrees": finding(gain=9.0)}
    report = verdict.Report("transformer", Base(), "", [made[word] for word in verdicts])
    assert report.verdict == worst
    assert report.nbytes == 10 * len(verdicts)


def test_a_report_as_data() -> None:
    findings = [
        finding(kind="x", cosine=0.97, gain=0.8, relative_l2=0.125, nbytes=7),
        finding(kind="x", cosine=0.92, gain=1.1, coded_cosine=0.85, scale_error=0.1),
        finding(kind="y", scheme=NVFP4, gain=1.5),
        finding(kind="x", gain=math.inf, nbytes=1),
    ]
    report = verdict.Report(
        "transformer", Base(reference="o/r"), "", findings, seconds=1.23456789
    ).to_json()
    kinds = report.pop("kinds")
    assert report == {
        "base": "o/r",
        "missing": None,
        "layout": None,
        "verdict": "disagrees",
        "layers": 4,
        "bytes": 28,
        "seconds": 1.2346,
    }
    assert [(k["kind"], k["layers"], k["verdict"]) for k in kinds] == [
        ("FP8: x", 2, "agrees"),
        ("NVFP4: y", 1, "disagrees"),
        ("FP8: x", 1, "disagrees"),
    ]
    numbers = ("cosine", "coded_cosine", "relative_l2", "gain", "scale_error")
    assert [kinds[0][name] for name in numbers] == [0.92, 0.85, 0.25, 0.8, 0.1]
    assert kinds[2]["gain"] == 1e9
    empty = verdict.Report("transformer", Base(missing="none"), "rows").to_json()
    assert (empty["base"], empty["missing"], empty["layout"]) == (None, "none", "rows")
    assert (empty["seconds"], empty["bytes"], empty["kinds"]) == (0.0, 0, [])


def make_component(name: str = "transformer") -> Any:
    header = TensorHeader("a.weight", "F8_E4M3", (384, 64), "f.st")
    stored = Checkpoint("here", ("f.st",), {"b.weight": header, "a.weight": header})
    return SimpleNamespace(name=name, checkpoint=stored)


@pytest.mark.parametrize(
    ("cosine", "hint"),
    [
        (0.4999, "these are weights of another model, or codes in another order"),
        (0.5, "a scale is not the one that its codes were made with, or is read in another order"),
    ],
)
def test_a_problem_in_words(cosine: float, hint: str) -> None:
    first = finding(cosine=cosine, coded_cosine=0.25, relative_l2=0.12345, gain=2.34567,
                    scale_error=0.98765)  # fmt: skip
    wrong = [finding(cosine=0.7, coded_cosine=0.75, scale_error=5.0), first]
    base = Base(name="transformer", reference="o/r")
    report = verdict.Report("transformer", base, "", [*wrong, finding()])
    start = (
        f"f.st: layer a decodes to other weights than m.weight of o/r (transformer): cosine {cosine:.4f} "
        "(coded part 0.2500), relative L2 0.123, 2.35 times as long, groups 0.988 off in length; expected "
        "a cosine of at least 0.900, 0.75 to 1.25 times the length, and groups within 0.125; 2 of 3 layers "
        "disagree"
    )
    part = make_component()
    assert verdict.describe_problem(report, part, wrong, "", "") == (
        f"{start}: {hint}. Name the base model that the checkpoint was made from, quantize again, or "
        "load it unproved with --witness off"
    )
    assert verdict.describe_problem(report, part, wrong, "", "Read so.") == f"{start}. Read so."
    assert verdict.describe_problem(report, part, wrong, "transformer_2", "") == (
        f"{start}. It agrees with transformer_2 of o/r: these are the weights of the other expert; give "
        "the file with --transformer-2-weights-path"
    )
    unjudged = [finding(None)]
    text = verdict.describe_problem(report, part, unjudged, "", "")
    assert "off in length; 1 of 3 layers disagree: a scale" in text


def test_which_of_equal_layers_is_named() -> None:
    """The lowest cosine of the coded part; of equal ones the largest distance of lengths."""
    wrong = [finding(coded_cosine=0.5, scale_error=0.1), finding(coded_cosine=0.5, scale_error=0.3),
             finding(coded_cosine=0.6, scale_error=0.9)]  # fmt: skip
    report = verdict.Report("transformer", Base(reference="o/r"), "", wrong)
    assert "groups 0.3 off" in verdict.describe_problem(report, make_component(), wrong, "", "")


@pytest.mark.parametrize(
    ("cosines", "asked"), [([0.91, 0.95], False), ([0.9, 0.95], True), ([], False), ([0.5], True)]
)
def test_siblings_are_looked_at_where_one_may_be_nearer(
    cosines: list[float], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    part = make_component()
    part.base = SimpleNamespace(weights={"transformer": 1, "transformer_2": 2})
    monkeypatch.setattr(verdict, "fetch", lambda checkpoint, hub: seen.append(1) or checkpoint)
    monkeypatch.setattr(verdict, "measure", lambda *_: iter([finding(cosine=0.1) for _ in cosines]))
    found = [finding(cosine=cosine, kind=str(n)) for n, cosine in enumerate(cosines)]
    report = verdict.Report("transformer", Base(), "", found)
    assert verdict.find_nearer(report, part, SimpleNamespace(hub=None)) == ""  # type: ignore[arg-type]
    assert bool(seen) is asked


@pytest.mark.parametrize(
    ("own", "others", "nearer"),
    [
        ([0.5], [0.61], True), ([0.5], [0.6], False), ([0.5, 0.5], [0.9, 0.5], False),
        ([0.5, 0.5, 0.5], [0.9, 0.9, 0.5], True), ([0.5, 0.5], [0.9], False),
        ([0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1], False), ([0.9], [0.5], False),
    ],
)  # fmt: skip
def test_a_sibling_that_is_nearer_in_most_kinds(
    own: list[float], others: list[float], nearer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = make_component()
    part.base = SimpleNamespace(weights={"transformer": 1, "transformer_2": 2})
    monkeypatch.setattr(verdict, "fetch", lambda checkpoint, hub: checkpoint)
    monkeypatch.setattr(verdict, "measure", lambda *_: (finding(cosine=c) for c in others))
    found = [finding(cosine=cosine, kind=str(n)) for n, cosine in enumerate(own)]
    report = verdict.Report("transformer", Base(), "", found)
    got = verdict.find_nearer(report, part, SimpleNamespace(hub=None))  # type: ignore[arg-type]
    assert got == ("transformer_2" if nearer else "")


GUESS = (
    ". This is a warning, because o/r is a guess: neither --model-path nor _name_or_path in the "
    "checkpoint's config.json names a base model in full precision; --witness require makes it an error"
)


@pytest.mark.parametrize(
    ("wrong", "right", "certain", "witness", "kind"),
    [
        (0, 1, True, "auto", ""), (1, 0, True, "auto", "problem"), (1, 0, False, "auto", "warning"),
        (1, 1, False, "auto", "problem"), (1, 0, False, "require", "problem"),
    ],
)  # fmt: skip
def test_a_guess_warns_where_nothing_agrees(
    wrong: int, right: int, certain: bool, witness: str, kind: str
) -> None:
    found = [finding(gain=9.0)] * wrong + [finding()] * right
    base = Base("transformer", {}, "o/r", certain)
    part = make_component()
    part.base = SimpleNamespace(weights={})
    request: Any = SimpleNamespace(hub=None, witness=witness)
    got = verdict.judge(verdict.Report("transformer", base, "", found), part, request)
    assert bool(got.problems) is (kind == "problem")
    assert bool(got.warnings) is (kind == "warning")
    for text in got.warnings:
        assert text.endswith(GUESS)
        assert text.startswith("f.st: layer a decodes to other weights")


def decide(layers: Mapping[str, Any], witness: str = "auto", remote: Any = None) -> Checkpoint:
    """The choice among readings, each with its findings, an error or none."""

    def examine(part: Any, request: Any) -> Any:
        return verdict.Report("transformer", Base(reference="o/r"), "", layers[part])

    def plan_reading(checkpoint: Checkpoint) -> Any:
        word = checkpoint.chosen["nibble_order"]
        if isinstance(layers[word], Exception):
            raise layers[word]
        return word

    readings = [{"nibble_order": word} for word in layers]
    request: Any = SimpleNamespace(witness=witness)
    stored = Checkpoint("here", (), {}, remote=remote)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "examine", examine)
        return verdict.decide(stored, readings, plan_reading, request, lambda why: f"<{why}>")


LOW, HIGH = NVFP4, replace(NVFP4, swap_nibbles=True)


def test_one_reading_that_agrees_is_chosen() -> None:
    good = [finding(scheme=LOW, cosine=0.98), finding(scheme=LOW, cosine=0.96), finding(cosine=0.1)]
    bad = [finding(scheme=HIGH, cosine=0.3)]
    found = decide({"low": good, "high": bad})
    assert found.chosen == {
        "nibble_order": "low",
        "why": "decided by the weights of o/r (lowest cosine 0.9600)",
    }
    for layers, text in (
        ({"low": good, "high": good},
         "<Beside the base model's weights more than one reading agrees (even column in the low nibble, "
         "block scales in rows: cosine 0.9600; even column in the low nibble, block scales in rows: "
         "cosine 0.9600)>"),
        ({"low": bad},
         "<Beside the base model's weights no reading agrees (even column in the high nibble, block "
         "scales in rows: cosine 0.3000)>"),
        ({"low": [finding()]},
         "<The base model's weights are not at hand (none were named)>"),
    ):  # fmt: skip
        with pytest.raises(WitnessError) as caught:
            decide(layers)
        assert str(caught.value) == text
    for more, text in (
        ({"witness": "off"}, "<--witness off leaves it to you>"),
        ({"remote": 1}, "<Download the file first, for its tensors to be looked at>"),
    ):
        with pytest.raises(WitnessError) as caught:
            decide({"low": good}, **more)
        assert str(caught.value) == text


# --- measurements ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "module", "kind"),
    [
        ("b.0.q", "b.0.q", "b.{i}.q"), ("b.12.q.3.x", "b.12.q.3.x", "b.{i}.q.3.x"),
        ("d.1.qkv", "t.1.to_q", "d.{i}.qkv -> t.{i}.to_q"), ("b.0", "b.0", "b.0"), ("q", "q", "q"),
    ],
)  # fmt: skip
def test_kinds_of_layers(layer: str, module: str, kind: str) -> None:
    assert measure.name_kind(piece(layer, module=module)) == kind


@pytest.mark.parametrize(
    ("count", "found"),
    [
        (0, []),
        (1, [0]),
        (3, [0, 1, 2]),
        (4, [0, 1, 3]),
        (5, [0, 2, 4]),
        (8, [0, 3, 7]),
        (20, [0, 9, 19]),
    ],
)
def test_layers_are_spread(count: int, found: list[int]) -> None:
    items: Any = list(range(count))
    assert measure.spread(items, 3) == found


@pytest.mark.parametrize(
    ("block", "height"),
    [
        ((0, 0), 128),
        ((1, 32), 128),
        ((128, 128), 128),
        ((64, 1), 128),
        ((256, 1), 256),
        ((96, 1), 384),
    ],
)
def test_rows_that_are_read_together(block: tuple[int, int], height: int) -> None:
    assert measure.find_height(replace(FP8, block=block)) == height


@pytest.mark.parametrize(
    ("out", "into", "rows", "found"),
    [
        (384, 64, (0, 1, 1), [(0, 384)] * 3),
        (3000, 1000, (0, 1, 1), [(0, 128), (1408, 1536), (2816, 2944)]),
        (3000, 300, (0, 1, 1), [(0, 384), (1280, 1664), (2560, 2944)]),
        (3072, 1000, (1, 2, 3), [(3072, 3200), (4480, 4608), (6016, 6144)]),
        (1000, 2**20, (0, 1, 1), [(0, 128), (384, 512), (768, 896)]),
        (200, 2**20, (1, 3, 3), [(100, 228), (128, 256), (128, 256)]),
    ],
)
def test_rows_that_are_looked_at(
    out: int, into: int, rows: tuple[int, int, int], found: list[tuple[int, int]]
) -> None:
    one = piece(out=out, into=into, rows=rows)
    assert [measure.choose_rows(one, index) for index in range(3)] == found


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [(0, 128, (0, 128)), (1, 128, (0, 128)), (130, 300, (128, 384)), (256, 257, (256, 384)),
     (700, 768, (640, 768)), (760, 766, (640, 768))],
)  # fmt: skip
def test_tiles_that_hold_rows(start: int, stop: int, found: tuple[int, int]) -> None:
    assert measure.find_cut(piece(out=256, rows=(1, 2, 3)), start, stop) == found


def test_the_last_tile_may_be_short() -> None:
    assert measure.find_cut(piece(out=300), 256, 300) == (256, 300)


def test_rows_of_modules_and_files() -> None:
    plain = piece(out=8)
    assert measure.find_rows(plain, 2, 5) == (slice(2, 5), None)
    third = piece(out=8, rows=(1, 2, 3))
    assert measure.find_rows(third, 9, 14) == (slice(1, 6), None)
    halves = piece(out=8, swap_halves=True)
    rows, order = measure.find_rows(halves, 3, 6)
    assert isinstance(rows, torch.Tensor)
    assert order is not None
    assert (rows.tolist(), order.tolist()) == ([0, 1, 7], [1, 2, 0])


def test_samples_are_the_same_every_time() -> None:
    layers = {
        f"b.{n}.q": (piece(f"b.{n}.q", into=5), piece(f"b.{n}.q", into=7, module="m"))
        for n in range(5)
    }
    component: Any = SimpleNamespace(layers=layers)
    found = [
        (s.module, s.kind, s.start, s.stop, s.column) for s in measure.choose_samples(component)
    ]
    assert found == [
        *((f"b.{n}.q", "b.{i}.q", 0, 384, 0) for n in (0, 2, 4)),
        *((f"b.{n}.q", "b.{i}.q -> m", 0, 384, 5) for n in (0, 2, 4)),
    ]


@pytest.mark.parametrize(
    ("scale", "block", "group", "shape"),
    [
        ("tensor", (0, 0), 0, (1, 24)), ("channel", (0, 0), 0, (4, 6)), ("block", (2, 3), 0, (4, 6)),
        ("block", (3, 4), 0, (4, 12)), ("group", (0, 0), 3, (8, 3)), ("group", (0, 0), 2, (12, 2)),
    ],
)  # fmt: skip
def test_groups_that_share_a_scale(
    scale: str, block: tuple[int, int], group: int, shape: tuple[int, int]
) -> None:
    weight = torch.arange(24.0).reshape(4, 6)
    scheme = replace(FP8, scale=scale, block=block, group_size=group)
    found = measure.split_groups(weight, scheme)
    assert found.shape == shape
    assert found.sum() == weight.sum()
    if scale == "block" and block == (2, 3):
        assert found.tolist()[1] == [3.0, 4.0, 5.0, 9.0, 10.0, 11.0]
    if scale == "block" and block == (3, 4):
        assert found.tolist()[3] == [22.0, 23.0, *[0.0] * 10]
    if scale == "group":
        assert found.tolist()[1] == [float(n) for n in range(group, 2 * group)]


def test_numbers_of_two_weights() -> None:
    base = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    decoded = torch.tensor([[6.0, 0.0], [0.0, 2.0]])
    found = measure.measure_likeness(decoded, base, replace(FP8, scale="channel"), nbytes=17)
    length = math.sqrt(40)
    expected = Likeness(
        cosine=26 / 5 / length,
        coded_cosine=26 / 5 / length,
        relative_l2=math.sqrt(13) / 5,
        gain=length / 5,
        scale_error=math.hypot(6 / length - 0.6, 2 / length - 0.8),
        nbytes=17,
    )
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    coded = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    beside = measure.measure_likeness(decoded, base, replace(FP8, scale="channel"), coded)
    rest = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    assert beside.cosine == pytest.approx(26 / 5 / length)
    assert beside.coded_cosine == pytest.approx(18 / math.sqrt(29) / rest.norm().item())
    assert beside.gain == pytest.approx(math.sqrt(29 / 20))
    assert beside.nbytes == 0


def test_numbers_of_zeros_and_of_none() -> None:
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    assert measure.measure_likeness(zeros, zeros, FP8) == Likeness(1.0, 1.0, 0.0, 1.0, 0.0, 0)
    found = measure.measure_likeness(zeros, ones, FP8)
    assert (found.cosine, found.relative_l2, found.gain, found.scale_error) == (0.0, 1.0, 0.0, 1.0)
    grown = measure.measure_likeness(ones, zeros, FP8)
    assert grown.cosine == 0.0
    assert grown.gain == pytest.approx(2e30)
    lost = measure.measure_likeness(ones * math.nan, ones, FP8, nbytes=3)
    assert lost == Likeness(0.0, 0.0, math.inf, math.inf, math.inf, 3)


@pytest.mark.parametrize(
    ("product", "one", "other", "found"),
    [(6.0, 4.0, 3.0, 0.5), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 5.0, 0.0), (0.0, 5.0, 0.0, 0.0),
     (-12.0, 4.0, 3.0, -1.0)],
)  # fmt: skip
def test_cosines(product: float, one: float, other: float, found: float) -> None:
    assert measure.find_cosine(product, one, other) == found


# --- base weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "coded"),
    [
        ("a.weight", "BF16", False), ("a.weight", "F32", False), ("a.weight", "F8_E4M3", True),
        ("a.weight", "U8", True), ("a.bias", "U8", False), ("a.qweight", "I8", True),
        ("a.weight_scale", "U8", False), ("a.weight", "A", True),
    ],
)  # fmt: skip
def test_weights_that_are_not_plain(name: str, dtype: str, coded: bool) -> None:
    assert witness_base.is_coded(name, dtype) is coded


@pytest.mark.parametrize(
    ("weights", "layout", "told"),
    [
        ({}, f"{witness_base.BY_NAME}: x", True), ({"transformer": 1}, f"{witness_base.BY_NAME}: x", False),
        ({}, "declared", False), ({}, "", False),
    ],
)  # fmt: skip
def test_a_layout_that_only_a_name_tells(weights: Any, layout: str, told: bool) -> None:
    base = Base("transformer", weights, missing="nothing is there")
    text = (
        f"the layout of NVFP4 codes is taken from a name ({layout}), and the base model's weights are not "
        "at hand to confirm it (nothing is there)"
    )
    assert witness_base.list_unproved(base, layout) == ([text] if told else [])


def test_base_weights_that_are_required_in_words() -> None:
    base = Base("transformer_2", missing="not here")
    assert witness_base.explain_missing("o/r", base) == (
        "o/r: --witness require, but the weights of the base model's transformer_2 are not at hand (not "
        "here): name a --model-path whose weights lie on this machine, or leave the flag out"
    )
    assert Base().certain


@pytest.mark.parametrize(
    ("verdicts", "found"),
    [
        (["agrees", "agrees", "disagrees"], "more than one reading agrees"),
        (["disagrees", "disagrees"], "disagrees"), (["no base weights", "disagrees"], "no base weights"),
    ],
)  # fmt: skip
def test_verdicts_of_several_readings(verdicts: list[str], found: str) -> None:
    reports: Any = [SimpleNamespace(verdict=word) for word in verdicts]
    assert inspect_against.worst_verdict(reports) == found
