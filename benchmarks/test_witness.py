"""Witness: what comparing decoded layers with the base model's own weights costs a load.

The files have the names, shapes and sizes of FLUX.1-dev's transformer (57 blocks): 12 GB as FP8, 7 GB
as NVFP4, 24 GB in BF16. They are sparse, so that they take no room: only the rows that are compared
hold numbers, everything else reads as zeros. What is measured is therefore the witness's own work, in
CPU seconds of one thread and without the time of a disk (2 % of a file of 12 GB is 0.24 GB). A process
of its own counts the pages of the base model's file that are in the system's cache afterwards and were
not before, beside the bytes that the witness tells of on both sides; the pages of the checkpoint are
read by the loading anyway. The bars are 2 % of the checkpoint's bytes for both, and 3 s.
"""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

ROUNDS = 3
WEIGHTS = "diffusion_pytorch_model.safetensors"
BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
SCALE = 0.01
"""Of every FP8 layer, and of the blocks of every NVFP4 layer together with 1.0."""

CHILD = """
import ctypes, json, mmap, os, sys, time
base, quantized = sys.argv[1:]
import torch
torch.set_num_threads(1)
from quantmatrix.api import plan
from quantmatrix.request import Request
from quantmatrix.runtime.witness import verdict

FILE = f"{base}/diffusion_pytorch_model.safetensors"

def forget():
    handle = os.open(FILE, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)

def count_cached():
    size = os.path.getsize(FILE)
    with open(FILE, "rb") as stream, mmap.mmap(
        stream.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE
    ) as mapped:
        place = ctypes.c_void_p(torch.frombuffer(mapped, dtype=torch.uint8).data_ptr())
        seen = torch.zeros(-(-size // mmap.PAGESIZE), dtype=torch.uint8)
        target = ctypes.c_void_p(seen.data_ptr())
        assert ctypes.CDLL(None).mincore(place, ctypes.c_size_t(size), target) == 0
    return int((seen & 1).sum(dtype=torch.int64)) * mmap.PAGESIZE

request = Request(base, component_paths={"transformer": quantized}, device="cpu")
part = plan(request).components["transformer"]
torch.ones(8, 8) @ torch.ones(8, 8)
forget()
before = count_cached()
start, cpu = time.perf_counter(), time.process_time()
report = verdict.confirm(part, request)
cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": report.nbytes, "pages": count_cached() - before,
    "total": report.total_bytes, "layers": len(report.findings), "verdict": report.verdict,
    "lowest": min(f.likeness.cosine for f in report.findings)}))
"""


class Sparse:
    """A safetensors file of the right size whose tensors can be written row by row."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path, self.tensors = path, tensors
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            size = prod(shape) * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.folders = {name: entry["data_offsets"][0] for name, entry in header.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(self.start + end)

    def write(self, name: str, row: int, tensor: Any) -> None:
        """Put a tensor's bytes at a row of another that is as wide."""
        import torch

        dtype, shape = self.tensors[name]
        with self.path.open("r+b") as file:
            file.seek(self.start + self.folders[name] + row * prod(shape[1:]) * BYTES[dtype])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def list_weights() -> dict[str, tuple[int, ...]]:
    """Shapes of FLUX.1-dev's transformer."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        model = FluxTransformer2DModel(guidance_embeds=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_configs(folder: Path, base: Path, algorithm: str) -> None:
    """config.json of both, the quantized one with a ModelOpt block; and the model's index."""
    config = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    (base / "config.json").write_text(json.dumps(config))
    block = {"quant_method": "modelopt", "quant_algo": algorithm}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": block}))


@pytest.fixture(scope="module", params=["FP8", "NVFP4"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(base folder, quantized folder): true sizes, numbers in the rows that are compared."""
    folder = tmp_path_factory.mktemp(request.param)
    weights = list_weights()
    base = Sparse(folder / "base" / WEIGHTS, {n: ("BF16", s) for n, s in weights.items()})
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in weights.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2 or "blocks." not in name:
            stored[name] = ("BF16", shape)
            continue
        rows, columns = shape
        stored[f"{layer}.input_scale"] = ("F32", ())
        if request.param == "FP8":
            stored |= {name: ("F8_E4M3", shape), f"{layer}.weight_scale": ("F32", ())}
            continue
        stored[name] = ("U8", (rows, columns // 2))
        stored[f"{layer}.weight_scale"] = ("F8_E4M3", (rows, columns // 16))
        stored[f"{layer}.weight_scale_2"] = ("F32", ())
    quantized = Sparse(folder / "quantized" / WEIGHTS, stored)
    write_configs(quantized.path.parent, base.path.parent, request.param)
    fill(base, quantized)
    return request.param, base.path.parent, quantized.path.parent


def fill(base: Sparse, quantized: Sparse) -> None:
    """Random numbers in the rows that the witness will look at, quantized in the other file."""
    import torch

    from quantmatrix.api import plan
    from quantmatrix.kernels.nvfp4_arithmetic import encode
    from quantmatrix.request import Request
    from quantmatrix.runtime.plan.types import Plan
    from quantmatrix.runtime.witness.measure import choose_samples

    folders = {"transformer": str(quantized.path.parent)}
    planned = plan(Request(str(base.path.parent), component_paths=folders, device="cpu"))
    assert isinstance(planned, Plan)
    generator = torch.Generator().manual_seed(0)
    for sample in choose_samples(planned.components["transformer"]):
        piece, name = sample.piece, f"{sample.module}.weight"
        plain = torch.randn(sample.stop - sample.start, piece.in_features, generator=generator)
        base.write(name, sample.start, plain.bfloat16())
        whole = torch.tensor(SCALE)
        if piece.scheme.op == "linear.fp8":
            quantized.write(name, sample.start, (plain / SCALE).to(torch.float8_e4m3fn))
            quantized.write(f"{sample.module}.weight_scale", 0, whole)
            continue
        codes, scales, whole = encode(plain)
        quantized.write(name, sample.start, codes)
        quantized.write(f"{sample.module}.weight_scale", sample.start, scales)
        quantized.write(f"{sample.module}.weight_scale_2", 0, whole)


def measure(base: Path, quantized: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(base), str(quantized)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_witness_reads_little_and_is_quick(
    benchmark: Any, folders: tuple[str, Path, Path]
) -> None:
    _, base, quantized = folders
    runs = [measure(base, quantized) for _ in range(ROUNDS)]
    benchmark.pedantic(measure, args=(base, quantized), rounds=1)
    cpu = statistics.median(run["cpu"] for run in runs)
    benchmark.extra_info.update(runs[0], cpu=cpu)
    print(json.dumps(dict(benchmark.extra_info), indent=1))
    assert all(run["verdict"] == "agrees" for run in runs), runs
    assert runs[0]["lowest"] < 0.9999  # numbers were compared, not zeros
    assert runs[0]["total"] > 6e9
    assert runs[0]["bytes"] <= 0.02 * runs[0]["total"]
    assert runs[0]["pages"] <= 0.02 * runs[0]["total"]
    assert cpu <= 3
