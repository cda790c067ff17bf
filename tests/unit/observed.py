"""Records of cells of the small tables, as a run would have left them."""

from __future__ import annotations

import base64
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from tables import CASES, CHECKPOINTS, write_tables

from quantmatrix.proof import record as records
from quantmatrix.proof import thumbnails
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell, Matrix

PROVEN = "fp8-flux-1@cpu+decode"
REFUSED = "svdq-flux-1-hopper@h100"
WORST = {"psnr_db": 41.25, "cosine": 0.9991, "relative_l2": 0.01234}


def find(tables: Matrix, name: str) -> Cell:
    return next(cell for cell in tables.cells if cell.id == name)


def observe(tables: Matrix, name: str, *, fails: str = "", **changes: Any) -> Evidence:
    """A record of a cell as it stands, all its checks passed but for one."""
    cell = find(tables, name)
    checks = {check: CheckResult("pass", {"worst": WORST}) for check in cell.checks}
    if fails:
        checks[fails] = CheckResult("fail", message="too far")
    refusal = {"rule": cell.rule, "message": "no integer units; use cpu"} if cell.rule else None
    plan = {"refusal": refusal, "components": {}}
    record = Evidence(
        cell=records.describe_cell(cell, tables),
        checks=checks,
        command=cell.shell(tables),
        plan=plan,
        versions={"torch": "2.13.0+cpu", "diffusers": "0.42.1"},
        made="2026-11-23T10:00:00Z",
    )
    record = replace(record, **{k: v for k, v in changes.items() if k != "cell"})
    record = sign(record, tables.hardware[cell.hardware])
    return replace(record, cell=changes["cell"]) if "cell" in changes else record


WITNESSED = {
    "transformer": {
        "base": "some/flux1",
        "missing": None,
        "layout": None,
        "verdict": "agrees",
        "layers": 3,
        "bytes": 1000,
        "seconds": 0.1,
        "kinds": [
            {
                "kind": "fp8: blocks.{i}.ff",
                "limit": "witness e4m3 tensor",
                "reading": "e4m3 per tensor",
                "layers": 3,
                "cosine": 0.9996,
                "coded_cosine": 0.9996,
                "relative_l2": 0.027,
                "gain": 1.0,
                "scale_error": 0.001,
                "verdict": "agrees",
            }
        ],
    }
}
"""What a witness leaves in a record."""


def observe_run(tables: Matrix, cell: Cell, steps: int = 4) -> Evidence:
    """A record of a working cell with everything that a run of the suites leaves."""
    drift = [min(step, 3) for step in range(steps)]  # a run that passes stays within its limits
    trajectory = [
        {"psnr_db": 50.0 - n, "cosine": 0.9999, "relative_l2": 0.01 * (n + 1), "max_abs": 0.1}
        for n in drift
    ]
    layers = {"layers": 40, "median": 0.0272, "worst": 0.0337, "worst_layer": "blocks.0.ff"}
    metrics = {
        "class": "e4m3 W8A8",
        "steps": trajectory,
        "worst": {**trajectory[-1], "identical": False, "nonfinite": 0},
        "final": trajectory[-1],
        "layers": {"transformer": layers},
        "media": {"psnr_db": 39.8, "mean_abs": 1.8},
        "repeats": True,
        "thumbnails": fake_pictures(cell.id),
    }
    limits = {"psnr_db": {"at_least": 40.5}, "relative_l2": {"at_most": 0.06}, "source": "samples"}
    plan = {
        "components": {
            "transformer": {
                "family": cell.family,
                "class": "FluxTransformer2DModel",
                "backends": {cell.backend or "torch": 40},
                "numerics": {"W8A8": 40},
                "quantized_layers": 40,
                "total_layers": 50,
                "bytes": 14533760,
                "files": ["$HUB/models--some--flux1/snapshots/0/model.safetensors"],
            }
        },
        "warnings": [],
        "refusal": None,
    }
    checks = {name: CheckResult("pass", {"tensors": 112}) for name in cell.checks}
    checks["latents"] = CheckResult("pass", metrics, limits)
    record = Evidence(
        cell=records.describe_cell(cell, tables),
        checks=checks,
        command=f"{cell.shell(tables)} --tiny",
        machine={"processor": "some", "threads": 1, "instruction_sets": ["avx2", "avx512f"]},
        versions={"torch": "2.13.0+cpu", "diffusers": "0.42.1"},
        commit="0" * 40,
        plan=plan,
        witness=WITNESSED,
        timings={"denoise": 0.25, "generate": 0.3, "decode": 0.05},
        made="2026-11-23T10:00:00Z",
    )
    return sign(record, tables.hardware[cell.hardware])


def fake_pictures(name: str) -> dict[str, Any]:
    """Thumbnails as large as those of a stand-in; the two that differ from cell to cell do."""
    sizes = {"baseline": ("", 4400), "quantized": (name, 4400), "difference": (f"{name}-", 900)}
    found: dict[str, Any] = {"gain": 8, "shown": "the picture"}
    for kind, (seed, size) in sizes.items():
        data = thumbnails.SIGNATURE + b"\0" + random.Random(seed).randbytes(size)
        found[kind] = thumbnails.PNG + base64.b64encode(data).decode()
    return found


def make_large(folder: Path, rows: int = 1667) -> tuple[Matrix, dict[str, Evidence]]:
    """A matrix of six cells per row (10,002 by default), each with a record; ten rows a checkpoint."""
    place = {"hardware": "cpu h100 b200", "backend": "reference decode"}
    cases = [
        {
            **CASES[0],
            **place,
            "id": f"row-{number:04}",
            "flags": f"--seed {number}",
            "checkpoint": f"flux-1-fp8-{number // 10:03}",
        }
        for number in range(rows)
    ]
    checkpoints = [
        {**CHECKPOINTS[0], "id": f"flux-1-fp8-{number:03}", "reference": f"some/fp8-{number:03}"}
        for number in range((rows + 9) // 10)
    ]
    tables = read.read(write_tables(folder, cases, checkpoints=checkpoints))
    return tables, {cell.id: observe_run(tables, cell) for cell in tables.cells}
