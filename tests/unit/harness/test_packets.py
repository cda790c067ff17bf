"""Packets: what is whole is sound; whatever is changed afterwards is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from observed import PROVEN, find, observe
from safetensors.torch import load_file, save_file
from tables import CASES, write_tables

from quantmatrix.cli.main import main
from quantmatrix.harness import packets
from quantmatrix.proof import record as records
from quantmatrix.proof import store, thumbnails
from quantmatrix.proof.limits import Limits
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

STEPS = 3


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


@pytest.fixture
def sides() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    baseline = [torch.randn(1, 16, 8, generator=noise).bfloat16() for _ in range(STEPS)]
    return baseline, [
        (t + 0.01 * torch.randn(t.shape, generator=noise)).bfloat16() for t in baseline
    ]


def make_record(tables: Matrix, sides: Any, **changes: Any) -> Evidence:
    metrics = {**packets.recompute(*sides), "class": "e4m3 W8A16"}
    machine = {"vendor": "cpu", "arch": "cpu", "name": "some"}
    said = {
        "checks": {"latents": CheckResult("pass", metrics)},
        "plan": {"ok": True, "components": {}, "machine": machine},
        "latents_digest": packets.digest(sides[1]),
    }
    return observe(tables, PROVEN, **{**said, **changes})


@pytest.fixture
def packet(tables: Matrix, sides: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "packet"
    packets.write(make_record(tables, sides), *sides, folder)
    return folder


def test_a_whole_packet_is_sound_and_is_an_evidence_folder(packet: Path, tables: Matrix) -> None:
    assert packets.check(packet, tables) == []
    assert list(store.read_folder(packet)) == [PROVEN]
    card = json.loads((packet / "packet.json").read_text())
    assert card["command"].startswith("quantmatrix generate")
    assert list(card) == sorted(card)  # the same packet is the same text
    assert len(card["metrics"]["steps"]) == STEPS
    assert set(card["files"]) == {"latents.safetensors", "cpu/fp8-flux-1+decode.json"}
    assert packet.stat().st_mode & 0o777 == 0o755


def edit_card(packet: Path, change: Callable[[dict[str, Any]], None]) -> None:
    card = json.loads((packet / "packet.json").read_text())
    change(card)
    (packet / "packet.json").write_text(json.dumps(card))


def seal(packet: Path) -> None:
    """Make digests agree with the files again, as somebody who cheats would."""

    def renew(card: dict[str, Any]) -> None:
        card["files"] = {name: packets.describe(packet / name) for name in card["files"]}

    edit_card(packet, renew)


def change_latents(packet: Path, side: str = "candidate") -> None:
    path = packet / "latents.safetensors"
    tensors = load_file(path)
    tensors[f"{side}.001"] = tensors[f"{side}.001"] * 1.25
    save_file(tensors, path)


def test_a_changed_file_is_found(packet: Path, tables: Matrix) -> None:
    change_latents(packet)
    [problem] = packets.check(packet, tables)
    assert "latents.safetensors: is" in problem
    assert "the file was changed" in problem


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_metrics_are_computed_again(packet: Path, tables: Matrix, side: str) -> None:
    change_latents(packet, side)
    seal(packet)
    problems = packets.check(packet, tables)
    assert any("packet.json: metrics.steps[1].relative_l2 is 0.0" in text for text in problems)
    assert any("checks.latents.metrics.metrics.worst" in text for text in problems)
    assert any("latents_digest" in text for text in problems) is (side == "candidate")


def edit_record(packet: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record, and make digests agree again."""
    path = packet / records.path_of(PROVEN)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    seal(packet)


NOTHING_ELSE = {"verdict": "pass", "metrics": {}, "limits": {}, "message": ""}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r["checks"].update(load=NOTHING_ELSE), "checks: load: latents prove nothing of"),
        (lambda r: r["checks"]["latents"]["metrics"].update({"class": "odd"}), "no limit is known"),
        (lambda r: r["plan"].pop("machine"), "names no machine"),
        (
            lambda r: r["plan"]["machine"].update(arch="sm90", vendor="nvidia"),
            "made on nvidia sm90",
        ),
        (lambda r: r.update(command="quantmatrix generate"), "command is"),
    ],
)
def test_what_latents_do_not_prove_is_not_believed(
    packet: Path, tables: Matrix, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    edit_record(packet, change)
    [problem] = packets.check(packet, tables)
    assert text in problem


@pytest.mark.parametrize(
    ("recorded", "same"),
    [(1.0, True), (1, True), (1.0000001, True), (1.001, False), (10**400, False), ("1", False)],
)
def test_numbers_agree_but_for_the_sixth_digit(recorded: object, same: bool) -> None:
    assert packets.compare_metrics({"psnr_db": recorded}, {"psnr_db": 1.0}) == (
        [] if same else [f"metrics.psnr_db is {recorded!r:.80}, the latents give 1.0"]
    )


def test_better_numbers_than_the_latents_give_are_found(packet: Path, tables: Matrix) -> None:
    def improve(card: dict[str, Any]) -> None:
        card["metrics"]["final"]["psnr_db"] += 0.01

    edit_card(packet, improve)
    [problem] = packets.check(packet, tables)
    assert "metrics.final.psnr_db is" in problem


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda card: card.pop("metrics"), "expected an object with cell, command, files"),
        (lambda card: card.update(schema=2), "schema 2, expected 1"),
        (lambda card: card.update(cell="../../x@cpu"), "x@cpu' is not the id of a cell"),
        (lambda card: card.update(cell="x@/etc"), "'x@/etc' is not the id of a cell"),
        (lambda card: card["files"].update(x=1), "files are"),
        (lambda card: card.update(cell="other@cpu"), "expected ['cpu/other.json', "),
    ],
)
def test_the_form_of_the_card(
    packet: Path, tables: Matrix, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    edit_card(packet, change)
    [problem] = packets.check(packet, tables)
    assert text in problem


def test_missing_strange_and_damaged_files(packet: Path, tables: Matrix) -> None:
    (packet / "run.sh").write_text("echo")
    assert packets.check(packet, tables) == [f"{packet}: run.sh: not a part of a packet"]
    (packet / "run.sh").unlink()
    latents = packet / "latents.safetensors"
    latents.write_bytes(latents.read_bytes()[:100])
    seal(packet)
    [problem] = packets.check(packet, tables)
    assert "latents.safetensors: " in problem
    latents.unlink()
    assert packets.check(packet, tables) == [f"{packet}: latents.safetensors: missing"]
    (packet / "packet.json").write_text("{")
    assert "cannot be read" in packets.check(packet, tables)[0]


def test_latents_come_in_pairs(packet: Path, tables: Matrix) -> None:
    path = packet / "latents.safetensors"
    tensors = load_file(path)
    del tensors["baseline.002"]
    save_file(tensors, path)
    seal(packet)
    [problem] = packets.check(packet, tables)
    assert "expected pairs per step" in problem


def test_nan_in_the_baseline_is_no_reference(packet: Path, tables: Matrix) -> None:
    path = packet / "latents.safetensors"
    tensors = load_file(path)
    tensors["baseline.000"][0, 0, 0] = float("nan")
    save_file(tensors, path)
    seal(packet)
    [problem] = packets.check(packet, tables)
    assert "it is not a reference" in problem


def test_a_row_that_changed_or_is_unknown(packet: Path, tmp_path: Path) -> None:
    cases = [{**CASES[0], "flags": "--seed 7"}, *CASES[1:]]
    changed = read.read(write_tables(tmp_path / "changed", cases))
    assert "changed since the run" in packets.check(packet, changed)[0]
    without = read.read(write_tables(tmp_path / "without", CASES[1:]))
    assert f"no cell {PROVEN} in the tables" in packets.check(packet, without)[0]


def test_the_verdict_is_judged_by_limits_of_this_project(
    packet: Path, tables: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = Limits(psnr_db=99.0, cosine=0.9, relative_l2=0.9)
    asked = []

    def find_strict(kind: str, model: str, hardware: str) -> Limits:
        asked.append((kind, model, hardware))
        return strict

    monkeypatch.setattr(packets, "find_limits", find_strict)
    [problem] = packets.check(packet, tables)
    assert "the record says pass, but psnr_db" in problem
    assert asked == [("e4m3 W8A16", "flux-1", "cpu")]


def test_a_failed_write_leaves_nothing(
    tables: Matrix, sides: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packets, "describe", full)
    with pytest.raises(OSError, match="No space left"):
        packets.write(make_record(tables, sides), *sides, tmp_path / "out" / "packet")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_record_without_latents_check(tables: Matrix, sides: Any, tmp_path: Path) -> None:
    record = replace(make_record(tables, sides), checks={"load": CheckResult("pass")})
    packets.write(record, *sides, tmp_path / "packet")
    assert "no latents check" in packets.check(tmp_path / "packet", tables)[0]
    assert find(tables, PROVEN).checks == ("load", "latents")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of a real cell on stand-ins becomes a packet that is sound, then one that is not."""
    folder = tmp_path / "packet"
    cell = "fp8-flux-1-tensor-dynamic@cpu+decode"
    words = ["packet", "make", cell, "--tiny", "--output-path", str(folder)]
    assert main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["verdict"], made["cell"]) == ("pass", cell)
    [record] = store.read_folder(folder).values()
    metrics = record.checks["latents"].metrics
    assert thumbnails.list_problems(metrics["thumbnails"]) == []
    assert 0.9 < metrics["media"]["ssim"] < 1
    assert main(words) == 2  # never over what is there
    assert main(["packet", "make", "nothing@cpu", "--output-path", str(tmp_path / "x")]) == 2
    capsys.readouterr()
    assert main(["packet", "check", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: sound\n"
    change_latents(folder)
    assert main(["packet", "check", str(folder), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"][str(folder)]
    assert "the file was changed" in problems[0]
