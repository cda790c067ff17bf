"""Ranges and limits: the last value that is taken, and the next one that is not."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.errors import UsageError
from quantmatrix.harness import shards
from quantmatrix.measure import latents
from quantmatrix.measure.latents import StepMetrics
from quantmatrix.measure.pictures import WINDOW, compute_ssim
from quantmatrix.proof import thumbnails
from quantmatrix.proof.limits import Limits
from quantmatrix.request import parse_number
from quantmatrix.runtime import media


@pytest.mark.parametrize("text", ["1/1", "1/3", "3/3", "12/12", "01/3"])
def test_shards_that_there_are(text: str) -> None:
    number, _, count = text.partition("/")
    assert shards.read_shard(text) == (int(number), int(count))


@pytest.mark.parametrize("text", ["0/1", "2/1", "4/3", "0/0"])
def test_shards_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match=f"--shard {text}: expected i/n"):
        shards.read_shard(text)


@pytest.mark.parametrize(
    ("seconds", "units", "parts"),
    [(0.0, 9, 1), (100.0, 9, 1), (100.1, 9, 2), (200.0, 9, 2), (900.0, 9, 9), (900.1, 9, 9)],
)
def test_parts_of_a_job_last_at_most_as_long_as_asked(
    seconds: float, units: int, parts: int
) -> None:
    assert shards.count_parts(seconds, units, 100.0) == parts
    assert shards.count_parts(1e9, 10**6) == shards.MOST_PARTS


def test_seconds_of_a_cell_are_loads_once_and_two_generations() -> None:
    cell: Any = SimpleNamespace(checks=("load", "latents"))
    timings = {"load": 2.0, "load_base": 5.0, "generate": 10.0, "decode": 100.0, "command": 1.0}
    record: Any = SimpleNamespace(timings=timings)
    assert shards.estimate(cell, record) == 2.0 + 5.0 + 20.0 + 1.0
    assert shards.estimate(cell, None, 7.5) == 7.5
    assert shards.estimate(cell, SimpleNamespace(timings={}), 7.5) == 7.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0.0), ("-1e308", -1e308), ("1.5", 1.5), ("1e309", None), ("nan", None),
                        ("-inf", None), ("", None), ("1,5", None)],
)  # fmt: skip
def test_numbers_of_a_command_line(text: str, value: float | None) -> None:
    if value is not None:
        assert parse_number(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
        parse_number(text)


# --- pictures that show nothing --------------------------------------------------------------


def make_frames(*pairs: tuple[int, int]) -> torch.Tensor:
    """uint8 elements: (how many, of which value)."""
    return torch.tensor([value for count, value in pairs for _ in range(count)], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (make_frames((5, 100), (5, 102)), "constant"),
        (make_frames((5, 100), (5, 103)), ""),
        (make_frames((90, 0), (10, 128)), ""),
        (make_frames((91, 0), (9, 128)), "saturated: 91%"),
        (make_frames((50, 0), (41, 255), (9, 128)), "saturated: 91%"),
        (make_frames((50, 1), (50, 254)), ""),
        (make_frames((50, 0), (40, 255), (10, 128)).double() / 255, ""),
        (make_frames((50, 0), (41, 255), (9, 128)).double() / 255, "saturated"),
        (make_frames((5, 100), (5, 103)).double() / 255, ""),
        (make_frames((5, 100), (5, 101)).double() / 255, "constant"),
    ],
)
def test_pictures_that_show_nothing(frames: torch.Tensor, why: str) -> None:
    found = media.find_degeneration(frames)
    assert (found is None) if not why else (found is not None and why in found)


def test_the_smallest_picture_that_ssim_takes() -> None:
    picture = torch.randint(0, 256, (WINDOW, WINDOW, 3), dtype=torch.uint8)
    assert compute_ssim(picture, picture) == pytest.approx(1.0)
    for shape in ((WINDOW - 1, WINDOW, 3), (WINDOW, WINDOW - 1, 3)):
        small = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(latents.ShapeError, match="SSIM needs 11 x 11"):
            compute_ssim(small, small)


def test_thumbnails_at_their_size() -> None:
    start = thumbnails.PNG + thumbnails.START.decode()
    room = thumbnails.MOST_BYTES - len(start)
    fits = start + "A" * (room - (len(start) - len(thumbnails.PNG) + room) % 4)
    assert thumbnails.find_problem(fits) is None
    assert "at most" in str(thumbnails.find_problem(fits + "A" * 8))
    assert thumbnails.find_problem(fits[:-1]) == "is not base64"
    assert thumbnails.find_problem(fits[:-1] + "*") == "is not base64"
    assert "does not start with" in str(thumbnails.find_problem(fits[1:]))


# --- limits of a run -------------------------------------------------------------------------

ALLOWED = Limits(psnr_db=32.0, cosine=0.5, relative_l2=0.25)
WORST = StepMetrics(cosine=0.5, relative_l2=0.25, psnr_db=32.0, max_abs=1.0)


@pytest.mark.parametrize(
    ("name", "better"), [("psnr_db", math.inf), ("cosine", 1.0), ("relative_l2", 0.0)]
)
def test_limits_of_latents_at_their_edges(name: str, better: float) -> None:
    """A step that meets the limit exactly passes; so do better ones; the next worse one does not."""
    own = getattr(WORST, name)
    assert latents.judge([WORST, replace(WORST, **{name: better})], ALLOWED) == []
    worse = replace(WORST, **{name: math.nextafter(own, 2 * own - better)})
    for steps in ([WORST, worse], [worse, WORST]):
        [problem] = latents.judge(steps, ALLOWED)
        assert problem.startswith(f"{name} ")
        assert f"the limit is at {'most' if name == 'relative_l2' else 'least'}" in problem


def test_a_run_that_equals_bf16_in_every_step_fails() -> None:
    same = StepMetrics(cosine=1.0, relative_l2=0.0, psnr_db=math.inf, max_abs=0.0, identical=True)
    assert "bit for bit" in latents.judge([same, same], ALLOWED)[0]
    assert latents.judge([same, WORST], ALLOWED) == []
    broken = replace(WORST, nonfinite=3)
    assert latents.judge([same, broken], ALLOWED) == [
        "3 elements of the latents are NaN or infinite"
    ]
