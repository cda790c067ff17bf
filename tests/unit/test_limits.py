"""Limits come from measurements, and their loosening is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix import evidence as records
from quantmatrix import limits
from quantmatrix.evidence import CheckResult, Evidence
from quantmatrix.limits import LimitsError, Sample

FLUX = Sample("e4m3 W8A8", "flux-1", 47.5, 0.9996, 0.03, 0.04, "a@cpu", 3, "2.13.0")
WAN = replace(FLUX, model="wan-2-2", psnr_db=40.0, cell="b@cpu")


def test_one_and_a_half_times_the_error_is_allowed() -> None:
    found = limits.find_limits([FLUX, WAN], "e4m3 W8A8", "flux-1")
    assert found.psnr_db == pytest.approx(47.5 - 20 * math.log10(1.5))
    assert found.cosine == pytest.approx(1 - 2.25 * 0.0004)
    assert found.relative_l2 == pytest.approx(0.045)
    assert found.layer_error == pytest.approx(0.06)
    assert found.source == "1.5 x the error of a@cpu (torch 2.13.0)"
    assert found.to_json()["psnr_db"] == {"at_least": round(found.psnr_db, 4)}


def test_another_model_lends_its_worst_sample_and_is_named() -> None:
    found = limits.find_limits([FLUX, WAN], "e4m3 W8A8", "z-image")
    assert found.psnr_db == WAN.to_limits().psnr_db
    assert found.source.endswith("borrowed from wan-2-2")


@pytest.mark.parametrize("kind", ["e2m1 W4A4", ""])
def test_a_class_that_was_never_measured_has_no_limit(kind: str) -> None:
    with pytest.raises(LimitsError, match="measure first"):
        limits.find_limits([FLUX, WAN], kind, "flux-1")


def test_classes_are_named_by_their_layers() -> None:
    layers = [("e4m3", "W8A8"), ("e2m1", "W4A4"), ("e4m3", "W8A8")]
    assert limits.name_class(layers) == "e2m1 W4A4 + e4m3 W8A8"


def make(name: str, psnr: float, *, verdict: str = "pass", limited: bool = True) -> Evidence:
    row, _, hardware = name.partition("@")
    cell = {**dict.fromkeys(records.CELL_KEYS, ""), "id": name, "row": row, "hardware": hardware}
    worst = {"psnr_db": psnr, "cosine": 1 - 1 / psnr, "relative_l2": 1 / psnr}
    bounds = {"psnr_db": {"at_least": 10.0}} if limited else {}
    layers = {"transformer": {"worst": 2 / psnr}}
    metrics = {"worst": worst, "layers": layers, "class": "e4m3 W8A8"}
    check = CheckResult(verdict, metrics, bounds, "far")
    found = {**cell, "model": "flux-1", "flags": [], "checks": []}
    return Evidence(cell=found, checks={"latents": check}, versions={"torch": "2.13.0"})


def test_samples_are_the_worst_of_what_passed_or_had_no_limit() -> None:
    evidence = {
        record.cell["id"]: record
        for record in (
            make("a@cpu", 50.0),
            make("b@cpu", 40.0),
            make("c@cpu", 5.0, verdict="fail"),
            make("d@cpu", 30.0, verdict="fail", limited=False),
        )
    }
    [found] = limits.collect_samples(evidence)
    expected = (30.0, 1 - 1 / 30, 1 / 30, 2 / 30)
    assert found == Sample("e4m3 W8A8", "flux-1", *expected, "d@cpu", 3, "2.13.0")


def test_a_record_without_measured_layers_is_no_sample() -> None:
    record = make("a@cpu", 50.0)
    del record.checks["latents"].metrics["layers"]
    assert limits.collect_samples({"a@cpu": record}) == []


def test_samples_read_back(tmp_path: Path) -> None:
    path = tmp_path / "limits.csv"
    path.write_text(limits.write_samples([WAN, FLUX]))
    assert limits.read_samples(path) == [FLUX, WAN]
    path.write_text(path.read_text().replace("47.5", "many"))
    with pytest.raises(LimitsError, match=r"limits\.csv:2: .*many"):
        limits.read_samples(path)
    path.write_text("kind,model\n")
    with pytest.raises(LimitsError, match=r"limits\.csv:1: expected the columns"):
        limits.read_samples(path)


def test_loosening_is_named() -> None:
    tighter, looser = replace(FLUX, psnr_db=48.0), replace(WAN, psnr_db=39.0)
    assert limits.list_loosened([FLUX, WAN], [tighter, WAN]) == []
    [first, second] = limits.list_loosened([FLUX, WAN], [looser])
    assert "flux-1: no longer measured" in first
    assert "40.00 dB (b@cpu) -> 39.00 dB (b@cpu)" in second


def test_measuring_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "limits.csv"
    records.write(make("a@cpu", 50.0), tmp_path / "evidence")
    assert limits.main([str(tmp_path / "evidence"), str(path)]) == 0
    records.write(make("b@cpu", 40.0), tmp_path / "evidence")
    assert limits.main([str(tmp_path / "evidence"), str(path)]) == 0
    assert "loosened: e4m3 W8A8 on flux-1: 50.00 dB" in capsys.readouterr().out
    assert [sample.cell for sample in limits.read_samples(path)] == ["b@cpu"]
    records.write(make("c@cpu", 5.0, verdict="fail"), tmp_path / "evidence")
    assert limits.main(["--anew", str(tmp_path / "evidence"), str(path)]) == 0
    assert [sample.cell for sample in limits.read_samples(path)] == ["c@cpu"]


def test_the_samples_of_this_project_are_sound() -> None:
    path = Path(__file__).parents[2] / "reports" / "limits.csv"
    samples = limits.read_samples(path)
    assert path.read_text() == limits.write_samples(samples)
    assert len({(sample.kind, sample.model) for sample in samples}) == len(samples)
    for sample in samples:
        assert 0 < sample.psnr_db < 100
        assert sample.to_limits().cosine > 0.7, sample  # else the limit proves nothing
        assert 0 < sample.to_limits().layer_error < 0.7, sample
