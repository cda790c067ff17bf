"""Runtimes: columns of other programs in Markdown, CSV, on the page and in `explain`."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix.cli.main import main
from quantmatrix.proof import columns
from quantmatrix.proof.columns import RuntimeRecord
from quantmatrix.proof.states import stand_all
from quantmatrix.report import render
from quantmatrix.report.explain import Explainer
from quantmatrix.report.overview import LONGEST
from quantmatrix.report.runtimes import Runtimes, write_csv, write_page
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell

TABLES = read.read()
EVIL = "</script><img src=x onerror=alert(1)> [x](javascript:1) | `a`"


def observe(
    checkpoint: str, verdict: str, reason: str = "", runtime: str = "diffusers"
) -> RuntimeRecord:
    cell = RuntimeCell(checkpoint, "cpu" if runtime == "diffusers" else "h200", runtime)
    return RuntimeRecord(
        cell=columns.describe_cell(cell, TABLES),
        verdict=verdict,
        reason=reason,
        command=f"load({checkpoint!r})",
        again="",
        version="0.42.1",
        scope="stand-in",
        log=EVIL,
        made="2026-11-29T10:00:00Z",
    )


RECORDS = {
    one.id: one
    for one in (
        observe("modelopt-nvfp4-flux-2-file", "wrong numbers", "cosine 0.62"),
        observe("fp8-qwen-image-comfyui", "works"),
        observe("fp8-guide", "refuses", EVIL),
        replace(observe("fp8-flux-1-online", "works"), scope="published"),
    )
}


@pytest.fixture(scope="module")
def runtimes() -> Runtimes:
    return Runtimes(TABLES, RECORDS, stand_all(TABLES, {}))


def find_line(text: str, *parts: str) -> str:
    [line] = [line for line in text.splitlines() if all(part in line for part in parts)]
    return line


def test_columns_show_verdicts_beside_what_is_documented(runtimes: Runtimes) -> None:
    page = write_page(runtimes)
    columns_part = page.split("## Columns")[1].split("## Where")[0]
    wrong = find_line(columns_part, "| `modelopt-nvfp4-flux-2-file` |")
    assert "[wrong numbers · stand-in (documented to work)](runtimes/diffusers/cpu/" in wrong
    assert "works · stand-in (undocumented)" in find_line(
        columns_part, "| `fp8-qwen-image-comfyui` |"
    )
    assert "works · published (documented)" in find_line(columns_part, "| `fp8-flux-1-online` |")
    assert "documented: works" in find_line(columns_part, "| `modelopt-fp8-flux-1` |")
    head = columns_part.strip().splitlines()[0]
    assert "quantmatrix cpu | diffusers cpu | sglang a100" in head  # one of each that nobody ran
    assert len(columns_part.strip().splitlines()) == 2 + len(TABLES.checkpoints)


def test_finds_are_what_run_and_documentation_tell_differently(runtimes: Runtimes) -> None:
    finds = (
        write_page(runtimes).split("## Where run and documentation differ")[1].split("## Runs")[0]
    )
    assert find_line(finds, "modelopt-nvfp4-flux-2-file@cpu~diffusers", "`diffusers-bfl`")
    assert find_line(finds, "fp8-qwen-image-comfyui@cpu~diffusers", "undocumented")
    assert "fp8-flux-1-online" not in finds
    assert "fp8-guide" not in finds


def test_texts_of_others_are_escaped(runtimes: Runtimes) -> None:
    line = find_line(write_page(runtimes).split("## Runs")[1], "fp8-guide@cpu~diffusers")
    assert "<img" not in line.replace("\\<img", "")
    assert "[x](javascript" not in line
    page = render.render(TABLES, {}, others=RECORDS)["index.html"].decode()
    assert "<img" not in page
    assert "\\u003cimg src=x" in page


def test_no_cell_of_a_table_is_wider_than_github_shows() -> None:
    long = observe("fp8-guide", "refuses", "*a* " * 200)
    long = replace(long, command="load('" + "word " * 100 + "')")
    found = {**RECORDS, long.id: long}
    page = write_page(Runtimes(TABLES, found, stand_all(TABLES, {})))
    for line in page.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            shown = [re.sub(r"\]\([^)]*\)", "]", cell.strip()) for cell in cells]
            assert max(map(len, shown)) <= LONGEST, line


def test_csv_has_every_cell(runtimes: Runtimes) -> None:
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(write_csv(runtimes)))}
    assert list(rows) == [cell.id for cell in TABLES.runtime_cells]
    wrong = rows["modelopt-nvfp4-flux-2-file@cpu~diffusers"]
    assert (wrong["state"], wrong["said"]) == ("wrong numbers", "documented to work")
    assert rows["fp8-guide@h200~sglang"]["state"] == "unproven"


def test_rendering_is_stable_and_needs_no_order() -> None:
    first = render.render(TABLES, {}, others=RECORDS)
    assert first == render.render(TABLES, {}, others=dict(reversed(RECORDS.items())))
    assert {"runtimes.md", "runtimes.csv"} <= set(first)


def test_explain_names_another_program_that_works() -> None:
    works = observe("modelopt-nvfp4-flux-1", "works", runtime="sglang")
    explainer = Explainer(TABLES, {}, None, {works.id: works})
    found = explainer.explain("modelopt-nvfp4-flux-1", "h200")
    others = [a for a in found[0].alternatives if a.how == "other runtime"]
    assert (others[0].cell, others[0].state) == (works.id, "works")
    assert others[0].commands == (works.command,)
    said = [a for a in others if a.cell == "modelopt-nvfp4-flux-1@h200~vllm-omni"]
    assert said[0].state.startswith("documented: https://docs.vllm.ai/")
    assert (
        said[0].commands[0].startswith("quantmatrix run-column --runtime vllm-omni --hardware h200")
    )
    refuses = observe("modelopt-nvfp4-flux-1", "refuses", runtime="sglang")
    told = Explainer(TABLES, {}, None, {refuses.id: refuses}).explain(
        "modelopt-nvfp4-flux-1", "h200"
    )
    assert refuses.id not in {a.cell for a in told[0].alternatives}


def test_the_command_explain_reads_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evidence").mkdir()
    record = observe("fp8-guide", "works")
    columns.write(record, tmp_path / columns.RUNTIMES)
    argv = ["explain", "--checkpoint", "fp8-guide", "--hardware", "cpu", "--reports", str(tmp_path)]
    assert main([*argv, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert record.id in [a["cell"] for a in cells[0]["alternatives"]]
    assert main(argv) == 0
    assert "other runtime: fp8-guide@cpu~diffusers (works · stand-in)" in capsys.readouterr().out


def test_records_of_no_cell_are_named(tmp_path: Path) -> None:
    record = observe("fp8-guide", "works")
    stray = replace(record, cell={**record.cell, "id": "gone@cpu~diffusers", "checkpoint": "gone"})
    columns.write(stray, tmp_path / columns.RUNTIMES)
    columns.write(record, tmp_path / columns.RUNTIMES)
    [line] = render.find_orphans(tmp_path)
    assert line.endswith("no cell gone@cpu~diffusers in the tables; delete it")
