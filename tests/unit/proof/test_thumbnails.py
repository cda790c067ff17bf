"""Thumbnails: what is drawn, how large it may be, and what a record must not hold."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantmatrix.measure.thumbnails import GAIN, draw
from quantmatrix.proof import thumbnails
from quantmatrix.proof.thumbnails import PICTURES, PNG, list_problems


def read(picture: str) -> Any:
    """uint8 [height, width, 3] of a data URI, by Pillow."""
    with Image.open(io.BytesIO(base64.b64decode(picture.removeprefix(PNG)))) as image:
        return np.asarray(image.convert("RGB"))


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)


def test_small_pictures_keep_their_pixels() -> None:
    frames = make(1, 64, 48, 3)
    found = draw(frames, frames)
    shown = read(found["baseline"])
    assert shown.shape == (64, 48, 3)
    distance = np.abs(shown.astype(int) - frames[0].numpy().astype(int))
    assert distance[..., 1].max() <= 22  # half a step of seven greens
    assert distance.max() <= 26  # half a step of six reds and blues
    assert found["baseline"] == found["quantized"]
    assert read(found["difference"]).max() == 0
    assert (found["gain"], found["shown"]) == (GAIN, "the picture")


def test_the_difference_is_the_largest_channel_times_the_gain() -> None:
    frames = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    other = frames.clone()
    other[0, 3, 5, 2] += 10
    other[0, 4, 6] += 1
    other[0, 7, 8, 0] -= 100
    shown = read(draw(frames, other)["difference"])
    assert abs(int(shown[3, 5, 0]) - 10 * GAIN) <= 8  # half a step of 16 greys
    assert abs(int(shown[4, 6, 0]) - GAIN) <= 9
    assert shown[7, 8, 0] == 255
    shown = shown.copy()
    for place in ((3, 5), (4, 6), (7, 8)):
        shown[place] = 0
    assert shown.max() == 0


def test_a_difference_is_drawn_as_the_nearest_of_sixteen_greys() -> None:
    distances = torch.arange(40)
    frames = torch.full((1, 2, 40, 3), 100, dtype=torch.uint8)
    other = frames.clone()
    other[0, :, :, 1] += distances.to(torch.uint8)
    shown = read(draw(frames, other)["difference"])[0, :, 0].tolist()
    assert shown == [17 * min(15, round(GAIN * n / 17)) for n in distances.tolist()]


def test_large_pictures_shrink_to_the_mean_of_boxes() -> None:
    frames = make(1, 720, 1280, 3)
    found = draw(frames, frames)
    shown = read(found["baseline"])
    assert shown.shape == (51, 91, 3)  # boxes of 14
    mean = frames[0, :14, :14].double().mean(dim=(0, 1))
    assert np.abs(shown[0, 0] - mean.numpy()).max() <= 26
    apart = draw(frames, make(1, 720, 1280, 3, seed=1))
    assert read(apart["difference"]).min() > 200  # taken before means make pictures alike


def test_a_clip_shows_three_frames() -> None:
    frames = make(5, 32, 32, 3)
    found = draw(frames, frames)
    assert found["shown"] == "frames 1, 3, 5 of 5"
    alone = [read(draw(frames[n : n + 1], frames[:1])["baseline"]) for n in (0, 2, 4)]
    assert np.array_equal(read(found["baseline"]), np.concatenate(alone, axis=1))
    assert draw(frames[:2], frames[:2])["shown"] == "frames 1, 2 of 2"


def test_odd_widths_and_equal_bytes() -> None:
    frames, other = make(1, 33, 31, 3), make(1, 33, 31, 3, seed=1)
    assert read(draw(frames, other)["difference"]).shape == (33, 31, 3)
    assert draw(frames, other) == draw(frames.clone(), other.clone())


@pytest.mark.parametrize("shape", [(1, 96, 96, 3), (81, 480, 832, 3), (1, 1024, 1024, 3)])
def test_what_is_drawn_is_what_a_record_may_hold(shape: tuple[int, ...]) -> None:
    assert list_problems(draw(make(*shape), make(*shape, seed=1))) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"quantized": "https://example.org/x.png"}, "quantized: 'https"),
        ({"quantized": f"{PNG}no base64"}, "quantized: is not base64"),
        ({"baseline": PNG + base64.b64encode(b"<svg>").decode()}, "baseline: is not a PNG"),
        ({"difference": 3}, "difference: 3 does not start"),
        ({"difference": PNG + "A" * 20_000}, "difference: takes 200"),
        ({"gain": 0}, "gain: 0"),
        ({"gain": True}, "gain: True"),
        ({"shown": ""}, "shown: ''"),
        ({"more": "x"}, "expected an object with baseline, difference, gain, quantized, shown"),
    ],
)
def test_what_a_record_must_not_hold(change: dict[str, Any], why: str) -> None:
    frames = make(1, 16, 16, 3)
    [problem] = list_problems({**draw(frames, frames), **change})
    assert problem.startswith(why)


def test_each_part_is_needed() -> None:
    frames = make(1, 16, 16, 3)
    whole = draw(frames, frames)
    for name in (*PICTURES, "gain", "shown"):
        assert list_problems({key: value for key, value in whole.items() if key != name})
    assert list_problems(None)
    assert set(whole) == thumbnails.KEYS
