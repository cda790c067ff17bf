"""SSIM against its formula written as plain loops, and its behaviour."""

from __future__ import annotations

import math

import pytest
import torch

from quantmatrix.measure import pictures
from quantmatrix.measure.latents import ShapeError


def picture(seed: int, height: int = 14, width: int = 13, channels: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (height, width, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def ssim_by_loops(one: torch.Tensor, two: torch.Tensor) -> float:
    weights = {
        (i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2))
        for i in range(-5, 6)
        for j in range(-5, 6)
    }
    total = sum(weights.values())
    values = []
    height, width, channels = one.shape
    for channel in range(channels):
        a, b = one[..., channel].tolist(), two[..., channel].tolist()
        for y in range(5, height - 5):
            for x in range(5, width - 5):
                at = [
                    (w / total, a[y + i][x + j], b[y + i][x + j]) for (i, j), w in weights.items()
                ]
                ma = sum(w * p for w, p, _ in at)
                mb = sum(w * q for w, _, q in at)
                va = sum(w * (p - ma) ** 2 for w, p, _ in at)
                vb = sum(w * (q - mb) ** 2 for w, _, q in at)
                cov = sum(w * (p - ma) * (q - mb) for w, p, q in at)
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                above = (2 * ma * mb + c1) * (2 * cov + c2)
                values.append(above / ((ma * ma + mb * mb + c1) * (va + vb + c2)))
    return sum(values) / len(values)


def test_ssim_follows_its_formula() -> None:
    one = picture(0)
    noisy = (one.int() + torch.randint(-20, 21, one.shape, generator=torch.Generator())).clamp(
        0, 255
    )
    for two in (picture(1), noisy.to(torch.uint8)):
        expected = ssim_by_loops(one, two)
        assert pictures.compute_ssim(one, two) == pytest.approx(expected, abs=1e-10)
    assert pictures.compute_ssim(one, one) == pytest.approx(1.0, abs=1e-15)


def test_a_clip_is_the_mean_of_its_frames() -> None:
    one = torch.stack([picture(0), picture(1)])
    two = torch.stack([picture(0), picture(2)])
    found = pictures.measure_frames(one, two)
    assert found["ssim_per_frame"][0] == 1
    assert found["ssim"] == pytest.approx(sum(found["ssim_per_frame"]) / 2, abs=1e-6)
    single = pictures.measure_frames(one[1:], two[1:])
    assert "ssim_per_frame" not in single
    assert found["psnr_db"] == pytest.approx(single["psnr_db"] + 10 * math.log10(2), abs=1e-4)


def test_small_and_unequal_pictures_are_errors() -> None:
    with pytest.raises(ShapeError, match="11 x 11"):
        pictures.compute_ssim(picture(0, 10, 20), picture(1, 10, 20))
    with pytest.raises(ShapeError, match="expected two of one"):
        pictures.compute_ssim(picture(0, 12, 20), picture(1, 20, 12))
