"""The dry run of a hardware's job: the guide's six checkpoints, commands, kernels, memory."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from quantmatrix.api import plan
from quantmatrix.cli import main
from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import NOTHING_COLLECTED
from quantmatrix.harness import dry_run
from quantmatrix.measure.workbench import Workbench
from quantmatrix.request import Request
from quantmatrix.runtime import empty_model
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tables import read

TABLES = read.read()
GUIDE = {  # the table of the guide, with what makes its weights on a B200
    "BBuf/flux1-dev-modelopt-fp8-sglang-transformer": "linear.fp8: torch",
    "BBuf/flux2-dev-modelopt-fp8-sglang-transformer": "linear.fp8: torch",
    "BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer": "linear.fp8: torch",
    "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer": "linear.nvfp4: flashinfer-trtllm",
    "black-forest-labs/FLUX.2-dev-NVFP4": "linear.nvfp4: flashinfer-trtllm",
    "BBuf/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer": "linear.nvfp4: flashinfer-cudnn",
}


def test_b200_job_is_the_six_checkpoints_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", "dry-run", "--hardware", "b200", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["job"]) == (True, "multimodal-gen-test-1-b200")
    cells = {cell["checkpoint"]: cell for cell in said["cells"]}
    assert list(cells) == list(GUIDE)
    for checkpoint, kernel in GUIDE.items():
        assert list(cells[checkpoint]["kernels"]["transformer"]) == [kernel]
        assert checkpoint in cells[checkpoint]["command"]
        words = shlex.split(cells[checkpoint]["command"])
        assert Request.from_words(words[words.index("generate") + 1 :]).prompt != ("",)
    for name in (checkpoint for checkpoint in GUIDE if "wan22" in checkpoint):
        assert cells[name]["kernels"]["transformer_2"] == {}
    assert "GEMM_BACKEND=cudnn quantmatrix" in cells[list(GUIDE)[-1]]["command"]


def test_four_cards_share_the_guides_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", "dry-run", "--hardware", "rtx-5090-x4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("gpu-rtx-5090-x4: 1 checkpoint of the guide on 4x NVIDIA GeForce")
    assert "--nproc-per-node 4" in text
    assert "16.4 GiB of weights at true size on each of 4 devices" in text


def test_true_sizes_lie_between_all_and_nothing_quantized() -> None:
    for checkpoint in (row for row in TABLES.checkpoints.values() if row.algo):
        plain = dry_run.estimate_bytes(TABLES, replace(checkpoint, components=()))
        size = dry_run.estimate_bytes(TABLES, checkpoint)
        assert 0.25 * plain < size < plain
        parameters = {"flux-1": 11.9e9, "flux-2": 32.2e9, "wan-2-2": 2 * 14.3e9}
        assert plain == pytest.approx(2 * parameters[checkpoint.model], rel=0.01)


@pytest.mark.parametrize("row", ["modelopt-fp8-flux-1-native", "guide-modelopt-nvfp4-wan-2-2"])
def test_same_arithmetic_gives_what_a_plan_measures_in_files(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = empty_model.build_plain
    monkeypatch.setattr(empty_model, "build_plain", lambda model, size: build(model, "tiny"))
    dry_run.list_parameters.cache_clear()
    cell = next(cell for cell in TABLES.cells if cell.id == f"{row}@b200")
    its_plan = plan(Workbench(TABLES, tiny=True).planned_request(cell))
    assert isinstance(its_plan, Plan)
    planned = sum(part.bytes for part in its_plan.components.values())
    estimated = dry_run.estimate_bytes(TABLES, TABLES.checkpoints[cell.checkpoint])
    dry_run.list_parameters.cache_clear()
    assert estimated == pytest.approx(planned, rel=0.01)


def test_refused_plan_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = next(cell for cell in TABLES.cells if cell.claim == "refused" and "b200" in cell.id)
    monkeypatch.setattr(dry_run, "choose_cells", lambda tables, hardware: [cell])
    assert main.main(["matrix", "dry-run", "--hardware", "b200"]) == 1
    assert f"refused [{cell.rule}]" in capsys.readouterr().out


def test_nothing_to_run_is_not_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "choose_cells", lambda tables, hardware: [])
    assert main.main(["matrix", "dry-run", "--hardware", "b200"]) == NOTHING_COLLECTED
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"b300.*known: cpu, a100"):
        dry_run.choose_cells(TABLES, "b300")


def test_a_claim_of_any_kind_but_a_refusal_is_planned() -> None:
    [cell, *_] = [
        cell
        for cell in TABLES.select(hardware=["b200"])
        if TABLES.checkpoints[cell.checkpoint].algo
    ]
    for claim, found in (("expected", 1), ("validated", 1), ("refused", 0), ("planned", 0)):
        some = replace(TABLES, cells=(replace(cell, claim=claim),))
        assert len(dry_run.choose_cells(some, "b200")) == found, claim
