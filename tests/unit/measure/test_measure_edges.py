"""Edges of what is measured: made-up layers, runs and plans, and the whole text of what is said of them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.kernels import kernels_of
from quantmatrix.measure import (
    carry,
    census,
    compiled,
    fallback,
    layers,
    networks,
    quality,
    rounding_bounds,
    saved_runs,
    spread,
    trace,
    trace_census,
    true_size,
    validate,
    workbench,
)
from quantmatrix.measure.classes import prove
from quantmatrix.measure.comparison import Bounds, make_request, split_backend
from quantmatrix.measure.comparison import judge as judge_sides
from quantmatrix.measure.compiled import Compiled
from quantmatrix.measure.fallback import Share, find_smallest, group_modules
from quantmatrix.measure.latents import ShapeError, StepMetrics, compare_frames
from quantmatrix.measure.trace_census import Census, LayerTrace
from quantmatrix.request import Request
from quantmatrix.tables import read

# --- fallback -----------------------------------------------------------------------------------


class Pretended:
    """A study whose PSNR grows by the number of modules that are kept."""

    def __init__(self, psnr: dict[int, float]) -> None:
        self.psnr, self.runs = psnr, list[int]()
        self.forms = {f"t.blocks.{n}.a": None for n in range(len(psnr) - 1)}
        self.plan = SimpleNamespace(model="m")
        self.reference = torch.tensor([3.0, 4.0])

    def measure(self, kept: Any) -> StepMetrics:
        count = len(list(kept))
        self.runs.append(count)
        return StepMetrics(0.0, 0.0, self.psnr[count], 0.0)

    def run(self, group: tuple[str, ...]) -> torch.Tensor:
        return torch.tensor([3.0, 4.0 + int(group[0].split(".")[2]) % 3])


def make_shares(count: int) -> list[Share]:
    return [Share((f"t.blocks.{n}.a",), 1.0, 1.0) for n in range(count)]


@pytest.mark.parametrize("groups", [0, 1, 2, 3, 5, 8])
def test_the_smallest_prefix_that_meets_the_target(groups: int) -> None:
    """Each place where the target may be met is found, and at most log2 prefixes are run."""
    for needed in range(groups + 2):
        study: Any = Pretended({n: 40.0 if n >= needed else 39.9 for n in range(groups + 1)})
        found, seen = find_smallest(study, make_shares(groups), 40.0)
        assert found == min(needed, groups)
        assert found in seen
        assert list(seen) == study.runs
        assert len(study.runs) == len(set(study.runs)) <= groups.bit_length() + 1


def test_a_prefix_is_made_of_all_modules_of_its_groups() -> None:
    study: Any = Pretended({0: 1.0, 2: 2.0, 3: 30.0, 6: 50.0})
    shares = [Share(tuple("ab"), 1, 1), Share(("c",), 1, 1), Share(tuple("def"), 1, 1)]
    found, seen = find_smallest(study, shares, 25.0)
    assert (found, {n: one.psnr_db for n, one in seen.items()}) == (2, {1: 2.0, 2: 30.0})


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (("t.blocks.12.a",), "t.blocks.12.a"),
        (("t.blocks.12.a", "t.blocks.12.b"), "t.blocks.12"),
        (("t.blocks.12.a", "t.blocks.12.b", "t.blocks.12.c.0.d"), "t.blocks.12"),
        (("t.norm", "t.proj"), "t.norm"),
        (("t.blocks.3.a", "t.norm", "t.proj"), "t.blocks.3"),
        (("t.blocks.1", "t.blocks.2"), "t.blocks.1"),
    ],
)
def test_a_group_by_its_name(modules: tuple[str, ...], name: str) -> None:
    assert Share(modules, 0.1, 2.0).name == name


@pytest.mark.parametrize("by", ["layers", "a", "blocks", "model", "zero"])
def test_modules_are_grouped_in_two_ways(by: str) -> None:
    with pytest.raises(UsageError) as caught:
        group_modules(["a"], by)
    assert str(caught.value) == f"--by {by}: expected layer or block"
    names = ["t.blocks.1.a", "t.out", "t.blocks.11.a", "t.blocks.1.b.2.c", "t.out"]
    assert group_modules(names, "block") == [
        ("t.blocks.1.a", "t.blocks.1.b.2.c"),
        ("t.out", "t.out"),
        ("t.blocks.11.a",),
    ]


def test_the_group_that_moves_most_is_first() -> None:
    study: Any = Pretended(dict.fromkeys(range(7), 1.0))
    found = fallback.rank_modules(study)
    assert [share.name for share in found] == [f"t.blocks.{n}.a" for n in (2, 5, 1, 4, 0, 3)]
    assert [round(share.relative_l2, 3) for share in found] == [0.4, 0.4, 0.2, 0.2, 0.0, 0.0]
    assert found[0].psnr_db == pytest.approx(20 * math.log10(1 / math.sqrt(2)))


def test_a_proposal_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Pretended({0: 11.0, 1: 20.0, 2: 30.0, 3: math.inf})
    shares = [
        Share(("t.a.b",), 0.5, 3.0),
        Share(("t.c",), 0.25, 4.0),
        Share(("t.d",), 0.0, math.inf),
    ]
    monkeypatch.setattr(fallback, "Study", lambda request: study)
    monkeypatch.setattr(fallback, "rank_modules", lambda *_: shares)
    request: Any = None
    assert fallback.propose(request, target_db=30.0) == {
        "model": "m",
        "target_psnr_db": 30.0,
        "met": True,
        "psnr_db": 30.0,
        "kept": ["t.a.b", "t.c"],
        "patterns": ["a.b", "c"],
        "all_quantized_psnr_db": 11.0,
        "tried": {"1": 20.0, "2": 30.0},
        "shares": [
            {"name": "t.a.b", "modules": ["t.a.b"], "relative_l2": 0.5, "psnr_db": 3.0, "kept": True},
            {"name": "t.c", "modules": ["t.c"], "relative_l2": 0.25, "psnr_db": 4.0, "kept": True},
            {"name": "t.d", "modules": ["t.d"], "relative_l2": 0.0, "psnr_db": None, "kept": False},
        ],
    }  # fmt: skip
    study.psnr[3] = 31.0
    found = fallback.propose(request, target_db=31.5)
    assert (found["met"], found["psnr_db"], len(found["kept"])) == (False, 31.0, 3)


def test_a_picture_of_no_shares_and_of_shares_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    fallback.draw_shares({"model": "m", "shares": []}, path)
    picture = ElementTree.parse(path).getroot()
    assert (picture.get("height"), picture.get("width")) == ("40", "860")
    assert [one.text for one in picture.findall("{*}title")] == [
        "How far each layer moves the final latents of m"
    ]
    fallback.draw_shares(
        {"model": "m", "shares": [{"name": "a", "relative_l2": 0.0, "kept": False}]}, path
    )
    [bar] = ElementTree.parse(path).getroot().findall("{*}rect")
    assert (bar.get("width"), bar.get("height")) == ("0.0", "13")
    assert path.read_text().endswith("</svg>\n")
    texts = [one.text for one in ElementTree.parse(path).getroot().findall("{*}text")]
    assert texts == [
        "relative L2 of the final latents with this layer alone quantized; orange: kept in full "
        "precision",
        "a",
        "0.00e+00",
    ]


@pytest.mark.parametrize(("value", "found"), [(2.5, 2.5), (-math.inf, -math.inf), (math.inf, None)])
def test_numbers_that_json_has(value: float, found: float | None) -> None:
    assert fallback.finite(value) == found


# --- classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "found", "fine"),
    [
        (("a", "b"), ("a", "b"), True),
        (("a", "b"), ("a",), False),
        (("a",), ("a", "b"), False),
        (("a", "c"), ("a", "b"), False),
        ((), ("a",), False),
    ],
)
def test_layers_that_were_written_stand_in_the_model(
    written: tuple[str, ...],
    found: tuple[str, ...],
    fine: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = SimpleNamespace(components={"transformer": "part"})
    monkeypatch.setattr(prove, "write_form", lambda *_: frozenset(written))
    monkeypatch.setattr(prove, "plan_transformers", lambda *_: part)
    monkeypatch.setattr(prove, "require", lambda plan: plan)
    monkeypatch.setattr(prove, "load_component", lambda *_: "model")
    monkeypatch.setattr(prove, "count_quantized", lambda model: dict.fromkeys(found, 1))
    small: Any = SimpleNamespace(folder=tmp_path, class_name="C")
    if fine:
        assert prove.load_form(small, "fp8", "x") == "model"
        return
    with pytest.raises(CheckpointError) as caught:
        prove.load_form(small, "fp8", "x")
    assert str(caught.value) == (
        f"C, fp8: {len(written)} layers were written quantized, {len(found)} stand in the model; "
        "expected the same ones"
    )


def test_the_numbers_of_a_forward_are_laid_end_to_end() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_dict: bool = True) -> Any:
            assert not return_dict
            drawn = torch.randn(2)
            return ([x.bfloat16(), 3], {"a": torch.tensor([[7]]), "b": torch.empty(0)}, drawn)

    given = {"x": torch.tensor([[1.0, 2.0]])}
    first, again = prove.run(Model(), given), prove.run(Model(), given)
    assert first[:3].tolist() == [1.0, 2.0, 7.0]
    assert (first.shape, first.dtype) == ((5,), torch.float32)
    assert torch.equal(first, again)

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    small: Any = SimpleNamespace(inputs={"x": torch.tensor([3.0, 4.0])})
    assert prove.measure(torch.tensor([3.0, 4.0]), Plain(), small) == 1.0
    assert prove.measure(torch.tensor([6.0, 4.0]), Plain(), small) == pytest.approx(
        4 / math.sqrt(52)
    )


# --- carry --------------------------------------------------------------------------------------


def test_a_twin_by_its_name() -> None:
    assert carry.Twin(("--a", "b c")).name() == "quantmatrix generate --a 'b c'"
    assert carry.Twin(("--a", "b"), "row").name() == "true size of row: --a b"
    with pytest.raises(AttributeError):
        carry.Twin(()).row = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("hardware", "given", "kept"),
    [
        ("h200", ["--compile", "--seed", "3"], ["--seed", "3", "--tiny"]),
        ("h200", ["--seed", "3", "--backend", "triton", "--x"], ["--seed", "3", "--x", "--tiny"]),
        ("cpu", ["--backend", "decode"], ["--backend", "decode", "--tiny"]),
        ("h200", ["--nproc-per-node", "2", "--y"], ["--y", "--tiny"]),
        ("cpu", ["--cuda-graph", "--y", "--compile"], ["--y", "--tiny"]),
        ("cpu", ["--nproc-per-node", "2", "--y", "--shard-weights"], ["--y", "--tiny"]),
    ],
)
def test_what_a_twin_leaves_out(hardware: str, given: list[str], kept: list[str]) -> None:
    tables = read.read()
    cell: Any = SimpleNamespace(
        command=lambda _: ["quantmatrix", "generate", *given], hardware=hardware, checkpoint="row"
    )
    assert carry.name_twin(cell, tables, carry.STAND_IN) == carry.Twin(tuple(kept))
    assert carry.name_twin(cell, tables, carry.TRUE_SIZE) == carry.Twin(tuple(kept), "row")


def test_several_differences_are_joined() -> None:
    old = {"latents": "1", "files": "2", "errors": "3"}
    new = {"latents": "4", "files": "2", "errors": "5"}
    assert carry.explain_difference(old, new) == "other latents and other layer errors"
    assert carry.explain_difference(old, {}) == (
        "other latents and other weights of the checkpoint and other layer errors"
    )
    assert carry.explain_difference({"error": "a\nb"}, {"error": "c"}) == "before: a"


# --- census -------------------------------------------------------------------------------------


def test_a_model_that_differs_from_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantmatrix.runtime import quantized_linear

    class Quantized(torch.nn.Module):
        def __init__(self, backend: str) -> None:
            super().__init__()
            self.kernel = SimpleNamespace(backend=backend)

    monkeypatch.setattr(quantized_linear, "QuantizedLinear", Quantized)
    model = torch.nn.Module()
    model.a, model.b, model.d = Quantized("int8"), Quantized("decode"), Quantized("int8")
    model.c = torch.nn.Module()
    model.c.parts = torch.nn.ModuleList([Quantized("x"), Quantized("y")])
    planned = {"a": ["int8"], "c": ["y", "x"], "d": ["decode"], "e": ["int8"]}
    part: Any = SimpleNamespace(
        layers={
            name: [SimpleNamespace(backend=one) for one in found] for name, found in planned.items()
        }
    )
    assert census.find_differences(part, model) == {
        "b": "quantized, although the plan has it in full precision",
        "d": "computed by ['int8'], planned was ['decode']",
        "e": "in full precision, although the plan has it quantized",
    }


def test_a_layer_that_should_be_quantized_is_named() -> None:
    header = SimpleNamespace(dtype="BF16", file="x.safetensors", shape=(2, 3))
    flat = SimpleNamespace(dtype="BF16", file="x.safetensors", shape=(2,))
    names = ("disk.7.q", "disk.8.k", "disk.9.norm")
    tensors = {f"{name}.weight": header for name in names} | {"disk.7.q.bias": flat}
    tensors["disk.9.norm.weight"] = flat
    plain = [
        SimpleNamespace(name=f"disk.7.q.{leaf}", parameter=f"m.7.q.{leaf}")
        for leaf in ("weight", "bias")
    ]
    plain += [
        SimpleNamespace(name=f"{name}.weight", parameter=f"m{name[4:]}.weight")
        for name in names[1:]
    ]
    part: Any = SimpleNamespace(
        layers=dict.fromkeys(("m.1.q", "m.12.q", "m.9.norm2", "m.9.norm")),
        plain=plain,
        checkpoint=SimpleNamespace(tensors=tensors, quantization={}),
    )
    assert census.find_undeclared(part) == {
        "m.7.q": "disk.7.q.weight is BF16 in x.safetensors, while 2 of its kind are quantized "
        "(m.1.q) and no ignore list names it"
    }


# --- compiled -----------------------------------------------------------------------------------


def program(kernel: str, shared: int, spilled: int, *faults: str) -> Any:
    return SimpleNamespace(
        kernel=kernel,
        arch="sm90",
        shared=shared,
        spilled=spilled,
        faults=faults,
        to_json=lambda: {"kernel": kernel},
    )


def test_programs_are_summed_up() -> None:
    programs = (
        program("decode", 300, 7),
        program("scale", 500, 2, "spills"),
        program("decode", 400, 9, "is large", "is slow"),
    )
    found = Compiled("sm90", "3.1", programs, ("t.a: 3 x 5",))
    assert found.summary == "decode x 2, scale"
    assert found.faults == [
        "t.a: 3 x 5",
        "scale on sm90 spills",
        "decode on sm90 is large",
        "decode on sm90 is slow",
    ]
    assert found.to_metrics() == {
        "arch": "sm90",
        "triton": "3.1",
        "programs": [{"kernel": "decode"}, {"kernel": "scale"}, {"kernel": "decode"}],
        "problems": ["t.a: 3 x 5"],
        "kernels": "decode x 2, scale",
        "shared": 500,
        "spilled": 9,
    }
    empty = Compiled("sm90", "3.1", ())
    assert (empty.summary, empty.faults, empty.problems) == ("none", [], ())
    assert (empty.to_metrics()["shared"], empty.to_metrics()["spilled"]) == (0, 0)
    with pytest.raises(FrozenInstanceError):
        empty.arch = "x"  # type: ignore[misc]


def test_cells_whose_programs_are_built() -> None:
    def cell(row: str, hardware: str, claim: str, backend: str = "") -> Any:
        return SimpleNamespace(
            id=f"{row}@{hardware}{backend}", row=row, hardware=hardware, claim=claim
        )

    cells = (
        cell("a", "h200", "validated", "+x"),
        cell("a", "h200", "expected", "+y"),
        cell("b", "h200", "refused"),
        cell("c", "h200", "planned"),
        cell("d", "h200", "expected"),
        cell("e", "b200", "expected"),
    )
    tables: Any = SimpleNamespace(hardware={"h200": 1, "b200": 2, "cpu": 3}, cells=cells)

    def choose(*given: Any) -> list[str]:
        return [one.id for one in compiled.choose_cells(tables, *given)]

    assert choose("h200") == ["a@h200+x", "a@h200+y", "d@h200"]
    assert choose("h200", "a") == ["a@h200+x", "a@h200+y"]
    assert choose("h200", "a@h200+y") == ["a@h200+y"]
    for given, text in (
        (("x",), "--hardware x: no such row; known: h200, b200, cpu"),
        (
            ("h200", "b"),
            "--row b: no row that is claimed to run on h200; rows that are: a, d",
        ),
        (("cpu",), "cpu; rows that are: none"),
    ):
        with pytest.raises(UsageError) as caught:
            choose(*given)
        assert str(caught.value) == text


# --- trace --------------------------------------------------------------------------------------


def make_census() -> Census:
    one = LayerTrace(
        "int8", 3, Counter(b=2, a=1), Counter(k=5), Counter(mm=4, aa=1), set(), 8.0, 3.0
    )
    other = LayerTrace("int8", 4, matmuls=Counter(mm=2), seconds=4.0, matmul_seconds=2.0)
    third = LayerTrace("decode", 1, seconds=4.0, matmul_seconds=2.5)
    stages = {"vae": {"calls": 1, "seconds": 2.0}, "transformer": {"calls": 4, "seconds": 9.0}}
    return Census(stages, {"t.b": one, "t.a": other, "t.c": third}, ["odd"])


def test_a_census_whole() -> None:
    found = make_census().to_json()
    assert list(found["layers"]) == ["t.a", "t.b", "t.c"]
    assert list(found["stages"]) == ["transformer", "vae"]
    assert list(found["backends"]["int8"]["matmuls"]) == ["aa", "mm"]
    assert found["backends"] == {
        "int8": {"layers": 2, "calls": 7, "matmuls": {"mm": 6, "aa": 1}, "kernels": {"k": 5}},
        "decode": {"layers": 1, "calls": 1, "matmuls": {}, "kernels": {}},
    }
    assert found["quantize_and_scale_share"] == round(8.5 / 16, 4)
    assert found["problems"] == ["odd"]
    assert found["layers"]["t.b"] == {
        "backend": "int8",
        "calls": 3,
        "operations": {"a": 1, "b": 2},
        "kernels": {"k": 5},
        "seconds": 8.0,
        "matmul_seconds": 3.0,
    }
    assert list(found["layers"]["t.b"]["operations"]) == ["a", "b"]
    assert Census({}, {}, []).overhead == 0.0
    assert make_census().overhead == 8.5 / 16


def piece_of(backend: str, inputs: int = 96, outputs: int = 64) -> Any:
    return SimpleNamespace(
        scheme=SimpleNamespace(op="linear.int8"),
        backend=backend,
        in_features=inputs,
        out_features=outputs,
    )


NATIVE = next(kernel for kernel in kernels_of("linear.int8") if kernel.backend == "int8")
DECODED = (
    "multiplied plain numbers by a weight of 64 x 96: the weight was decoded, although the kernel "
    "takes codes"
)


@pytest.mark.parametrize(
    ("operations", "kernels", "plain", "problems"),
    [
        ((NATIVE.matmul[0],), (), (), []),
        ((), (NATIVE.matmul[0],), (), []),
        (
            ("z", "a"),
            ("k",),
            (),
            [f"ran none of {', '.join(NATIVE.matmul)}, but a, k, z"],
        ),
        ((NATIVE.matmul[0],), (), ((64, 96),), [DECODED]),
        ((NATIVE.matmul[0],), (), ((96, 64),), [DECODED]),
        ((NATIVE.matmul[0],), (), ((5, 96, 64), (7, 9)), [DECODED]),
        ((NATIVE.matmul[0],), (), ((96, 16), (16, 64), (96,), (96, 64, 2)), []),
    ],
)
def test_what_a_layer_shows_against_it(
    operations: tuple[str, ...], kernels: tuple[str, ...], plain: Any, problems: list[str]
) -> None:
    layer = LayerTrace("int8", 1, Counter(operations), Counter(kernels), plain=set(plain))
    assert trace_census.judge_layer(piece_of("int8"), layer) == problems


def test_layers_that_differ_from_the_plan() -> None:
    pieces = {"t.a": piece_of("int8"), "t.b": piece_of("int8"), "t.c": piece_of("int8")}
    ran = {"t.b": LayerTrace("decode"), "t.c": LayerTrace("int8"), "t.d": LayerTrace("int8")}
    assert trace_census.judge(pieces, ran) == [
        "t.a is planned and did not run",
        "t.b ran by decode, not int8",
        f"t.c (int8) ran none of {', '.join(NATIVE.matmul)}, but ",
        "t.d ran quantized and is not planned",
    ]


@pytest.mark.parametrize(
    ("given", "flag"),
    [({"compile": True}, "--compile"), ({"cuda_graph": True}, "--cuda-graph")],
)
def test_a_trace_is_of_an_ordinary_run(given: dict[str, bool], flag: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        trace.refuse_acceleration(Request(**given))  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{flag}: a trace names the layers of an ordinary run; leave it out"
    )
    trace.refuse_acceleration(Request())
    with pytest.raises(UsageError) as caught:
        trace.trace(Request(), tmp_path / "a.json")
    assert str(caught.value) == (
        f"--output-path {tmp_path}/a.json: expected a file ending in .json.gz"
    )


# --- true size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "config", "shift"),
    [
        (256, {}, 0.5),
        (4096, {}, 1.15),
        (1216, {}, 0.5 + 0.65 / 4),
        (
            70,
            {
                "base_image_seq_len": 10,
                "max_image_seq_len": 210,
                "base_shift": 0.2,
                "max_shift": 1.0,
            },
            0.2 + 0.8 * 0.3,
        ),
    ],
)
def test_how_far_steps_are_moved(tokens: int, config: dict[str, float], shift: float) -> None:
    assert true_size.shift_of(tokens, config) == pytest.approx(shift)


@pytest.mark.parametrize(
    ("left", "per", "moment", "passed"),
    [(False, 1000, 250.0, 0.25), (True, 1000, 250.0, 0.75), (False, 1, 250.0, 250.0), (True, 4, 300.0, 175.0)],
)  # fmt: skip
def test_the_time_that_a_forward_is_given(
    left: bool, per: int, moment: float, passed: float
) -> None:
    step: Any = SimpleNamespace(latents="x", time="t", left=left, per=per, listed=False)
    inputs = {"x": torch.ones(2), "t": torch.zeros(1, dtype=torch.bfloat16), "other": 3}
    given, latents = true_size.set_moment(step, inputs, torch.tensor(moment))
    assert latents is inputs["x"]
    assert (given["t"].tolist(), given["t"].dtype, given["other"]) == ([passed], torch.bfloat16, 3)
    true_size.put_latents(step, inputs, torch.zeros(3))
    assert inputs["x"].tolist() == [0.0] * 3  # type: ignore[attr-defined]
    step.listed = True
    true_size.put_latents(step, inputs, torch.ones(1))
    assert true_size.set_moment(step, inputs, torch.tensor(moment))[1].tolist() == [1.0]
    assert isinstance(inputs["x"], list)


def measured(latents: list[float], **given: Any) -> true_size.Measured:
    usual: dict[str, Any] = {"seconds": 0.5, "repeats": True, "peak_bytes": 70, "weight_bytes": 40}
    return true_size.Measured([torch.tensor([1.0, one]) for one in latents], **{**usual, **given})


@pytest.mark.parametrize(
    ("bf16", "quantized", "repeats"),
    [(True, True, True), (False, True, False), (True, False, False)],
)
def test_what_is_kept_of_true_size(bf16: bool, quantized: bool, repeats: bool) -> None:
    errors = layers.LayerErrors({"transformer": {"a": 0.25}})
    plan: Any = None
    found = true_size.TrueSize(
        plan,
        "a size",
        measured([3.0, 1.0], repeats=bf16, seconds=0.75),
        measured([4.0, 1.5], repeats=quantized, peak_bytes=30, weight_bytes=10),
        errors,
        {"write": 2.0},
    )
    told = found.to_json()
    assert (told["size"], told["repeats"], told["finite"]) == ("a size", repeats, True)
    assert told["peak"] == {"bf16_bytes": 70, "quantized_bytes": 30}
    assert told["weights"] == {"bf16_bytes": 40, "quantized_bytes": 10}
    assert told["layers"]["transformer"]["worst"] == 0.25
    assert told["worst"]["relative_l2"] == pytest.approx(0.5 / math.sqrt(2), abs=1e-6)
    assert found.tell_times() == {"step bf16": 0.75, "step quantized": 0.5, "write": 2.0}
    found.quantized.latents[0][0] = math.inf
    assert found.to_json()["finite"] is False


def test_the_inputs_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(true_size, "make_inputs", lambda *given, size: asked.append((given, size)))
    for device in ("cpu", "cuda:1"):
        true_size.choose_inputs("m", "module", device)  # type: ignore[arg-type]
    assert asked == [
        (("m", "module", "cpu", torch.bfloat16), "tiny"),
        (("m", "module", "cuda:1", torch.bfloat16), "full"),
    ]


@pytest.mark.parametrize(
    ("selector", "components", "weights", "path"),
    [
        ("--transformer-path", {"transformer": "c"}, {}, "b"),
        ("--transformer-weights-path", {}, {"transformer": "c"}, "b"),
        ("--model-path", {}, {}, "c"),
        ("--zzz", {}, {}, "c"),
    ],
)
def test_the_request_of_a_written_checkpoint(
    selector: str,
    components: dict[str, str],
    weights: dict[str, str],
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(true_size, "require_plan", lambda request: request)
    row: Any = SimpleNamespace(selector=selector)
    given = Request(tiny=True, model_id="x", nproc_per_node=2, height=48)
    found: Any = true_size.plan_checkpoint(row, given, Path("b"), Path("c"))
    assert (found.component_paths, found.weights_paths) == (components, weights)
    assert (found.model_path, found.tiny, found.model_id) == (path, False, None)
    assert (found.nproc_per_node, found.height, found.hub.offline) == (1, 48, True)


# --- saved runs and sides -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "several", "text"),
    [
        ("x.pt", False, "--save-latents x.pt: expected a file ending in .safetensors"),
        (
            "x.safetensors",
            True,
            "--save-latents: one file holds one run; give one prompt and one seed",
        ),
    ],
)
def test_where_a_run_cannot_be_saved(path: str, several: bool, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        saved_runs.check_target(path, several=several)
    assert str(caught.value) == text
    assert saved_runs.check_target(None, several=True) is None


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        ({"latents": {}}, "found the tensors none, expected latents.000 and so on without gaps; "),
        ({"latents": [], "frames": torch.zeros(1)}, "found the tensors frames, expected latents.000 "
         "and so on without gaps; "),
        ({"latents": [torch.ones(1), 3]}, "latents.001 is not a tensor: expected a run of "),
        ({"latents": [torch.ones(1)], "about": [1]}, "quantmatrix.runtime.generate is [1]: expected "
         "a run of "),
        ({"other": 1}, "expected a dict with the key `latents`"),
        ([1], "expected a dict with the key `latents`"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_run(saved: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(saved, path)
    with pytest.raises(CheckpointError) as caught:
        saved_runs.read(path)
    ends = {"; ": "write it with `generate --save-latents`", "f ": "`generate --save-latents`"}
    assert str(caught.value) == f"{path}: {text}{ends.get(text[-2:], '')}"


def test_a_run_of_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"latents": torch.arange(6.0).view(3, 2), "about": {"seed": 7}}, path)
    found = saved_runs.read(path)
    assert [one.tolist() for one in found.latents] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert (found.name, found.frames, found.about) == ("x.pt", None, {"seed": 7})
    assert saved_runs.is_saved_run(path)
    assert not saved_runs.is_saved_run(tmp_path)
    (tmp_path / "x.bin").touch()
    assert not saved_runs.is_saved_run(tmp_path / "x.bin")


def test_a_side_with_a_backend(tmp_path: Path) -> None:
    assert split_backend("a/b@decode") == ("a/b", "decode")
    assert split_backend("a@b@reference") == ("a@b", "reference")
    assert split_backend("a/b") == ("a/b", None)
    (tmp_path / "x@odd").touch()
    assert split_backend(f"{tmp_path}/x@odd") == (f"{tmp_path}/x@odd", None)
    with pytest.raises(UsageError) as caught:
        split_backend("a@odd")
    text = str(caught.value)
    assert text.startswith("a@odd: odd is not a backend; known: ")
    known = text.partition("known: ")[2].split(", ")
    assert known == sorted(set(known))
    assert {"decode", "reference", "int8"} <= set(known)


def test_sides_that_have_to_be_run() -> None:
    with pytest.raises(UsageError) as caught:
        make_request("x", Request())
    assert str(caught.value) == "x is not a saved run: name its base model with --model-path"
    base = Request(model_path="a")
    assert make_request("a", base) == base
    assert make_request("a@decode", base) == replace(base, backend="decode")
    for given in (
        {"component_paths": {"transformer": "y"}},
        {"weights_paths": {"transformer_2": "y"}},
    ):
        with pytest.raises(UsageError) as caught:
            make_request("x", replace(base, **given))
        assert str(caught.value) == (
            "x and --transformer-path or -weights-path: name each side once"
        )


def test_bounds_of_a_comparison_whole() -> None:
    worst = StepMetrics(0.123456789, 0.987654321, 12.3456789, 1.0)
    media = {"psnr_db": 23.4567891, "ssim": 0.3456789}
    assert judge_sides(worst, media, Bounds(40.5, 0.5, 0.9, 41.25, 0.75)) == [
        "PSNR of the latents at the worst step is 12.3457, --min-psnr is 40.5",
        "cosine at the worst step is 0.123457, --min-cosine is 0.9",
        "PSNR of the picture is 23.4568, --min-image-psnr is 41.25",
        "SSIM of the picture is 0.345679, --min-ssim is 0.75",
        "relative L2 at the worst step is 0.987654, --max-rel-l2 is 0.5",
    ]
    assert len(judge_sides(replace(worst, psnr_db=math.nan), media, Bounds(min_psnr=1.0))) == 1
    with pytest.raises(UsageError) as caught:
        judge_sides(worst, None, Bounds(min_ssim=0.5))
    assert str(caught.value) == "--min-ssim: a side has no frames; save it with `generate`"
    with pytest.raises(FrozenInstanceError):
        Bounds().min_psnr = 1.0  # type: ignore[misc]


# --- pictures -----------------------------------------------------------------------------------


def test_pictures_that_are_too_small_for_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "has_flip", lambda: False)
    picture = torch.zeros(175, 190, 3, dtype=torch.uint8).numpy()
    found = quality.measure_quality([picture], [picture])
    assert found == {
        "ms_ssim": None,
        "flip": None,
        "missing": {
            "ms_ssim": "pictures of 190 x 175 pixels, five scales need 176 x 176",
            "flip": "the package flip-evaluator is not installed: pip install 'quantmatrix[quality]'",
        },
    }
    large = torch.zeros(176, 176, 3, dtype=torch.uint8).numpy()
    assert quality.measure_quality([large], [large])["ms_ssim"] == 1.0
    with pytest.raises(ShapeError) as caught:
        quality.measure_quality([picture], [large])
    assert str(caught.value) == (
        "frames of [1, 175, 190, 3] and [1, 176, 176, 3]: expected one shape"
    )
    with pytest.raises(ShapeError) as caught:
        quality.compute_ms_ssim(torch.zeros(200, 175, 3), torch.zeros(200, 175, 3))
    assert str(caught.value) == "[200, 175, 3]: MS-SSIM needs 176 x 176 pixels"


@pytest.mark.parametrize(("side", "measured"), [(30, False), (31, True)])
def test_networks_measure_each_frame(side: int, measured: bool) -> None:
    values = iter([0.5, 0.25])
    own = networks.Networks(
        lambda r, c: next(values), lambda picture, prompt: float(picture.max()) + len(prompt), {"x": "y"}
    )  # fmt: skip
    frames = [torch.full((side, 40, 3), n, dtype=torch.uint8) for n in (3, 8, 4, 14)]
    pairs = [(frames[0], frames[1]), (frames[2], frames[3])]
    found = quality.measure_networks(pairs, own, "fox", {"missing": {"z": "w"}})
    missing = {"z": "w", "x": "y"}
    if not measured:
        missing["lpips"] = "pictures of 40 x 30 pixels, AlexNet needs 31"
    assert found == {
        "lpips": 0.375 if measured else None,
        "clip": 14.0,
        "clip_bf16": 6.5,
        "missing": missing,
    }
    assert quality.take_mean([1.0, 2.0, 2.0]) == 1.66667


def test_frames_that_cannot_be_compared() -> None:
    one = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ShapeError) as caught:
        compare_frames(one, one.float())
    assert str(caught.value) == "frames are uint8, found torch.uint8 and torch.float32"
    with pytest.raises(ShapeError) as caught:
        compare_frames(one, one[:1])
    assert str(caught.value) == "frames of [2, 3] and [1, 3] elements"


def test_a_picture_for_clip_keeps_its_middle() -> None:
    picture = torch.zeros(20, 30, 3, dtype=torch.uint8)
    picture[:, 15:] = 255
    found = networks.prepare_clip(picture, 10)
    assert (found.shape, found.dtype) == ((1, 3, 10, 10), torch.float32)
    low = [(0 - m) / d for m, d in zip(networks.MEAN, networks.DEVIATION, strict=True)]
    high = [(1 - m) / d for m, d in zip(networks.MEAN, networks.DEVIATION, strict=True)]
    assert found[0, :, 4, 0].tolist() == pytest.approx(low, abs=1e-5)
    assert found[0, :, 4, 9].tolist() == pytest.approx(high, abs=1e-5)
    assert networks.prepare_clip(picture.transpose(0, 1), 7).shape == (1, 3, 7, 7)


# --- rounding, layers, spread, prompts --------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [(0.1, False), (0.125, False), (0.1251, True), (math.nan, True), (math.inf, True)],
)
def test_weights_that_rounding_does_not_explain(
    error: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = SimpleNamespace(scheme="s")
    monkeypatch.setattr(rounding_bounds, "measure_plan", lambda *_: [("t.a", piece, error)])
    monkeypatch.setattr(rounding_bounds, "find_bound", lambda scheme: 0.1)
    monkeypatch.setattr(rounding_bounds, "name_format", lambda scheme: "e4m3")
    plan: Any = None
    text = (
        f"t.a: a weight is {error:.4g} of its group's magnitude away from the base model's; e4m3 "
        "rounds by at most 0.1: a scale is not the one that its codes were made with"
    )
    assert rounding_bounds.judge_weights(plan, plan) == ([text] if told else [])
    monkeypatch.setattr(rounding_bounds, "find_bound", lambda scheme: None)
    assert rounding_bounds.judge_weights(plan, plan) == []


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], 1e6),
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([1.0, 0.0], [1.0, 999_999.0], 999_999.0),
        ([1.0, 0.0], [1.0, 1_000_001.0], 1e6),
        ([1.0, 0.0], [1.0, math.nan], 1e6),
    ],
)
def test_the_error_of_a_layer(expected: list[float], found: list[float], error: float) -> None:
    assert layers.relative_error(torch.tensor(expected), torch.tensor(found)) == error


def test_errors_of_layers_in_six_digits() -> None:
    found = layers.LayerErrors({"t": {"a": 0.123456789, "b": 0.2, "c": 1.23456789, "d": 0.3}})
    assert found.to_json() == {
        "t": {"layers": 4, "median": 0.25, "worst": 1.23457, "worst_layer": "c"}
    }
    assert layers.LayerErrors().worst == 0
    assert spread.round_number(1.23456789) == 1.23457


@pytest.mark.parametrize(
    ("text", "prompts"),
    [("a fox\n\n  # no\n#\n  a hen \n", ("a fox", "a hen")), ("x # y", ("x # y",))],
)
def test_prompts_of_a_file(text: str, prompts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    assert validate.read_prompts(path) == prompts
    path.write_text("# only this\n\n")
    with pytest.raises(UsageError) as caught:
        validate.read_prompts(path)
    assert str(caught.value) == f"--prompts {path}: holds no prompt; write one per line"


def test_scopes_and_bases_by_name(tmp_path: Path) -> None:
    tiny: Any = SimpleNamespace(tiny=True, model_path="")
    assert validate.name_scope(tiny, []) == "stand-in"
    local: Any = SimpleNamespace(tiny=False, model_path=str(tmp_path))
    assert validate.name_scope(local, [str(tmp_path / "x.safetensors")]) == "local files"
    plan: Any = SimpleNamespace(model="flux-1")
    assert validate.name_base(local, plan) == "black-forest-labs/FLUX.1-dev"
    hub: Any = SimpleNamespace(model_path="some-one/a_model.1")
    assert validate.name_base(hub, plan) == "some-one/a_model.1"
    for odd in ("some/one/model", "some one/x", "x"):
        assert validate.name_base(SimpleNamespace(model_path=odd), plan) == (  # type: ignore[arg-type]
            "black-forest-labs/FLUX.1-dev"
        )


# --- workbench ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "count", "devices", "found"),
    [
        (None, 1, 1, "cuda:0"),
        (2, 3, 1, "cuda:2"),
        (3, 3, 1, "worker 3 has no device of its own: 3 of them are here; use -n 3"),
        (None, 4, 4, "cuda"),
        (0, 4, 4, "cuda"),
        (1, 4, 4, "cells of a row take all devices: run without workers"),
        (0, 4, 2, "cuda"),
    ],
)
def test_the_device_of_a_worker(
    worker: int | None, count: int, devices: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    machine = SimpleNamespace(device="cuda:7", count=count)
    monkeypatch.setattr(workbench.probe, "probe", lambda: machine)
    monkeypatch.setattr(workbench, "find_difference", lambda *_: "")
    bench = workbench.Workbench(read.read(), worker=worker)
    torch.set_num_threads(threads)
    row: Any = SimpleNamespace(vendor="nvidia", id="a row", devices=devices)
    if found.startswith("cuda"):
        assert bench.find_device(row) == found
    else:
        with pytest.raises(workbench.MachineError) as caught:
            bench.find_device(row)
        assert str(caught.value) == found
    monkeypatch.setattr(workbench, "find_difference", lambda *_: "it is another")
    with pytest.raises(workbench.MachineError) as caught:
        bench.find_device(row)
    assert str(caught.value) == "cells of a row cannot be tested here: it is another"
    row.vendor = "cpu"
    assert bench.find_device(row) == "cpu"
