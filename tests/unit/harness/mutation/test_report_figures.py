"""What a run of faults is summed up to, whole: shares, the CSV table, the page."""

from __future__ import annotations

import re
from typing import Any

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.harness.mutation import judge, report
from quantmatrix.harness.mutation.judge import Outcome


def make(fault: str, row: str = "row", **gates: str) -> Outcome:
    return Outcome(fault, row, "fp8", "flux-1", "blocks.1", gates)


FOUND = [
    make("unit-scales", "b-row", layers="far", witness="other"),
    make("unit-scales", "a-row", witness="other"),
    make("unit-scales", "c-row", witness="other", latents="far"),
    make("corrupted-tensor", "a-row"),
    make("swapped-nibbles", "a-row", plan="torn"),
]


def test_the_page() -> None:
    assert report.to_markdown(FOUND) == "\n".join([
        "# Which gate catches which fault",
        "",
        "5 faults injected into 3 rows, 4 caught (80.0%). Made by `quantmatrix mutate --write`.",
        "",
        "| fault | injected | caught | plan | witness | load | weights | generate | latents | layers |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| swapped-nibbles: the two codes of every byte exchanged **(never missed)** | 1 | 1 | 1 |  |"
        "  |  |  |  |  |",
        "| unit-scales: weight scales taken as one | 3 | 3 |  | 3 |  |  |  | 1 | 1 |",
        "| corrupted-tensor: codes of one layer torn in the middle | 1 | 0 |  |  |  |  |  |  |  |",
        "",
        "Missed:",
        "",
        "- corrupted-tensor in `a-row` (blocks.1)",
        "",
        "Caught by the witness alone, of the gates that a user passes (plan, witness, load, generate): "
        "unit-scales (3).",
        "",
        "Caught by the witness alone, of all gates:",
        "",
        "- unit-scales in `a-row` (blocks.1)",
        "",
    ])  # fmt: skip


def test_the_page_without_a_miss() -> None:
    text = report.to_markdown([FOUND[4]])
    assert "Missed" not in text
    assert text.endswith(
        "|  |\n\nCaught by the witness alone, of the gates that a user passes "
        "(plan, witness, load, generate): none.\n\n"
        "Caught by the witness alone, of all gates: none.\n"
    )
    assert "1 faults injected into 1 rows, 1 caught (100.0%)." in text


def test_what_a_user_meets_most_comes_first() -> None:
    found = [make("corrupted-tensor", witness="w"), *(make("unit-scales", witness="w"),) * 2]
    line = next(iter(report.list_caught_by_witness(found)))
    assert line == (
        "Caught by the witness alone, of the gates that a user passes (plan, witness, load, "
        "generate): unit-scales (2), corrupted-tensor (1)."
    )


def test_the_table() -> None:
    assert report.to_csv(FOUND).splitlines() == [
        "fault,row,family,model,place,caught,plan,witness,load,weights,generate,latents,layers",
        "corrupted-tensor,a-row,fp8,flux-1,blocks.1,0,0,0,0,0,0,0,0",
        "swapped-nibbles,a-row,fp8,flux-1,blocks.1,1,1,0,0,0,0,0,0",
        "unit-scales,a-row,fp8,flux-1,blocks.1,1,0,1,0,0,0,0,0",
        "unit-scales,b-row,fp8,flux-1,blocks.1,1,0,1,0,0,0,0,1",
        "unit-scales,c-row,fp8,flux-1,blocks.1,1,0,1,0,0,0,1,0",
    ]
    assert report.to_csv(FOUND).endswith("1,0\n")


def test_the_summary() -> None:
    found = report.summarize(FOUND)
    outcomes: list[dict[str, Any]] = found.pop("outcomes")
    assert found == {
        "ok": False,
        "problems": ["80.0% of the faults were caught, at least 95% is required"],
        "injected": 5,
        "caught": 4,
        "share": 0.8,
        "missed": ["corrupted-tensor in a-row (blocks.1)"],
        "by_witness_alone": ["unit-scales in a-row (blocks.1)"],
    }
    assert outcomes[1] == {
        "fault": "unit-scales", "row": "a-row", "family": "fp8", "model": "flux-1",
        "part": "blocks.1", "gates": {"witness": "other"},
    }  # fmt: skip
    third = [*FOUND[:2], FOUND[3]]
    assert report.summarize(third)["share"] == 0.666667
    with pytest.raises(
        UsageError, match=r"^no fault can happen to the chosen rows: nothing was tested$"
    ):
        report.summarize([])


@pytest.mark.parametrize(("missed", "ok"), [(0, True), (1, True), (2, False)])
def test_nineteen_of_twenty_are_enough(missed: int, ok: bool) -> None:
    found = [make("unit-scales", layers="far")] * (20 - missed)
    found += [make("unit-scales")] * missed
    summary = report.summarize(found)
    assert summary["ok"] is ok
    assert summary["problems"] == (
        [] if ok else ["90.0% of the faults were caught, at least 95% is required"]
    )
    assert report.summarize(found, judge.LIGHT_GATES)["ok"]


def test_a_fault_that_must_never_be_missed() -> None:
    found = [make("unit-scales", witness="w")] * 40 + [make("excluded-layer-quantized")]
    assert report.summarize(found)["problems"] == [
        "excluded-layer-quantized in row (blocks.1) was missed, which must never happen"
    ]
    assert report.summarize(found, judge.LIGHT_GATES)["problems"] == []
    found[-1] = make("wrong-expert", latents="far")
    for gates in (judge.GATES, judge.LIGHT_GATES):
        assert report.summarize(found, gates)["problems"] == [
            "wrong-expert in row (blocks.1): the witness does not report it, and must"
        ]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("row-a", True), ("row-*", True), ("flux-?", True), ("fp8", True), ("row-a@cpu", False),
        ("row-a@cpu+ref*", True), ("ROW-a", False), ("row", False),
    ],
)  # fmt: skip
def test_globs_of_rows(pattern: str, found: bool) -> None:
    from types import SimpleNamespace

    cell: Any = SimpleNamespace(
        id="row-a@cpu+reference", row="row-a", family="fp8", model="flux-2", hardware="cpu"
    )
    assert judge.matches(cell, pattern) is found


def test_rows_that_are_none_are_told_with_those_that_are() -> None:
    from quantmatrix.tables import read

    tables = read.read()
    known = ", ".join(cell.row for cell in judge.choose_rows(tables, []))
    with pytest.raises(UsageError, match=f"^{re.escape(f'nix no*: no row; known: {known}')}$"):
        judge.choose_rows(tables, ["nix", "no*"])
