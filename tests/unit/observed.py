"""Records of cells of the small tables, as a run would have left them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantmatrix import evidence as records
from quantmatrix.evidence import CheckResult, Evidence
from quantmatrix.matrix import Cell, Matrix

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
    record = Evidence(
        cell=records.describe_cell(cell, tables),
        checks=checks,
        command=cell.shell(tables),
        plan={"refusal": refusal, "components": {}},
        versions={"torch": "2.13.0+cpu", "diffusers": "0.42.1"},
        made="2026-11-23T10:00:00Z",
    )
    return replace(record, **changes)
