"""Figures of `compare` and `thresholds`, by value and direction, on made-up inputs.

Nothing is symmetric here: a ratio that was turned over, a first for a last, seconds for milliseconds
or the wrong side of a comparison is another number.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.cli import compare as compare_command
from quantmatrix.cli import main
from quantmatrix.errors import UsageError
from quantmatrix.measure.comparison import Bounds, compare_sides, judge
from quantmatrix.measure.latents import StepMetrics, compare_tensors, find_worst, summarize
from quantmatrix.measure.saved_runs import SavedRun
from quantmatrix.proof import limits
from quantmatrix.proof.limit_samples import Sample, Spread
from quantmatrix.proof.limits import Ledger

# --- compare ---------------------------------------------------------------------------------


def make_steps() -> list[StepMetrics]:
    """Three steps of which none is the worst in everything; the first is neither best nor worst."""
    return [
        StepMetrics(cosine=0.99, relative_l2=0.3, psnr_db=40.0, max_abs=1.0),
        StepMetrics(cosine=0.90, relative_l2=0.1, psnr_db=50.0, max_abs=3.0, nonfinite=2),
        StepMetrics(cosine=0.95, relative_l2=0.2, psnr_db=31.0, max_abs=2.0, identical=True),
    ]


def test_the_worst_of_the_steps_and_what_a_step_loses() -> None:
    worst = find_worst(make_steps())
    assert worst == StepMetrics(0.90, 0.3, 31.0, 3.0, nonfinite=2, identical=False)
    found = summarize(make_steps())
    assert found["drift_db_per_step"] == 4.5  # 40 dB at first, 31 dB after two more steps
    assert found["final"]["psnr_db"] == 31.0
    assert [step["psnr_db"] for step in found["steps"]] == [40.0, 50.0, 31.0]
    assert summarize(make_steps()[:1])["drift_db_per_step"] == 0.0
    assert summarize(make_steps()[::-1])["drift_db_per_step"] == -4.5


def test_what_is_divided_by_is_the_reference() -> None:
    reference, candidate = torch.tensor([0.0, 6.0, 8.0]), torch.tensor([0.0, 6.0, 10.0])
    found = compare_tensors(reference, candidate)
    assert found.relative_l2 == pytest.approx(0.2)
    assert found.psnr_db == pytest.approx(20 * math.log10(8 / (2 / math.sqrt(3))))
    turned = compare_tensors(candidate, reference)
    assert turned.relative_l2 == pytest.approx(2 / math.sqrt(136))
    assert turned.psnr_db == pytest.approx(20 * math.log10(10 / (2 / math.sqrt(3))))


WORST = StepMetrics(cosine=0.5, relative_l2=0.25, psnr_db=32.0, max_abs=1.0)
MEDIA = {"psnr_db": 28.0, "ssim": 0.75}
FLAGS = [
    ("min_psnr", 32.0, -1, "PSNR of the latents at the worst step is 32, --min-psnr is"),
    ("min_cosine", 0.5, -1, "cosine at the worst step is 0.5, --min-cosine is"),
    ("min_image_psnr", 28.0, -1, "PSNR of the picture is 28, --min-image-psnr is"),
    ("min_ssim", 0.75, -1, "SSIM of the picture is 0.75, --min-ssim is"),
    ("max_rel_l2", 0.25, 1, "relative L2 at the worst step is 0.25, --max-rel-l2 is"),
]


@pytest.mark.parametrize(("flag", "found", "easier", "text"), FLAGS)
def test_each_flag_of_compare_passing_equal_and_failing(
    flag: str, found: float, easier: int, text: str
) -> None:
    """The limit itself is allowed; the next number on the far side of it is not."""
    for bound in (found, found + easier * 0.125, found + easier * 100.0):
        assert judge(WORST, MEDIA, Bounds(**{flag: bound})) == []
    for bound in (found - easier * 0.125, math.nextafter(found, -easier * math.inf)):
        [problem] = judge(WORST, MEDIA, Bounds(**{flag: bound}))
        assert problem.startswith(text)


def test_flags_of_compare_count_one_by_one() -> None:
    strict = Bounds(33.0, 0.1, 0.6, 29.0, 0.8)
    assert len(judge(WORST, MEDIA, strict)) == 5
    assert set(vars(Bounds())) == {flag for flag, *_ in FLAGS} == set(compare_command.BOUNDS)
    assert judge(WORST, {"psnr_db": None, "ssim": 1.0}, Bounds(min_image_psnr=99.0)) == []
    for flag in ("min_image_psnr", "min_ssim"):
        with pytest.raises(UsageError, match="a side has no frames"):
            judge(WORST, None, Bounds(**{flag: 0.0}))
    assert judge(WORST, None, Bounds(min_psnr=0.0, min_cosine=0.0, max_rel_l2=1.0)) == []
    broken = replace(WORST, nonfinite=1)
    assert judge(broken, MEDIA, Bounds()) == ["1 elements of the latents are NaN or infinite"]


def make_saved(name: str, *values: float) -> SavedRun:
    return SavedRun(name, [torch.tensor([1.0, value]) for value in values], None, {"seed": name})


def test_sides_of_a_comparison_are_not_swapped() -> None:
    found = compare_sides(
        make_saved("A", 3.0, 1.0), make_saved("B", 4.0, 1.0), Bounds(min_psnr=5.0)
    )
    assert (found["reference"]["name"], found["candidate"]["name"]) == ("A", "B")
    assert (found["reference"]["seed"], found["candidate"]["seed"]) == ("A", "B")
    assert found["latents"]["worst"]["relative_l2"] == pytest.approx(1 / math.sqrt(10), abs=1e-6)
    assert found["latents"]["identical"] is False
    assert found["limits"] == {"min_psnr": 5.0}
    assert found["ok"] is True
    same = compare_sides(make_saved("A", 3.0, 1.0), make_saved("B", 3.0, 1.0), Bounds(min_psnr=5.0))
    assert same["latents"]["identical"] is True
    bad = compare_sides(make_saved("A", 3.0, 1.0), make_saved("B", 4.0, 1.0), Bounds(min_psnr=99.0))
    assert bad["ok"] is False


def test_the_table_of_a_comparison(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    latents = {**summarize(make_steps()[:2]), "identical": False}
    found = {"reference": {"name": "one"}, "candidate": {"name": "two"}, "latents": latents,
             "media": {"psnr_db": 28.0, "ssim": 0.75}, "problems": ["far"]}  # fmt: skip
    compare_command.print_comparison(found)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[:2] == [["A", "one"], ["B", "two"]]
    assert lines[3:6] == [["0", "40", "0.3", "0.99"], ["1", "50", "0.1", "0.9"],
                          ["worst", "40", "0.3", "0.9"]]  # fmt: skip
    assert out.splitlines()[6] == "picture: PSNR 28 dB, SSIM 0.75"
    assert "identical" not in out
    assert [record.getMessage() for record in caplog.records] == ["far"]


# --- thresholds ------------------------------------------------------------------------------


def make_sample(**changes: Any) -> Sample:
    about = {"kind": "e4m3 W8A8", "model": "flux-1", "cell": "row@cpu", "cells": 3, "torch": "2.13"}
    numbers = {"psnr_db": 40.0, "cosine": 0.99, "relative_l2": 0.1, "layer_error": 0.02}
    return Sample(**{**about, **numbers, **changes})


def make_spread(**changes: Any) -> Spread:
    numbers = {"psnr_db": 60.0, "cosine": 0.9999, "relative_l2": 0.01, "layer_error": 0.001}
    about = {"model": "flux-1", "layer": "a", "layers": 9, "steps": 4, "size": "1 x 64 x 32",
             "torch": "2.13", "processor": "some", "commit": "0" * 40,
             "made": "2026-11-28T10:00:00Z"}  # fmt: skip
    return Spread(**{**about, **numbers, **changes})


def test_limits_follow_from_the_sample() -> None:
    """1.5 times the error: 3.52 dB less, 2.25 times what the cosine lacks, 1.5 times both others."""
    [(_, found)] = Ledger([make_sample()], {"flux-1": make_spread()}).list_limits()
    assert found.psnr_db == pytest.approx(40.0 - 20 * math.log10(1.5))
    assert found.cosine == pytest.approx(1 - 2.25 * 0.01)
    assert found.relative_l2 == pytest.approx(0.15)
    assert found.layer_error == pytest.approx(0.03)
    assert found.decided == "measured"


@pytest.mark.parametrize(
    ("name", "looser", "tighter"),
    [("psnr_db", 10.0, 39.0), ("cosine", 0.5, 0.98), ("relative_l2", 0.6, 0.14),
     ("layer_error", 0.5, 0.029)],
)  # fmt: skip
def test_the_loosest_source_decides(name: str, looser: float, tighter: float) -> None:
    for value, decides in ((looser, True), (tighter, False)):
        spread = {"flux-1": make_spread(**{name: value})}
        [(_, found)] = Ledger([make_sample()], spread).list_limits()
        assert (getattr(found, name) == value) is decides
        assert found.decided == (f"measured, {name} by spread" if decides else "measured")


def write_limits(folder: Path, *samples: Sample) -> Path:
    folder.mkdir(exist_ok=True)
    limits.write(Ledger(samples, {"flux-1": make_spread()}), folder / "limits.csv")
    return folder / "limits.csv"


def test_thresholds_as_json_and_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_limits(tmp_path, make_sample())
    assert main.main(["thresholds", "--json", "--reports", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["margin"]) == (True, 1.5)
    [row] = found["limits"]
    assert (row["class"], row["model"], row["side"]) == ("e4m3 W8A8", "flux-1", "cpu")
    assert row["psnr_db"] == {"at_least": 36.4782}
    assert row["cosine"] == {"at_least": 0.9775}
    assert row["relative_l2"] == {"at_most": 0.15}
    assert found["spreads"]["flux-1"]["psnr_db"] == 60.0
    assert main.main(["thresholds", "--reports", str(tmp_path)]) == 0
    line = capsys.readouterr().out
    assert line.startswith("e4m3 W8A8 ")
    assert " 36.48 dB  rel L2 0.1500  cosine 0.97750  layer 0." in line


@pytest.mark.parametrize(("psnr", "ok"), [(40.0, True), (41.0, True), (39.0, False)])
def test_loosened_limits_are_not_ok(
    psnr: float, ok: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = write_limits(tmp_path / "older", make_sample())
    write_limits(tmp_path / "newer", make_sample(psnr_db=psnr))
    words = ["thresholds", "--reports", str(tmp_path / "newer"), "--diff", str(older)]
    assert main.main([*words, "--json"]) == (0 if ok else 1)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is ok
    assert found["against"] == str(older)
    assert len(found["loosened"]) == (0 if ok else 1)
    if not ok:
        assert "psnr_db 36.4782 -> 35.4782" in found["loosened"][0]
    assert main.main(words) == (0 if ok else 1)
    out = capsys.readouterr().out
    assert (out == f"no limit is wider than in {older}\n") is ok


def test_a_record_at_the_edge_of_a_limit_that_was_tightened() -> None:
    ledger = Ledger([make_sample()], {"flux-1": make_spread()})
    allowed = ledger.find("e4m3 W8A8", "flux-1")
    at = {"psnr_db": allowed.psnr_db, "cosine": allowed.cosine, "relative_l2": allowed.relative_l2}

    def look(layer: float, **worst: float) -> list[str]:
        metrics = {
            "class": "e4m3 W8A8",
            "worst": {**at, **worst},
            "layers": {"t": {"worst": layer}},
        }
        check = SimpleNamespace(verdict="pass", metrics=metrics)
        cell = {"model": "flux-1", "hardware": "cpu"}
        record: Any = SimpleNamespace(checks={"latents": check}, cell=cell)
        return limits.list_exceeded(record, ledger)

    assert look(allowed.layer_error) == []
    for name, factor in (("psnr_db", 0.999), ("cosine", 0.999), ("relative_l2", 1.001)):
        [line] = look(allowed.layer_error, **{name: at[name] * factor})
        assert line.startswith(f"{name} is ")
        assert look(allowed.layer_error, **{name: at[name] / factor}) == []
    assert look(allowed.layer_error * 1.001)[0].startswith("layer_error is ")
