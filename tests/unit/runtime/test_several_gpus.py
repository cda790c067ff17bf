"""Several GPUs of one machine: any of them gives the same bits, and NCCL shares a generation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import context_parallel
import pytest
import torch

from quantmatrix.runtime import parallel

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
        seen.append(context_parallel.run_alone([*FAMILIES[family], "--device", device])["latents"])
        assert torch.cuda.current_device() == int(device[-1])
    torch.cuda.set_device(0)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_gpus_give_the_latents_of_one(family: str, tmp_path: Path) -> None:
    words = [*FAMILIES[family], "--device", "cuda"]
    one = context_parallel.run_alone(words)
    two = context_parallel.run_together(tmp_path / "seen.pt", words)
    context_parallel.check_shared(one, two, ROUNDING)


def test_graphs_of_two_gpus_give_the_latents_of_one_and_end(tmp_path: Path) -> None:
    """Whose graphs are still there when NCCL ends would wait for ever."""
    words = [*FAMILIES["modelopt-fp8"], "--device", "cuda", "--cuda-graph"]
    one = context_parallel.run_alone(words)
    two = context_parallel.run_together(tmp_path / "seen.pt", words)
    context_parallel.check_shared(one, two, ROUNDING)


def test_memory_of_the_other_gpu_grows_while_both_are_busy() -> None:
    """A mark of a meeting that was wiped would let one GPU wait for ten minutes."""
    program = Path(__file__).parents[1] / "peer_exchange.py"
    command = [*parallel.name_launcher(2), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["compared"] == 4 * 30
    assert seen["largest"] < 0.01
    assert all(count > 2 for count in seen["areas"].values())
