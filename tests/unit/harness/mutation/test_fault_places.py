"""Every class of fault can be injected somewhere, and is not where it cannot happen.

`reports/mutation.csv` says where each was; a class that is injected nowhere would prove nothing, and
look like one that is always caught. Nothing is generated here: what is judged is the injection.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix.harness.mutation import faults
from quantmatrix.harness.mutation.judge import Mutator, NotApplicable, choose_rows
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.tables import read

REPORTS = Path(__file__).resolve().parents[4] / "reports"
with (REPORTS / "mutation.csv").open() as stream:
    RECORDED = [(row["fault"], row["row"]) for row in csv.DictReader(stream)]
ROWS = {row: [fault for fault, place in RECORDED if place == row] for _, row in RECORDED}
BY_NAME = {fault.name: fault for fault in faults.FAULTS}


def choose_places() -> list[tuple[str, str, bool]]:
    """For every fault one row that it happens to, and one that it does not, where there is one."""
    found = []
    for name in BY_NAME:
        found += [(name, row, True) for row in ROWS if name in ROWS[row]][:1]
        found += [(name, row, False) for row in ROWS if name not in ROWS[row]][:1]
    return found


@pytest.fixture(scope="module")
def mutator() -> Mutator:
    return Mutator(read.read(), REPORTS / "limits.csv")


@pytest.mark.parametrize(("name", "row", "happens"), choose_places())
def test_where_a_fault_happens(
    name: str, row: str, happens: bool, mutator: Mutator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = BY_NAME[name]
    [cell] = choose_rows(mutator.tables, [row])
    request = mutator.bench.request(cell)

    def judge(_: Any, sound: Any, faulty: Any, model: Any) -> dict[str, str]:
        if model is not None:
            plan = mutator.bench.plan(request)
            base = mutator.bench.plan(mutator.bench.base_request(cell, request))
            if not model.model(build_pipeline(plan), plan, base):
                raise NotApplicable
        else:
            assert faulty.hub != sound.hub
        return {"plan": "judged"}

    monkeypatch.setattr(mutator, "judge", judge)
    outcome = mutator.inject(cell, request, fault)
    assert (outcome is not None) is happens
    if outcome is not None:
        assert outcome.caught
        kind = "model" if fault.model else "files" if fault.files else ""
        assert outcome.part == kind or (not kind and outcome.part.startswith("transformer"))


def test_each_fault_was_injected_and_has_one_place() -> None:
    for fault in faults.FAULTS:
        assert any(fault.name in names for names in ROWS.values()), fault.name
        assert sum(x is not None for x in (fault.tensors, fault.files, fault.model)) == 1
    assert set(faults.MUST) <= set(BY_NAME)


def make_layer() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(12, dtype=torch.uint8).reshape(2, 6),
        "weight_scale": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(8.0),
        "svdquant_lora_b": torch.ones(2, 2),
    }


@pytest.mark.parametrize(
    ("name", "suffix", "values"),
    [
        ("swapped-nibbles", "weight", [0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176]),
        ("transposed-scales", "weight_scale", [1, 4, 2, 5, 3, 6]),
        ("wrong-scale-layout", "weight_scale", [1, 4, 2, 5, 3, 6]),
        ("unit-scales", "weight_scale", [1, 1, 1, 1, 1, 1]),
        ("stale-activation-scale", "input_scale", [1]),
        ("low-rank-skipped", "svdquant_lora_b", [0, 0, 0, 0]),
        ("corrupted-tensor", "weight", [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_a_fault_does_to_a_layer(name: str, suffix: str, values: list[int]) -> None:
    own = make_layer()
    fault = BY_NAME[name].tensors
    assert fault is not None
    changed = fault(dict(own))
    assert changed is not None
    assert changed[suffix].flatten().tolist() == values
    assert {n for n in own if not changed[n].equal(own[n])} == {suffix}
    assert fault({"bias": own["input_scale"]}) is None


def test_the_most_detailed_scale_is_dropped() -> None:
    dropped = faults.drop_scales(make_layer())
    assert dropped is not None
    assert set(make_layer()) - set(dropped) == {"weight_scale"}


def test_codes_that_fill_a_byte_have_no_nibbles() -> None:
    codes = torch.ones(2, 2, dtype=torch.int8)
    assert faults.swap_nibbles({"weight": codes}) is None
    assert faults.swap_nibbles({"qweight": codes}) is not None
    assert faults.swap_nibbles({"weight": codes.to(torch.float8_e4m3fn)}) is None
