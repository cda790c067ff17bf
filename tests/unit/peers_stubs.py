"""Stub programs that speak what the real ones document, and limits that tests hold runs to.

`sglang` and `xdit` are scripts on the path: unknown flags are errors, pictures and dumps go where the flags say.
`FAULT` plants a fault: `noise`, `bf16` (the base model's own picture), `wide` (right numbers, BF16 in
memory), `refuse`, `crash` (killed by a signal), `silent` (no picture).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from quantmatrix.proof.limits import Limits
from quantmatrix.tables.rows import CheckpointRow

SCRIPT = f"""#!{sys.executable}
import argparse, json, os, random, signal, sys
from pathlib import Path
from PIL import Image

fault = os.environ.get("FAULT", "")
"""
PICTURE = """
def draw(path, quantized, seed):
    noise = random.Random(seed)
    picture = Image.new("RGB", (16, 16))
    for y in range(16):
        for x in range(16):
            base = (16 * x, 16 * y, 128)
            shift = noise.randint(-1, 1) if quantized and fault != "bf16" else 0
            pixel = tuple(max(0, min(255, c + shift)) for c in base)
            if quantized and fault == "noise":
                pixel = tuple(noise.randint(0, 255) for _ in base)
            picture.putpixel((x, y), pixel)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def fail(quantized):
    if quantized and fault == "refuse":
        print("Traceback (most recent call last):")
        print("ValueError: no loader for this layout\\x1b[31m")
        print("sglang: error while starting")
        sys.exit(1)
    if quantized and fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
"""
SGLANG = (
    SCRIPT
    + PICTURE
    + """
if sys.argv[1:] == ["--version"]:
    print("sglang 0.5.6")
    sys.exit(0)
assert sys.argv[1] == "generate"
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("model-path", "transformer-path", "transformer-weights-path", "quantization", "output-path",
             "perf-dump-path", "prompt", "quantization-precision", "model-id"):
    parser.add_argument(f"--{name}")
for name in ("seed", "height", "width", "num-inference-steps", "num-frames", "quantization-rank"):
    parser.add_argument(f"--{name}", type=int)
for name in ("save-output", "enable-svdquant"):
    parser.add_argument(f"--{name}", action="store_true")
found = parser.parse_args(sys.argv[2:])
print(json.dumps(sys.argv[1:]))
given = (found.transformer_path, found.transformer_weights_path, found.quantization)
quantized = any(given) or "w8a8" in found.model_path
fail(quantized)
if fault != "silent" or not quantized:
    draw(Path(found.output_path) / "a_picture.png", quantized, found.seed)
wide = not quantized or fault in ("bf16", "wide")
dump = {"total_duration_ms": 1500.0, "steps": [{"name": "denoising", "duration_ms": 1200.0}],
        "memory_checkpoints": {"after_denoising": {"peak_allocated_mb": 64.0}},
        "weights": {"bfloat16": 1000} if wide else {"float8_e4m3fn": 500, "bfloat16": 10}}
Path(found.perf_dump_path).write_text(json.dumps(dump))
"""
)
XDIT = (
    SCRIPT
    + PICTURE
    + """
if sys.argv[1:] == ["--version"]:
    print("xfuser 0.4.5")
    sys.exit(0)
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("model", "prompt", "output_directory"):
    parser.add_argument(f"--{name}", required=True)
for name in ("seed", "height", "width", "num_inference_steps"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--use_fp8_gemms", action="store_true")
found = parser.parse_args()
draw(Path(found.output_directory) / "out.png", found.use_fp8_gemms, found.seed)
"""
)


def install(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a script of this name on the path."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


class Fixed:
    """Limits that are the same for every checkpoint."""

    def find(self, row: CheckpointRow) -> Limits:
        return Limits(psnr_db=30.0, cosine=0.99, relative_l2=0.1, layer_error=0.1)
