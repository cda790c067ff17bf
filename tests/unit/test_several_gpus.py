"""Several GPUs of one machine: any of them gives the same bits, and NCCL shares a generation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import context_parallel
import pytest
import torch

from quantmatrix import parallel
from quantmatrix.pipeline import build_pipeline

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="not measured: needs two CUDA devices"
)
FLUX = ("--model-path", "black-forest-labs/FLUX.1-dev")
FAMILIES = {
    "modelopt-fp8": (*FLUX, "--transformer-path", "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"),
    "modelopt-nvfp4": (
        *(*FLUX, "--transformer-path"),
        "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer",
    ),
    "nunchaku-svdq": (
        *(*FLUX, "--transformer-weights-path"),
        "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors",
    ),
    "msmodelslim": ("--model-path", "quantmatrix/wan-2-2-w8a8-dynamic"),
}
ROUNDING = 2.0**-6
"""Four units of BF16's eight bits, relative to the norm of the latents: attention is another kernel
for half of the heads, and codes of the inputs follow."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_gpu_gives_the_bits_of_the_first(family: str) -> None:
    seen = []
    for device in ("cuda:0", "cuda:1"):
        request = context_parallel.read([*FAMILIES[family], "--device", device])
        made = parallel.find_plan(request)
        pipeline = build_pipeline(made)
        seen.append(context_parallel.watch(request, made, pipeline)["latents"])
        assert next(pipeline.transformer.parameters()).device == torch.device(device)
    torch.cuda.set_device(0)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_gpus_give_the_latents_of_one(family: str, tmp_path: Path) -> None:
    words = [*FAMILIES[family], "--device", "cuda"]
    request = context_parallel.read(words)
    made = parallel.find_plan(request)
    one = context_parallel.watch(request, made, build_pipeline(made))
    target = tmp_path / "seen.pt"
    together = [*words, "--nproc-per-node", "2"]
    launcher = parallel.name_launcher(2)
    done = subprocess.run(
        [*launcher, context_parallel.__file__, str(target), *together],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(target)
    assert two["calls"] == one["calls"] > 0
    assert two["rows"] < 0.8 * one["rows"]
    for alone, shared in zip(one["latents"], two["latents"], strict=True):
        distance = (alone.cpu().float() - shared.cpu().float()).norm() / alone.float().norm().cpu()
        assert distance <= ROUNDING, distance
