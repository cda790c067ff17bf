"""Which layers to keep in full precision: measured shares, and a set that beats the hand-made one."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix import api, models
from quantmatrix.cli import main
from quantmatrix.errors import UsageError
from quantmatrix.measure.fallback import (
    Share,
    Study,
    draw_shares,
    find_smallest,
    group_modules,
    rank_modules,
)
from quantmatrix.request import Request
from quantmatrix.tiny.hub import use_tiny
from quantmatrix.tools import quantize

BASES = {"flux-1": "black-forest-labs/FLUX.1-dev", "qwen-image": "Qwen/Qwen-Image"}
CASES = [
    ("modelopt-nvfp4", "flux-1", "flux1-nvfp4"),
    ("modelopt-nvfp4", "qwen-image", "qwen-image"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of a checkpoint with every layer quantized, by family and model; made once."""

    @cache
    def make(family: str, model: str) -> tuple[Study, str]:
        folder = tmp_path_factory.mktemp("made") / model
        options: dict[str, Any] = {"model_path": BASES[model], "tiny": True, "device": "cpu"}
        quantize.quantize(
            use_tiny(Request(**options)), family=family, output=folder, kept=[], prompts=["a fox"]
        )
        request = Request(
            **options, component_paths={"transformer": str(folder)}, backend="reference",
            dtype="float32",
        )  # fmt: skip
        return Study(request), str(folder)

    return make


@pytest.fixture(scope="module")
def ranked(made: Any) -> Any:
    """The shares of that study's layers, a run for each; measured once."""

    @cache
    def rank(family: str, model: str) -> list[Share]:
        return rank_modules(made(family, model)[0])

    return rank


@pytest.mark.parametrize(("family", "model", "name"), CASES)
def test_the_proposal_beats_the_hand_made_set(
    made: Any, ranked: Any, family: str, model: str, name: str
) -> None:
    """As many layers as the guide's set has, taken by their measured shares: higher PSNR."""
    study, _ = made(family, model)
    patterns = [re.compile(pattern) for pattern in models.load(model).FALLBACKS[name]]
    hand = [n for n in study.forms if any(p.fullmatch(n.partition(".")[2]) for p in patterns)]
    assert 0 < len(hand) < len(study.forms)
    shares = ranked(family, model)
    ours = [module for share in shares[: len(hand)] for module in share.modules]
    assert study.measure(ours).psnr_db > study.measure(hand).psnr_db


def test_runs_are_those_of_the_pipelines(made: Any) -> None:
    """With everything quantized the study gives the checkpoint's latents, with nothing the base's."""
    study, folder = made("modelopt-nvfp4", "flux-1")
    options = {"model_path": BASES["flux-1"], "tiny": True, "device": "cpu", "dtype": "float32"}
    whole = Request(**options, component_paths={"transformer": folder}, backend="reference")
    assert torch.equal(study.run(study.forms), api.generate(whole).latents[-1])
    assert torch.equal(study.run(()), api.generate(Request(**options)).latents[-1])
    assert study.measure(study.forms).relative_l2 == 0


def test_the_smallest_prefix_is_one_that_was_run(made: Any, ranked: Any) -> None:
    study, _ = made("modelopt-nvfp4", "flux-1")
    shares = ranked("modelopt-nvfp4", "flux-1")
    assert [s.relative_l2 for s in shares] == sorted((s.relative_l2 for s in shares), reverse=True)
    start = study.measure(()).psnr_db
    count, seen = find_smallest(study, shares, start + 6)
    assert 0 < count < len(shares)
    assert seen[count].psnr_db >= start + 6
    assert seen[count - 1].psnr_db < start + 6
    kept = [module for share in shares[:count] for module in share.modules]
    assert study.measure(kept).psnr_db == seen[count].psnr_db
    assert find_smallest(study, shares, start - 1)[0] == 0
    assert find_smallest(study, shares, float("inf"))[0] == len(shares)


def test_blocks_hold_their_layers() -> None:
    names = ["transformer.blocks.0.a", "transformer.blocks.0.b.c", "transformer.blocks.1.a"]
    assert group_modules(names, "layer") == [(name,) for name in names]
    assert group_modules(names, "block") == [tuple(names[:2]), (names[2],)]
    with pytest.raises(UsageError, match="--by x: expected layer or block"):
        group_modules(names, "x")


WORDS = ["fallback", "--tiny", "--model-path", BASES["flux-1"], "--device", "cpu"]
CHECKPOINT = ["--transformer-path", "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"]


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = [*WORDS, *CHECKPOINT, "--by", "block", "--target-psnr", "20", "--output-path", str(out)]
    assert main.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "fallback.json").read_text())
    assert found["kept"] == []
    assert found["met"]
    assert [share["kept"] for share in found["shares"]] == [False] * 4
    assert sorted(path.name for path in out.iterdir()) == ["fallback.json", "fallback.svg"]
    bars = ElementTree.parse(out / "fallback.svg").getroot().findall("{*}rect")
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert widths == sorted(widths, reverse=True)
    assert len(widths) == 4


def test_a_target_that_cannot_be_met_by_quantized_layers_keeps_all(
    tmp_path: Path, capsys: Any
) -> None:
    words = [*WORDS, *CHECKPOINT, "--by", "block", "--target-psnr", "500"]
    assert main.main([*words, "--output-path", str(tmp_path / "out")]) == 0
    assert "which meets 500 dB" in capsys.readouterr().out.splitlines()[-1]
    found = json.loads((tmp_path / "out" / "fallback.json").read_text())
    assert [share["kept"] for share in found["shares"]] == [True] * 4
    assert found["kept"] == [name for share in found["shares"] for name in share["modules"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (WORDS, "no layer of the checkpoint is quantized"),
        (
            ["fallback", "--tiny", "--model-path", "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"],
            "is quantized itself",
        ),
    ],
)
def test_what_cannot_be_studied(words: list[str], said: str, capsys: Any) -> None:
    assert main.main(words) == 2
    assert said in capsys.readouterr().err


def test_bars_of_the_picture_stand_by_their_names_and_numbers(tmp_path: Path) -> None:
    shares = [
        {"name": "a", "relative_l2": 0.4, "kept": True},
        {"name": "b", "relative_l2": 0.1, "kept": False},
    ]
    draw_shares({"model": "flux-1", "shares": shares}, tmp_path / "a.svg")
    picture = ElementTree.parse(tmp_path / "a.svg").getroot()
    bars = [
        tuple(bar.get(name) for name in ("x", "y", "width", "fill"))
        for bar in picture.findall("{*}rect")
    ]
    assert bars == [("390", "30", "380.0", "#d9730d"), ("390", "48", "95.0", "#4c78a8")]
    texts = [(t.get("x"), t.get("y"), t.text) for t in picture.findall("{*}text")][1:]
    assert texts == [
        ("8", "41", "a"), ("776.0", "41", "4.00e-01"),
        ("8", "59", "b"), ("491.0", "59", "1.00e-01"),
    ]  # fmt: skip
    assert picture.get("height") == "76"
