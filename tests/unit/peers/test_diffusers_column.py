"""The column of diffusers: complete on cpu, of the rows as they stand, and run again once per form.

What a form gives is decided by diffusers, not by the model: one checkpoint of each family and form is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantmatrix.measure import latents
from quantmatrix.peers import quantmatrix as ours
from quantmatrix.peers.column import Column, Ran
from quantmatrix.peers.verdict import judge_numbers
from quantmatrix.proof import columns
from quantmatrix.proof.limits import MARGIN, Limits
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell

REPORTS = Path(__file__).parents[3] / "reports"
TABLES = read.read()
RECORDS = columns.read_folder(REPORTS / columns.RUNTIMES)
CELLS = [
    cell for cell in TABLES.runtime_cells if (cell.runtime, cell.hardware) == ("diffusers", "cpu")
]
LIMITS = Limits(psnr_db=30.0, cosine=0.99, relative_l2=0.1, layer_error=0.1)


def choose() -> list[str]:
    """The first checkpoint of each family, form and selector, those that ran before those that did not."""
    found: dict[tuple[str, str, str], str] = {}
    for cell in sorted(CELLS, key=lambda c: not getattr(RECORDS.get(c.id), "weights", None)):
        row = TABLES.checkpoints[cell.checkpoint]
        found.setdefault((row.family, row.form, row.selector), row.id)
    return sorted(found.values(), key=lambda name: TABLES.checkpoints[name].model)


@pytest.fixture(scope="module")
def column(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Column]:
    folder = tmp_path_factory.mktemp("column") / "runs"
    with Column(TABLES, "diffusers", "cpu", folder, tiny=True) as column:
        yield column


def test_the_column_is_complete_and_fresh() -> None:
    states = {cell.id: columns.explain_state(cell, RECORDS.get(cell.id), TABLES) for cell in CELLS}
    lacking = {name: why for name, (state, why) in states.items() if state not in columns.VERDICTS}
    assert lacking == {}, (
        "run `quantmatrix run-column --runtime diffusers --hardware cpu --tiny --record-dir reports/runtimes`"
    )
    assert len(CELLS) == len(TABLES.checkpoints)


@pytest.mark.parametrize("checkpoint", choose())
def test_a_form_gets_its_recorded_verdict(checkpoint: str, column: Column) -> None:
    outcome = column.run_one(TABLES.checkpoints[checkpoint])
    recorded = RECORDS[RuntimeCell(checkpoint, "cpu", "diffusers").id]
    assert outcome.record is not None, outcome.problem
    found = outcome.record
    if "not installed" in (found.verdict, recorded.verdict) and found.verdict != recorded.verdict:
        pytest.skip(f"recorded: {recorded.verdict} {recorded.reason}; here: {found.reason}")
    assert (found.verdict, found.reason.split(":")[0]) == (
        recorded.verdict,
        recorded.reason.split(":")[0],
    ) or found.verdict == recorded.verdict == "wrong numbers"


def test_our_decode_is_near_the_runtimes_own_bf16(column: Column, tmp_path: Path) -> None:
    """What a run is compared with where the base model is too large, on one where it is not."""
    row = TABLES.checkpoints["fp8-flux-1-tensor-dynamic"]
    task = replace(column.make_task(row), way=ours.BACKEND)
    base = column.find_baseline(task)
    answer = ours.run(task, tmp_path)
    found = Ran(task, answer, tmp_path)
    numbers = [one.read_numbers(latents=True) for one in (base, found)]
    judged = judge_numbers(*numbers, {}, column.limits.find(row))
    assert (judged.verdict, answer.media) == ("works", "media.png"), judged.reason
    said = ours.command(task)
    assert said.endswith(f"--transformer-path {task.weights} --backend decode --tiny")


@pytest.mark.parametrize("checkpoint", ["gguf-flux-1-q8-0", "gguf-z-image-q4-k"])
def test_diffusers_gguf_loader_gives_our_latents(
    checkpoint: str, column: Column, tmp_path: Path
) -> None:
    """One file, its blocks decoded by diffusers for every call and by us while loading.

    The two are no further apart than runs in BF16 are (`spread`, with the margin of other instruction
    sets), and nearer to each other than to the base model.
    """
    task = column.make_task(TABLES.checkpoints[checkpoint])
    theirs = column.ask(replace(task, way="GGUFQuantizationConfig"))
    assert theirs.answer.weights["uint8"] > 0, theirs.answer
    found = Ran(task, ours.run(task, tmp_path), tmp_path)
    base, mine, other = (
        one.read_numbers(latents=True) for one in (column.find_baseline(task), found, theirs)
    )
    near, far = (
        latents.find_worst(latents.compare_trajectories(base_of, other)) for base_of in (mine, base)
    )
    spread = column.limits.ledger.spreads[task.checkpoint.model]
    assert near.relative_l2 < MARGIN * spread.relative_l2
    assert near.relative_l2 < far.relative_l2 / 2


@pytest.mark.parametrize(
    ("scale", "weights", "verdict"),
    [
        (1e-3, {"float8_e4m3fn": 8, "bfloat16": 8}, "works"),
        (1e-3, {}, "works"),
        (1e-3, {"bfloat16": 8, "float32": 8}, "not quantized"),
        (0.0, {"uint8": 8}, "not quantized"),
        (1.0, {"uint8": 8}, "wrong numbers"),
        (float("nan"), {"uint8": 8}, "wrong numbers"),
    ],
)
def test_numbers_and_weights_decide(scale: float, weights: dict[str, int], verdict: str) -> None:
    draw = torch.Generator().manual_seed(0)
    base = [torch.randn(4, 4, generator=draw) for _ in range(2)]
    found = [step + scale * torch.randn(4, 4, generator=draw) for step in base]
    assert judge_numbers(base, found, weights, LIMITS).verdict == verdict


def test_a_run_may_equal_our_decode_of_the_file() -> None:
    step = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    narrow, wide = {"uint8": 8}, {"bfloat16": 8}
    assert judge_numbers([step], [step], narrow, LIMITS, decoded=True).verdict == "works"
    assert judge_numbers([step], [step], wide, LIMITS, decoded=True).verdict == "not quantized"
    assert judge_numbers([step], [-step], narrow, LIMITS, decoded=True).verdict == "wrong numbers"


def test_runs_of_other_lengths_are_wrong() -> None:
    step = torch.zeros(2)
    found = judge_numbers([step], [step, step], {}, LIMITS)
    assert found.verdict == "wrong numbers"
    assert "1 steps, candidate 2" in found.reason
