"""Small tables for tests of what reads the matrix: written as CSV, read by the real reader."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

FAMILIES = [
    {
        "id": name,
        "checkpoint_form": "svdq-{int4|fp4}_r{rank}-...",
        "canonical_cli": "`--transformer-path`",
        "supported_models": "some",
        "extra_dependency": "None",
        "notes": f"about {name}",
        "models": "flux-1 flux-2",
    }
    for name in (
        *("fp8", "modelopt-fp8", "modelopt-nvfp4", "nunchaku-svdq", "comfyui-int8", "gguf"),
        "msmodelslim",
    )
]
MODELS = [
    {"id": name, "name": name, "repo": f"some/{name}", "transformers": "transformer", "notes": ""}
    for name in ("flux-1", "flux-2", "wan-2-2", "qwen-image", "z-image")
]
HARDWARE = [
    {"id": name, "name": name.upper(), "vendor": vendor, "arch": arch, "job": "j", "label": "l"}
    for name, vendor, arch in (
        ("cpu", "cpu", "cpu"),
        ("h100", "nvidia", "sm90"),
        ("b200", "nvidia", "sm100"),
    )
]
CHECKPOINTS = [
    {
        "id": "flux-1-fp8",
        "family": "fp8",
        "model": "flux-1",
        "form": "component-folder",
        "selector": "--transformer-path",
        "reference": "some/flux1-fp8",
        "base": "some/flux-1",
        "scheme": "tensor-dynamic",
        "components": "transformer",
        "algo": "FP8",
        "cli": "--transformer-path",
        "scope": "single-transformer override",
        "notes": "a | b",
    },
    {
        "id": "flux-2-fp8",
        "family": "fp8",
        "model": "flux-2",
        "form": "component-folder",
        "selector": "--transformer-path",
        "reference": "some/flux2-fp8",
        "base": "some/flux-2",
        "scheme": "tensor-dynamic",
        "components": "transformer",
    },
    {
        "id": "flux-1-svdq",
        "family": "nunchaku-svdq",
        "model": "flux-1",
        "form": "single-file",
        "selector": "--transformer-weights-path",
        "reference": "some/svdq/svdq-int4_r32-flux1.safetensors",
        "base": "some/flux-1",
        "scheme": "int4_r32",
        "components": "transformer",
    },
]
CASES = [
    {
        "id": "fp8-flux-1",
        "checkpoint": "flux-1-fp8",
        "hardware": "cpu h100",
        "backend": "reference decode",
        "checks": "load latents",
        "claim": "expected",
    },
    {
        "id": "fp8-flux-2",
        "checkpoint": "flux-2-fp8",
        "hardware": "cpu",
        "checks": "load generate",
        "claim": "validated",
    },
    {
        "id": "svdq-flux-1-hopper",
        "checkpoint": "flux-1-svdq",
        "hardware": "h100",
        "checks": "refuse",
        "claim": "refused",
        "rule": "svdq-arch",
        "notes": "no 4-bit integer matrix units",
    },
    {
        "id": "svdq-flux-1",
        "checkpoint": "flux-1-svdq",
        "hardware": "cpu b200",
        "checks": "load",
        "claim": "planned",
        "notes": "no kernel yet",
    },
]
COLUMNS = {
    "families": "id checkpoint_form canonical_cli supported_models extra_dependency notes models",
    "models": "id name repo transformers notes",
    "hardware": "id name vendor arch memory_gib devices group packages job label",
    "checkpoints": "id family model form selector reference base revision scheme kept components "
    "algo cli scope notes",
    "cases": "id family model checkpoint hardware backend flags checks claim rule notes",
}


def write_tables(
    folder: Path,
    cases: Iterable[Mapping[str, str]] = CASES,
    checkpoints: Iterable[Mapping[str, str]] = CHECKPOINTS,
) -> Path:
    """The five tables in a folder; a case takes family and model from its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    by_id = {row["id"]: row for row in checkpoints}
    taken = ("family", "model")
    full = [{**{k: by_id[case["checkpoint"]][k] for k in taken}, **case} for case in cases]
    tables = {"families": FAMILIES, "models": MODELS, "hardware": HARDWARE}
    for name, rows in {**tables, "checkpoints": by_id.values(), "cases": full}.items():
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS[name].split(), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return folder
