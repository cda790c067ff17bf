"""The check `compile`: cells, records, what is kept between runs, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix import exit_codes
from quantmatrix.cli import main
from quantmatrix.errors import UsageError
from quantmatrix.kernels import compiling, int8_triton, launching
from quantmatrix.kernels.compiling import Program
from quantmatrix.kernels.launching import TRITON, Launch
from quantmatrix.measure import compiled
from quantmatrix.measure.compiled import Builder, Compiled
from quantmatrix.proof import scopes, store
from quantmatrix.proof.record import CheckResult, Evidence, EvidenceError, describe_cell
from quantmatrix.proof.states import stand
from quantmatrix.report import render
from quantmatrix.report.explain import Explainer
from quantmatrix.tables import read, rows

TABLES = read.read()
CELLS = {cell.id: cell for cell in TABLES.cells}
CELL = CELLS["modelopt-nvfp4-flux-1-packed-elsewhere@rtx-3090"]
RUN = ("load", "latents", "generate", "trace")

PROGRAM = Program("decode", "sm86", "size 1", digest="sha256:1").to_json()

needs_triton = pytest.mark.skipif(not launching.has_triton(), reason="needs triton")


def see_quantizer(columns: int = 512) -> Launch:
    with launching.watch("sm86") as seen:
        int8_triton.quantize_tokens(torch.empty(64, columns, device="meta"), 127)
    return seen[0]


def make_record(**changes: Any) -> Evidence:
    """A record of the check, as the suite leaves it."""
    one = Program("decode", "sm86", "size 1", 8, 3, 40, 0, 4096, 101376, "sha256:1")
    found = Compiled("sm86", "3.9.0", (one, replace(one, registers=48)))
    passed = CheckResult("pass", found.to_metrics(), found.to_limits())
    machine = {"vendor": "nvidia", "arch": "sm86", "name": "NVIDIA GeForce RTX 3090"}
    whole = {
        "cell": describe_cell(CELL, TABLES),
        "checks": {"compile": passed},
        "command": f"quantmatrix compile --hardware rtx-3090 --row {CELL.id}",
        "plan": {"ok": True, "machine": machine, "components": {}, "warnings": []},
        "made": "2026-11-28T23:00:00Z",
    }
    return Evidence(**{**whole, **changes})


def test_a_record_is_of_scope_compiled_and_lies_in_a_file_of_its_own(tmp_path: Path) -> None:
    record = make_record()
    assert scopes.read_scope(record) == scopes.COMPILED
    path = store.write(record, tmp_path)
    assert path.name == "modelopt-nvfp4-flux-1-packed-elsewhere.compiled.json"
    assert store.read(path) == record
    said = store.read_folder(tmp_path)
    standing = stand(CELL, said, TABLES)
    assert (standing.label, standing.reason) == ("proven · compiled", "")
    ran = make_record(checks={name: CheckResult("pass") for name in RUN})
    standing = stand(CELL, {**said, scopes.key_of(ran): ran}, TABLES)
    assert standing.label == "proven · stand-in"


def test_kernels_that_cannot_be_built_are_never_hidden() -> None:
    failed = make_record(checks={"compile": CheckResult("fail", {}, {}, "spills")})
    ran = make_record(checks={name: CheckResult("pass") for name in RUN})
    both = {scopes.key_of(record): record for record in (failed, ran)}
    standing = stand(CELL, both, TABLES)
    assert (standing.label, standing.reason) == ("failing · compiled", "compile: spills")


def test_a_record_that_contradicts_its_limits_is_none() -> None:
    record = make_record()
    metrics = {**record.checks["compile"].metrics, "shared": 120 * 1024}
    forged = replace(record.checks["compile"], metrics=metrics)
    with pytest.raises(EvidenceError, match="shared is 122880, at most 101376 is allowed"):
        store.encode(replace(record, checks={"compile": forged}))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"programs": []}, "no program was built"),
        ({"problems": ["ff at its true size: no"]}, "it reports problems: ff at its true size"),
        ({"programs": [{**PROGRAM, "faults": ["spills"]}]}, "decode has a fault: spills"),
        ({"programs": [{**PROGRAM, "arch": "sm90"}]}, "built for sm90, the plan is for sm86"),
        ({"programs": [{"kernel": "decode"}]}, r"programs\[0\].arch: missing"),
        ({"programs": [7]}, r"programs\[0\]: expected an object, found 7"),
        ({"arch": 86}, "compile.metrics.arch: expected a text, found 86"),
    ],
)
def test_a_pass_that_tells_of_a_fault_is_refused(metrics: dict[str, Any], message: str) -> None:
    said = make_record().checks["compile"]
    forged = replace(said, metrics={**said.metrics, **metrics})
    with pytest.raises(EvidenceError, match=message):
        store.encode(make_record(checks={"compile": forged}))


def test_the_page_shows_each_program_on_a_line() -> None:
    record = make_record()
    page = render.render(TABLES, {scopes.key_of(record): record})["index.html"].decode()
    assert "40 registers, 0 bytes spilled, 4096 of 101376 bytes of shared memory" in page
    assert "decode for sm86" in page
    assert "modelopt-nvfp4-flux-1-packed-elsewhere.compiled.json" in page


def test_explain_says_compiled_and_never_run_and_what_was_run_instead() -> None:
    record = make_record()
    explained = Explainer(TABLES, {scopes.key_of(record): record}).explain_cell(CELL)
    assert (explained.state, explained.scope) == ("proven", "compiled")
    assert explained.why.startswith("compiled for sm86, never run: Triton 3.9.0 built the kernels")
    assert "they fit (decode x 2); their numbers are proven on a CPU only" in explained.why
    assert explained.alternatives


@needs_triton
def test_no_cell_of_ours_in_triton_lacks_the_check() -> None:
    """The suite fails where a cell has the check and nothing to build."""
    from quantmatrix.measure.true_launches import list_launches
    from quantmatrix.measure.workbench import Workbench

    bench = Workbench(TABLES, tiny=True)
    lacking = []
    for cell in TABLES.cells:
        claimed = cell.claim not in ("refused", "planned")
        on_gpu = TABLES.hardware[cell.hardware].vendor in TRITON
        assert (claimed and on_gpu) or "compile" not in cell.checks
        plain = cell.backend in rows.PLAIN_BACKENDS
        if claimed and on_gpu and not plain and "compile" not in cell.checks:
            launches, problems = list_launches(bench.plan(bench.planned_request(cell)))
            lacking += [cell.id] if launches or problems else []
    assert lacking == []


@needs_triton
def test_what_did_not_change_is_not_built_again(tmp_path: Path) -> None:
    first = Builder(tmp_path)
    one, other = see_quantizer(), see_quantizer(1024)
    programs = first.build_all([one, other, one], "sm86")
    assert (first.built, len(programs)) == (2, 2)
    assert first.build_all([one], "sm86") == programs[:1]
    again = Builder(tmp_path)
    assert again.build_all([one, other], "sm86") == programs
    assert again.built == 0
    again.build(one, "sm89")
    assert again.built == 1
    for path in tmp_path.iterdir():
        path.write_text("{")
    damaged = Builder(tmp_path)
    assert damaged.build_all([one], "sm86") == programs[:1]
    assert damaged.built == 1


@needs_triton
def test_the_command_builds_one_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "default_folder", lambda: tmp_path)
    words = ["compile", "--hardware", "rtx-3090", "--row", CELL.row]
    assert main.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["arch"], said["built"]) == (True, "sm86", 1)
    [program] = said["cells"][CELL.id]["programs"]
    assert (program["kernel"], program["faults"]) == ("decode", [])
    assert main.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("NVIDIA GeForce RTX 3090 (sm86), Triton 3.")
    assert "built, never run" in text
    assert "1 programs, 0 of them built now" in text


@needs_triton
def test_a_fault_is_told_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(compiling, "MOST_THREADS", 128)
    assert (
        main.main(["compile", "--hardware", "mi300x", "--row", CELL.row]) == exit_codes.EXIT_PROBLEM
    )
    text = capsys.readouterr().out
    assert "FAULT decode on gfx942 8 warps of 64 threads are 512 threads" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "rtx-3091"], "no such row; known: cpu, a100"),
        (["--hardware", "rtx-3090", "--row", "no"], "no row that is claimed to run on rtx-3090"),
    ],
)
def test_unknown_words_are_named(words: list[str], message: str) -> None:
    values = dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(UsageError, match=message):
        compiled.choose_cells(TABLES, values["--hardware"], values.get("--row"))


def test_without_triton_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    assert main.main(["compile", "--hardware", "rtx-3090"]) == exit_codes.EXIT_USAGE
    assert "pip install 'quantmatrix[compile]'" in capsys.readouterr().err
