"""Figures of `validate`, each by its value: what was the base model's, what the checkpoint's.

Everything is made up and lopsided: no number of one side is a number of the other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quantmatrix.errors import UsageError
from quantmatrix.measure import validate, validation_page
from quantmatrix.measure.layers import USELESS, LayerErrors, relative_error
from quantmatrix.measure.quality import summarize_quality
from quantmatrix.measure.validate import USELESS_LAYER
from quantmatrix.request import Request
from quantmatrix.runtime.run import Run

MIB = 2**20
CPU, GPU = SimpleNamespace(vendor="cpu"), SimpleNamespace(vendor="nvidia")


def make_plan(machine: Any, *sizes: int) -> Any:
    parts = {str(number): SimpleNamespace(bytes=size) for number, size in enumerate(sizes)}
    return SimpleNamespace(machine=machine, components=parts)


def make_run(*latents: float, peak: int = 0, shade: int = 100, prompt: str = "a fox") -> Run:
    """A run of a step per value: its latents are [1, value]; its picture is of one shade."""
    return Run(
        plan=make_plan(CPU, 1),
        prompt=prompt,
        seed=7,
        latents=[torch.tensor([1.0, value]) for value in latents],
        media=[np.full((12, 16, 3), shade, dtype=np.uint8)],
        is_video=False,
        fps=0,
        seconds={"generate": 1.0},
        step_seconds=[0.5],
        peak_bytes=peak,
        census={},
    )


def test_memory_of_both_models() -> None:
    """Weights of two components together; the larger of two runs' peaks, of its own side."""
    pairs = [(make_run(1.0, peak=70), make_run(1.0, peak=30)),
             (make_run(1.0, peak=90), make_run(1.0, peak=20))]  # fmt: skip
    base, plan = make_plan(GPU, 4000, 500), make_plan(GPU, 1000, 250)
    assert validate.describe_memory(base, plan, pairs) == {
        "bf16": {"weight_bytes": 4500, "peak_bytes": 90},
        "quantized": {"weight_bytes": 1250, "peak_bytes": 30},
    }
    found = validate.describe_memory(make_plan(CPU, 7), make_plan(CPU, 3), pairs)
    assert found == {"bf16": {"weight_bytes": 7}, "quantized": {"weight_bytes": 3}}


@pytest.mark.parametrize(
    ("prompts", "seeds", "text"),
    [(1, 1, "1 prompt, 1 seed"), (2, 1, "2 prompts, 1 seed"), (1, 3, "1 prompt, 3 seeds")],
)
def test_runs_in_words(prompts: int, seeds: int, text: str) -> None:
    request: Any = SimpleNamespace(prompt=("x",) * prompts, seed=tuple(range(seeds)))
    assert validate.describe_runs(request) == text


def test_a_run_that_equals_the_base_models_is_a_problem() -> None:
    base = make_run(2.0, 3.0)
    same, last, other = make_run(2.0, 3.0), make_run(2.0, 3.5), make_run(2.5, 3.0)
    assert validate.judge_runs([(base, same)]) == [
        "prompt 'a fox', seed 7: equals the base model bit for bit, nothing is quantized"
    ]
    assert validate.judge_runs([(base, last), (base, other)]) == []
    broken = make_run(2.0, math.nan, prompt="a hen")
    assert validate.judge_runs([(base, last), (base, broken)]) == [
        "prompt 'a hen', seed 7: 1 elements of the latents are not finite"
    ]


def test_a_layer_counts_as_another_beyond_the_limit_only() -> None:
    def judge(error: float) -> list[str]:
        return validate.judge_layers(LayerErrors({"transformer": {"a": 0.1, "b": error}}))

    assert judge(USELESS_LAYER) == []
    assert judge(0.0) == []
    [line] = judge(math.nextafter(USELESS_LAYER, 1))
    assert line.startswith("transformer.b: relative error 0.8 against the base model's layer")
    assert len(judge(math.nan)) == 1


def test_errors_of_layers() -> None:
    """|found - expected| / |expected|: what is divided by is the base model's."""
    expected, found = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 7.0])
    assert relative_error(expected, found) == pytest.approx(0.6)
    assert relative_error(found, expected) == pytest.approx(3 / math.sqrt(58))
    assert relative_error(expected, expected) == 0.0
    assert relative_error(torch.zeros(2), found) == USELESS
    assert relative_error(expected, torch.full((2,), math.nan)) == USELESS
    errors = LayerErrors({"one": {"a": 0.1, "b": 0.7, "c": 0.2}, "two": {"d": 0.9}, "none": {}})
    assert errors.worst == 0.9
    assert errors.to_json() == {
        "one": {"layers": 3, "median": 0.2, "worst": 0.7, "worst_layer": "b"},
        "two": {"layers": 1, "median": 0.9, "worst": 0.9, "worst_layer": "d"},
    }


def test_distances_are_those_of_the_checkpoint_from_the_base_model() -> None:
    """Swapped sides would divide by the other's norm: [1, 3] and [1, 4] have different ones."""
    base, run = make_run(3.0, 1.0, shade=100), make_run(4.0, 1.5, shade=110)
    found = validate.describe_pair((base, replace(run, seed=9, prompt="a hen")))
    assert (found["prompt"], found["seed"]) == ("a hen", 9)
    first, last = found["latents"]["steps"]
    assert first["relative_l2"] == pytest.approx(1 / math.sqrt(10), abs=1e-6)
    assert last["relative_l2"] == pytest.approx(0.5 / math.sqrt(2), abs=1e-6)
    assert found["latents"]["final"] == last
    assert found["media"]["mean_abs"] == 10.0
    assert found["media"]["psnr_db"] == pytest.approx(20 * math.log10(25.5), abs=1e-4)


# --- the page and the model card -------------------------------------------------------------


def make_step(psnr: float | None, cosine: float, error: float | None) -> dict[str, Any]:
    return {"psnr_db": psnr, "cosine": cosine, "relative_l2": error}


KIND = {"kind": "to_q", "reading": "as declared", "relative_l2": 0.0371, "verdict": "near"}
WITNESS = {
    "base": "some/base",
    "verdict": "as promised",
    "layers": 12,
    "kinds": [{**KIND, "cosine": 0.9993}, {**KIND, "cosine": 0.9871}, {**KIND, "cosine": 0.9999}],
}


def make_report(*, ok: bool = True) -> dict[str, Any]:
    """Two runs; worst, final and best steps are all different, as are both components."""
    runs = []
    for shift, psnr in ((0.0, 41.0), (2.0, 37.5)):
        steps = [make_step(50.0, 0.999, 0.1), make_step(30.0 + shift, 0.95, 0.4),
                 make_step(40.0 + shift, 0.99, 0.2)]  # fmt: skip
        latents = {"steps": steps, "worst": {**steps[1], "cosine": 0.95 + shift / 100},
                   "final": steps[2]}  # fmt: skip
        runs.append({"prompt": "a <fox>", "seed": 3, "latents": latents,
                     "media": {"psnr_db": psnr, "ssim": 0.9 + shift / 100, "mean_abs": 1.5},
                     "quality": {"ms_ssim": 0.8 + shift / 100, "flip": 0.25 + shift / 100,
                                 "missing": {}}})  # fmt: skip
    part = {"family": "fp8", "precision": "FP8", "quantized": 30, "linear_layers": 40,
            "backends": {"decode": 30}, "not_as_declared": {}, "not_as_planned": {},
            "not_called": []}  # fmt: skip
    other = {**part, "quantized": 20, "linear_layers": 50, "backends": {"torch": 20},
             "not_called": ["a", "b", "c"]}  # fmt: skip
    return {
        "ok": ok,
        "problems": [] if ok else ["one | thing", "another"],
        "command": "quantmatrix validate --x",
        "base": "some/base",
        "base_id": "some/base",
        "scope": "stand-in",
        "pipeline_tag": "text-to-image",
        "references": {"transformer": "some/checkpoint", "transformer_2": "some/other"},
        "census": {"transformer": part, "transformer_2": other},
        "layers": {"summary": {}, "errors": {}},
        "runs": runs,
        "quality": summarize_quality(runs),
        "witness": {"transformer": WITNESS},
        "memory": {"bf16": {"weight_bytes": 3000 * MIB}, "quantized": {"weight_bytes": 1500 * MIB}},
        "machine": {"processor": "Some CPU", "devices": []},
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "checkpoint": {"bytes": 750 * MIB, "digest": "sha256:0"},
        "made": "2026-11-28T10:00:00Z",
    }  # fmt: skip


FACTS = {
    "verdict": "as declared",
    "quantized": "transformer: 30 of 40 linear layers, FP8; "
    "transformer_2: 20 of 50 linear layers, FP8",
    "beside the base": "transformer: as promised (cosine at least 0.9871 in 12 decoded layers)",
    "not called": "3 layers of transformer_2",
    "latents, PSNR": "at least 40 dB after the last step",
    "latents, cosine": "at least 0.95 at the worst step",
    "pictures, PSNR": "at least 37.5 dB",
    "pictures, SSIM": "at least 0.9",
    "pictures, MS-SSIM": "0.81 in the mean, 0.8 at worst",
    "pictures, FLIP": "0.26 in the mean, 0.27 at worst",
    "files": "750.0 MiB",
    "weights in memory": "3,000.0 MiB in BF16, 1,500.0 MiB quantized",
    "backends": "decode, torch",
}


def test_facts_of_the_model_card() -> None:
    facts = dict(validation_page.list_facts(make_report()))
    assert {name: facts[name] for name in FACTS} == FACTS
    assert "devices" not in facts
    assert dict(validation_page.list_facts(make_report(ok=False)))["verdict"] == "2 problems"
    card = validation_page.write_card(make_report())
    assert all(f"| {name} | {value} |" in card for name, value in FACTS.items())
    assert "Problems:" not in card
    assert "\nProblems:\n\n- one " in validation_page.write_card(make_report(ok=False))


def test_facts_stand_on_the_page() -> None:
    pictures = [[f"images/{run}-{kind}.png" for kind in validation_page.KINDS] for run in range(2)]
    page = validation_page.write_page(make_report(), pictures)
    for value in FACTS.values():
        assert value in page
    row = "<td>as declared</td><td>0.9993</td><td>0.0371</td><td>near</td>"
    assert f'<tr><th scope="row">to_q</th>{row}</tr>' in page
    assert page.index("images/0-bf16.png") < page.index("images/1-bf16.png")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3.0], "3"),
        ([3.0, 2.0, 4.0], "at least 2"),
        ([None, 2.0], "at least 2"),
        ([None], "infinite"),
        ([None, None], "infinite"),
    ],
)
def test_the_smallest_of_several(values: list[float | None], text: str) -> None:
    assert validation_page.show_least(values) == text


def test_the_curve_rises_with_the_error() -> None:
    """Step 1 is on the left; no error is at the bottom (y = 105), the largest at the top (5)."""
    steps = [make_step(None, 1.0, value) for value in (0.0, 0.1, 0.4, 0.2, 0.3)]
    curve = validation_page.draw_curve(steps)
    assert curve["points"] == [
        (5.0, 105.0),
        (77.5, 80.0),
        (150.0, 5.0),
        (222.5, 55.0),
        (295.0, 30.0),
    ]
    assert curve["line"].startswith("5.0,105.0 77.5,80.0 ")
    assert curve["told"].startswith("step 1: 0.0, step 2: 0.1, step 3: 0.4")
    assert validation_page.draw_curve([make_step(None, 1.0, 0.0)])["points"] == [(5.0, 105.0)]
    gap = validation_page.draw_curve([make_step(None, 1.0, None), make_step(None, 1.0, 0.5)])
    assert gap["points"] == [(5.0, 5.0)]


def test_pictures_of_a_clip_are_of_its_middle_frame_and_the_difference_has_a_sign() -> None:
    def frames(*shades: int) -> list[Any]:
        return [np.full((4, 6, 3), shade, dtype=np.uint8) for shade in shades]

    base = replace(make_run(1.0), media=frames(10, 50, 90))
    run = replace(make_run(1.0), media=frames(20, 60, 30))
    left, right, shown = validation_page.draw_pictures((base, run))
    assert [image.getpixel((0, 0))[0] for image in (left, right, shown)] == [50, 60, 128 + 40]
    assert left.size == (6, 4)
    brighter, darker = validation_page.draw_pictures((run, base))[2], shown
    assert brighter.getpixel((5, 3))[0] == 128 - 40
    assert darker.getpixel((5, 3))[0] == 128 + 40


@pytest.mark.parametrize(
    ("layers", "request_words", "text"),
    [
        ({}, {}, "no transformer component is quantized"),
        ({"a": ()}, {}, "is quantized itself: give the base model"),
        ({"a": ()}, {"component_paths": {"transformer": "x"}}, ""),
        ({"a": ()}, {"weights_paths": {"transformer": "x"}}, ""),
        ({"a": ()}, {"quantization": "fp8"}, ""),
    ],
)
def test_what_there_is_to_validate(
    layers: dict[str, Any],
    request_words: dict[str, Any],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One quantized component of two is enough; the base model must be another than it."""
    parts = {"transformer": SimpleNamespace(layers=layers), "other": SimpleNamespace(layers={})}
    made = SimpleNamespace(components=parts)
    monkeypatch.setattr(validate, "require_plan", lambda request: made)
    request = replace(Request(model_path="some/base"), **request_words)
    if not text:
        assert validate.plan_quantized(request) is made
        return
    with pytest.raises(UsageError, match=text):
        validate.plan_quantized(request)


def test_a_table_of_every_prompt_with_mean_and_worst() -> None:
    report = make_report()
    assert validation_page.list_quality(report) == [
        ["a <fox> (seed 3)", "41", "0.9", "0.8", "0.25"],
        ["a <fox> (seed 3)", "37.5", "0.92", "0.82", "0.27"],
        ["mean", "39.25", "0.91", "0.81", "0.26"],
        ["worst", "37.5", "0.9", "0.8", "0.27"],
    ]
    caption = "a <fox>, seed 3: PSNR 41 dB, SSIM 0.9, MS-SSIM 0.8, FLIP 0.25"
    assert validation_page.write_caption(report["runs"][0]) == caption
    page = validation_page.write_page(report, [["a", "b", "c"]] * 2)
    assert '<th scope="row">worst</th><td>37.5</td>' in page
    assert "a &lt;fox&gt; (seed 3)" in page
    assert 'src="contact-sheet.png"' in page


def test_what_was_not_measured_is_said() -> None:
    report = make_report()
    for run in report["runs"]:
        run["quality"] = {"ms_ssim": None, "flip": None, "missing": {"flip": "no package"}}
    report["quality"] = summarize_quality(report["runs"])
    assert validation_page.list_quality(report)[-1] == ["worst", "37.5", "0.9", "–", "–"]
    assert "flip was not measured: no package." in validation_page.write_page(
        report, [["a", "b", "c"]] * 2
    )
    assert "pictures, FLIP" not in dict(validation_page.list_facts(report))


def test_a_file_of_prompts_has_one_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n# a remark\n  two dogs \n")
    assert validate.read_prompts(file) == ("a cat", "two dogs")
    link = tmp_path / "elsewhere" / "link.txt"
    link.parent.mkdir()
    link.symlink_to(file)
    assert validate.read_prompts(link) == ("a cat", "two dogs")


def make_endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("# nothing\n"), "holds no prompt"),
        (lambda path: path.write_bytes(b"\xd6\x00"), "can't decode byte 0xd6"),
        (make_endless, "it has 3221225472 bytes"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "prompts.txt")
    with pytest.raises(UsageError, match=said):
        validate.read_prompts(tmp_path / "prompts.txt")
