"""What the suites write down, ask for and say, on made-up jobs."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from quantmatrix import api, families, models
from quantmatrix.cli import main
from quantmatrix.errors import RefusedError
from quantmatrix.hardware.probe import SATURATING
from quantmatrix.kernels import launching
from quantmatrix.measure import saved_runs
from quantmatrix.measure import trace as tracing
from quantmatrix.models import Defaults
from quantmatrix.runtime import media
from quantmatrix.runtime.plan import types
from quantmatrix.suites import (
    command,
    conftest,
    test_compile,
    test_generate,
    test_latents,
    test_load,
)
from quantmatrix.suites import test_refuse as refuse_suite
from quantmatrix.suites import test_trace as trace_suite

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

compile_suite, generate_suite, latents_suite, load_suite = (
    test_compile, test_generate, test_latents, test_load,
)  # fmt: skip
del test_compile, test_generate, test_latents, test_load  # pytest takes modules of these names


def make_proof() -> Any:
    return SimpleNamespace(timings={}, metrics={}, limits={}, folders={}, command="", plan=None)


# --- latents ---------------------------------------------------------------------------------------


def test_layers_beyond_their_limit() -> None:
    errors: Any = SimpleNamespace(
        found={"t": {"a": 0.25, "b": 0.2500001, "c": float("nan"), "d": 0.1}, "u": {"e": 9.0}}
    )
    tail = "on its own input, the limit is 0.25"
    assert latents_suite.judge_layers("t", errors, 0.25) == [
        f"t.b: relative error 0.25 {tail}", f"t.c: relative error nan {tail}"
    ]  # fmt: skip
    assert latents_suite.judge_layers("u", errors, 0.12345678) == [
        "u.e: relative error 9 on its own input, the limit is 0.1235"
    ]


# --- refuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("no; works here: --backend reference | decode; more", ["reference", "decode"]),
        ("works here: --backend fp8-recode", ["fp8-recode"]),
        ("works here: --backend a | b-c | d_e, f", ["a", "b-c", "d_e"]),
        ("works: --backend decode", []), ("", []),
    ],
)  # fmt: skip
def test_backends_that_a_refusal_offers(message: str, found: list[str]) -> None:
    assert refuse_suite.find_backends(message) == found


@dataclass
class Refused:
    """As much of a refusal as the suite looks at."""

    rule: str = "r1"
    message: str = "H9 no; works here: --backend a | b"
    ok: bool = False
    request: Any = None

    def to_json(self) -> dict[str, Any]:
        return {"rule": self.rule}


@dataclass(frozen=True)
class Asked:
    """A request that has a backend alone."""

    backend: str = ""


@pytest.mark.parametrize(
    ("planned", "works", "said"),
    [
        (Refused(), ("a", "b"), ""),
        (Refused(message="H9 no: take --model-path x"), (), ""),
        (Refused("r0"), ("a", "b"), "refused by another rule: H9 no; works here: --backend a | b"),
        (Refused("r2"), ("a", "b"), "refused by another rule: H9 no; works here: --backend a | b"),
        (Refused(message="no -- so"), (), "the message does not name H9: no -- so"),
        (Refused(message="H9 no - so"), (), "no way out is named: H9 no - so"),
        (Refused(), ("a",), "--backend b is offered, and refused, too: {'rule': 'r1'}"),
        (SimpleNamespace(ok=True, to_json=dict), (),
         "row@h9 is claimed to be refused (r1), and the plan accepts it"),
    ],
    ids=list("abcdefgh"),
)  # fmt: skip
def test_what_a_refusal_is_held_to(
    planned: Any, works: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(request: Asked) -> Any:
        if not request.backend:
            return planned
        return SimpleNamespace(ok=True) if request.backend in works else Refused()

    monkeypatch.setattr(api, "plan", plan)
    monkeypatch.setattr(types, "Refusal", Refused)
    bench: Any = SimpleNamespace(
        planned_request=lambda _: Asked(), folders=lambda _: {"f": "$F"},
        command=lambda _: "quantmatrix generate --model-path 'quantmatrix generate'",
        tables=SimpleNamespace(hardware={"h9": SimpleNamespace(name="H9")}),
    )  # fmt: skip
    cell: Any = SimpleNamespace(id="row@h9", hardware="h9", rule="r1")
    proof = make_proof()
    if said:
        with pytest.raises(AssertionError, match=f"^{re.escape(said)}"):
            refuse_suite.test_refuse(cell, bench, proof)
    else:
        refuse_suite.test_refuse(cell, bench, proof)
        assert proof.metrics == {"rule": "r1", "works_instead": list(works)}
    assert proof.limits == {"rule": "r1"}
    assert proof.folders == {"f": "$F"}
    assert proof.command == ("quantmatrix plan --model-path 'quantmatrix generate' --hardware h9")


# --- generate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tiny", "found"),
    [
        ({}, False, (5, 7, 11)), ({}, True, (2, 3, 4)), ({"height": 20}, False, (5, 20, 11)),
        ({"width": 20, "num_frames": 9}, True, (9, 3, 20)),
    ],
)  # fmt: skip
def test_the_size_that_is_asked_for(
    fields: dict[str, Any], tiny: bool, found: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(
        DEFAULTS=Defaults(7, 11, 1, 1.0, frames=5), TINY_DEFAULTS=Defaults(3, 4, 1, 1.0, frames=2)
    )
    monkeypatch.setattr(models, "load", {"m": module}.__getitem__)
    request = SimpleNamespace(
        **{"height": None, "width": None, "num_frames": None, **fields}, tiny=tiny
    )
    job: Any = SimpleNamespace(plan=SimpleNamespace(model="m"), request=request)
    assert generate_suite.expected_size(job) == found


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_is_read_as_frames(mode: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new(mode, (3, 2), 7 if mode == "L" else (7, 8, 9, 255)[: len(mode)]).save(
        tmp_path / "a.png"
    )
    frames = generate_suite.read_media(tmp_path / "a.png")
    assert (frames.shape, frames.dtype) == ((1, 2, 3, 3), torch.uint8)
    assert frames[0, 1, 2].tolist() == ([7, 7, 7] if mode == "L" else [7, 8, 9])


# --- compile and trace -----------------------------------------------------------------------------


def make_built(faults: list[str], programs: list[str]) -> Any:
    return SimpleNamespace(
        faults=faults, programs=programs, to_metrics=lambda: {"m": 1}, to_limits=lambda: {"l": 2}
    )


@pytest.mark.parametrize(
    ("built", "said"),
    [
        (make_built([], ["p"]), ""), (make_built(["a", "b"], ["p"]), "a; b"),
        (make_built([], []), "row@h9: its plan starts no kernel of ours; drop the check compile"),
    ],
    ids=list("abc"),
)  # fmt: skip
def test_what_is_built_has_no_fault(built: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "has_triton", lambda: True)
    plan = SimpleNamespace(request="r", to_json=lambda: "plan")
    bench: Any = SimpleNamespace(
        plan={"request": plan}.__getitem__, planned_request=lambda _: "request",
        folders=lambda request: {request: "$R"},
    )  # fmt: skip
    cell: Any = SimpleNamespace(id="row@h9", hardware="h9")
    builder: Any = SimpleNamespace(compile_plan=lambda asked: built if asked is plan else None)
    proof = make_proof()
    if said:
        with pytest.raises(AssertionError, match=f"^{re.escape(said)}"):
            compile_suite.test_compile(cell, bench, proof, builder)
    else:
        compile_suite.test_compile(cell, bench, proof, builder)
    assert proof.command == "quantmatrix compile --hardware h9 --row row@h9"
    assert (proof.metrics, proof.limits, proof.plan) == ({"m": 1}, {"l": 2}, "plan")
    assert proof.folders == {"r": "$R"}


def test_without_triton_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "has_triton", lambda: False)
    nothing: Any = None
    with pytest.raises(pytest.skip.Exception):
        compile_suite.test_compile(nothing, nothing, nothing, nothing)


@dataclass(frozen=True)
class Short:
    """A request of some steps."""

    num_inference_steps: int = 99


@pytest.mark.parametrize(
    ("components", "layers", "problems", "stages", "said"),
    [
        (1, 3 + 2, [], ["encode", "decode", "t0"], ""),
        (2, 3 + 2, [], ["encode", "decode", "t0", "t1"], ""),
        (1, 4, [], ["encode", "decode", "t0"], "assert 4 == 5"),
        (1, 6, [], ["encode", "decode", "t0"], "assert 6 == 5"),
        (1, 5, ["a", "b"], ["encode", "decode", "t0"], "a; b"),
        (1, 5, [], ["encode", "decode"], "stages of the run"),
        (1, 5, [], ["encode", "decode", "t0", "t1"], "stages of the run"),
    ],
    ids=list("abcdefg"),
)
def test_every_layer_is_traced_once(
    components: int, layers: int, problems: list[str], stages: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One step for one transformer, three for two experts."""
    asked = []

    def trace(request: Short, plan: Any, pipeline: Any) -> Any:
        asked.append((request.num_inference_steps, pipeline))
        return SimpleNamespace(
            summarize=lambda: {"stages": dict.fromkeys(stages)},
            layers=["x"] * layers,
            problems=problems,
        )

    monkeypatch.setattr(tracing, "trace_pipeline", trace)
    part = SimpleNamespace(pieces=lambda: iter("abc"))
    encoder = SimpleNamespace(pieces=lambda: iter("de"))
    job: Any = SimpleNamespace(
        request=Short(), quantized={"t0": part},
        plan=SimpleNamespace(
            components={f"t{n}": part for n in range(components)}, encoders={"e": encoder}
        ),
    )  # fmt: skip
    bench: Any = SimpleNamespace(pipeline=lambda *_: "a pipeline")
    proof = make_proof()
    if said:
        with pytest.raises(AssertionError, match=re.escape(said)):
            trace_suite.test_trace(job, bench, proof)
    else:
        trace_suite.test_trace(job, bench, proof)
    assert asked == [({1: 1, 2: 3}[components], "a pipeline")]
    assert proof.limits == {"layers": 5}
    assert proof.metrics == {"stages": dict.fromkeys(stages), "layers": layers}


# --- load and the fixtures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "layer", "found"),
    [
        ("one", "a.1", True), ("one", "a.12", True), ("one", "xa.1", False), ("one", "a.1.b", False),
        ("one", "c", False), ("two", "c", True), ("two", "d", True), ("one two", "d", True), ("", "c", False),
    ],
)  # fmt: skip
def test_layers_that_a_row_keeps(
    kept: str, layer: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"one": (r"a\.\d+",), "two": ("c", "d")}
    monkeypatch.setattr(models, "load", lambda _: SimpleNamespace(FALLBACKS=sets))
    row: Any = SimpleNamespace(model="m", kept=kept)
    assert load_suite.is_kept(row, layer) is found


@pytest.mark.parametrize(
    ("value", "where", "said"),
    [
        (1.0, "weight", ""), (float("nan"), "weight", "0.weight holds NaN or infinite numbers"),
        (float("-inf"), "scales", "0.scales holds NaN or infinite numbers"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(value: float, where: str, said: str) -> None:
    layer = nn.LayerNorm(3)
    layer.register_buffer("scales", torch.ones(3, dtype=torch.bfloat16))
    layer.register_buffer("codes", torch.full((3,), 255, dtype=torch.uint8))
    with torch.no_grad():
        getattr(layer, where)[1] = value
    if not said:
        load_suite.assert_finite(nn.Sequential(layer))
        return
    with pytest.raises(AssertionError, match=f"^{re.escape(said)}"):
        load_suite.assert_finite(nn.Sequential(layer))


@dataclass
class Part:
    """As much of a component's plan as the census of tensors looks at."""

    family: str = ""
    tensors: tuple[str, ...] = ("a.codes", "b.weight", "left", "0.weight")
    ignored: tuple[str, ...] = ("left",)
    plain: list[Any] = field(
        default_factory=lambda: [
            SimpleNamespace(name="b.weight", parameter="0.weight"),
            SimpleNamespace(name="b.weight", parameter="0.bias"),
            SimpleNamespace(name="0.weight", parameter="0.weight"),
        ]
    )

    @property
    def checkpoint(self) -> Any:
        return SimpleNamespace(tensors=self.tensors)

    def pieces(self) -> Any:
        return iter([SimpleNamespace(layer="a")])


def test_every_tensor_went_somewhere() -> None:
    model = nn.Sequential(nn.LayerNorm(3))
    assert load_suite.count_tensors(Part(), model) == {
        "checkpoint": 4, "quantized": 1, "plain": 2, "ignored": 1
    }  # fmt: skip
    words = "tensors of the checkpoint that went nowhere: ['left', 'c.weight']"
    with pytest.raises(AssertionError, match=f"^{re.escape(words)}"):
        load_suite.count_tensors(Part(tensors=("left", "c.weight"), ignored=()), model)
    gone = Part()
    gone.plain.append(SimpleNamespace(name="0.weight", parameter="gone"))
    words = "tensors of the checkpoint that went nowhere: ['0.weight']"
    with pytest.raises(AssertionError, match=f"^{re.escape(words)}"):
        load_suite.count_tensors(gone, model)
    with torch.device("meta"):
        empty = nn.Sequential(nn.LayerNorm(3))
    words = "tensors of the model without a value: ['0.weight', '0.bias']"
    with pytest.raises(AssertionError, match=f"^{re.escape(words)}"):
        load_suite.count_tensors(Part(), empty)


def test_a_wrapper_of_the_family_holds_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "load", lambda _: SimpleNamespace(WRAPPERS=("linear",)))
    part = Part("fp8", ("a.linear.codes",), (), [])
    found = load_suite.count_tensors(part, nn.Sequential())
    assert found == {"checkpoint": 1, "quantized": 1}


def test_a_machine_that_saturates_proves_nothing() -> None:
    def refuse(rule: str) -> Any:
        def plan(_: Any) -> Any:
            error = RefusedError.__new__(RefusedError)
            Exception.__init__(error, "why")
            error.rule = rule
            raise error

        return SimpleNamespace(plan=plan)

    request: Any = None
    with pytest.raises(pytest.skip.Exception, match=r"^why$"):
        conftest.plan_or_skip(refuse(SATURATING.rule), request)
    for other in ("aaa", "zzz"):
        with pytest.raises((RefusedError, pytest.skip.Exception)) as caught:
            conftest.plan_or_skip(refuse(other), request)
        assert caught.type is RefusedError  # a skip would pass for a skipped test here


def test_components_with_quantized_layers() -> None:
    parts = {"a": SimpleNamespace(layers={"x": 1}), "b": SimpleNamespace(layers={})}
    plan: Any = SimpleNamespace(components=parts)
    nothing: Any = None
    assert conftest.Job(nothing, nothing, plan).quantized == {"a": parts["a"]}


# --- the row's command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "planned", "said"),
    [
        ({}, True, ""), ({}, False, "the command's plan is not the cell's"),
        ({"frames": 3}, True, "frames, height, width"), ({"frames": 1}, True, "frames, height, width"),
        ({"layers": {"t": 1}}, True, "assert"), ({"layers": {"t": 3}}, True, "assert"),
        ({"why": "white"}, True, "o/a.png: white"),
    ],
    ids=list("abcdefg"),
)  # fmt: skip
def test_what_a_command_leaves(
    changes: dict[str, Any], planned: bool, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = {"frames": 2, "layers": {"t": 2}, "why": None, **changes}
    monkeypatch.setattr(
        generate_suite, "read_media", lambda path: torch.zeros(given["frames"], 5, 7, 3)
    )
    monkeypatch.setattr(generate_suite, "expected_size", lambda job: (2, 5, 7))
    monkeypatch.setattr(media, "find_degeneration", lambda frames: given["why"])
    out = json.dumps({"runs": [{"output": "o/a.png", "quantized_layers": given["layers"]}]})
    done = command.Commanded(tmp_path, 0, out, "err", 7.5, planned)
    part = SimpleNamespace(layers={"a": 1, "b": 2})
    job: Any = SimpleNamespace(plan=SimpleNamespace(components={"t": part}))
    proof = make_proof()
    if said:
        with pytest.raises(AssertionError, match=said):
            generate_suite.test_generate(job, proof, lambda: done)
    else:
        generate_suite.test_generate(job, proof, lambda: done)
        assert proof.limits == {"frames": 2, "height": 5, "width": 7, "constant": False}
        assert proof.metrics == {
            "file": "a.png", "frames": 2, "height": 5, "width": 7, "quantized_layers": {"t": 2}
        }  # fmt: skip
    assert proof.timings == {"command": 7.5}
    assert proof.folders == {str(tmp_path): "$OUTPUT"}


@pytest.mark.parametrize(
    ("processes", "lent", "planned"),
    [(1, [True], True), (1, [False], False), (1, [], False), (2, [], True), (2, [True], False)],
)
def test_a_command_is_run_with_the_environment_of_its_row(
    processes: int, lent: list[bool], planned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to the cell's plan in this process, or starts others, which borrow no pipeline."""
    ticks, argvs = iter([100.0, 107.5]), []

    def run(argv: list[str]) -> int:
        argvs.append((argv, os.environ.get("QM_MADE_UP")))
        return 3

    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(main, "main", run)
    said = iter([("before", "before"), ("out", "err")])
    capfd: Any = SimpleNamespace(readouterr=lambda: next(said))
    bench: Any = SimpleNamespace(
        argv=lambda cell: ["quantmatrix", "generate", "x"], lend=lambda *_: nullcontext(lent)
    )
    job: Any = SimpleNamespace(
        cell=SimpleNamespace(environment={"QM_MADE_UP": "1"}),
        request=SimpleNamespace(device=None), plan=SimpleNamespace(processes=processes),
    )  # fmt: skip
    done = command.run_command(job, bench, tmp_path, capfd)
    assert done == command.Commanded(tmp_path, 3, "out", "err", 7.5, planned)
    latents = str(tmp_path / "latents.safetensors")
    where = ["--output-path", str(tmp_path), "--save-latents", latents]
    assert argvs == [(["generate", "x", "--device", "cpu", *where, "--json"], "1")]
    assert "QM_MADE_UP" not in os.environ


def test_what_a_command_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its latents and frames as it saved them; nothing of a command that failed, or planned otherwise."""
    saved = SimpleNamespace(latents=["l"], frames="f")
    kept = {str(tmp_path / "latents.safetensors"): saved}
    monkeypatch.setattr(saved_runs, "read", lambda path: kept[str(path)])
    told = {"backends": {"t": {"b": 2}}, "transformer_calls": {"t": 4}}
    out = json.dumps({"runs": [{**told, "seconds": {"load": 9.0, "denoise": 0.5}}]})
    done = command.Commanded(tmp_path, 0, out, "", 7.5, planned=True)
    shown: Any = command.Shown(["l"], "f", {"t": {"b": 2}}, {"t": 4}, {"denoise": 0.5})  # type: ignore
    assert done.show() == shown
    assert replace(done, code=1).show() is None
    assert replace(done, planned=False).show() is None
    monkeypatch.setattr(media, "stack_frames", lambda frames: frames[0])
    run: Any = SimpleNamespace(
        latents=["l"], media=["f"], census={"t": {"b": 2}}, calls={"t": 4}, seconds={"denoise": 0.5}
    )
    assert command.show(run) == shown


@pytest.mark.parametrize(
    ("processes", "shown", "expected", "steps"),
    [
        (1, "command", ("command", None), ["pipeline", "command"]),
        (1, None, ("run 1", None), ["pipeline", "command", "run 1"]),
        (2, "command", ("run 1", "command"), ["run 1", "command"]),
        (2, None, ("run 1", "run 2"), ["run 1", "command", "run 2"]),
    ],
)
def test_two_runs_are_compared(
    processes: int, shown: str | None, expected: Any, steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second of one process comes later; a command that failed serves as none."""
    done: list[str] = []

    def run(*_: Any) -> str:
        done.append(f"run {sum(step.startswith('run') for step in done) + 1}")
        return done[-1]

    def call() -> Any:
        done.append("command")
        return SimpleNamespace(show=lambda: shown)

    monkeypatch.setattr(latents_suite, "show", lambda run: run)
    bench: Any = SimpleNamespace(run=run, pipeline=lambda *_: done.append("pipeline"))
    job: Any = SimpleNamespace(request=None, plan=SimpleNamespace(processes=processes))
    assert latents_suite.run_twice(job, bench, call) == expected
    assert done == steps


CELLS_OF_A_COMMAND = """
from types import SimpleNamespace
import pytest
from quantmatrix.suites import conftest
from quantmatrix.proof import known_limits
from quantmatrix.suites.conftest import (
    command, commanded, read_limits_once, read_once, unchanging_tables,
)
from quantmatrix.tables import read

runs = []

@pytest.fixture
def workbench():
    pass

@pytest.fixture
def job(request):
    return SimpleNamespace(cell=SimpleNamespace(id=request.param))

@pytest.mark.parametrize("job", [*"aab"], indirect=True, ids=["first", "again", "other"])
def test_cell(job, command, monkeypatch, request):
    def run(job, workbench, folder, capfd):
        assert folder.is_dir() and not any(folder.iterdir())
        runs.append(job.cell.id)
        return runs[-1] + " was run"

    monkeypatch.setattr(conftest, "run_command", run)
    assert command() == command() == job.cell.id + " was run"
    assert runs == {"first": ["a"], "again": ["a"], "other": ["a", "b"]}[request.node.callspec.id]
    assert read.read() is read.read()
    reports = known_limits.own_reports()
    assert known_limits.read(reports) is known_limits.read(reports)
"""


def test_a_command_runs_once_for_a_cell(pytester: pytest.Pytester) -> None:
    """And the tables and limits are read once."""
    pytester.makepyfile(CELLS_OF_A_COMMAND)
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q").assert_outcomes(passed=3)
