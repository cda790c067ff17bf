"""`quantmatrix trace`: of a command or of rows of the matrix, as files and as a verdict."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix import api
from quantmatrix.cli.main import build_parser, main
from quantmatrix.cli.trace import choose_cells
from quantmatrix.harness import sessions
from quantmatrix.request import Request
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tables.read import read

FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
WORDS = ("--tiny", "--model-path", "black-forest-labs/FLUX.1-dev", "--transformer-path", FP8,
         "--num-inference-steps", "2", "--device", "cpu", "--backend", "reference")  # fmt: skip
CELL = "modelopt-fp8-flux-1@cpu+decode"


def test_every_planned_layer_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json.gz"
    capsys.readouterr()
    assert main(["trace", *WORDS, "--output-path", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = api.plan(Request.from_words(WORDS))
    assert isinstance(plan, Plan)
    layers = found["layers"]
    assert set(layers) == {f"transformer.{name}" for name in plan.components["transformer"].layers}
    assert {layer["backend"] for layer in layers.values()} == {"reference"}
    assert {layer["calls"] for layer in layers.values()} == {2}
    assert all("aten::linear" in layer["operations"] for layer in layers.values())
    assert {name: stage["calls"] for name, stage in found["stages"].items()} == {
        "encode": 1, "transformer": 2, "decode": 1,
    }  # fmt: skip
    assert 0 < found["quantize_and_scale_share"] < 1
    with gzip.open(path) as stream:
        names = [event.get("name", "") for event in json.load(stream)["traceEvents"]]
    assert sum(name.startswith("quantized|") for name in names) == 2 * len(layers)
    assert {name for name in names if name.startswith("stage|")} == {
        "stage|encode", "stage|transformer", "stage|decode",
    }  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_trace_of_nothing_quantized_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS[:3], "--num-inference-steps", "1", "--device", "cpu", "--json"]
    assert main(["trace", *words, "--output-path", str(tmp_path / "a.json.gz")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["layers"] == {}
    assert "warning: no layer is quantized" in said.err


def test_what_is_only_planned_is_not_traced() -> None:
    tables = read()
    cells = [replace(c, claim="planned") for c in choose_cells(tables, "h200")[:1]]
    others = [replace(c, id=f"other-{c.id}", claim="expected") for c in cells]
    chosen = choose_cells(replace(tables, cells=(*cells, *others)), "h200")
    assert [cell.id for cell in chosen] == [cell.id for cell in others]


def test_a_row_leaves_a_trace_and_a_census(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "modelopt-fp8-flux-1-native@h200"
    words = ["trace", "--row", CELL, "--row", other, "--tiny", "--output-path", str(tmp_path)]
    capsys.readouterr()
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["cells"][CELL]["problems"] == []
    [problem] = found["cells"][other]["problems"]
    assert "cannot be tested here" in problem
    assert {path.name for path in tmp_path.iterdir()} == {f"{CELL}.json", f"{CELL}.json.gz"}
    said = json.loads((tmp_path / f"{CELL}.json").read_text())
    assert said["backends"]["decode"]["matmuls"] == {"aten::linear": 4 * len(said["layers"])}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([*WORDS, "--output-path", "trace.json"], "ending in .json.gz"),
        ([*WORDS, "--compile"], "--compile: a trace names the layers"),
        ([*WORDS, "--row", CELL], "one of --model-path, --row and --hardware"),
        ([], "one of --model-path, --row and --hardware"),
        (["--row", "nothing@cpu"], "no such cell"),
        (["--hardware", "abacus"], "not in the tables"),
        (["--row", CELL, "--strange"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_told(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["trace", *words]) == 2
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_hardware_is_traced_once_for_each_kind() -> None:
    tables = read()
    cells = choose_cells(tables, "h200")
    kinds = [(cell.family, cell.model, cell.backend) for cell in cells]
    assert len(set(kinds)) == len(kinds)
    claimed = [c for c in tables.cells if c.hardware == "h200" and "latents" in c.checks]
    assert set(kinds) == {(cell.family, cell.model, cell.backend) for cell in claimed}


def test_the_command_of_a_hardware_session_is_ours(tmp_path: Path) -> None:
    row = read().hardware["h200"]
    words = sessions.trace_command(row, tmp_path, [])
    arguments, rest = build_parser().parse_known_args(words[1:])
    assert rest == []
    assert (arguments.hardware, arguments.tiny) == ("h200", True)
