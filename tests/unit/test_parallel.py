"""Two processes share one generation: the latents of one process, one file, clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import context_parallel
import pytest
import torch

from quantmatrix import cli, parallel
from quantmatrix.errors import RefusedError, UsageError
from quantmatrix.pipeline import build_pipeline
from quantmatrix.request import Request

FLUX = (
    *("--model-path", "black-forest-labs/FLUX.1-dev"),
    *("--transformer-path", "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"),
)
WAN = (
    *("--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    *("--transformer-path", "BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer"),
)
Z_IMAGE = (
    *("--model-path", "Tongyi-MAI/Z-Image-Turbo"),
    *("--transformer-path", "quantmatrix/z-image-modelopt-fp8"),
)
SHARED = {"flux-1": FLUX, "wan-2-2": WAN}
ROUNDING = 2.0**-7
"""Two units of BF16's eight bits, relative to the norm of the latents."""


def run_together(target: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """What rank 0 of two processes saw."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, context_parallel.__file__, str(target), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(target))


@pytest.mark.parametrize("model", SHARED)
def test_two_processes_give_the_latents_of_one(model: str, tmp_path: Path) -> None:
    request = context_parallel.read(list(SHARED[model]))
    made = parallel.find_plan(request)
    one = context_parallel.watch(request, made, build_pipeline(made))
    two = run_together(tmp_path / "seen.pt", SHARED[model])
    assert two["calls"] == one["calls"] > 0
    assert two["rows"] < 0.8 * one["rows"]  # else nothing was shared
    assert len(one["latents"]) == len(two["latents"]) > 1
    for alone, shared in zip(one["latents"], two["latents"], strict=True):
        distance = (alone.float() - shared.float()).norm() / alone.float().norm()
        assert distance <= ROUNDING


def test_only_the_first_process_writes_and_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", *FLUX, "--tiny", "--device", "cpu", "--prompt", "a fox", "--json"]
    more = ["--nproc-per-node", "2", "--output-path", str(tmp_path)]
    assert cli.main([*words, *more]) == 0
    out = capfd.readouterr().out
    [run] = json.loads(out)["runs"]
    assert [str(path) for path in tmp_path.iterdir()] == [run["output"]]
    assert run["quantized_layers"]["transformer"] > 0


def test_model_without_a_plan_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["generate", *Z_IMAGE, "--tiny", "--device", "cpu", "--nproc-per-node", "2"]
    assert cli.main(words) == cli.EXIT_REFUSED
    err = capfd.readouterr().err
    assert "ZImageTransformer2DModel" in err
    assert "has no context-parallel plan" in err


def test_what_cannot_be_shared_is_said_before_anything_starts() -> None:
    request = Request.from_words([*FLUX, "--tiny", "--device", "cpu"])
    made = parallel.find_plan(request)
    parallel.check(made, 2)
    for count, message in ((0, "expected 1 or more"), (3, "2 attention heads")):
        with pytest.raises(UsageError, match=message):
            parallel.check(made, count)
    with pytest.raises(UsageError, match="leave out the offload"):
        parallel.check(replace(made, layerwise_offload=True), 2)
    on_gpus = replace(made.machine, device="cuda")
    if torch.cuda.device_count() < 64:
        with pytest.raises(UsageError, match="cuda devices here"):
            parallel.check(replace(made, machine=on_gpus), 64)
    with pytest.raises(UsageError, match="without a number"):
        parallel.check(replace(made, machine=replace(on_gpus, device="cuda:1")), 2)
    with pytest.raises(RefusedError, match="z-image: transformer is a ZImage"):
        parallel.require_plan("z-image", "transformer", "ZImageTransformer2DModel")
