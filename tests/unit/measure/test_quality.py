"""MS-SSIM against its definition in numpy, FLIP against its package, and the contact sheet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from quantmatrix.measure import contact_sheet, quality
from quantmatrix.measure.latents import ShapeError

flip_evaluator = pytest.importorskip("flip_evaluator")
POWERS = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]


def picture(seed: int, height: int = 177, width: int = 182) -> np.ndarray:
    """Smooth noise: uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
    return (128 + 600 * smooth).clip(0, 255).astype(np.uint8)


def disturb(one: np.ndarray, seed: int, strength: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=one.shape)
    return (one + strength * noise).clip(0, 255).astype(np.uint8)


def ms_ssim_of_numpy(one: np.ndarray, two: np.ndarray) -> float:
    """By channel, with scipy's Gaussian, its border cut off."""

    def blur(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, 1.5, truncate=3.4)[5:-5, 5:-5]

    def halve(x: np.ndarray) -> np.ndarray:
        x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
        return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    channels = []
    for channel in range(3):
        a, b = (x[..., channel].astype(float) for x in (one, two))
        product = 1.0
        for scale, power in enumerate(POWERS):
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
            structure = (2 * cov + c2) / (va + vb + c2)
            light = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
            part = structure * light if scale == 4 else structure
            product *= max(part.mean(), 0) ** power
            a, b = halve(a), halve(b)
        channels.append(product)
    return float(np.mean(channels))


@pytest.mark.parametrize("strength", [5.0, 60.0])
def test_ms_ssim_follows_its_definition(strength: float) -> None:
    one = picture(0)
    two = disturb(one, 1, strength)
    found = quality.compute_ms_ssim(torch.from_numpy(one), torch.from_numpy(two))
    assert found == pytest.approx(ms_ssim_of_numpy(one, two), abs=1e-9)
    assert 0 < found < 1


def test_equal_pictures() -> None:
    found = quality.measure_quality([picture(0)], [picture(0)])
    assert found == {"ms_ssim": 1.0, "flip": 0.0, "missing": {}}


def test_flip_is_that_of_its_package_and_of_a_clip_the_mean() -> None:
    one, two = picture(0), disturb(picture(0), 1, 40.0)
    ours, theirs = (x.astype(np.float32) / 255 for x in (one, two))
    expected = flip_evaluator.evaluate(ours, theirs, "LDR")[1]
    assert expected > 0.02
    single = quality.measure_quality([one], [two])
    assert single["flip"] == pytest.approx(expected, abs=1e-4)
    clip = quality.measure_quality([one, one], [two, one])
    assert clip["flip"] == pytest.approx(expected / 2, abs=1e-4)
    assert clip["ms_ssim"] == pytest.approx((single["ms_ssim"] + 1) / 2, abs=2e-6)


def test_what_cannot_be_had_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "has_flip", lambda: False)
    found = quality.measure_quality([picture(0, 175, 300)], [picture(1, 175, 300)])
    assert (found["ms_ssim"], found["flip"]) == (None, None)
    assert found["missing"] == {
        "ms_ssim": "pictures of 300 x 175 pixels, five scales need 176 x 176",
        "flip": quality.NEEDS_FLIP,
    }


def test_pictures_of_other_sizes_are_an_error() -> None:
    with pytest.raises(ShapeError, match="expected one shape"):
        quality.measure_quality([picture(0)], [picture(0, 190)])
    small = torch.zeros(175, 200, 3, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="176 x 176"):
        quality.compute_ms_ssim(small, small)


def test_the_worst_of_a_metric_is_by_its_direction() -> None:
    runs = [
        {
            "prompt": prompt,
            "seed": 1,
            "media": {"psnr_db": psnr, "ssim": ssim},
            "quality": {"ms_ssim": None, "flip": flip, "missing": {"ms_ssim": "small"}},
        }
        for prompt, psnr, ssim, flip in (
            ("a", None, 0.9, 0.1),
            ("b", 30.0, 0.8, 0.3),
            ("c", 40.0, 0.95, 0.2),
        )
    ]
    found = quality.summarize_quality(runs)
    assert found["psnr_db"] == {"mean": 35.0, "worst": 30.0, "prompt": "b", "seed": 1}
    assert found["ssim"]["worst"] == 0.8
    assert found["flip"] == {"mean": 0.2, "worst": 0.3, "prompt": "b", "seed": 1}
    assert found["ms_ssim"] is None
    assert found["missing"] == {"ms_ssim": "small"}


def make_pair(one: np.ndarray, two: np.ndarray) -> Any:
    return tuple(SimpleNamespace(media=[x]) for x in (one, two))


@pytest.mark.parametrize("package", [True, False])
def test_the_sheet_has_a_row_a_run_and_black_where_pictures_are_equal(
    package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "has_flip", lambda: package)
    one = picture(0, 128, 256)
    pairs = [make_pair(one, one), make_pair(one, disturb(one, 1, 80.0))]
    sheet = contact_sheet.draw_sheet(pairs, ["equal", "far \u4e2d"], "stand-in: random")
    array = np.asarray(sheet).astype(int)
    height = 128 + 2 * contact_sheet.LINE + contact_sheet.GAP
    top, left = 3 * contact_sheet.LINE, contact_sheet.GAP + 2 * (256 + contact_sheet.GAP)
    maps = [array[top + n * height :, left:][:128, :256] for n in range(2)]
    assert maps[0].max() <= 4  # the first colour of magma is nearly black
    assert maps[1].mean() > maps[0].mean() + 20
    quantized = array[top + height :, 2 * contact_sheet.GAP + 256 :][:128, :256]
    assert (quantized == pairs[1][1].media[0]).all()


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(2, 1024, (256, 1)), (1024, 2, (1, 256)), (32, 1024, (256, 8)), (300, 200, (171, 256))],
)
def test_a_picture_of_a_sheet_has_one_pixel_at_least(
    height: int, width: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "has_flip", lambda: False)
    one = np.zeros((height, width, 3), np.uint8)
    assert [shown.size for shown in contact_sheet.draw_row(*make_pair(one, one))] == [size] * 3
