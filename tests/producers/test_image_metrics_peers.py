"""PSNR and SSIM against scikit-image and torchmetrics, where those define them."""

from __future__ import annotations

import pytest
import torch

from quantmatrix.measure import pictures

PAIRS = [(0, 64, 48, 5), (1, 33, 80, 40), (2, 16, 16, 255)]


def make_pair(seed: int, height: int, width: int, noise: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, height, width, 3)
    ramp = torch.linspace(0, 255, width).view(1, 1, width, 1).expand(shape)
    one = (ramp + torch.randint(-30, 31, shape, generator=generator)).clamp(0, 255)
    two = (one + torch.randint(-noise, noise + 1, shape, generator=generator)).clamp(0, 255)
    return one.to(torch.uint8), two.to(torch.uint8)


@pytest.mark.parametrize(("seed", "height", "width", "noise"), PAIRS)
def test_scikit_image(seed: int, height: int, width: int, noise: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    one, two = make_pair(seed, height, width, noise)
    found = pictures.measure_frames(one, two)
    psnr = metrics.peak_signal_noise_ratio(one.numpy(), two.numpy(), data_range=255)
    assert found["psnr_db"] == pytest.approx(psnr, rel=1e-5)
    for r, c in zip(one, two, strict=True):
        expected = metrics.structural_similarity(
            r.double().numpy(), c.double().numpy(), data_range=255, channel_axis=2,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert pictures.compute_ssim(r, c) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("seed", "height", "width", "noise"), PAIRS)
def test_torchmetrics(seed: int, height: int, width: int, noise: int) -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    one, two = make_pair(seed, height, width, noise)
    planes = [x.permute(0, 3, 1, 2).double() for x in (two, one)]
    found = pictures.measure_frames(one, two)
    psnr = float(image.peak_signal_noise_ratio(*planes, data_range=255.0))
    assert found["psnr_db"] == pytest.approx(psnr, rel=1e-5)
    _, maps = image.structural_similarity_index_measure(
        *planes, data_range=255.0, return_full_image=True
    )
    inside = maps[..., 5:-5, 5:-5]  # torchmetrics' own mean counts a mirrored border, too
    assert found["ssim"] == pytest.approx(float(inside.mean()), abs=1e-5)
