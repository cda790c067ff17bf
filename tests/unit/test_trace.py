"""A trace names every quantized layer with the kernel that ran."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from quantmatrix import planning
from quantmatrix.cli import main
from quantmatrix.planning import Plan
from quantmatrix.request import Request
from quantmatrix.trace import judge

FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
WORDS = ("--tiny", "--model-path", "black-forest-labs/FLUX.1-dev", "--transformer-path", FP8,
         "--num-inference-steps", "2", "--device", "cpu", "--backend", "reference")  # fmt: skip


def test_every_planned_layer_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json.gz"
    capsys.readouterr()
    assert main(["trace", *WORDS, "--output-path", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    made = planning.plan(Request.from_words(WORDS))
    assert isinstance(made, Plan)
    layers = found["layers"]
    assert set(layers) == {f"transformer.{name}" for name in made.components["transformer"].layers}
    assert {layer["backend"] for layer in layers.values()} == {"reference"}
    assert {layer["calls"] for layer in layers.values()} == {2}
    assert all(any("mm" in op for op in layer["operations"]) for layer in layers.values())
    with gzip.open(path) as stream:
        names = {event.get("name", "") for event in json.load(stream)["traceEvents"]}
    assert sum(name.startswith("quantized|") for name in names) == len(layers)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json.gz"]
    name = min(layers)
    layers[name]["backend"] = "decode"
    assert judge(made, layers) == [f"{name} ran by decode, not reference"]
    del layers[name]
    assert judge(made, layers) == [f"{name} is planned and did not run"]


def test_the_file_is_a_gzipped_trace(tmp_path: Path) -> None:
    assert main(["trace", *WORDS, "--output-path", str(tmp_path / "trace.json")]) == 2
