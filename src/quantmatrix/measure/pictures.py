"""Image metrics: PSNR and SSIM of pictures and clips, in float64, as the literature defines them.

Both take uint8 frames `[frames, height, width, channels]`. A clip's PSNR is that of all its frames
together; its SSIM is the mean over frames.

| metric | definition | equal pictures |
| ------ | ---------- | -------------- |
| `psnr_db` | 20 log10(255 / rms(c - r)) | infinite |
| `ssim`    | Wang et al. 2004: mean over pixels and channels of |  1 |
|           | (2 m_r m_c + C1)(2 s_rc + C2) / ((m_r^2 + m_c^2 + C1)(s_r^2 + s_c^2 + C2)) | |

Means `m`, variances `s^2` and covariance `s_rc` are weighted by a Gaussian of sigma 1.5 in a window
of 11 x 11 pixels that lies inside the picture; C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. This is
scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
data_range=255)`, and torchmetrics' map without the border that it mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from quantmatrix.measure.latents import ShapeError, compare_frames
from quantmatrix.runtime.media import stack_frames

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2


def measure_media(reference: Sequence[Any], candidate: Sequence[Any]) -> dict[str, Any]:
    """PSNR, SSIM and absolute differences of two lists of PIL images or arrays; see the module."""
    return measure_frames(stack_frames(reference), stack_frames(candidate))


def measure_frames(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, Any]:
    """The same for uint8 [frames, height, width, channels]; infinite PSNR is null."""
    found: dict[str, Any] = dict(compare_frames(reference, candidate))
    per_frame = [
        float(f"{compute_ssim(r, c):.6g}") for r, c in zip(reference, candidate, strict=True)
    ]
    found["ssim"] = float(f"{sum(per_frame) / len(per_frame):.6g}")
    if len(per_frame) > 1:
        found["ssim_per_frame"] = per_frame
    return found


def compute_ssim(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """SSIM of two uint8 pictures [height, width, channels] of at least 11 x 11 pixels.

    Raises ShapeError for smaller ones, and for two that are not of one such shape.
    """
    if reference.shape != candidate.shape or reference.ndim != 3:
        raise ShapeError(
            f"pictures of {list(reference.shape)} and {list(candidate.shape)} elements: "
            "expected two of one [height, width, channels]"
        )
    if min(reference.shape[:2]) < WINDOW:
        raise ShapeError(
            f"a picture of {list(reference.shape[:2])} pixels: SSIM needs {WINDOW} x {WINDOW}"
        )
    r, c = (x.to("cpu", torch.float64).permute(2, 0, 1) for x in (reference, candidate))
    products = torch.stack([r, c, r * r, c * c, r * c])
    mean_r, mean_c, square_r, square_c, product = smooth(products)
    variances = square_r - mean_r**2 + square_c - mean_c**2
    covariance = product - mean_r * mean_c
    above = (2 * mean_r * mean_c + C1) * (2 * covariance + C2)
    below = (mean_r**2 + mean_c**2 + C1) * (variances + C2)
    return float((above / below).mean())


def smooth(planes: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted means of planes [..., height, width] where the window lies inside.

    Planes are float64; each loses 10 rows and 10 columns.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    rows = functional.conv2d(flat, weights.view(1, 1, -1, 1))
    both = functional.conv2d(rows, weights.view(1, 1, 1, -1))
    return both.view(*planes.shape[:-2], *both.shape[-2:])
