"""The page of a Hopper measurement: every goal beside the number that was measured for it.

    python benchmarks/hopper_page.py reports/evidence/h200/measurements

writes README.md into the folder. `hopper.json` holds the whole run; `hopper-again*.json`, in the order of
their names, later runs of some forms, whose numbers take the place of the earlier ones. Ratios are
medians of one process, quantized over BF16; `graph` means replayed from a CUDA graph, `compiled`
diffusers' regional compilation. What `several_gpus.py` and `first_picture.py` measured is shown, too,
where it is kept beside (`several-gpus*.json`, `first-picture.json`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FP8, RECODED = "modelopt-fp8 FP8 torch", "modelopt-nvfp4 NVFP4 fp8-recode"
PACKED, BFL = "modelopt-nvfp4 NVFP4 packed", "diffusers nvfp4 bfl"
ROWS = "torchao float8-row torch"
MERGED, INT8 = "nunchaku-svdq int4_r32 merged", "msmodelslim W8A8 int8"
FLUX = "step flux-1"
LINEAR_TFLOP, ATTENTION_TFLOP = 59.5, 14.9
"""One forward of FLUX.1-dev at 1024 pixels and 512 tokens of text."""
COMPILED = (
    ("Wan2.2 480p", "step wan-2-2", 0.68),
    ("Qwen-Image", "step qwen-image", 0.50),
    ("Z-Image", "step z-image", 0.40),
)
"""(model, stage, most that its compiled step with a graph may take of an eager one in BF16)."""
AGAIN = "hopper-again*.json"
SEVERAL = "several-gpus*.json"
FIRST = "first-picture.json"
Goal = tuple[str, float | None, float, str]


def ratio(stages: dict[str, Any], stage: str, form: str, other: str = "bf16") -> float | None:
    """Time of a form over that of a BF16 way of the same stage; None: not measured."""
    found = stages.get(stage, {}).get(form, {})
    return found["ratios"].get(other) if "ratios" in found else None


def compare(stages: dict[str, Any], stage: str, form: str, other: str) -> float | None:
    """Time of a form over that of another quantized form, each over its own BF16 run."""
    one, two = ratio(stages, stage, form), ratio(stages, stage, other)
    return one / two if one and two else None


def share_roof(stages: dict[str, Any]) -> float | None:
    """Ideal time of FLUX.1 at the matmul rates measured in the run, over the best measured time."""
    found = stages.get(f"{FLUX} compiled-graph", {}).get(FP8, {})
    if "ms" not in found:
        return None
    rates = stages["rates"]
    ideal = LINEAR_TFLOP / rates["fp8_tflops"] + ATTENTION_TFLOP / rates["bf16_tflops"]
    return float(1e3 * ideal / found["ms"]["quantized"])


def list_goals(stages: dict[str, Any]) -> list[Goal]:
    """(what, measured, limit, at most or at least)."""
    layers = stages.get("layers", {}).get("geometric mean of ratios", {})
    most, least = "at most", "at least"
    packed = stages.get(FLUX, {}).get(PACKED, {})
    share = packed["bytes"] / stages[FLUX]["bf16_bytes"] if "bytes" in packed else None
    return [
        ("fp8 layer with quantization, mean of four shapes", layers.get(FP8), 0.70, most),
        ("FLUX.1 fp8 step, eager", ratio(stages, FLUX, FP8), 0.82, most),
        ("FLUX.1 fp8 step, graph", ratio(stages, f"{FLUX} graph", FP8), 0.82, most),
        ("FLUX.1 fp8 step, compiled", ratio(stages, f"{FLUX} compiled", FP8), 0.65, most),
        (
            "FLUX.1 fp8 step, compiled graph",
            ratio(stages, f"{FLUX} compiled-graph", FP8),
            0.49,
            most,
        ),
        (
            "FLUX.1 fp8 step over torchao's per row, compiled graph",
            compare(stages, f"{FLUX} compiled-graph", FP8, ROWS),
            0.90,
            most,
        ),
        *(
            (
                f"{title} fp8 step, compiled graph",
                ratio(stages, f"{stage} compiled-graph", FP8),
                goal,
                most,
            )
            for title, stage, goal in COMPILED
        ),
        (
            "FLUX.1 fp8 step over compiled BF16",
            ratio(stages, f"{FLUX} compiled", FP8, "bf16 compiled"),
            0.78,
            most,
        ),
        ("share of the measured fp8 roof, compiled graph", share_roof(stages), 0.65, least),
        ("NVFP4 recoded over fp8, eager", compare(stages, FLUX, RECODED, FP8), 1.02, most),
        ("NVFP4 packed, eager", ratio(stages, FLUX, PACKED), 1.10, most),
        ("NVFP4 packed over diffusers' bfl", compare(stages, FLUX, PACKED, BFL), 0.75, most),
        ("NVFP4 packed, bytes over BF16", share, 0.32, most),
        ("SVDQuant merged, eager", ratio(stages, FLUX, MERGED), 1.02, most),
        ("W8A8 step, eager", ratio(stages, FLUX, INT8), 0.90, most),
        ("W8A8 step, graph", ratio(stages, f"{FLUX} graph", INT8), 0.90, most),
        ("FLUX.2 fp8 step, eager", ratio(stages, "step flux-2", FP8), 0.75, most),
        ("FLUX.2 fp8 step, compiled", ratio(stages, "step flux-2 compiled", FP8), 0.62, most),
        ("Wan2.2 480p fp8 step, eager", ratio(stages, "step wan-2-2", FP8), 0.88, most),
    ]


def show_goal(goal: Goal) -> str:
    """A row of the table."""
    what, found, limit, sense = goal
    if found is None:
        return f"| {what} | {sense} {limit:.2f} | not measured | |"
    met = found <= limit if sense == "at most" else found >= limit
    return f"| {what} | {sense} {limit:.2f} | {found:.3f} | {'met' if met else 'missed'} |"


def show_steps(stages: dict[str, Any]) -> list[str]:
    """A row for every measured step."""
    rows = []
    for name, stage in stages.items():
        if not name.startswith("step "):
            continue
        for form, found in stage.items():
            if not isinstance(found, dict):
                continue
            if "ms" not in found:
                rows.append(f"| {name[5:]} | {form} | {next(iter(found.values()))} | | | | |")
                continue
            memory = found["bytes"] / stage["bf16_bytes"]
            times = found["ms"]
            named = {key: value for key, value in found["kernels"].items() if key != "all"}
            longest = max(named, key=lambda key: named[key][1], default="")
            rows.append(
                f"| {name[5:]} | {form} | {times['quantized']:.1f} | {times['bf16']:.1f} "
                f"| {times['quantized'] / times['bf16']:.3f} | {memory:.3f} | `{longest[:48]}` |"
            )
    return rows


def read_folder(folder: Path) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """(results, what of them was measured again): a form keeps the BF16 run of its own process."""
    results = read(folder / "hopper.json")
    again = set()
    for later in list_runs(folder, AGAIN):
        newer = read(later)
        if newer["machine"]["name"] != results["machine"]["name"]:
            raise SystemExit(f"{later}: measured on another machine than hopper.json")
        for name, stage in newer["stages"].items():
            for form, found in stage.items() if name.startswith("step ") else ():
                if isinstance(found, dict) and "ms" in found:
                    first = {key: size for key, size in stage.items() if key == "bf16_bytes"}
                    results["stages"].setdefault(name, first)[form] = found
                    again.add((name, form))
    results["several"] = {
        name: found
        for file in list_runs(folder, SEVERAL)
        for name, found in read(file)["forms"].items()
        if "ratio" in found
    }
    results["first"] = read(folder / FIRST) if (folder / FIRST).is_file() else {}
    return results, again


def list_runs(folder: Path, pattern: str) -> list[Path]:
    """The files of several runs in the order of their names without endings: `x`, `x-again`, `x-again-2`."""
    return sorted(folder.glob(pattern), key=lambda file: file.stem)


def read(file: Path) -> dict[str, Any]:
    """The results in a file."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def show_several(forms: dict[str, Any]) -> list[str]:
    """One forward on one GPU and on two of a host."""
    if not forms:
        return []
    rows = [
        f"| {name} | {found['alone']['ms']:.1f} | {found['shared']['ms']:.1f} | {found['ratio']:.3f} "
        f"| {found['alone']['peak_bytes'] / 2**30:.2f} | {found['shared']['peak_bytes'] / 2**30:.2f} |"
        for name, found in sorted(forms.items())
    ]
    return [
        "One forward at true size on one GPU and on two of one host (`benchmarks/several_gpus.py`); a "
        "weight of a `sharded` form lies half on each, and a `ring` gathers keys and values where others exchange "
        "heads.",
        "",
        "| model, form, mode | one GPU, ms | two GPUs, ms | ratio | peak GiB of one | of each of two |",
        "| - | -: | -: | -: | -: | -: |",
        *rows,
        "",
    ]


def show_first(models: dict[str, Any]) -> list[str]:
    """Seconds before a first compiled forward has ended, with and without a compile cache."""
    if not models:
        return []
    rows = [
        f"| {model} | {cache} | {found['built']:.1f} | {found['first forward']:.1f} |"
        for model, runs in sorted(models.items())
        for cache, found in runs.items()
    ]
    return [
        "Seconds from the start of a process to the end of its first compiled forward "
        "(`benchmarks/first_picture.py`): imports, a model of random codes, compiling.",
        "",
        "| model | compile cache | model built | first forward |",
        "| - | - | -: | -: |",
        *rows,
        "",
    ]


def render(results: dict[str, Any], again: set[tuple[str, str]] = frozenset()) -> str:
    """The whole page."""
    machine, stages = results["machine"], results["stages"]
    checks = {name[6:]: found for name, found in stages.items() if name.startswith("check ")}
    steps = [found for name, stage in stages.items() if name.startswith("step ") for found in
             stage.values() if isinstance(found, dict) and "repeats" in found]  # fmt: skip
    repeats = sum(bool(found["repeats"]) for found in steps)
    lines = [
        f"# Measured on {machine['name']}",
        "",
        f"torch {results['torch']}, diffusers {machine['versions']['diffusers']}, random weights of "
        "the true sizes and formats; what a checkpoint's own numbers do to an image is not in here.",
        "",
        "| goal | limit | measured | |",
        "| - | - | - | - |",
        *(show_goal(goal) for goal in list_goals(stages)),
        "",
        f"Repeated forwards that were bit-identical: {repeats} of {len(steps)}.",
        "",
        *(
            [
                "Measured again later, each beside BF16 in that process: "
                + ", ".join(f"{form} ({name[5:]})" for name, form in sorted(again))
                + ".",
                "",
            ]
            if again
            else ()
        ),
        "An eager step is missed where Python's launches take longer than the GPU's work: the same "
        "step replayed from a CUDA graph shows what the kernels take.",
        "",
        "| kernel | relative L2 from `reference` | repeats |",
        "| - | - | - |",
        *(
            f"| {name} | {found['error_from_reference']:.2e} | {'yes' if found['repeats'] else 'no'} |"
            for name, found in sorted(checks.items())
            if "error_from_reference" in found
        ),
        "",
        "| model and mode | form | ms | BF16 eager, ms | ratio | bytes | longest kernel |",
        "| - | - | - | - | - | - | - |",
        *show_steps(stages),
        "",
        *show_several(results.get("several", {})),
        *show_first(results.get("first", {})),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    page = folder / "README.md"
    page.write_text(render(*read_folder(folder)), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
