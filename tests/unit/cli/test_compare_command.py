"""Comparisons of checkpoints, backends and saved runs, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix.cli.main import main

BASE = "black-forest-labs/FLUX.1-dev"
FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
FLUX = ("--tiny", "--model-path", BASE, "--num-inference-steps", "2", "--device", "cpu")


def compare(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["compare", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base model's run and the checkpoint's."""
    folder = tmp_path_factory.mktemp("runs")
    paths = (folder / "base.safetensors", folder / "fp8.safetensors")
    for path, words in zip(paths, ((), ("--transformer-path", FP8)), strict=True):
        words = (*FLUX, *words, "--prompt", "a red fox", "--no-save-output")
        assert main(["generate", *words, "--save-latents", str(path)]) == 0
    return paths


def test_saved_runs_and_limits(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, fp8 = map(str, saved)
    found = compare(capsys, base, fp8)
    worst = found["latents"]["worst"]
    assert found["ok"]
    assert len(found["latents"]["steps"]) == 2
    assert 20 < worst["psnr_db"] < 80
    assert 0.5 < found["media"]["ssim"] <= 1
    assert found["candidate"]["prompt"] == "a red fox"
    tight = compare(capsys, base, fp8, "--min-psnr", str(worst["psnr_db"] + 1), code=1)
    assert "--min-psnr" in tight["problems"][0]
    most = str(worst["relative_l2"] / 2)
    assert "--max-rel-l2" in compare(capsys, base, fp8, "--max-rel-l2", most, code=1)["problems"][0]
    assert compare(capsys, base, fp8, "--min-psnr", str(worst["psnr_db"] - 1))["ok"]
    assert compare(capsys, base, base)["latents"]["identical"]


def test_a_checkpoint_computed_here_equals_its_saved_run(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(capsys, str(saved[1]), FP8, *FLUX, "--prompt", "a red fox")
    assert found["latents"]["identical"]
    assert found["media"]["psnr_db"] is None
    assert found["media"]["ssim"] == 1
    base = compare(capsys, str(saved[0]), BASE, *FLUX, "--prompt", "a red fox")
    assert base["latents"]["identical"]


def test_backends_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(capsys, f"{FP8}@reference", f"{FP8}@decode", *FLUX)
    assert not found["latents"]["identical"]
    sides = [next(iter(found[side]["backends"].values())) for side in ("reference", "candidate")]
    assert [set(side) for side in sides] == [{"reference"}, {"decode"}]


def test_a_pickle_is_read_without_being_executed(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantmatrix.measure import saved_runs

    run = saved_runs.read(saved[0])
    torch.save({"latents": run.latents}, tmp_path / "run.pt")
    found = compare(capsys, str(saved[0]), str(tmp_path / "run.pt"))
    assert found["latents"]["identical"]
    assert found["media"] is None
    words = (str(saved[0]), str(tmp_path / "run.pt"), "--min-ssim", "0.5")
    assert "no frames" in compare(capsys, *words, code=2)["error"]["message"]
    torch.save({"latents": Path("x")}, tmp_path / "bad.pt")
    text = compare(capsys, str(saved[0]), str(tmp_path / "bad.pt"), code=1)["error"]["message"]
    assert "bad.pt" in text


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nowhere@fast", "nowhere", *FLUX), "fast is not a backend"),
        (("a/b", "a/b"), "--model-path"),
        (("a/b", "a/b", "--min-psnr", "nan"), "expected a number, not 'nan'"),
        ((FP8, FP8, *FLUX, "--transformer-path", FP8), "name each side once"),
    ],
)
def test_wrong_words(words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why in compare(capsys, *words, code=2)["error"]["message"]


def test_the_table_for_people(saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["compare", *map(str, saved), "--min-ssim", "1.1"]) == 1
    out, err = capsys.readouterr()
    assert "worst" in out
    assert "SSIM" in out
    assert "--min-ssim is 1.1" in err


def test_a_run_is_written_whole_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", *FLUX, "--no-save-output", "--json", "--save-latents"]
    assert main([*words, "run.bin"]) == 2
    assert main([*words, "run.safetensors", "--seed", "1", "2"]) == 2
    assert "one prompt and one seed" in capsys.readouterr().err
