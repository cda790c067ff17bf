"""Loading: our loader beside diffusers `from_pretrained`, on a file of more than 2 GB.

Each way runs in processes of its own, in turn (A B A B ...), and touches every byte: one read per
page. A first load in each process imports what is imported on first use. Reported: CPU and wall
seconds, and anonymous memory beyond the mapped file. The bars are 1.1 times the time of diffusers,
which looks at no number, for a load that looks at none (`unchecked`), and 10 % of the file in
anonymous memory.

That plain tensors are looked at for NaN has a bar of its own: the CPU seconds of that, for the
quantized file, are at most 3 % of what its load takes from a disk. The share for the file in full
precision, of which every number is looked at, is reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = ("diffusers", "quantmatrix-unchecked", "quantmatrix", "modelopt-fp8")
ROUNDS = 3
CHECK_SHARE = 0.03

CHILD = """
import gc, json, sys, time
way, base, quantized = sys.argv[1:]
import torch, diffusers
from diffusers import FluxTransformer2DModel
import quantmatrix.api, quantmatrix.families.fp8, quantmatrix.families.modelopt_fp8
from quantmatrix.runtime import stored_values

if way.endswith("-unchecked"):
    way = way.removesuffix("-unchecked")
    stored_values.is_finite = lambda numbers: True

def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024

def load():
    if way == "diffusers":
        return FluxTransformer2DModel.from_pretrained(base, dtype=torch.bfloat16)
    if way == "quantmatrix":
        return quantmatrix.api.load_transformer(base)
    return quantmatrix.api.load_transformer(base, transformer_path=quantized, backend="reference")

load()  # modules that are imported on first use are not what is measured
gc.collect()
before = anonymous()
start, cpu = time.perf_counter(), time.process_time()
model = load()
total = 0
for tensor in [*model.parameters(), *model.buffers()]:
    flat = tensor.detach().flatten().view(torch.uint8)
    total += int(flat[::4096].sum(dtype=torch.int64))
print(json.dumps({
    "wall": time.perf_counter() - start, "cpu": time.process_time() - cpu,
    "anonymous": anonymous() - before, "touched": total}))
"""


CHECK = """
import json, sys, time
import torch
from quantmatrix.kernels.number_formats import is_finite
from quantmatrix import load_transformer
base, quantized = sys.argv[1:]
model = load_transformer(base, transformer_path=quantized or None, backend=quantized and "reference")
plain = [tensor.detach() for tensor in model.parameters()]
seconds = []
for _ in range(5):
    start = time.process_time()
    assert all(map(is_finite, plain))
    seconds.append(time.process_time() - start)
print(min(seconds))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A FLUX.1 transformer of more than 2 GB, in BF16 and as ModelOpt FP8."""
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    from quantmatrix.families import modelopt_fp8
    from quantmatrix.families.protocol import Calibration

    folder = tmp_path_factory.mktemp("big")
    base, quantized = folder / "base", folder / "quantized"
    torch.set_default_dtype(torch.bfloat16)
    model = FluxTransformer2DModel(num_layers=2, num_single_layers=4)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(base, max_shard_size="100GB")
    del model
    tensors = load_file(base / "diffusion_pytorch_model.safetensors")
    scheme = modelopt_fp8.SCHEMES["FP8"]
    layers = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and "blocks." in name
    ]
    for layer in layers:
        weight = tensors.pop(f"{layer}.weight")
        ones = torch.ones(weight.shape[1])
        made = modelopt_fp8.quantize(weight, scheme, calibration=Calibration(-ones, ones))
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
    config = json.loads((base / "config.json").read_text())
    declared = modelopt_fp8.declare(dict.fromkeys(layers, scheme), [])
    quantized.mkdir()
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization_config": declared.config})
    )
    save_file(tensors, quantized / "diffusion_pytorch_model.safetensors")
    return base, quantized


def measure(way: str, folders: tuple[Path, Path]) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, way, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def forget(folder: Path) -> None:
    """Let the next reader of a folder's weights wait for the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_check(folders: tuple[Path, Path], *, quantized: bool) -> tuple[float, float]:
    """(CPU seconds of looking at all plain tensors, wall seconds of a load from disk)."""
    base, coded = folders
    code = CHILD.replace("gc.collect()\n", "gc.collect(); print('ready', flush=True); input()\n")
    way = "modelopt-fp8-unchecked" if quantized else "quantmatrix-unchecked"
    loaded = []
    for _ in range(ROUNDS):
        child = subprocess.Popen(
            [sys.executable, "-c", code, way, str(base), str(coded)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        forget(coded if quantized else base)
        said, _ = child.communicate("\n")
        loaded.append(json.loads(said.splitlines()[-1])["wall"])
    words = [sys.executable, "-c", CHECK, str(base), str(coded) if quantized else ""]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout), statistics.median(loaded)


def test_looking_for_nan(benchmark, folders: tuple[Path, Path]) -> None:
    for name, quantized in (("full_precision", False), ("modelopt-fp8", True)):
        seconds, load = measure_check(folders, quantized=quantized)
        benchmark.extra_info[f"{name}_check_cpu"] = seconds
        benchmark.extra_info[f"{name}_load_wall"] = load
        benchmark.extra_info[f"{name}_share"] = seconds / load
    benchmark.pedantic(lambda: None, rounds=1)
    print(json.dumps(dict(benchmark.extra_info), indent=1))
    assert benchmark.extra_info["modelopt-fp8_share"] <= CHECK_SHARE


def test_load_and_touch(benchmark, folders: tuple[Path, Path]) -> None:
    size = (folders[0] / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 2e9
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in WAYS:
        measure(way, folders)
    for _ in range(ROUNDS):
        for way in WAYS:
            results[way].append(measure(way, folders))
    benchmark.pedantic(measure, args=("quantmatrix", folders), rounds=1)
    for way, runs in results.items():
        for key in ("wall", "cpu", "anonymous"):
            benchmark.extra_info[f"{way}_{key}"] = statistics.median(run[key] for run in runs)
    pairs = zip(results["quantmatrix-unchecked"], results["diffusers"], strict=True)
    ratio = statistics.median(ours["cpu"] / theirs["cpu"] for ours, theirs in pairs)
    benchmark.extra_info["file_bytes"] = size
    benchmark.extra_info["cpu_ratio_to_diffusers"] = ratio
    print(json.dumps(dict(benchmark.extra_info), indent=1))
    assert results["quantmatrix"][0]["touched"] == results["diffusers"][0]["touched"]
    assert ratio <= 1.1
    assert benchmark.extra_info["quantmatrix_anonymous"] <= 0.1 * size
    assert benchmark.extra_info["modelopt-fp8_anonymous"] <= 0.1 * size
