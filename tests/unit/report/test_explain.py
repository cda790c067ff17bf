"""Explain: cells found by any of their names, reasons, and what works instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tables import CASES, CHECKPOINTS, write_tables

from quantmatrix.cli.main import main
from quantmatrix.errors import UsageError
from quantmatrix.hardware import probe
from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.report.explain import Explainer, find_checkpoints, find_hardware
from quantmatrix.tables import identify, read
from quantmatrix.tables.rows import Matrix

PROVEN = "fp8-flux-1@cpu+decode"
REFUSED = "svdq-flux-1-hopper@h100"


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


def observe(tables: Matrix, name: str, *, fails: str = "") -> Evidence:
    cell = next(cell for cell in tables.cells if cell.id == name)
    checks = {c: CheckResult("pass", {"worst": {"psnr_db": 41.5}}) for c in cell.checks}
    if fails:
        checks[fails] = CheckResult("fail", message="too far")
    refusal = {"rule": cell.rule, "message": "no integer units; use cpu"} if cell.rule else None
    described = records.describe_cell(cell, tables)
    record = Evidence(
        cell=described,
        checks=checks,
        command="quantmatrix generate --tiny",
        plan={"refusal": refusal},
        made="2026-11-23T10:00:00Z",
    )
    return sign(record, tables.hardware[cell.hardware])


@pytest.fixture
def explainer(tables: Matrix) -> Explainer:
    return Explainer(tables, {name: observe(tables, name) for name in (PROVEN, REFUSED)})


@pytest.mark.parametrize(
    ("word", "ids"),
    [
        ("flux-1-fp8", ["flux-1-fp8"]),
        ("some/flux1-fp8", ["flux-1-fp8"]),
        ("some/flux1-fp8/", ["flux-1-fp8"]),
        ("some/svdq", ["flux-1-svdq"]),
        ("svdq-int4_r32-flux1.safetensors", ["flux-1-svdq"]),
        ("/home/me/svdq-int4_r32-flux1.safetensors", ["flux-1-svdq"]),
    ],
)
def test_a_checkpoint_has_many_names(tables: Matrix, word: str, ids: list[str]) -> None:
    assert [row.id for row in find_checkpoints(tables, word)] == ids


def test_a_name_shared_by_models_is_told_apart_by_model(tmp_path: Path) -> None:
    twin = {"id": "flux-2-svdq", "model": "flux-2", "base": "some/flux-2"}
    name = {"reference": "some/svdq/svdq-int4_r32-flux2.safetensors"}
    rows = [*CHECKPOINTS, {**CHECKPOINTS[2], **twin, **name}]
    tables = read.read(write_tables(tmp_path / "m", CASES, rows))
    both = find_checkpoints(tables, "some/svdq")
    assert [row.id for row in both] == ["flux-1-svdq", "flux-2-svdq"]
    [one] = find_checkpoints(tables, "some/svdq", "flux-2")
    assert one.id == "flux-2-svdq"
    with pytest.raises(UsageError, match="not of z-image"):
        find_checkpoints(tables, "some/svdq", "z-image")


def test_unknown_words_are_answered_with_near_ones(tables: Matrix) -> None:
    with pytest.raises(UsageError, match=r"did you mean .*flux-1-fp8"):
        find_checkpoints(tables, "flux1-fp8-x")
    with pytest.raises(UsageError, match="--checkpoint: empty"):
        find_checkpoints(tables, "/")
    with pytest.raises(UsageError, match="--model abacus: not in the tables"):
        find_checkpoints(tables, "flux-1-fp8", "abacus")
    with pytest.raises(UsageError, match="known ids and groups: cpu, h100, b200, all"):
        find_hardware(tables, "abacus")
    assert find_hardware(tables, "all") == ("cpu", "h100", "b200")


def test_auto_is_the_row_of_this_machine(tables: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: identify.from_row(tables.hardware["h100"]))
    assert find_hardware(tables, "auto") == ("h100",)


def test_a_proven_cell_needs_no_alternative(explainer: Explainer) -> None:
    found = {e.cell: e for e in explainer.explain("flux-1-fp8", "cpu")}
    proven = found[PROVEN]
    assert proven.state == "proven"
    assert (
        proven.why == "load and latents passed on 2026-11-23 with random weights at a tiny size, "
        "41.5 dB from BF16 at the worst step"
    )
    assert (proven.scope, proven.ran) == ("stand-in", "quantmatrix generate --tiny")
    assert proven.title == "With the published repository: not yet run"
    [command] = proven.commands
    assert command.startswith("quantmatrix generate --model-path some/flux-1")
    assert proven.evidence == "evidence/cpu/fp8-flux-1+decode.json"
    assert proven.alternatives == ()
    other = found["fp8-flux-1@cpu+reference"]
    assert (other.state, other.why) == ("unproven", "no run yet")
    best = other.alternatives[0]
    assert (best.how, best.cell, best.state) == ("other backend", PROVEN, "proven")


def test_a_refused_cell_says_the_rule_and_what_works_there(explainer: Explainer) -> None:
    [found] = explainer.explain("flux-1-svdq", "h100")
    assert found.state == "refused"
    assert found.why == "rule svdq-arch: no integer units; use cpu"
    [other] = found.alternatives
    assert (other.how, other.checkpoint) == ("other checkpoint", "flux-1-fp8")
    assert other.cell == "fp8-flux-1@h100+reference"


def test_a_failing_cell_is_no_alternative(tables: Matrix) -> None:
    failing = "fp8-flux-1@h100+reference"
    records_of = {name: observe(tables, name) for name in (PROVEN, REFUSED)}
    records_of[failing] = observe(tables, failing, fails="latents")
    explainer = Explainer(tables, records_of)
    found = {e.cell: e for e in explainer.explain("flux-1-fp8", "h100")}
    assert found[failing].state == "failing"
    assert "latents: too far" in found[failing].why
    assert "other hardware" in {a.how for a in found[failing].alternatives}
    [refused] = explainer.explain("flux-1-svdq", "h100")
    assert failing not in {a.cell for a in refused.alternatives}


def test_proven_is_nearer_than_the_same_family(tmp_path: Path) -> None:
    other = {"id": "flux-1-svdq-2", "reference": "some/svdq/svdq-int4_r32-other.safetensors"}
    twin = {"id": "svdq-twin", "checkpoint": "flux-1-svdq-2", "hardware": "h100"}
    rows = [*CHECKPOINTS, {**CHECKPOINTS[2], **other}]
    tables = read.read(write_tables(tmp_path / "m", [*CASES, {**CASES[0], **twin}], rows))
    [found] = Explainer(tables, {}).explain("flux-1-svdq", "h100")
    assert [a.checkpoint for a in found.alternatives] == ["flux-1-svdq-2"]
    far = "fp8-flux-1@h100+decode"
    [found] = Explainer(tables, {far: observe(tables, far)}).explain("flux-1-svdq", "h100")
    assert [(a.cell, a.state) for a in found.alternatives] == [(far, "proven")]


def test_a_gap_is_said_and_can_be_planned(explainer: Explainer) -> None:
    [found] = explainer.explain("flux-2-fp8", "b200")
    assert (found.cell, found.state) == ("", "unclaimed")
    assert found.commands == (
        "quantmatrix plan --model-path some/flux-2 --transformer-path some/flux2-fp8 "
        "--hardware b200",
    )
    assert [a.how for a in found.alternatives] == ["other hardware"]


def test_command(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    store.write(observe(tables, PROVEN), tmp_path / "reports" / "evidence")
    words = ["explain", "--checkpoint", "some/flux1-fp8", "--hardware", "cpu"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"{PROVEN}: proven · stand-in\n  why       load and latents passed" in text
    assert "instead   other backend: fp8-flux-1@cpu+decode (proven · stand-in)" in text
    assert main([*words, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert {cell["cell"]: cell["state"] for cell in cells}[PROVEN] == "proven"
    assert main(["explain", "--checkpoint", "nothing", "--hardware", "cpu", "--json"]) == 2
