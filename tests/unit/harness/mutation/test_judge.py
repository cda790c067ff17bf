"""Injected faults are caught by the row's gates; a gate that is blunted misses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix.cli.main import main
from quantmatrix.errors import CheckpointError, QuantmatrixError, UsageError, WitnessError
from quantmatrix.harness.mutation import faults, judge, report
from quantmatrix.harness.mutation.judge import Mutator, Outcome
from quantmatrix.measure import rounding_bounds
from quantmatrix.runtime.witness import measure
from quantmatrix.tables import read

SAMPLES = Path(__file__).parents[4] / "reports" / "limits.csv"
ROW = "modelopt-nvfp4-svd-flux-1"


@pytest.fixture(scope="module")
def mutator() -> Mutator:
    return Mutator(read.read(), SAMPLES)


def inject(mutator: Mutator, row: str, *names: str) -> dict[str, Outcome]:
    cells = judge.choose_rows(mutator.tables, [row])
    found = mutator.run(cells, judge.choose_faults(names), lambda _: None)
    return {outcome.fault: outcome for outcome in found}


def test_faults_of_every_place_are_caught(mutator: Mutator) -> None:
    names = ("swapped-nibbles", "dropped-scales", "transposed-scales", "low-rank-skipped",
             "excluded-layer-quantized", "bf16-under-label", "fallback-list-ignored",
             "wrong-expert")  # fmt: skip
    found = inject(mutator, ROW, *names)
    assert all(outcome.caught for outcome in found.values()), found
    assert "wrong-expert" not in found  # FLUX.1 has one transformer
    assert set(names) - set(found) == {"wrong-expert", "fallback-list-ignored"}
    assert "plan" in found["dropped-scales"].gates
    assert "weights" in found["transposed-scales"].gates
    assert "weights" in found["low-rank-skipped"].gates
    assert "identical" not in found["swapped-nibbles"].gates.get("latents", "")
    assert "bit for bit" in found["bf16-under-label"].gates["latents"]
    for name in ("swapped-nibbles", "transposed-scales", "low-rank-skipped"):
        assert "decodes to other weights" in found[name].gates["witness"]
    assert (
        "witness" not in found["bf16-under-label"].gates
    )  # the files are right, the loader is not


def test_a_fault_that_no_gate_looks_at_is_missed(
    mutator: Mutator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "judge_weights", lambda *_: [])
    monkeypatch.setattr(judge, "judge_witness", lambda *_: {})
    found = inject(mutator, ROW, "transposed-scales")
    assert not found["transposed-scales"].caught
    summary = report.summarize(list(found.values()))
    assert not summary["ok"]
    assert "must never happen" in summary["problems"][0]


def test_an_unsound_row_proves_nothing(mutator: Mutator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "judge_weights", lambda *_: ["off"])
    with pytest.raises(QuantmatrixError, match="not sound"):
        inject(mutator, ROW, "swapped-nibbles")


@pytest.mark.parametrize(
    ("step", "error", "gates"),
    [
        ("plan", CheckpointError("torn"), {"plan": "torn"}),
        ("plan", WitnessError("far"), {"witness": "far"}),
        ("build_pipeline", CheckpointError("torn"), {"witness": "odd", "load": "torn"}),
    ],
)
def test_an_error_is_told_by_the_gate_that_it_ends(
    mutator: Mutator,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: Exception,
    gates: dict[str, str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    cell = judge.choose_rows(mutator.tables, [ROW])[0]
    request = mutator.bench.request(cell)
    mutator.bench.baseline(cell, request)
    monkeypatch.setattr(judge, "judge_witness", lambda _: {"witness": "odd"})
    monkeypatch.setattr(judge, step, fail)
    assert mutator.judge(cell, request, request, None) == gates


def make(fault: str, **gates: str) -> Outcome:
    return Outcome(fault, "row", "fp8", "flux-1", "layer", gates)


def test_shares_and_tables(tmp_path: Path) -> None:
    caught = [make("unit-scales", layers="far") for _ in range(19)]
    missed = make("corrupted-tensor")
    assert report.summarize([*caught, missed])["ok"]
    assert not report.summarize([*caught[:18], missed])["ok"]
    with pytest.raises(UsageError, match="nothing was tested"):
        report.summarize([])
    paths = list(report.write_reports([*caught, missed], tmp_path))
    assert [path.name for path in paths] == ["mutation.csv", "mutation.md"]
    assert "20 faults injected into 1 rows, 19 caught (95.0%)" in paths[1].read_text()
    assert paths[0].read_text().count("\n") == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mutation.csv", "mutation.md"]


def test_the_witness_is_held_to_what_it_must_catch() -> None:
    seen = make("swapped-nibbles", witness="other weights")
    unseen = make("swapped-nibbles", latents="far")
    planned = make("dropped-scales", plan="no weight_scale")
    for gates in (judge.GATES, judge.LIGHT_GATES):
        assert report.summarize([seen, planned], gates)["ok"]
        found = report.summarize([seen, unseen], gates)
        assert found["problems"] == [
            "swapped-nibbles in row (layer): the witness does not report it, and must"
        ]
    assert found["by_witness_alone"] == ["swapped-nibbles in row (layer)"]
    text = report.to_markdown([seen, unseen])
    assert text.count("- swapped-nibbles in `row` (layer)") == 1
    assert "Caught by the witness alone, of all gates:\n" in text


def test_what_only_the_witness_tells_a_user() -> None:
    """A gate that needs a BF16 run beside it is none that a user passes."""
    both = make("swapped-nibbles", witness="other weights", layers="far")
    late = make("unit-scales", witness="other weights", generate="white")
    text = report.to_markdown([both, both, late])
    assert "load, generate): swapped-nibbles (2).\n" in text
    assert "Caught by the witness alone, of all gates: none." in text


@pytest.mark.parametrize(
    "row",
    ["fp8-qwen-image-block-dynamic", "modelopt-nvfp4-z-image", "svdq-qwen-image-int4-r128",
     "svdq-z-image-int4-r256", "msmodelslim-w4a4-dynamic", "modelopt-fp8-wan-2-2"],
)  # fmt: skip
def test_the_witness_alone_catches_its_faults(row: str) -> None:
    """No other gate is asked: no model runs."""
    tables = read.read()
    light = Mutator(tables, SAMPLES, judge.LIGHT_GATES)
    found = inject(light, row, *faults.WITNESSED, "unit-scales", "corrupted-tensor")
    assert {"unit-scales", "corrupted-tensor", "dropped-scales"} <= set(found)
    assert ("wrong-expert" in found) == (found["unit-scales"].model == "wan-2-2")
    for name, outcome in found.items():
        assert set(outcome.gates) == {"plan" if name == "dropped-scales" else "witness"}, name


def test_the_table_of_this_project() -> None:
    """At least 95 % were caught, none of the first six was missed, every family and model is in.

    What headers do not show of the witness's faults, it told of in every one of them.
    """
    import csv

    with (SAMPLES.parent / "mutation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tables = read.read()
    cells = judge.choose_rows(tables, ())
    assert {row["row"] for row in rows} == {cell.row for cell in cells}
    assert {row["fault"] for row in rows} == {fault.name for fault in faults.FAULTS}
    caught = [row for row in rows if row["caught"] == "1"]
    assert len(caught) >= report.LEAST_CAUGHT * len(rows)
    assert not [r for r in rows if r["caught"] == "0" and r["fault"] in faults.MUST]
    assert set(judge.GATES) <= rows[0].keys()
    seen = [r for r in rows if r["fault"] in faults.WITNESSED and r["plan"] == "0"]
    assert {r["family"] for r in seen} == {cell.family for cell in cells}
    assert [(r["fault"], r["row"]) for r in seen if r["witness"] == "0"] == []


def test_both_experts_are_a_row_of_their_own_and_a_pipeline_without_a_base_is_none() -> None:
    found = {cell.row for cell in judge.choose_rows(read.read(), ["modelopt-fp8", "msmodelslim"])}
    assert {"modelopt-fp8-wan-2-2", "modelopt-fp8-wan-2-2-both", "msmodelslim-w8a8"} <= found
    assert not any("i2v" in row for row in found)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mutate", "fp8-z-image-channel-dynamic", "--json", "--faults"]
    capsys.readouterr()
    assert main([*words, "wrong-scale-layout"]) == 0
    found: Any = json.loads(capsys.readouterr().out)
    assert (found["injected"], found["caught"]) == (1, 1)
    assert main([*words, "gremlins"]) == 2
    assert main([*words[:2], "--gates", "latents"]) == 2
    assert main([*words[:2], "--gates", "witness", "--write"]) == 2
    assert main(["mutate", "no-such-row"]) == 2
    assert main([*words, "swapped-nibbles"]) == 2  # FP8 has no nibbles: nothing was tested


@pytest.mark.parametrize(
    ("scale", "steps", "weight"),
    [("group", 7, "int4"), ("channel", 127, "int8"), ("tensor", 127, "int8")],
)
def test_bounds_are_those_of_rounding_to_the_nearest(scale: str, steps: int, weight: str) -> None:
    from quantmatrix.scheme import Scheme

    scheme = Scheme("linear.svdq", "", weight, scale, "none", group_size=64)
    base = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    groups = measure.split_groups(base, scheme)
    step = groups.abs().amax(dim=1, keepdim=True) / steps
    decoded = ((groups / step).round() * step).reshape(base.shape)
    bound = rounding_bounds.find_bound(scheme)
    assert bound is not None
    error = rounding_bounds.measure_error(base, decoded, scheme)
    assert 0.9 * bound < error <= bound * 1.0001
    assert rounding_bounds.measure_error(base, decoded * 1.2, scheme) > bound * 1.25
    broken = decoded.clone()
    broken[3, 4] = float("nan")
    assert rounding_bounds.measure_error(base, broken, scheme) == float("inf")


@pytest.mark.parametrize(
    ("weight", "codes", "bound"),
    [("e4m3", torch.float8_e4m3fn, 1 / 16), ("e5m2", torch.float8_e5m2, 1 / 8)],
)
def test_a_plain_cast_is_rounded_by_half_a_gap_of_the_lower_end(
    weight: str, codes: torch.dtype, bound: float
) -> None:
    from quantmatrix.scheme import Scheme

    scheme = Scheme("linear.fp8", "fp8-cast", weight, "tensor", "none")
    base = torch.linspace(1.0, 1.13, 64).reshape(8, 8)
    assert rounding_bounds.find_bound(scheme) == bound
    error = rounding_bounds.measure_error(base, base.to(codes).float(), scheme)
    assert 0.8 * bound < error <= bound


@pytest.mark.parametrize(
    ("scale", "activation"),
    [
        *(("block", "none"), ("channel", "none"), ("tensor", "tensor-static")),
        *(("tensor", "tensor-dynamic"), ("tensor", "channel-dynamic")),
    ],
)
def test_any_other_scale_leads_to_the_largest_code(scale: str, activation: str) -> None:
    from quantmatrix.scheme import Scheme

    scheme = Scheme("linear.fp8", "", "e4m3", scale, activation, block=(128, 128))
    assert rounding_bounds.find_bound(scheme) == pytest.approx(1 / 28)


def test_blocks_share_a_scale() -> None:
    from quantmatrix.scheme import Scheme

    scheme = Scheme("linear.fp8", "", "e4m3", "block", "none", block=(2, 3))
    weight = torch.arange(20.0).view(4, 5)
    groups = measure.split_groups(weight, scheme)
    assert groups.tolist()[0] == [0, 1, 2, 5, 6, 7]
    assert groups.tolist()[1] == [3, 4, 0, 8, 9, 0]
    assert groups.shape == (4, 6)


def test_a_missing_scale_is_named() -> None:
    from quantmatrix.errors import CheckpointError
    from quantmatrix.families import msmodelslim

    stored = {"weight": torch.zeros(2, 2, dtype=torch.int8), "input_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match="W8A8 layer has no deq_scale"):
        msmodelslim.canonical(stored, msmodelslim.SCHEMES["W8A8"])
