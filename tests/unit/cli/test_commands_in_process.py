"""Commands with their work replaced: flags that reach it, exit codes, and all that is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.cli import quantize, run_column, thresholds
from quantmatrix.tools.quantize import PROMPTS

MIB, GIB = 2**20, 2**30
MODEL = ("--model-path", "some/model")
Run = Callable[..., tuple[int, str, str]]
Replace = Callable[..., list[Any]]


def test_dequantize(run: Run, replace: Replace) -> None:
    written = {"output": "plain", "tensors": 17, "bytes": 1234 * MIB + MIB // 2}
    calls = replace("tools.dequantize.dequantize", written)
    words = ("dequantize", *MODEL, "--output-path", "plain")
    assert run(*words) == (0, "plain: 17 tensors, 1,234.5 MiB\n", "")
    assert calls[0][1:] == ("plain", {"component": "transformer", "dtype": "float32"})
    code, out, _ = run(*words, "--component", "transformer_2", "--dtype", "float16", "--json")
    assert (code, json.loads(out)) == (0, written)
    assert calls[1][2] == {"component": "transformer_2", "dtype": "float16"}
    assert run("dequantize", *MODEL) == (
        *(2, "", "quantmatrix: --output-path is missing: name the folder to write\n"),
    )
    assert len(calls) == 2


QUANTIZE = ("quantize", *MODEL, "--family", "fp8", "--output-path", "made")


def test_quantize(run: Run, replace: Replace, tmp_path: Path) -> None:
    counts = {
        "transformer": {"quantized": 26, "kept": 5},
        "transformer_2": {"quantized": 1, "kept": 0},
    }
    found = {
        "output": "made",
        "scheme": "FP8",
        "bytes": 1234 * MIB + MIB // 2,
        "components": counts,
    }
    calls = replace("tools.quantize.quantize", found)
    assert run(*QUANTIZE) == (
        0,
        "made: FP8, 1,234.5 MiB\n"
        "  transformer: 26 layers quantized, 5 kept\n"
        "  transformer_2: 1 layers quantized, 0 kept\n",
        "",
    )
    common = {"family": "fp8", "output": "made", "show": quantize.show_progress}
    unsaid = {"scheme": None, "kept": None, "prompts": PROMPTS, "precision": None, "rank": None}
    assert calls[0][1] == {**common, **unsaid, "overwrite": False}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n a fox \n\nan owl\n  \n")
    words = ("--scheme", "FP8", "--precision", "int4", "--rank", "16", "--keep", "a", "b")
    more = ("--calibration-prompts", str(prompts), "--overwrite", "--json")
    code, out, _ = run(*QUANTIZE, *words, *more)
    assert (code, json.loads(out)) == (0, {"ok": True, **found})
    said = {"scheme": "FP8", "kept": ["a", "b"], "prompts": ["a fox", "an owl"]}
    assert calls[1][1] == {**common, **said, "precision": "int4", "rank": 16, "overwrite": True}


def test_quantize_a_text_encoder(run: Run, replace: Replace) -> None:
    found = {"output": "made", "scheme": "FP8", "bytes": MIB // 4, "components": {}}
    calls = replace("tools.quantize_encoder.quantize_encoder", found)
    words = (*QUANTIZE, "--component", "text_encoder_2")
    assert run(*words) == (0, "made: FP8, 0.2 MiB\n", "")
    assert calls[0][1] == "text_encoder_2"
    assert set(calls[0][2]) == {
        *("family", "output", "scheme", "kept", "prompts", "overwrite", "show")
    }
    end = "for nunchaku-svdq, which is for transformers; leave it out\n"
    for given, first in (
        (("--precision", "int4", "--rank", "0"), "--precision"),
        (("--rank", "0"), "--rank"),
        (("--precision", ""), "--precision"),
    ):
        assert run(*words, *given) == (2, "", f"quantmatrix: {first}: {end}")
    assert len(calls) == 1


def test_prompts_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    def say(file: Path) -> str:
        code, _, said = run(*QUANTIZE, "--calibration-prompts", str(file))
        assert code == 2
        return said.removeprefix(f"quantmatrix: --calibration-prompts {file}: ")

    assert say(tmp_path / "none") == "No such file or directory\n"
    (tmp_path / "empty").write_text("\n  \n\n")
    assert say(tmp_path / "empty") == "holds no prompt; expected one per line\n"
    (tmp_path / "latin").write_bytes(b"\xe4")
    assert say(tmp_path / "latin").endswith("; expected text, one prompt per line\n")
    code, _, said = run(*QUANTIZE, "--abacus", "7")
    assert (code, said) == (2, "quantmatrix: unrecognized arguments: --abacus 7\n")


SPEED = ("speed", "--model-id", "flux-1", "--family", "fp8", "--device", "cpu")


def test_speed(run: Run, replace: Replace) -> None:
    found = {
        "model": "flux-1",
        "size": "full",
        "machine": {"name": "A card"},
        "backends": {"decode": 23, "torch": 3},
        "milliseconds": {"bf16": 1500.567, "quantized": 750.123},
        "bytes": {"bf16": 13 * GIB, "quantized": 5 * GIB + GIB // 4},
        "ratio": 0.49987,
        "repeats_bit_identical": True,
    }
    calls = replace("measure.bench.speed.compare_forms", found)
    lines = [
        "flux-1 (full) on A card",
        "  layers   23 decode, 3 torch",
        "  time     750.12 ms, BF16 1500.57 ms: 0.500x",
        "  weights  5.25 GiB: 0.404x of BF16",
    ]
    code, out, _ = run(*SPEED)
    assert (code, out.splitlines()) == (0, [*lines, "  repeats  bit-identical"])
    model, machine, named = calls[0]
    assert (model, machine.device) == ("flux-1", "cpu")
    assert named == {
        "family": "fp8", "scheme": "tensor-dynamic", "backend": None, "size": "full",
        "compiled": False, "graph": False, "repeats": 10,
    }  # fmt: skip
    found["repeats_bit_identical"] = False
    words = ("--repeats", "1", "--compile", "--backend", "torch", "--synthetic", "tiny")
    code, out, _ = run(*SPEED, *words, "--scheme", "tensor-static")
    assert (code, out.splitlines()) == (0, [*lines, "  repeats  differ"])
    assert calls[1][2] == {
        "family": "fp8", "scheme": "tensor-static", "backend": "torch", "size": "tiny",
        "compiled": True, "graph": False, "repeats": 1,
    }  # fmt: skip
    code, out, _ = run(*SPEED, "--json")
    assert (code, json.loads(out)) == (0, found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--repeats", "0"), "--repeats 0: expected 1 or more"),
        (("--cuda-graph",), "--cuda-graph needs an NVIDIA GPU, the device is cpu"),
    ],
)
def test_what_cannot_be_timed(
    words: tuple[str, ...], said: str, run: Run, replace: Replace
) -> None:
    calls = replace("measure.bench.speed.compare_forms", {})
    assert run(*SPEED, *words) == (2, "", f"quantmatrix: {said}\n")
    assert calls == []


@dataclass
class FakeTrueSize:
    size: str = "true width and depth"
    peak: int = 3 * GIB + GIB // 4
    repeats: bool = True
    steps: list[dict[str, float]] = field(
        default_factory=lambda: [{"relative_l2": 0.0123456}, {"relative_l2": 0.5}]
    )

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": {"bf16_bytes": 5 * GIB, "quantized_bytes": 2 * GIB + GIB // 2},
            "peak": {"bf16_bytes": self.peak and 7 * GIB, "quantized_bytes": self.peak},
            "steps": self.steps,
            "repeats": self.repeats,
        }

    def tell_times(self) -> dict[str, float]:
        return {"step bf16": 12.3456, "step quantized": 6.5}


def test_true_size(run: Run, replace: Replace, folder: Path) -> None:
    found = FakeTrueSize()
    calls = replace("measure.true_size.measure", found)
    words = ("true-size", "fp8-flux-2@cpu", "--tables", str(folder))
    code, out, _ = run(*words)
    assert (code, out.splitlines()) == (
        0,
        [
            "fp8-flux-2@cpu: true width and depth, random weights",
            "  bf16       12.346 s a step, 5.00 GiB, 7.00 GiB at most",
            "  quantized  6.500 s a step, 2.50 GiB, 3.25 GiB at most",
            "  relative L2 of the latents after each step: 0.01235, 0.5",
            "  repeats    bit-identical",
        ],
    )
    row, request, tables, place, _ = calls[0]
    assert row.id == "flux-2-fp8"
    assert (request.device, request.tiny) == ("cpu", True)
    assert list(tables.checkpoints) == ["flux-1-fp8", "flux-2-fp8", "flux-1-svdq"]
    assert place.name.startswith("quantmatrix-")
    assert not place.exists()
    found.peak, found.repeats, found.steps = 0, False, found.steps[1:]
    code, out, _ = run(*words)
    assert out.splitlines()[1:] == [
        "  bf16       12.346 s a step, 5.00 GiB",
        "  quantized  6.500 s a step, 2.50 GiB",
        "  relative L2 of the latents after each step: 0.5",
        "  repeats    differ",
    ]
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "ok": True,
            "cell": "fp8-flux-2@cpu",
            "metrics": found.to_json(),
            "seconds": found.tell_times(),
            "tables": f"{folder} (--tables)",
        },
    )


@pytest.mark.parametrize("name", ["fp8-flux-2", "fp8-flux-2@cpu+", "a@cpu", "z@cpu"])
@pytest.mark.parametrize("command", ["true-size", "matrix history", "matrix show"])
def test_cells_that_there_are_not(command: str, name: str, run: Run, folder: Path) -> None:
    if command == "matrix show" and name == "fp8-flux-2":
        return
    what = "row or cell" if command == "matrix show" else "cell"
    given = ("--reports", str(folder.parent / "reports")) if command == "matrix show" else ()
    code, out, said = run(*command.split(), name, *given, "--tables", str(folder))
    line = f"quantmatrix: {name}: no such {what}; see `quantmatrix matrix list`"
    assert (code, out, said.splitlines()) == (2, "", [line])


def show(run: Run, folder: Path, *words: str) -> tuple[int, str, str]:
    """A `matrix` command on small tables."""
    given = ("--tables", str(folder))
    reports = () if words[0] == "check" else ("--reports", str(folder.parent / "reports"))
    return run("matrix", *words, *reports, *given)


def test_matrix_show(run: Run, folder: Path) -> None:
    code, out, said = show(run, folder, "show", "svdq-flux-1-hopper@h100")
    assert (code, said) == (0, f"tables: {folder} (--tables)\n")
    lines = out.splitlines()
    assert lines[0] == "svdq-flux-1-hopper@h100"
    assert lines[1:-1] == [
        "  row         svdq-flux-1-hopper",
        "  family      nunchaku-svdq",
        "  model       flux-1",
        "  checkpoint  flux-1-svdq",
        "  hardware    h100",
        "  claim       refused",
        "  state       unproven",
        "  rule        svdq-arch",
        "  checks      refuse",
        "  notes       no 4-bit integer matrix units",
    ]
    assert lines[-1].startswith("  command     quantmatrix generate ")
    code, out, _ = show(run, folder, "show", "fp8-flux-1")
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        *("fp8-flux-1@cpu+reference", "fp8-flux-1@cpu+decode"),
        *("fp8-flux-1@h100+reference", "fp8-flux-1@h100+decode"),
    ]
    assert "  checks      load latents\n" in out
    assert "  backend     decode\n" in out
    code, out, _ = show(run, folder, "show", "fp8-flux-1@h100+decode", "--json")
    [row] = json.loads(out)["rows"]
    assert (code, row["id"], row["notes"]) == (0, "fp8-flux-1@h100+decode", "")


def test_matrix_list(run: Run, folder: Path) -> None:
    code, out, said = show(
        run, folder, "list", "--family", "nunchaku-svdq", "--hardware", "h100", "b200"
    )
    assert (code, out) == (
        0,
        "unproven               refused    svdq-flux-1-hopper@h100\n"
        "planned                planned    svdq-flux-1@b200\n",
    )
    assert said == f"2 cells\ntables: {folder} (--tables)\n"
    for words in (("--state", "planned"), ("--claim", "planned"), ("--hardware", "b200")):
        assert show(run, folder, "list", *words)[2].splitlines()[0] in ("1 cells", "2 cells")
    for flag, name, count in (
        *(("state", "planned", 2), ("claim", "planned", 2), ("hardware", "b200", 1)),
        *(("model", "flux-2", 1), ("model", "wan-2-2", 0), ("family", "gguf", 0)),
        *(("scope", "published", 0), ("claim", "failing", 0), ("state", "proven", 0)),
    ):
        code, out, said = show(run, folder, "list", f"--{flag}", name)
        assert (code, len(out.splitlines())) == (0, count)
        assert said.splitlines()[0] == f"{count} cells"


@pytest.mark.parametrize(
    ("flag", "known"),
    [
        (
            "family",
            "['comfyui-int8', 'fp8', 'gguf', 'modelopt-fp8', 'modelopt-nvfp4', 'msmodelslim', "
            "'nunchaku-svdq']",
        ),
        ("model", "['flux-1', 'flux-2', 'qwen-image', 'wan-2-2', 'z-image']"),
        ("hardware", "['b200', 'cpu', 'h100']"),
        ("claim", "['expected', 'failing', 'planned', 'refused', 'validated']"),
        ("scope", "['compiled', 'published', 'stand-in', 'true size']"),
    ],
)
def test_filters_that_no_row_can_meet(flag: str, known: str, run: Run, folder: Path) -> None:
    code, out, said = show(run, folder, "list", f"--{flag}", known.split("'")[1], "abacus", "zoo")
    assert (code, out) == (2, "")
    line = f"quantmatrix: --{flag} abacus: not in the tables; known: {known}"
    assert said.splitlines()[0] == line


def test_matrix_check(run: Run, folder: Path) -> None:
    code, out, _ = show(run, folder, "check")
    assert (code, out) == (0, "4 rows, 8 cells: no problem found\n")
    code, out, _ = show(run, folder, "check", "--json")
    assert json.loads(out) == {"ok": True, "rows": 4, "cells": 8, "tables": f"{folder} (--tables)"}


def outcome(name: str, verdict: str = "", *, skipped: bool = False) -> Any:
    record = SimpleNamespace(verdict=verdict, reason="", command="run it") if verdict else None
    cell = SimpleNamespace(id=name)
    return SimpleNamespace(cell=cell, record=record, problem="gone", skipped=skipped)


COLUMN = ("run-column", "--runtime", "diffusers", "--hardware", "cpu")


def test_run_column(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = outcome("a", "works"), outcome("b")
    given: list[Any] = []

    def make(tables: Any, *rest: Any) -> Any:
        given.append(rest)
        outcomes = [good, outcome("c", skipped=True), *([bad] if rest[0].tiny else [])]
        for one in outcomes if rest[-1] else ():
            rest[-1](one)
        return outcomes, Path("made.tar")

    monkeypatch.setattr("quantmatrix.peers.packet.make", make)
    monkeypatch.setattr("quantmatrix.peers.packet.read_memory", lambda: 9 * GIB)
    code, out, _ = run(*COLUMN)
    assert (code, out) == (0, "a: works\nc: left out: gone\nmade.tar: 1 records\n")
    asked, folder, records, _ = given[0]
    assert (folder, records) == (run_column.PACKETS / "diffusers-cpu", None)
    assert (asked.runtime, asked.hardware, asked.tiny) == ("diffusers", "cpu", False)
    assert (asked.bounds.seconds, asked.workers) == (600.0, 1)
    assert asked.bounds.memory_bytes == 9 * GIB
    words = ("--tiny", "--timeout", "7.5", "--memory", "1.5", "--workers", "3")
    code, out, _ = run(*COLUMN, *words, "--output-path", "there", "--record-dir", "kept")
    assert (code, out.splitlines()[2:]) == (1, ["b: no verdict: gone", "made.tar: 1 records"])
    asked, folder, records, _ = given[1]
    assert (folder, records) == (Path("there"), Path("kept"))
    assert (asked.bounds.seconds, asked.bounds.memory_bytes) == (7.5, 3 * GIB // 2)
    assert (asked.workers, asked.tiny) == (3, True)
    run(*COLUMN, "--workers", "4")
    assert given[2][0].bounds.memory_bytes == 9 * GIB // 4
    code, out, _ = run(*COLUMN, "--tiny", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["packet"]) == (1, False, "made.tar")
    assert found["cells"] == {
        "a": {"verdict": "works", "reason": "", "command": "run it"},
        "c": {"verdict": "", "reason": "gone"},
        "b": {"verdict": "", "reason": "gone"},
    }
    assert given[3][-1] is None
    assert json.loads(run(*COLUMN, "--json")[1])["ok"] is True


@pytest.mark.parametrize(
    ("drift", "check", "code", "said"),
    [
        ([], True, 0, "reports agree with claims and evidence\n"),
        (["a.md", "b.csv"], True, 1, "a.md\nb.csv\n"),
        (["a.md", "b.csv"], False, 0, "a.md\nb.csv\n"),
        ([], False, 0, "\n"),
    ],
)
def test_report(
    drift: list[str], check: bool, code: int, said: str, run: Run, replace: Replace
) -> None:
    calls = replace(f"report.render.{'check' if check else 'write'}", drift)
    words = ("report", *(["--check"] if check else []), "--reports", "there")
    assert run(*words)[:2] == (code, said)
    assert calls == [("there", {})]
    found = run(*words, "--json")
    assert found[0] == code
    assert json.loads(found[1]) == {"ok": code == 0, "files": drift}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "md", "--table", "cells"), "--table is about a page: name it with --into"),
        (("--columns", "id"), "--columns is about a page: name it with --into"),
        (("--format", "md"), "--format is about a page: name it with --into"),
        (
            ("--into", "a.md", "--columns", "id"),
            "--columns: of which table? Name one with --table",
        ),
        (
            ("--into", "a.md", "--columns", "id", "--table", "cells", "families"),
            "--columns: of which table? Name one with --table",
        ),
    ],
)
def test_flags_of_a_page(words: tuple[str, ...], said: str, run: Run) -> None:
    assert run("report", *words) == (2, "", f"quantmatrix: {said}\n")


@pytest.mark.parametrize(
    ("found", "check", "code", "said"),
    [
        ([], True, 0, "page.md agrees with claims and evidence\n"),
        ([], False, 0, "page.md agrees with claims and evidence\n"),
        (["page.md: cells"], True, 1, "page.md: cells\n"),
        (["page.md: cells"], False, 0, "page.md: cells\n"),
    ],
)
def test_report_into_a_page(
    *, found: list[str], check: bool, code: int, said: str, run: Run, replace: Replace, folder: Path
) -> None:
    calls = replace("report.into.update", found)
    reports = str(folder.parent / "reports")
    words = ("report", "--into", "page.md", "--reports", reports, "--tables", str(folder))
    words = (*words, *(["--check"] if check else []))
    assert run(*words, "--table", "cells", "--columns", "id") == (
        code,
        said,
        f"tables: {folder} (--tables)\n",
    )
    page, _, names, named = calls[0]
    assert (page, names, named) == (Path("page.md"), ["cells"], {"check": check})
    code_of_json, out, _ = run(*words, "--json")
    assert (code_of_json, json.loads(out)["ok"]) == (code, code == 0)


def test_trace(run: Run, replace: Replace, tmp_path: Path) -> None:
    from quantmatrix.measure.trace_census import Census

    place = str(tmp_path / "t.json.gz")
    calls = replace("measure.trace.trace", Census({}, {}, []))
    words = ("trace", *MODEL, "--output-path", place)
    warning = "warning: no layer is quantized: the trace is that of a model in full precision"
    share = "0.0% of their time went into quantizing and scaling"
    assert run(*words) == (0, f"{share}\n{place}\n", f"quantmatrix: {warning}\n")
    assert calls[0][1] == Path(place)
    layer: Any = SimpleNamespace(
        backend="decode", calls=3, matmuls={}, kernels={}, seconds=4.0, matmul_seconds=3.0
    )
    replace("measure.trace.trace", Census({}, {"a": layer}, ["a did not run"]))
    line = "1 quantized layers ran by decode, 3 calls"
    share = "25.0% of their time went into quantizing and scaling"
    assert run(*words) == (1, f"{line}\n{share}\n{place}\n", "quantmatrix: a did not run\n")


@pytest.mark.parametrize(
    "words", [(), (*MODEL, "--hardware", "cpu"), ("--row", "a", "--hardware", "cpu")]
)
def test_one_thing_to_trace(words: tuple[str, ...], run: Run) -> None:
    said = "quantmatrix: expected one of --model-path, --row and --hardware\n"
    assert run("trace", *words) == (2, "", said)


def test_cells_that_are_traced(run: Run, replace: Replace, folder: Path, tmp_path: Path) -> None:
    one = {"quantize_and_scale_share": 0.12345, "problems": []}
    found = {"a@cpu": one, "b@cpu": {"problems": ["b@cpu: refused"]}}
    calls = replace("cli.trace.trace_cells", found)
    place = str(tmp_path / "traces")
    given = ("--tables", str(folder), "--output-path", place)
    code, out, said = run("trace", "--hardware", "cpu", *given)
    assert (code, out.splitlines()) == (
        1,
        [
            f"{'a@cpu':50}  12.3% of the layers' time not in matmuls",
            f"{'b@cpu':50} failed",
            place,
        ],
    )
    assert said == f"quantmatrix: b@cpu: refused\ntables: {folder} (--tables)\n"
    cells, _, where, named = calls[0]
    assert [cell.id for cell in cells] == ["fp8-flux-1@cpu+reference", "fp8-flux-1@cpu+decode"]
    assert (where, named) == (Path(place), {"tiny": False, "quiet": False})
    replace("cli.trace.trace_cells", {"a@cpu": one})
    words = ("--row", "fp8-flux-2@cpu", "fp8-flux-1@h100+decode", "--tiny", "--json")
    code, out, _ = run("trace", *words, *given)
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert json.loads(out)["output"] == place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--row", "a@cpu"),
            "--row a@cpu: no such cell; `quantmatrix matrix list` shows their ids",
        ),
        (
            ("--row", "z@cpu"),
            "--row z@cpu: no such cell; `quantmatrix matrix list` shows their ids",
        ),
        (("--hardware", "abacus"), "--hardware abacus: not in the tables; known: cpu, h100, b200"),
        (("--hardware", "b200"), "--hardware b200: no row claims that anything runs there"),
        (("--row", "a@cpu", "--abacus", "1"), "unrecognized arguments: --abacus 1"),
    ],
)
def test_cells_that_cannot_be_traced(
    words: tuple[str, ...], said: str, run: Run, folder: Path
) -> None:
    code, _, found = run("trace", *words, "--tables", str(folder))
    assert (code, found.splitlines()[0]) == (2, f"quantmatrix: {said}")


def test_one_cell_of_each_backend_is_chosen(folder: Path) -> None:
    from quantmatrix.cli.trace import choose_cells, find_cell
    from quantmatrix.tables import read

    tables = read.read(folder)
    ids = [cell.id for cell in choose_cells(tables, "h100")]
    assert ids == ["fp8-flux-1@h100+reference", "fp8-flux-1@h100+decode"]
    assert find_cell(tables, ids[1]).id == ids[1]


def test_thresholds(run: Run, replace: Replace, tmp_path: Path) -> None:
    calls = replace("cli.thresholds.measure_spread", ["one is looser"])
    reports, file = ("--reports", str(tmp_path)), tmp_path / thresholds.FILE
    end = "no such file; name the folder of the reports with --reports"
    for words in ((), ("--measure-spread",)):
        assert run("thresholds", *words, *reports) == (2, "", f"quantmatrix: {file}: {end}\n")
    assert calls == []
    file.write_text("")
    assert run("thresholds", "--measure-spread", *reports) == (1, "one is looser\n", "")
    assert calls == [(file, {})]
    replace("cli.thresholds.measure_spread", [])
    said = f"no limit is wider than in {file}\n"
    assert run("thresholds", "--measure-spread", *reports) == (0, said, "")


def test_packet_make(run: Run, replace: Replace, folder: Path, tmp_path: Path) -> None:
    check = SimpleNamespace(verdict="pass", message="")
    record = SimpleNamespace(checks={"latents": check})
    calls = replace("harness.packets.make", tmp_path / "packet")
    replace("proof.store.read_folder", {"key": record})
    replace("proof.scopes.read_scope", "stand-in")
    given = ("--output-path", str(tmp_path / "packet"), "--tables", str(folder))
    words = ("packet", "make", "fp8-flux-1@cpu+decode", *given)
    line = f"{tmp_path / 'packet'}: fp8-flux-1@cpu+decode: pass"
    assert run(*words)[:2] == (0, f"{line}\n")
    _, cell, place, named = calls[0]
    assert (cell.id, place, named) == (
        *("fp8-flux-1@cpu+decode", tmp_path / "packet", {"tiny": False}),
    )
    check.message = "20 dB"
    assert run(*words, "--tiny")[:2] == (0, f"{line} 20 dB\n")
    assert calls[1][3] == {"tiny": True}
    code, out, _ = run(*words, "--json")
    assert json.loads(out) == {
        "ok": True, "packet": str(tmp_path / "packet"), "cell": "fp8-flux-1@cpu+decode",
        "verdict": "pass", "message": "20 dB", "scope": "stand-in", "tables": f"{folder} (--tables)",
    }  # fmt: skip
    for name in ("a@cpu", "z@cpu"):
        code, _, said = run("packet", "make", name, *given)
        line = f"quantmatrix: {name}: no such cell; see `quantmatrix matrix list`"
        assert (code, said.splitlines()[0]) == (2, line)


def test_packet_check(
    run: Run, replace: Replace, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    replace("harness.packets.check", ["one", "two"])
    replace("peers.packet_check.check", [])
    monkeypatch.setattr(
        "quantmatrix.peers.packet_check.is_column", lambda place: place.name == "column"
    )
    given = ("--tables", str(folder))
    assert run("packet", "check", "cell", "column", *given)[:2] == (1, "one\ntwo\ncolumn: sound\n")
    assert run("packet", "check", "column", *given)[:2] == (0, "column: sound\n")
    code, out, _ = run("packet", "check", "cell", "column", "--json", *given)
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert json.loads(out)["problems"] == {"cell": ["one", "two"], "column": []}


def test_evidence_carry(run: Run, replace: Replace, tmp_path: Path) -> None:
    @dataclass
    class Outcome:
        pairs: list[str]
        cells: list[str]
        differing: dict[str, str]
        foreign: list[str]

    calls = replace("measure.carry.carry", Outcome(["p"], ["c", "d"], {}, []))
    words = ("evidence", "carry", "HEAD~2", "--reports", str(tmp_path))
    assert run(*words) == (0, f"{tmp_path}: 1 pairs carry 2 records\n", "\n")
    assert calls[0][:2] == ("HEAD~2", tmp_path)
    replace("measure.carry.carry", Outcome([], [], {"twin": "latents differ"}, []))
    out = f"not carried: latents differ: twin\n{tmp_path}: 0 pairs carry 0 records\n"
    assert run(*words) == (1, out, "\n")
    replace("measure.carry.carry", Outcome(["p", "q"], ["c"], {}, ["a@cpu"]))
    out = f"not of HEAD~2: the record of a@cpu\n{tmp_path}: 2 pairs carry 1 records\n"
    assert run(*words) == (1, out, "\n")
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)) == (
        1,
        {"ok": False, "pairs": ["p", "q"], "cells": ["c"], "differing": {}, "foreign": ["a@cpu"]},
    )


def test_tiny_hub(run: Run, replace: Replace, tmp_path: Path) -> None:
    calls = replace("tiny.hub.ensure_all", ["a/b", "c/d"])
    place = tmp_path / "hub"
    assert run("tiny-hub", str(place)) == (0, "a/b\nc/d\n", f"2 stand-ins in {place}\n")
    assert calls == [(place, {})]
    code, out, _ = run("tiny-hub", str(place), "--json")
    assert (code, json.loads(out)) == (0, {"folder": str(place), "repositories": ["a/b", "c/d"]})


def test_init(run: Run, replace: Replace) -> None:
    calls = replace("tables.starter.write", [Path("new/a.csv"), Path("new/b.csv")])
    end = "next: quantmatrix matrix check --tables new\n"
    assert run("init", "new") == (0, f"new/a.csv: written\nnew/b.csv: written\n{end}", "")
    assert calls == [(Path("new"), {})]
    code, out, _ = run("init", "new", "--json")
    assert (code, json.loads(out)) == (0, {"ok": True, "written": ["new/a.csv", "new/b.csv"]})


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["a is missed"], 1)])
def test_mutate(
    problems: list[str], code: int, run: Run, replace: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmatrix.harness.mutation.judge import Mutator

    monkeypatch.setattr(Mutator, "run", lambda *_: [])
    replace("harness.mutation.report.summarize", {"problems": problems})
    replace("harness.mutation.report.to_markdown", "a table")
    written = replace("harness.mutation.report.write_reports", [Path("a.csv"), Path("b.md")])
    errors = "".join(f"quantmatrix: {line}\n" for line in problems)
    assert run("mutate", "modelopt-fp8") == (code, "a table\n", errors)
    assert written == []
    found = run("mutate", "modelopt-fp8", "--write", "--json")
    assert (found[0], json.loads(found[1])["problems"]) == (code, problems)
    assert found[2].startswith("wrote a.csv\nwrote b.md\n")
    assert written == [([], Path("reports"), {})]
    said = "quantmatrix: --write keeps the result of all gates: leave --gates out\n"
    found = run("mutate", "modelopt-fp8", "--gates", "plan", "--write")
    assert (found[0], found[2]) == (2, said)


def test_plan_refused_in_words(run: Run, replace: Replace) -> None:
    from quantmatrix.runtime.plan.types import Refusal

    calls = replace("api.plan", Refusal("fp8-arch", "no such units"))
    assert run("plan", *MODEL, "--tiny") == (3, "refused [fp8-arch]: no such units\n", "")
    assert calls[0][0].model_path == "some/model"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-age-days", "-1"), "--max-age-days -1: expected 0 or more"),
        (("--fail-under", "-0.5"), "--fail-under -0.5: expected a percentage, 0 to 100"),
        (("--fail-under", "100.5"), "--fail-under 100.5: expected a percentage, 0 to 100"),
        (("--today", "24.11.2026"), "--today 24.11.2026: expected a date, 2026-11-24"),
    ],
)
def test_questions_of_agreement(words: tuple[str, ...], said: str, run: Run) -> None:
    assert run("agreement", *words) == (2, "", f"quantmatrix: {said}\n")


def test_edges_of_agreement() -> None:
    from quantmatrix.cli.agreement import check_numbers

    check_numbers(0, 0.0)
    check_numbers(90, 100.0)
    check_numbers(1, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--parts", "0"), "--parts and --minutes: expected more than 0"),
        (("--minutes", "0"), "--parts and --minutes: expected more than 0"),
        (("--minutes", "-1"), "--parts and --minutes: expected more than 0"),
        (
            ("--hardware", "cpu", "abacus", "zoo"),
            "--hardware abacus: not in the tables; known: cpu, h100, b200, all",
        ),
    ],
)
def test_jobs_that_there_are_not(words: tuple[str, ...], said: str, run: Run, folder: Path) -> None:
    code, _, found = run("matrix", "jobs", *words, "--tables", str(folder))
    assert (code, found.splitlines()[0]) == (2, f"quantmatrix: {said}")


def test_jobs_by_minutes_or_parts(run: Run, replace: Replace, folder: Path) -> None:
    calls = replace("harness.shards.list_jobs", {"include": []})
    reports = ("--reports", str(folder.parent / "reports"), "--tables", str(folder))
    code, out, _ = run("matrix", "jobs", *reports)
    assert (code, out) == (
        *(13, "nothing collected: no claimed cell of this hardware can be run\n"),
    )
    assert calls[0][2:5] == ([], None, 1800.0)
    job = {"job": "GPU", "hardware": "h100", "shard": "1/1", "rows": ["a"], "seconds": 61.6}
    calls = replace("harness.shards.list_jobs", {"include": [job]})
    words = ("--hardware", "h100", "cpu", "--parts", "1", "--minutes", "0.5", "--json")
    code, out, _ = run("matrix", "jobs", *words, *reports)
    assert (code, json.loads(out), out.count("\n")) == (0, {"include": [job]}, 1)
    assert calls[0][2:5] == (["h100", "cpu"], 1, 30.0)
    assert re.findall(r'"(\w+)":', out) == [
        "include",
        "hardware",
        "job",
        "rows",
        "seconds",
        "shard",
    ]
