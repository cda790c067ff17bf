"""Examples: what `--help` of every command ends with. Each is a command that its parser takes."""

from __future__ import annotations

BASE = "--model-path black-forest-labs/FLUX.1-dev"
FP8 = f"--tiny {BASE} --transformer-path BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
CELL = "modelopt-fp8-flux-1@cpu+decode"

EXAMPLES: dict[str, tuple[str, ...]] = {
    "agreement": ("agreement --fail-under 80",),
    "bench": (f"bench {FP8} --repeats 8", f"bench --tiny --row {CELL}"),
    "compare": (f"compare --tiny {BASE} black-forest-labs/FLUX.1-dev run.safetensors",),
    "compile": ("compile --hardware rtx-3090",),
    "completion": ("completion bash > ~/.local/share/bash-completion/completions/quantmatrix",),
    "dequantize": (f"dequantize {FP8} --output-path plain-transformer",),
    "doctor": ("doctor",),
    "evidence": ("evidence check reports/evidence --planned cpu",),
    "evidence carry": ("evidence carry HEAD",),
    "evidence check": ("evidence check reports/evidence --planned cpu",),
    "evidence merge": ("evidence merge shard-1 shard-2 --output-path reports/evidence",),
    "evidence schema": ("evidence schema",),
    "explain": ("explain --checkpoint modelopt-fp8-flux-1 --hardware h200",),
    "fallback": (f"fallback {FP8} --target-psnr 30 --output-path fallback",),
    "fleet": ("fleet run --address auto --evidence-dir reports/evidence",),
    "fleet run": ("fleet run --address auto --evidence-dir reports/evidence",),
    "fleet status": ("fleet status --evidence-dir reports/evidence",),
    "generate": (f"generate {FP8} --prompt 'a curious pikachu'",),
    "init": ("init matrix",),
    "inspect": ("inspect --tiny BBuf/flux1-dev-modelopt-fp8-sglang-transformer",),
    "matrix": ("matrix list --family modelopt-fp8 --hardware cpu",),
    "matrix check": ("matrix check", "matrix check --tables docs/matrix"),
    "matrix diff": ("matrix diff main..HEAD",),
    "matrix dry-run": ("matrix dry-run --hardware h200",),
    "matrix history": ("matrix history fp8-flux-1-native@h200",),
    "matrix jobs": ("matrix jobs --hardware h100 b200 --json",),
    "matrix list": ("matrix list --family modelopt-fp8 --hardware cpu",),
    "matrix schema": ("matrix schema",),
    "matrix show": (f"matrix show {CELL}",),
    "mutate": ("mutate modelopt-fp8 --gates plan witness",),
    "packet": ("packet check packets/gpu-h200",),
    "packet check": ("packet check packets/gpu-h200",),
    "packet make": (f"packet make {CELL} --tiny --output-path packet",),
    "plan": (f"plan {FP8} --hardware h200",),
    "quantize": (f"quantize --tiny {BASE} --family fp8 --output-path flux-1-fp8",),
    "recommend": (
        "recommend --hardware rtx-4090 --model flux-1 --memory-gib 16",
        "recommend --hardware auto --prefer speed",
    ),
    "report": (
        "report --check",
        "report --into docs/quantization.md --table families --columns family cli states=State",
    ),
    "run-column": ("run-column --runtime diffusers --hardware cpu --tiny",),
    "speed": ("speed --synthetic tiny --model-id flux-1 --family modelopt-fp8 --device cpu",),
    "summary": ("summary packets/gpu-h200/evidence",),
    "thresholds": ("thresholds", "thresholds --diff HEAD"),
    "tiny-hub": ("tiny-hub stand-ins",),
    "trace": (f"trace {FP8} --num-inference-steps 2",),
    "true-size": ("true-size modelopt-fp8-flux-1-native@h200",),
    "validate": (f"validate {FP8} --output-path validation",),
}
"""Examples by command, without the program's name."""


def write_epilog(prog: str) -> str:
    """The examples of the parser of this name, as the end of its help; empty where there are none."""
    found = EXAMPLES.get(prog.removeprefix("quantmatrix "), ())
    if not found:
        return ""
    return "\n".join(
        ["examples:" if len(found) > 1 else "example:", *(f"  quantmatrix {e}" for e in found)]
    )
