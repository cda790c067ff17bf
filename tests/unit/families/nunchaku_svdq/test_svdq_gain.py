"""What the low-rank branch and the smoothing are for, and that a run is the same everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix import api, load_transformer, models
from quantmatrix.api import plan
from quantmatrix.checkpoints.opening import fetch_pipeline
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.nunchaku_svdq import writer
from quantmatrix.measure.latents import compare_tensors, digest_latents
from quantmatrix.request import Request
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny.hub import use_tiny
from quantmatrix.tools import quantize
from quantmatrix.tools.recipe import WEIGHTS

BASES = {
    "flux-1": "black-forest-labs/FLUX.1-dev",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
}
GAIN_DB = 6.0
STRENGTH = 3.0
"""Size of the low-rank part of structured weights, over that of the rest."""


def round_to_awq(weight: torch.Tensor) -> torch.Tensor:
    """A weight that AWQ codes hold exactly: both forms have them, and neither has a branch there."""
    groups: torch.Tensor = weight.unflatten(1, (-1, 64))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7).bfloat16().float()
    return ((groups / scale).round().clamp(-7, 8) * scale).flatten(1).contiguous()


@pytest.fixture(scope="module", params=BASES)
def structured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline whose blocks have a strong part of rank 8, as trained weights have."""
    planned = plan(Request(model_path=BASES[request.param], tiny=True, device="cpu"))
    assert isinstance(planned, Plan)
    folder = tmp_path_factory.mktemp("structured") / request.param
    shutil.copytree(fetch_pipeline(planned.base, planned.request.hub), folder)
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    blocks = models.load(request.param).BLOCKS
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(tensors.items()):
        if weight.ndim != 2 or name.split(".")[0] not in blocks:
            continue
        if "norm" in name or "_mod" in name:
            tensors[name] = round_to_awq(weight)
            continue
        rows, columns = weight.shape
        left = torch.randn(rows, 8, generator=generator)
        low = left @ torch.randn(8, columns, generator=generator)
        low *= STRENGTH * weight.norm() / low.norm()
        tensors[name] = ((weight + low) / (1 + STRENGTH**2) ** 0.5).contiguous()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


def measure_psnr(base: str, file: Path, backend: str) -> float:
    """PSNR of final latents against the full-precision run, dB."""
    options = {"model_path": base, "tiny": True, "device": "cpu", "dtype": "float32"}
    plain = api.generate(Request(**options))
    made = api.generate(
        Request(**options, weights_paths={"transformer": str(file)}, backend=backend)
    )
    return compare_tensors(plain.latents[-1], made.latents[-1]).psnr_db


def write_file(base: str, folder: Path) -> Path:
    folder.mkdir()
    file = folder / "svdq-int4_r32-made.safetensors"
    request = use_tiny(Request(model_path=base, tiny=True, device="cpu", dtype="float32"))
    quantize.quantize(
        request, family="nunchaku-svdq", precision="int4", rank=32, output=file, prompts=["a fox"]
    )
    return file


def test_rank_32_gains_over_plain_int4(
    structured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(structured)
    branch = measure_psnr(base, write_file(base, tmp_path / "branch"), "reference")

    def no_branch(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = weight.shape
        shape = torch.zeros(rank, columns, dtype=torch.float64)
        return shape, torch.zeros(rows, rank, dtype=torch.float64)

    monkeypatch.setattr(writer, "find_low_rank", no_branch)
    monkeypatch.setattr(
        writer,
        "find_smoothing",
        lambda weight, _: torch.ones(weight.shape[1], dtype=torch.float64),
    )
    plain = measure_psnr(base, write_file(base, tmp_path / "plain"), "reference")
    assert branch >= plain + GAIN_DB, (branch, plain)


@pytest.mark.parametrize("model", BASES)
def test_merged_latents_are_those_of_decode(model: str, tmp_path: Path) -> None:
    file = write_file(BASES[model], tmp_path / "made")
    options = {"model_path": BASES[model], "tiny": True, "device": "cpu", "dtype": "float32"}
    merged, decoded = (
        api.generate(
            Request(**options, weights_paths={"transformer": str(file)}, backend=backend)
        ).latents[-1]
        for backend in ("merged", "decode")
    )
    assert compare_tensors(decoded, merged).relative_l2 < 2**-8


PROGRAM = """
import json, sys
from test_svdq_gain import digest_runs

print(json.dumps([digest_runs(sys.argv[1], threads) for threads in (1, 2)]))
"""
BACKENDS = ("reference", "decode", "merged")


def digest_runs(file: str, threads: int) -> dict[str, str]:
    """Digests of the latents of each backend, and of a product of torch's own, by name."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(n, 1024, generator=generator) for n in (64, 256))
        found = {"plain": digest_latents([left @ right.T])}
        for backend in BACKENDS:
            request = Request(
                model_path=BASES["z-image"], tiny=True, device="cpu", backend=backend,
                weights_paths={"transformer": file}, num_inference_steps=2,
            )  # fmt: skip
            found[backend] = digest_latents(api.generate(request).latents)
    finally:
        torch.set_num_threads(before)
    return found


def test_processes_and_threads_do_not_change_bits(tmp_path: Path) -> None:
    """Two runs in this process, two in a second: on one thread and on two.

    On some processors torch's own float32 product depends on the number of threads (an Intel Xeon
    with AMX splits long sums); there the run on two threads is not compared.
    """
    file = str(write_file(BASES["z-image"], tmp_path / "made"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, file],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one_thread, two_threads = json.loads(done.stdout.splitlines()[-1])
    here = digest_runs(file, 1)
    assert here == digest_runs(file, 1) == one_thread
    if two_threads["plain"] == here["plain"]:
        assert two_threads == here


def test_modulation_has_no_plain_form(tmp_path: Path) -> None:
    request = use_tiny(
        Request(model_path=BASES["flux-1"], tiny=True, device="cpu", dtype="float32")
    )
    with pytest.raises(UsageError, match=r"norm1.linear cannot be kept in full precision"):
        quantize.quantize(
            request, family="nunchaku-svdq", precision="int4", kept=[r".*\.norm1\.linear"],
            output=tmp_path / "svdq-int4_r32-x.safetensors", prompts=["a fox"],
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_plain_modulation_is_refused(tmp_path: Path) -> None:
    """It was loaded with its rows turned and without the 1 that its bias may hold."""
    file = write_file(BASES["flux-1"], tmp_path / "made")
    layer = "transformer_blocks.0.norm1.linear"
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors = {name: t for name, t in tensors.items() if not name.startswith(layer)}
    tensors[f"{layer}.weight"] = torch.zeros(1536, 256, dtype=torch.bfloat16)
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"norm1.linear.weight is stored plainly"):
        load_transformer(
            BASES["flux-1"], tiny=True, transformer_weights_path=str(file), backend="decode"
        )
