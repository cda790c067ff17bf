"""index.html as a file: self-contained, the same bytes every time, complete, quick to write."""

from __future__ import annotations

import gc
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from observed import (
    PROVEN,
    REFUSED,
    WITNESSED,
    fake_pictures,
    find,
    make_large,
    observe,
    observe_run,
)
from tables import CASES, write_tables

from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.proof.thumbnails import PICTURES
from quantmatrix.report import page_data
from quantmatrix.report import render as report
from quantmatrix.report.answers import Option
from quantmatrix.report.page import encode_data
from quantmatrix.report.page_data import flatten
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts by their id."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.found[-1] if self.found else ("", {})
        if tag == "script":
            name = attributes.get("id") or "code"
            self.scripts[name] = self.scripts.get(name, "") + data


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


def render(tables: Matrix, evidence: dict[str, Evidence]) -> bytes:
    return report.render(tables, evidence)["index.html"]


def read_data(page: bytes) -> Any:
    """Both blocks of a page as one."""
    scripts = Elements(page).scripts
    return {**json.loads(scripts["data"]), **json.loads(scripts["details"])}


def test_nothing_is_loaded_from_anywhere(tables: Matrix) -> None:
    page = render(tables, {PROVEN: observe_run(tables, find(tables, PROVEN))})
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe", "base", "object", "embed")
        assert "src" not in attributes
        assert not re.match(r"(https?:)?//", attributes.get("href") or "")
    assert b"default-src 'none'" in page
    assert b"@import" not in page
    assert b"url(" not in page


def test_equal_input_equal_bytes(tables: Matrix) -> None:
    evidence = {name: observe_run(tables, find(tables, name)) for name in (PROVEN, REFUSED)}
    first = render(tables, evidence)
    again = {name: store.decode(store.encode(r)) for name, r in evidence.items()}
    assert first == render(tables, dict(reversed(again.items())))
    assert first.endswith(b"</html>\n")


def test_every_cell_is_there_with_its_state_and_record(tables: Matrix) -> None:
    evidence = {name: observe(tables, name) for name in (PROVEN, REFUSED)}
    data = read_data(render(tables, evidence))
    assert len(data["cells"]) == len(tables.cells)
    for cell, said in zip(tables.cells, data["cells"], strict=True):
        row, place, backend, state, scope, claim, rule, reason, offer, record, others, number = said
        name, family, model, checkpoint = data["rows"][row]
        assert (name, data["hardware"][place][0], backend) == (
            cell.row,
            cell.hardware,
            cell.backend,
        )
        assert (data["families"][family], data["models"][model][0]) == (cell.family, cell.model)
        assert number == ("41.2 dB" if cell.id == PROVEN else "")
        assert data["checkpoints"][checkpoint][0] == cell.checkpoint
        assert (claim, rule, others) == (cell.claim, cell.rule, [])
        shown = ["With the published repository: not yet run", cell.shell(tables)]
        assert data["shared"][offer] == shown
        assert (data["scopes"][scope] if scope >= 0 else "") == (
            "stand-in" if cell.id in evidence else ""
        )
        assert data["states"][state] == report.state_of(cell, evidence.get(cell.id), tables)
        assert (record is not None) == (cell.id in evidence)
        assert reason or data["states"][state] == "proven"
    refused = data["records"][data["cells"][[c.id for c in tables.cells].index(REFUSED)][9]]
    assert refused["refusal"] == "no integer units; use cpu"


def test_a_record_keeps_what_a_reader_wants(tables: Matrix) -> None:
    record = observe_run(tables, find(tables, PROVEN))
    data = read_data(render(tables, {PROVEN: record}))
    [said] = data["records"]
    latents = next(check for check in said["checks"] if check["name"] == "latents")
    assert latents["steps"][1] == [49.0, 0.9999, 0.02]
    assert ["psnr_db.at_least", 40.5] in data["shared"][latents["limits"]]
    assert ["layers.transformer.worst", 0.0337] in latents["metrics"]
    assert not any(name.startswith("steps") for name, _ in latents["metrics"])
    assert ["instruction_sets", "avx2, avx512f"] in data["shared"][said["machine"]]
    assert ["torch", "2.13.0+cpu"] in data["shared"][said["versions"]]
    assert ["backends.decode", 40] in data["shared"][said["plan"]]["transformer"]
    assert said["timings"]["denoise"] == 0.25
    assert said["file"] == "evidence/cpu/fp8-flux-1+decode.json"


def observe_pictures(tables: Matrix, name: str, found: Any) -> Evidence:
    check = CheckResult("pass", {"thumbnails": found})
    return observe(tables, name, checks={"load": check})


def test_pictures_stand_in_the_page_once(tables: Matrix) -> None:
    names = [PROVEN, "fp8-flux-1@cpu+reference"]
    found = {name: fake_pictures(name) for name in names}
    page = render(tables, {name: observe_pictures(tables, name, found[name]) for name in names})
    data = read_data(page)
    checks = [record["checks"][0] for record in data["records"]]
    shown = [[data["shared"][place] for place in check["pictures"]] for check in checks]
    files = [f"evidence/{records.path_of(name)}" for name in names]
    assert {r["file"]: s for r, s in zip(data["records"], shown, strict=True)} == {
        file: [found[name][kind] for kind in PICTURES]
        for file, name in zip(files, names, strict=True)
    }
    assert page.decode().count(found[PROVEN]["baseline"]) == 1  # both rows have the same BF16 run
    assert all((check["gain"], check["shown"]) == (8, "the picture") for check in checks)
    assert not any("thumbnails" in name for check in checks for name, _ in check["metrics"])


def test_a_record_of_another_form_shows_no_pictures(tables: Matrix) -> None:
    for found in ({}, {"baseline": "x"}, {**fake_pictures("a"), "more": "x"}):
        data = read_data(render(tables, {PROVEN: observe_pictures(tables, PROVEN, found)}))
        assert "pictures" not in data["records"][0]["checks"][0]


def test_pictures_that_the_page_has_no_room_for(
    tables: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = fake_pictures(PROVEN)
    size = sum(len(pictures[kind]) for kind in PICTURES)
    for room, count in ((size, 3), (size - 1, 0)):
        monkeypatch.setattr(page_data, "PICTURE_BYTES", room)
        data = read_data(render(tables, {PROVEN: observe_pictures(tables, PROVEN, pictures)}))
        assert len(data["records"][0]["checks"][0]["pictures"]) == count


def test_words_cannot_leave_the_data(tables: Matrix, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)><!--DATA-->/*SCRIPT*/"
    cases = [{**CASES[0], "notes": evil}, *CASES[1:]]
    hostile = read.read(write_tables(tmp_path / "hostile", cases))
    page = render(hostile, {PROVEN: observe(hostile, PROVEN, commit=evil)})
    assert evil.encode() not in page
    assert not any(tag == "img" for tag, _ in Elements(page).found)
    assert read_data(page)["records"][0]["commit"] == evil
    assert encode_data(["<", 1.5]) == '["\\u003c",1.5]'


def test_flatten() -> None:
    nested = {"b": {"y": 1, "x": {"z": None}}, "a": [1, "2"], "steps": [3], "e": {}, "c": 0}
    assert list(flatten(nested, ("steps",))) == [("a", "1, 2"), ("b.y", 1), ("c", 0)]


# Ten thousand, their size and the seconds that they take are held by benchmarks/test_rendering.py.
def test_a_thousand_cells_are_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, evidence = make_large(tmp_path / "matrix", rows=167)
    folder = tmp_path / "evidence"
    for record in evidence.values():
        path = folder / records.path_of(record.cell["id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.to_json()))
    del evidence, record
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    done = report.write(tmp_path)
    assert gc.isenabled()
    pages = {"index.html": (tmp_path / "index.html").read_bytes()}
    assert f"{tmp_path / 'index.html'}: written" in done
    assert pages["index.html"].count(b'"file":"evidence/') == len(tables.cells) == 1002
    assert len(gzip.compress(pages["index.html"])) < 1_000_000  # as it travels


def test_the_committed_page_travels_as_a_megabyte_at_most() -> None:
    """With other programs, histories and pictures, which the made-up matrix has few of."""
    page = (Path(__file__).parents[3] / "reports" / "index.html").read_bytes()
    assert len(gzip.compress(page)) < 1_000_000


def test_what_an_open_cell_needs_is_a_block_of_its_own(tables: Matrix) -> None:
    page = render(tables, {PROVEN: observe_run(tables, find(tables, PROVEN))})
    scripts = Elements(page).scripts
    assert set(json.loads(scripts["details"])) == set(page_data.DETAILS)
    assert "data:image" not in scripts["data"]
    assert "data:image" in scripts["details"]


def test_the_page_ranks_what_recommend_ranks(tables: Matrix) -> None:
    evidence = {PROVEN: observe_run(tables, find(tables, PROVEN))}
    pages = report.render(tables, evidence)
    data = read_data(pages["index.html"])
    assert data["answers"] == json.loads(pages["answers.json"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"step": 0.832, "step_on": "h100", "psnr_db": 44.64, "error_on": "h100, true size"},
            "0.83 of BF16's time",
        ),
        (
            {"step": 0.832, "step_on": "h200", "psnr_db": 44.64, "error_on": "h100, true size"},
            "44.6 dB",
        ),
        ({"step": 0.832, "step_on": "h200", "psnr_db": 44.64, "error_on": "cpu, stand-in"}, ""),
        ({}, ""),
    ],
)
def test_the_number_of_a_cell_was_measured_there(fields: dict[str, Any], text: str) -> None:
    ran = Option("c", "m", "h100", "f", "r", "k", proof=0, **fields)
    assert page_data.show_number(ran) == text
    assert page_data.show_number(replace(ran, proof=1)) == ""


def test_what_was_timed_at_true_size(tmp_path: Path) -> None:
    metrics = {
        "weights": {"bf16_bytes": 400, "quantized_bytes": 200},
        "peak": {"bf16_bytes": 500, "quantized_bytes": 300},
    }
    row = {**CASES[0], "checks": "load true-size"}
    timed = read.read(write_tables(tmp_path / "timed", [row, *CASES[1:]]))
    [cell] = [cell for cell in timed.cells if cell.id == PROVEN]
    record = observe(timed, PROVEN)
    record = replace(
        record,
        checks={"true-size": CheckResult("pass", metrics)},
        timings={"step bf16": 2.0, "step quantized": 1.5},
    )
    data = read_data(
        report.render(timed, {f"{PROVEN}:true-size": sign(record, timed.hardware["cpu"])})[
            "index.html"
        ]
    )
    assert data["speed"] == [[timed.cells.index(cell), 2.0, 1.5, 400, 200, 500, 300]]


def test_the_cosines_of_a_witness_are_on_the_page() -> None:
    said = dict(page_data.describe_witness(WITNESSED["transformer"]))
    assert said["verdict"] == "agrees"
    assert said["base"] == "some/flux1"
    assert said["cosine of fp8: blocks.{i}.ff"] == 0.9996
