"""Programs: columns of other runtimes as the page has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quantmatrix.proof import columns
from quantmatrix.proof.columns import RuntimeRecord
from quantmatrix.proof.states import stand_all
from quantmatrix.report import programs
from quantmatrix.report.runtimes import Runtimes
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell

TABLES = read.read()
WORKS, WRONG = "fp8-qwen-image-comfyui", "modelopt-nvfp4-flux-2-file"


def observe(checkpoint: str, hardware: str, verdict: str, **fields: Any) -> RuntimeRecord:
    cell = RuntimeCell(checkpoint, hardware, "diffusers")
    known = {
        "reason": "",
        "command": "load()",
        "again": "quantmatrix run-column",
        "version": "0.42.1",
        "scope": "stand-in",
    }
    return RuntimeRecord(columns.describe_cell(cell, TABLES), verdict, **{**known, **fields})


RECORDS = [
    observe(WORKS, "cpu", "works", metrics={"worst": {"psnr_db": 48.46, "cosine": 0.99}}),
    observe(WORKS, "h200", "crashes", reason="out of memory", log="the end"),
    observe(WRONG, "cpu", "wrong numbers"),
]


def collect(*found: RuntimeRecord) -> dict[str, Any]:
    by_id = {one.id: one for one in found}
    return programs.collect(Runtimes(TABLES, by_id, stand_all(TABLES, {})))


def find_lines(data: dict[str, Any], checkpoint: str, program: str) -> list[list[Any]]:
    number = [name for name, _, _ in data["programs"]].index(program)
    place = list(TABLES.checkpoints).index(checkpoint)
    return [line[2:] for line in data["others"] if line[:2] == [place, number]]


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return collect(*RECORDS)


def test_a_program_has_a_column_if_it_was_run_or_is_documented(data: dict[str, Any]) -> None:
    documented = {one.runtime for one in TABLES.statements.values()}
    names = [name for name, _, _ in data["programs"]]
    assert names == [name for name in TABLES.runtimes if name in {*documented, "diffusers"}]
    assert "xdit" in TABLES.runtimes
    assert "xdit" not in names
    [places] = [places for name, _, places in data["programs"] if name == "comfyui"]
    hardware = list(TABLES.hardware)
    assert hardware.index("cpu") in places
    assert hardware.index("ascend-910b") not in places


def test_a_checkpoint_has_a_cell_for_each_run(data: dict[str, Any]) -> None:
    hardware = list(TABLES.hardware)
    names = [name for name, _ in data["verdicts"]]
    cpu, h200 = find_lines(data, WORKS, "diffusers")
    place, verdict, scope, said, number, run, statements = cpu
    assert (hardware[place], names[verdict], scope) == ("cpu", "works", 1)
    assert (said, number, statements) == ("undocumented", "48.5 dB", [])
    assert data["runs"][run]["worst"] == [["cosine", 0.99], ["psnr_db", 48.46]]
    assert (hardware[h200[0]], names[h200[1]], h200[4]) == ("h200", "crashes", "")
    assert data["runs"][h200[5]]["reason"] == "out of memory"
    assert data["runs"][h200[5]]["file"] == f"runtimes/diffusers/h200/{WORKS}.json"


def test_what_is_documented_stands_beside_a_run_and_alone(data: dict[str, Any]) -> None:
    names = [name for name, _ in data["verdicts"]]
    run, documented = find_lines(data, WRONG, "diffusers")
    assert (names[run[1]], run[3]) == ("wrong numbers", "documented to work")
    assert documented[:6] == [-1, names.index("documented"), -1, "documented: works", "", -1]
    assert documented[6] == run[6]
    says, quote, source, _, date = data["statements"][run[6][0]]
    said = TABLES.statements["diffusers-bfl"]
    assert (says, quote, source, date) == ("works", said.quote, said.source, said.date)
    [alone] = find_lines(data, "modelopt-fp8-flux-1", "sglang")
    assert alone[3] == "documented: works"


def test_records_of_another_form_lose_their_numbers_alone() -> None:
    odd = replace(RECORDS[0], scope="partly", metrics={"worst": {"psnr_db": "?"}})
    [line] = find_lines(collect(odd), WORKS, "diffusers")
    assert (line[2], line[4]) == (-1, "")


def test_tables_without_other_programs_have_no_columns() -> None:
    alone = replace(TABLES, runtimes={}, statements={})
    data = programs.collect(Runtimes(alone, {}, stand_all(alone, {})))
    assert (data["programs"], data["others"], data["runs"]) == ([], [], [])
