"""Distances between runs, against their definitions and against scikit-image."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from quantmatrix.measure.latents import (
    ShapeError,
    compare_frames,
    compare_tensors,
    compare_trajectories,
    digest_latents,
    judge,
    summarize,
)
from quantmatrix.proof.limits import Limits
from quantmatrix.runtime import media


def make(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_metrics_follow_their_definitions() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    found = compare_tensors(reference, torch.tensor([[4.0, 4.0]]))
    assert found.cosine == pytest.approx(28 / (5 * math.sqrt(32)), abs=1e-15)
    assert found.relative_l2 == pytest.approx(0.2, abs=1e-15)
    assert found.psnr_db == pytest.approx(20 * math.log10(1 / math.sqrt(0.5)), abs=1e-12)
    assert found.max_abs == 1.0
    assert not found.identical


def test_float64_even_for_bf16() -> None:
    reference = make(0, 4, 64).bfloat16()
    candidate = (reference.double() + 1e-3).to(torch.float32)
    difference = candidate.double() - reference.double()
    found = compare_tensors(reference, candidate)
    assert found.max_abs == float(difference.abs().max())
    assert found.relative_l2 == pytest.approx(
        float(difference.norm() / reference.double().norm()), rel=1e-12
    )


def test_psnr_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    reference, candidate = make(1, 16, 16), make(1, 16, 16) + 0.01 * make(2, 16, 16)
    peak = float(reference.double().max() - reference.double().min())
    expected = metrics.peak_signal_noise_ratio(
        reference.double().numpy(), candidate.double().numpy(), data_range=peak
    )
    found = compare_tensors(reference, candidate)
    assert found.psnr_db == pytest.approx(expected, abs=1e-9)


def test_zero_norms() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    both = compare_tensors(zero, zero)
    assert (both.cosine, both.relative_l2, both.identical) == (1.0, 0.0, True)
    for pair in ((zero, one), (one, zero)):
        assert compare_tensors(*pair).cosine == 0.0
    assert compare_tensors(zero, one).relative_l2 == math.inf
    assert compare_tensors(one, zero).psnr_db == -math.inf


def test_parallel_vectors_never_exceed_one() -> None:
    x = make(3, 1000)
    assert compare_tensors(x, x * 3).cosine == pytest.approx(1.0, abs=1e-15)
    assert compare_tensors(x, x * 3).cosine <= 1.0
    assert compare_tensors(x, -x).cosine >= -1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_is_the_worst_there_is(bad: float) -> None:
    reference, candidate = make(4, 8), make(4, 8)
    candidate[3] = bad
    found = compare_tensors(reference, candidate)
    assert (found.cosine, found.psnr_db, found.nonfinite) == (0.0, -math.inf, 1)
    assert "NaN" in judge([found], Limits(0.0, 0.0, 9.0))[0]
    with pytest.raises(ShapeError, match="not a reference"):
        compare_tensors(candidate, reference)


def test_json_is_finite() -> None:
    x = make(5, 8)
    nan = torch.full_like(x, math.nan)
    summary = summarize(compare_trajectories([x, x], [x, nan]))
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text)["steps"][0]["psnr_db"] is None
    assert json.loads(text)["steps"][0]["identical"] is True


def test_shapes_and_step_counts_must_agree() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3\], candidate \[3, 2\]"):
        compare_tensors(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ShapeError, match="2 steps, candidate 1"):
        compare_trajectories([torch.ones(1)] * 2, [torch.ones(1)])
    with pytest.raises(ShapeError, match="without steps"):
        summarize([])


def test_the_worst_step_is_judged() -> None:
    x = make(6, 1000)
    near, far = x + 0.001 * make(7, 1000), x + 0.5 * make(8, 1000)
    limits = Limits(psnr_db=30.0, cosine=0.99, relative_l2=0.1)
    steps = compare_trajectories([x, x, x], [near, near, near])
    assert judge(steps, limits) == []
    for order in ([far, near, near], [near, far, near], [near, near, far]):
        problems = judge(compare_trajectories([x, x, x], order), limits)
        assert [p.split()[0] for p in problems] == ["psnr_db", "cosine", "relative_l2"]


def test_a_run_that_equals_bf16_fails() -> None:
    x = make(9, 100)
    problems = judge(compare_trajectories([x, x], [x, x]), Limits(0.0, 0.0, 9.0))
    assert "BF16 was loaded under a quantized label" in problems[0]
    one = compare_trajectories([x, x], [x, x + 1e-3])
    assert judge(one, Limits(0.0, 0.0, 9.0)) == []


def test_frames() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    two = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    found = compare_frames(torch.from_numpy(one), torch.from_numpy(two))
    expected = metrics.peak_signal_noise_ratio(one, two, data_range=255)
    assert found["psnr_db"] == pytest.approx(expected, rel=1e-5)
    assert found["max_abs"] == np.abs(one.astype(int) - two.astype(int)).max()
    same = compare_frames(torch.from_numpy(one), torch.from_numpy(one))
    assert (same["psnr_db"], same["mean_abs"]) == (None, 0.0)
    with pytest.raises(ShapeError, match="uint8"):
        compare_frames(torch.ones(2), torch.ones(2))


def test_media_are_stacked_from_pictures_and_arrays() -> None:
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert torch.equal(
        media.stack_frames([Image.fromarray(pixels)]), media.stack_frames([pixels / 255.0])
    )


def test_degenerate_output_is_named() -> None:
    rng = np.random.default_rng(2)
    alive = torch.from_numpy(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert media.find_degeneration(alive) is None
    assert "constant" in str(media.find_degeneration(torch.full_like(alive, 255)))
    white = torch.full((8, 8, 3), 255, dtype=torch.uint8)
    white[0, 0] = 7
    assert "saturated" in str(media.find_degeneration(white))
    assert "NaN" in str(media.find_degeneration(torch.tensor([0.0, 0.5, math.nan])))
    assert "nothing" in str(media.find_degeneration(torch.empty(0)))


def test_digest_tells_bits_dtype_and_shape_apart() -> None:
    x = make(10, 4, 4)
    digests = {
        digest_latents(latents)
        for latents in ([x], [x, x], [x.flatten()], [x.bfloat16()], [x + 1], [-x * 0], [x * 0])
    }
    assert len(digests) == 7
    assert digest_latents([x.T.contiguous().T]) == digest_latents([x])
    assert digest_latents([torch.tensor(1.0)]).startswith("sha256:")
