"""What commands hand to the code that works for them, and how they end."""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tables import write_tables

from quantmatrix import errors
from quantmatrix.cli import bench, generate, output, trace, validate
from quantmatrix.cli.main import main, show_version
from quantmatrix.cli.output import explain_os_error, report_error, shorten_error
from quantmatrix.request import FP4_BACKEND_VARIABLE, Request
from quantmatrix.tables import read, source
from quantmatrix.tables.rows import PROMPT, MatrixError

MODEL = ("--model-path", "some/model")
Run = Callable[..., tuple[int, str, str]]
Replace = Callable[..., list[Any]]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [],
            "give one of --model-path, --row, --synthetic, --compare; found none of them",
        ),
        (
            ["--model-path", "a", "--row", "b", "--synthetic", "tiny"],
            "give one of --model-path, --row, --synthetic, --compare; "
            "found both --model-path and --row and --synthetic",
        ),
        (
            ["--model-path", "a", "--repeats", "5"],
            "--repeats 5: expected 6 or more; fewer give no interval",
        ),
        (
            ["--compare", "a", "b", "--output-path", "c"],
            "--compare measures nothing: leave out --baseline and --output-path",
        ),
        (
            ["--compare", "a", "b", "--baseline", "c"],
            "--compare measures nothing: leave out --baseline and --output-path",
        ),
        (["--row", "a", "--tolerance", "1.5"], "--tolerance is for --baseline and --compare"),
        (
            ["--synthetic", "tiny", "--model-id", "x"],
            "--model-id x: --synthetic expects one of {models}",
        ),
        (
            ["--synthetic", "tiny", "--model-id", "flux-1", "--family", "z"],
            "--family z: --synthetic expects one of {families}",
        ),
        (
            [
                "--synthetic",
                "tiny",
                "--model-id",
                "flux-1",
                "--family",
                "msmodelslim",
                "--scheme",
                "x",
            ],
            "--scheme x: msmodelslim has {schemes}",
        ),
    ],
)
def test_benchmarks_that_are_none(words: list[str], said: str, run: Run) -> None:
    from quantmatrix import families, models

    said = said.format(
        models=", ".join(models.IDS),
        families=", ".join(families.IDS),
        schemes=", ".join(families.load("msmodelslim").SCHEMES),
    )
    assert run("bench", *words) == (2, "", f"quantmatrix: {said}\n")


def arguments(**given: Any) -> argparse.Namespace:
    fields = {
        "model_path": None, "row": None, "synthetic": None, "compare": None, "repeats": 6,
        "baseline": None, "output_path": None, "tolerance": None, "argv": ["bench", "--row", "a b"],
        "tiny": True, "backend": None, "scheme": None, "device": "cpu", "json": False,
    }  # fmt: skip
    return argparse.Namespace(**{**fields, **given})


def test_benchmarks_at_the_edge_of_what_can_be_judged() -> None:
    bench.check_arguments(arguments(model_path="a"))
    bench.check_arguments(arguments(row=["a"], tolerance=0.0, baseline="b"))
    bench.check_arguments(arguments(compare=["a", "b"], tolerance=1.5))


def test_a_benchmark_of_random_weights(replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replace("measure.bench.pairs.bench_synthetic", {"found": 1})
    given = {"synthetic": "tiny", "model_id": "flux-1", "family": "fp8"}
    result = bench.measure(arguments(**given), [])
    assert result == [
        {
            "what": "synthetic tiny flux-1 fp8 tensor-dynamic default",
            "command": "quantmatrix bench --row 'a b'",
            "found": 1,
        }
    ]
    model, machine, named = calls[0]
    named.pop("say")
    assert (model, machine.device) == ("flux-1", "cpu")
    expected = {"family": "fp8", "scheme": "tensor-dynamic", "size": "tiny", "backend": None}
    assert named == {**expected, "repeats": 6}
    given |= {"scheme": "tensor-static", "backend": "torch", "repeats": 9, "synthetic": "full"}
    [found] = bench.measure(arguments(**given), [])
    assert found["what"] == "synthetic full flux-1 fp8 tensor-static torch"
    assert calls[1][2]["repeats"] == 9
    assert calls[1][2]["backend"] == "torch"


def test_a_benchmark_of_cells(replace: Replace) -> None:
    replace("measure.bench.rows.find_cells", [SimpleNamespace(id="a"), SimpleNamespace(id="b")])
    calls = replace("measure.bench.pairs.bench_cell", {"x": 1})
    benches = replace("measure.workbench.Workbench", "the bench")
    assert bench.measure(arguments(row=["a", "b"], repeats=7), []) == [{"x": 1}, {"x": 1}]
    assert [(call[0], call[1].id, call[2]) for call in calls] == [
        ("the bench", "a", 7),
        ("the bench", "b", 7),
    ]
    assert benches[0][1] == {"tiny": True}


def test_a_benchmark_of_a_request(run: Run, replace: Replace) -> None:
    calls = replace("measure.bench.pairs.bench_request", {"x": 1})
    replace("measure.bench.pairs.name_request", "named")
    replace("proof.bench_results.check_file", None)
    code, out, _ = run("bench", *MODEL, "--json", "--repeats", "8")
    command = "quantmatrix bench --model-path some/model --json --repeats 8"
    result = {"what": "named", "command": command, "x": 1}
    assert (code, json.loads(out)) == (0, {"ok": True, "results": [result], "comparison": None})
    assert calls[0][1:3] == ("some/model", 8)


def test_compare(run: Run, replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[Any] = []

    def read_side(side: str, request: Request) -> str:
        sides.append((side, request))
        return f"read {side}"

    monkeypatch.setattr("quantmatrix.measure.comparison.read_side", read_side)
    step = {"psnr_db": 40.0, "relative_l2": 0.5, "cosine": 0.75}
    found: dict[str, Any] = {
        "reference": {"name": "a"},
        "candidate": {"name": "b"},
        "latents": {"steps": [], "worst": step, "identical": False},
        "media": {},
        "problems": [],
    }
    calls = replace("measure.comparison.compare_sides", found)
    words = ("compare", "left", "right", *MODEL)
    assert run(*words, "--min-psnr", "20", "--min-ssim", "0.5")[::2] == (0, "")
    assert [side for side, _ in sides] == ["left", "right"]
    assert sides[0][1].prompt == (PROMPT,)
    assert calls[0][:2] == ("read left", "read right")
    assert vars(calls[0][2]) == {
        "min_psnr": 20.0, "max_rel_l2": None, "min_cosine": None, "min_image_psnr": None,
        "min_ssim": 0.5,
    }  # fmt: skip
    found["problems"] = ["too far"]
    code, _, said = run(*words, "--prompt", "a fox", "an owl")
    assert (code, said) == (1, "quantmatrix: too far\n")
    assert sides[-1][1].prompt == ("a fox", "an owl")
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)) == (1, found)


def test_fallback(run: Run, replace: Replace, tmp_path: Path) -> None:
    found = {"shares": [], "kept": [], "met": True, "psnr_db": 31.0, "target_psnr_db": 30.0}
    calls = replace("measure.fallback.propose", found)
    written = replace("cli.fallback.write_results", None)
    line = "keeping 0 of the quantized layers gives 31.00 dB, which meets 30 dB"
    code, out, _ = run("fallback", *MODEL)
    assert (code, out.splitlines()[1:]) == (0, [line])
    assert (calls[0][1]["target_db"], calls[0][1]["by"]) == (30.0, "layer")
    assert written == []
    found["met"] = False
    words = ("--target-psnr", "42.5", "--by", "block", "--output-path", str(tmp_path))
    code, out, _ = run("fallback", *MODEL, *words, "--json")
    assert (code, json.loads(out)) == (1, found)
    assert (calls[1][1]["target_db"], calls[1][1]["by"]) == (42.5, "block")
    assert written == [(found, tmp_path, {})]
    (tmp_path / "file").touch()
    said = f"--output-path {tmp_path / 'file'}: is a file, expected a folder"
    words = ("fallback", *MODEL, "--output-path", str(tmp_path / "file"))
    assert run(*words) == (2, "", f"quantmatrix: {said}\n")
    said = run("fallback", *MODEL, "--output-path", str(tmp_path / "file" / "x"))[2]
    assert "is not a folder, and the path leads through it" in said
    assert len(calls) == 2


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["too much"], 1)])
def test_compile(faults: list[str], code: int, run: Run, replace: Replace, folder: Path) -> None:
    program = SimpleNamespace(
        kernel="decode", digest="", faults=faults, arch="sm90", registers=0, spilled=0, shared=0,
        shared_limit=1024, warps=4,
    )  # fmt: skip
    from quantmatrix.measure.compiled import Compiled

    result = Compiled("sm90", "3.3", (program,))  # type: ignore[arg-type]
    replace("kernels.compiling.require_triton", "3.3.1")
    chosen = replace(
        "measure.compiled.choose_cells", [SimpleNamespace(id="a"), SimpleNamespace(id="b")]
    )
    builder = SimpleNamespace(built=2, kept={"x": 1, "y": 2, "z": 3})
    builders = replace("measure.compiled.Builder", builder)
    replace("measure.compiled.default_folder", Path("cache"))
    replace("measure.compiled.compile_cell", result)
    words = ("compile", "--hardware", "h100", "--tables", str(folder))
    lines = ["a: decode", "  decode: not built", *(f"  FAULT decode on sm90 {f}" for f in faults)]
    assert run(*words)[:2] == (
        code,
        "\n".join(
            [
                "H100 (sm90), Triton 3.3.1: built, never run",
                *lines,
                *[line.replace("a: ", "b: ") for line in lines],
                "3 programs, 2 of them built now",
            ]
        )
        + "\n",
    )
    assert chosen[0][1:3] == ("h100", None)
    assert builders == [(Path("cache"), {})]
    replace("measure.compiled.compile_cell", None)
    found, out, _ = run(*words, "--row", "a", "--no-cache", "--json")
    assert found == 0
    about = json.loads(out)
    assert about.pop("tables").endswith("(--tables)")
    assert about == {
        "ok": True, "hardware": "h100", "arch": "sm90", "triton": "3.3.1", "built": 2,
        "cells": {"a": None, "b": None},
    }  # fmt: skip
    assert chosen[1][1:3] == ("h100", "a")
    assert builders[1] == (None, {})


@pytest.mark.parametrize(
    ("oks", "code", "many"),
    [([True], 0, "1 checkpoint"), ([True, False], 1, "2 checkpoints"), ([], 13, "0 checkpoints")],
)
def test_dry_run(
    oks: list[bool], code: int, many: str, run: Run, monkeypatch: pytest.MonkeyPatch,
    replace: Replace, folder: Path,
) -> None:  # fmt: skip
    found = [
        {"cell": f"c{n}", "command": "x", "ok": ok, "kernels": {}, "true_bytes": 0, "devices": 1,
         "tiny_bytes": 0, "memory_bytes": 0, "warnings": [],
         "refusal": {"rule": "r", "message": "m"}}
        for n, ok in enumerate(oks)
    ]  # fmt: skip
    replace("harness.dry_run.choose_cells", found)
    monkeypatch.setattr("quantmatrix.harness.dry_run.describe", lambda tables, cell: cell)
    words = ("matrix", "dry-run", "--hardware", "h100", "--tables", str(folder))
    found_code, out, _ = run(*words)
    lines = out.splitlines()
    assert (found_code, lines[0]) == (code, f"j: {many} of the guide on H100, planned only")
    assert [line for line in lines if line.startswith("c")] == [f"c{n}" for n in range(len(oks))]
    found_code, out, _ = run(*words, "--json")
    assert (found_code, json.loads(out)["ok"]) == (code, code == 0)


def make_run(name: str, *, warnings: tuple[str, ...] = (), degenerate: str | None = None) -> Any:
    about = {
        "output": f"{name}.png", "backends": {}, "seconds": {"generate": 1.0}, "step_seconds": [1],
    }  # fmt: skip
    return SimpleNamespace(
        name=name,
        plan=SimpleNamespace(warnings=warnings),
        degenerate=degenerate,
        require_numbers=lambda: None,
        to_json=lambda: about,
    )


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Say which runs there will be; keeps what was saved how."""

    def give(*runs: Any) -> Any:
        kept = SimpleNamespace(saved=[], targets=[], outputs=[], progress=[])

        def work(request: Any, *, plan: Any, pipeline: Any, progress: bool, save: Any) -> Any:
            kept.progress.append(progress)
            for one in runs if save else ():
                save(one)
            return runs

        def save_media(one: Any, path: str, *, several: bool, taken: set[Path]) -> Path:
            kept.saved.append((one.name, path, several, sorted(map(str, taken))))
            return Path(f"{one.name}.png")

        def check_target(path: str | None, *, several: bool) -> Path | None:
            kept.targets.append(several)
            return Path(path) if path else None

        monkeypatch.setattr("quantmatrix.runtime.generate.generate_all", work)
        monkeypatch.setattr("quantmatrix.runtime.media.save_media", save_media)
        monkeypatch.setattr(
            "quantmatrix.runtime.media.check_output", lambda plan, path: kept.outputs.append(path)
        )
        monkeypatch.setattr("quantmatrix.measure.saved_runs.check_target", check_target)
        monkeypatch.setattr("quantmatrix.measure.saved_runs.write", lambda run, path: path)
        monkeypatch.setattr("quantmatrix.api.require_plan", lambda request: "a plan")
        return kept

    return give


def test_generate(run: Run, generated: Callable[..., Any]) -> None:
    kept = generated(make_run("a", warnings=("slow", "hot")), make_run("b", degenerate="black"))
    code, out, said = run(
        "generate", *MODEL, "--prompt", "x", "y", "--save-latents", "l.safetensors"
    )
    assert code == 0
    assert out == "a.png\n  ; 1.00 s, 2 steps\nb.png\n  ; 1.00 s, 2 steps\n"
    assert said.splitlines() == [
        "quantmatrix: warning: slow",
        "quantmatrix: warning: hot",
        "saved a.png",
        "saved l.safetensors",
        "quantmatrix: warning: the output shows nothing: black. Run the base model alone: if that "
        "shows something, the checkpoint does not work here",
        "saved b.png",
        "saved l.safetensors",
    ]
    assert kept.saved == [("a", "outputs", True, []), ("b", "outputs", True, ["a.png"])]
    assert (kept.targets, kept.outputs, kept.progress) == ([True], ["outputs"], [False])


@pytest.mark.parametrize(
    ("words", "several"),
    [
        (["--prompt", "x"], False),
        (["--prompt", "x", "--seed", "1", "2"], True),
        (["--prompt", "x", "y", "--seed", "5"], True),
        (["--prompt", "x", "y", "z", "--seed", "1", "2"], True),
    ],
)
def test_whether_there_are_several_runs(
    words: list[str], several: bool, run: Run, generated: Callable[..., Any]
) -> None:
    kept = generated(make_run("a"))
    code, out, said = run("generate", *MODEL, *words, "--no-save-output", "--json")
    assert (code, kept.targets, kept.outputs, kept.saved) == (0, [several], [], [])
    assert json.loads(out) == {"ok": True, "runs": [make_run("a").to_json()]}
    assert said == ""


def test_only_the_first_process_saves_and_prints(
    capsys: Capture, generated: Callable[..., Any]
) -> None:
    kept = generated(make_run("a"))
    request: Any = SimpleNamespace(prompt=("x",), seed=(0,))
    given = argparse.Namespace(save_output=True, output_path="o", save_latents=None, json=False)
    assert generate.show_runs(request, given, "plan", 1) == 0  # type: ignore[arg-type]
    assert kept.saved == []
    assert capsys.readouterr().out == ""
    assert generate.show_runs(request, given, "plan") == 0  # type: ignore[arg-type]
    assert len(kept.saved) == 1


def test_traces_of_cells(monkeypatch: pytest.MonkeyPatch, replace: Replace, tmp_path: Path) -> None:
    class Bench:
        def __init__(self, tables: Any, *, tiny: bool) -> None:
            assert tiny is True

        def request(self, cell: Any) -> str:
            if cell.id == "b@cpu":
                raise errors.CheckpointError("damaged")
            return cell.id

        def plan(self, request: str) -> str:
            return f"plan {request}"

        def pipeline(self, request: str, plan: str) -> str:
            return f"pipeline {request}"

    monkeypatch.setattr("quantmatrix.measure.workbench.Workbench", Bench)
    census = SimpleNamespace(to_json=lambda: {"z": 1, "a": 2}, problems=["one", "two"])
    calls = replace("measure.trace.trace_pipeline", census)
    cells: Any = [SimpleNamespace(id=name) for name in ("a@cpu", "b@cpu", "c@cpu")]
    place = tmp_path / "deep" / "traces"
    tables: Any = None
    found = trace.trace_cells(cells, tables, place, tiny=True, quiet=True)
    problems = {name: [f"{name}: one", f"{name}: two"] for name in ("a@cpu", "c@cpu")}
    assert found == {
        "a@cpu": {"z": 1, "a": 2, "problems": problems["a@cpu"]},
        "b@cpu": {"problems": ["b@cpu: damaged"]},
        "c@cpu": {"z": 1, "a": 2, "problems": problems["c@cpu"]},
    }
    assert sorted(path.name for path in place.iterdir()) == ["a@cpu.json", "c@cpu.json"]
    text = (place / "a@cpu.json").read_text()
    assert text.startswith('{\n "a": 2,\n "problems": [\n  "a@cpu: one",')
    assert text.endswith('],\n "z": 1\n}\n')
    assert calls[0][:3] == ("a@cpu", "plan a@cpu", "pipeline a@cpu")
    assert calls[0][3].parent == place
    trace.trace_cells([], tables, place, tiny=True, quiet=True)


def test_the_command_of_a_validation() -> None:
    given = argparse.Namespace(
        model_path="some/model", backend=None, device="cpu", quantization_rank=16, height=0,
        prompt=["a fox", "b"], seed=[3, 5], tiny=True, output_path="out dir", guidance_scale=2.5,
    )  # fmt: skip
    rest = ["--transformer-path", "x"]
    assert validate.tell_command(given, rest) == (
        "quantmatrix validate --model-path some/model --transformer-path x --device cpu "
        "--quantization-rank 16 --height 0 --guidance-scale 2.5 --prompt 'a fox' b --seed 3 5 "
        "--tiny --output-path 'out dir'"
    )
    bare = argparse.Namespace(
        model_path="m", prompt=None, seed=None, tiny=None, output_path="o", prompts="p.txt"
    )
    assert validate.tell_command(bare, []) == (
        "quantmatrix validate --model-path m --prompts p.txt --output-path o"
    )


def test_validate(run: Run, replace: Replace, tmp_path: Path) -> None:
    found = SimpleNamespace(report={"a": 1}, problems=[])
    calls = replace("measure.validate.validate", found)
    written = replace("measure.validation_page.write_folder", None)
    replace("measure.validation_page.list_facts", [("name", "v"), ("a longer name", 7)])
    place = str(tmp_path / "out")
    words = ("validate", *MODEL, "--output-path", place)
    facts = f"{'name':17} v\n{'a longer name':17} 7\n{place}/index.html\n"
    assert run(*words) == (0, facts, "")
    assert calls[0][0].prompt == (PROMPT,)
    assert calls[0][1] == f"quantmatrix validate --model-path some/model --output-path {place}"
    assert written == [(found, Path(place), {})]
    found.problems = ["a layer"]
    assert run(*words, "--prompt", "x") == (1, facts, "quantmatrix: a layer\n")
    assert calls[1][0].prompt == ("x",)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    code, out, _ = run(*words, "--prompts", str(prompts), "--json")
    assert (code, json.loads(out)) == (1, {"a": 1, "output": place})
    assert calls[2][0].prompt == ("one", "two")
    for more, said in (
        ((*words, "--prompts", "a", "--prompt", "b"), "--prompts and --prompt: give one of them"),
        (words[:-2], "--output-path is missing: name the folder to write"),
    ):
        assert run(*more) == (2, "", f"quantmatrix: {said}\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.UsageError("wrong"), 2, "quantmatrix: wrong\n"),
        (errors.MachineError("wrong"), 2, "quantmatrix: wrong\n"),
        (errors.CheckpointError("bad"), 1, "quantmatrix: bad\n"),
        (errors.RefusedError("a-rule", "no units"), 3, "quantmatrix: no units\n"),
        (errors.UnusableError("no hub"), 14, "quantmatrix: no hub\n"),
        (errors.MissingPackageError("no package"), 14, "quantmatrix: no package\n"),
        (errors.UnreachableError("no network"), 14, "quantmatrix: no network\n"),
        (errors.BrokenRunError("NaN"), 1, "quantmatrix: NaN\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(28, "No space left", "a/b"),
            14,
            "quantmatrix: a/b: No space left; look at the path, its permissions and the free space\n",
        ),
        (
            PermissionError(13, "Permission denied", "a/b"),
            1,
            "quantmatrix: a/b: Permission denied; look at the path, its permissions and the free "
            "space\n",
        ),
        (OSError("strange"), 1, "quantmatrix: strange\n"),
    ],
)
def test_ends_of_a_command(
    error: BaseException, code: int, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("quantmatrix.runtime.doctor.examine", fail)
    assert run("doctor") == (code, "", said)
    if isinstance(error, KeyboardInterrupt):
        return
    found, out, _ = run("doctor", "--json")
    message = said.removeprefix("quantmatrix: ").rstrip()
    refused = isinstance(error, errors.RefusedError)
    kind = (
        type(error).__name__ if isinstance(error, errors.QuantmatrixError) else "QuantmatrixError"
    )
    assert (found, json.loads(out)) == (
        code,
        {
            "ok": False,
            "refusal": {"rule": "a-rule", "message": message} if refused else None,
            "error": {"type": kind, "message": message},
        },
    )


def test_words_without_a_command(run: Run) -> None:
    from quantmatrix import __version__

    assert run("--version") == (0, f"quantmatrix {__version__}\n", "")
    found = json.loads(run("--version", "--json")[1])
    assert found["quantmatrix"] == __version__
    assert (found["tables_version"], found["record_schema"]) == (1, 1)
    assert list(found["packages"]) == ["diffusers", "torch", "transformers", "triton"]
    code, out, said = run()
    assert (code, said) == (2, "")
    assert out.startswith("usage: quantmatrix [-h]")
    see = "which command? See `quantmatrix --help`"
    assert run("--json")[::2] == (2, f"quantmatrix: {see}\n")
    assert run("--abacus", "--json")[::2] == (2, f"quantmatrix: --abacus: {see}\n")
    assert run("--version", "--abacus")[::2] == (2, f"quantmatrix: --abacus: {see}\n")
    assert run("doctor", "--abacus", "--json")[0] == 2
    assert run("doctor", "--abacus")[2] == "quantmatrix: unrecognized arguments: --abacus\n"


def test_packages_that_are_not_there(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if name == "triton":
            raise metadata.PackageNotFoundError
        return f"{name} 1"

    monkeypatch.setattr(metadata, "version", version)
    assert show_version(as_json=True) == 0
    packages = json.loads(capsys.readouterr().out)["packages"]
    assert packages == {
        "torch": "torch 1", "diffusers": "diffusers 1", "transformers": "transformers 1",
        "triton": None,
    }  # fmt: skip


def test_errors_in_words(capsys: Capture) -> None:
    error = errors.CheckpointError("a\x1b[0m\n::error::b")
    assert report_error(error, 7, as_json=False) == 7
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "quantmatrix: a\\x1b[0m\n\\::error::b\n")
    lines = [f"line {n} " + "x " * 600 for n in range(3)]
    assert shorten_error(MatrixError(lines)) == "\n".join(lines)
    assert len(shorten_error(errors.UsageError("\n".join(lines)))) == 2000
    assert str(explain_os_error(OSError("x"))) == "x"


def test_which_tables_were_read(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv(source.VARIABLE, str(folder))
    code, _, said = run("matrix", "check")
    assert (code, said) == (0, f"tables: {folder} ({source.VARIABLE})\n")
    found = json.loads(run("matrix", "check", "--json")[1])
    assert found["tables"] == f"{folder} ({source.VARIABLE})"
    assert run("matrix", "check", "--json")[2] == ""
    monkeypatch.delenv(source.VARIABLE)
    read.last_read.append(folder)
    assert output.name_tables() == str(folder)
    read.last_read.clear()
    assert output.name_tables() == ""
    output.tell_tables()
    output.print_json({"b": Path("x"), "a": 1})
    assert capsys.readouterr().out == '{\n  "a": 1,\n  "b": "x"\n}\n'
    read.last_read.append(source.own_folder())
    output.tell_tables()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with output.shown_log():
        output.tell_tables()
    assert capsys.readouterr().err == f"quantmatrix: tables: {source.find()}\n"
    read.last_read.clear()


def test_json_is_finite(capsys: Capture) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        output.print_json([float("inf")])


def test_a_request_of_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantmatrix.cli.main import build_parser

    given = build_parser().parse_args(["plan", *MODEL, "--revision", "main"])
    monkeypatch.setenv(FP4_BACKEND_VARIABLE, "cudnn")
    request = output.read_request(given, ["--transformer-path", "x"])
    assert (request.fp4_gemm_backend, request.hub.revision) == ("cudnn", "main")
    assert request.component_paths == {"transformer": "x"}
    monkeypatch.delenv(FP4_BACKEND_VARIABLE)
    given.revision = None
    request = output.read_request(given, [])
    assert (request.fp4_gemm_backend, request.hub.revision) == (None, None)
    assert output.backends_text({"decode": 28, "torch": 4}) == "28 decode, 4 torch"
    assert output.backends_text({}) == "none"


def test_lines_for_people(capsys: Capture) -> None:
    output.say("a\x07\nb")
    output.say("c", to_errors=True)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\\x07\nb\n", "c\n")


def test_the_log_is_put_back() -> None:
    logger = logging.getLogger("quantmatrix")
    logger.setLevel(logging.ERROR)
    try:
        with suppress(KeyError), output.shown_log(verbose=True):
            assert logger.level == logging.DEBUG
            assert len(logger.handlers) == 1
            raise KeyError
        assert (logger.level, logger.handlers) == (logging.ERROR, [])
    finally:
        logger.setLevel(logging.NOTSET)


def test_a_reader_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []

    def fail() -> None:
        raise BrokenPipeError

    monkeypatch.setattr("quantmatrix.runtime.doctor.examine", fail)
    monkeypatch.setattr("quantmatrix.cli.main.drop_output", lambda: dropped.append(1))
    assert main(["doctor"]) == 1
    assert dropped == [1]


def test_completion_without_its_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    said = "quantmatrix: completion needs shtab: `pip install shtab`\n"
    assert run("completion", "bash") == (14, "", said)


def test_completion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shtab = SimpleNamespace(complete=lambda parser, shell: f"{parser.prog} in {shell}")
    monkeypatch.setitem(sys.modules, "shtab", shtab)
    assert run("completion", "zsh") == (0, "quantmatrix in zsh\n", "")


def test_a_checkpoint_to_explain_is_needed(run: Run) -> None:
    said = (
        "quantmatrix: --checkpoint is missing: name one, or let `quantmatrix recommend "
        "--hardware h200{} choose it\n"
    )
    assert run("explain", "--hardware", "h200") == (2, "", said.format("`"))
    words = ("explain", "--hardware", "h200", "--model", "flux-1")
    assert run(*words) == (2, "", said.format(" --model flux-1`"))


def test_history_of_a_cell(
    run: Run, replace: Replace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmatrix.report.history import Skipped, Version

    first = Version("stand-in", "2026-11-01", "a" * 40, "pass", 41.23456, None, "first")
    later = Version("stand-in", "2026-11-02", "b" * 40, "load: fail", None, 0.51234, "worse")
    replace("report.changes.find_checkout", folder)
    calls = replace("report.history.read_history", ([first, later], [Skipped("2026", "c", "old")]))
    replace("report.history.is_shallow", True)
    words = ("matrix", "history", "fp8-flux-2@cpu", "--tables", str(folder))
    shallow = "this clone is shallow and lacks older versions: `git fetch --unshallow`"
    notes = ["skipped 1 version (2026): old", shallow]
    assert run(*words)[:2] == (
        0,
        "\n".join(
            [
                "fp8-flux-2@cpu: stand-in: worse since 2026-11-02 (bbbbbbbbbbbb)",
                "day         commit        scope     verdict     PSNR dB  step / BF16",
                "2026-11-01  aaaaaaaaaaaa  stand-in  pass        41.23                 first",
                "2026-11-02  bbbbbbbbbbbb  stand-in  load: fail           0.5123",
            ]
        ).replace("0.5123", "0.5123       worse")
        + "\n"
        + "\n".join(notes)
        + "\n",
    )
    assert calls[0][0].id == "fp8-flux-2@cpu"
    found = json.loads(run(*words, "--json")[1])
    assert found["versions"] == [first.to_json(), later.to_json()]
    assert found["skipped"] == [{"date": "2026", "commit": "c", "why": "old"}]
    assert (found["notes"], found["cell"], found["ok"]) == (notes, "fp8-flux-2@cpu", True)
    replace("report.history.read_history", ([], []))
    replace("report.history.is_shallow", False)
    assert run(*words)[1] == "fp8-flux-2@cpu: no record was ever committed\n"


def test_a_folder_of_tables_that_is_not_there(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "none"
    code, _, said = run("matrix", "check", "--tables", str(place))
    assert (code, said) == (
        2,
        f"quantmatrix: --tables {place}: not a directory; expected one that holds cases.csv; "
        f"`quantmatrix init {place}` writes a first set of tables\n",
    )
    write_tables(place)
    (place / "cases.csv").write_text("x\n")
    code, _, said = run("matrix", "check", "--tables", str(place))
    assert code == 1
    assert re.match(r"quantmatrix: none/cases\.csv:1: expected the columns id,family,", said)


def test_the_entry_of_the_program(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from quantmatrix.cli import main as program

    signals: list[Any] = []
    monkeypatch.setattr(program.signal, "signal", lambda *given: signals.append(given))
    monkeypatch.setattr(program, "main", lambda: 5)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as left:
        program.entry()
    assert left.value.code == 5
    assert signals == [(program.signal.SIGTERM, program.terminate)]
    stream.write("ü")
    stream.flush()
    assert raw.getvalue() == b"\\xfc"
    monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        program.terminate(15, None)
    assert left.value.code == 143
    assert capsys.readouterr().err == "terminated\n"


def test_a_program_without_an_output(replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    replace("cli.main.run_command", 7)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["doctor"]) == 7
    monkeypatch.setattr(sys, "argv", ["quantmatrix", "a_b", "--c_d"])
    calls = replace("cli.main.run_command", 3)
    assert main() == 3
    assert calls == [(["a_b", "--c-d"], {})]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_output_that_is_full(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr("quantmatrix.runtime.doctor.examine", fail)
    monkeypatch.setattr("quantmatrix.cli.main.report_error", fail)
    monkeypatch.setattr("quantmatrix.cli.main.drop_output", lambda: dropped.append(1))
    assert main(["doctor", *(["--json"] if as_json else [])]) == 14
    assert dropped == [1]
