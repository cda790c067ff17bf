"""Refuse: where a row claims a refusal, the plan refuses, by that rule, and says what would work,
which is planned, too.

Planning needs no device, so these cells run for every hardware of the tables. A row that starts to
work fails here: its claim has to change.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.tables.rows import Cell


@pytest.mark.check("refuse")
def test_refuse(cell: Cell, workbench: Workbench, proof: Proof) -> None:
    from quantmatrix.api import plan
    from quantmatrix.runtime.plan.types import Refusal

    request = workbench.planned_request(cell)
    planned = plan(request)
    proof.command = f"{workbench.command(cell)} --hardware {cell.hardware}".replace(
        "quantmatrix generate", "quantmatrix plan", 1
    )
    proof.folders = workbench.folders(getattr(planned, "request", request))
    proof.plan = planned.to_json()
    proof.limits = {"rule": cell.rule}
    assert isinstance(planned, Refusal), (
        f"{cell.id} is claimed to be refused ({cell.rule}), and the plan accepts it"
    )
    proof.metrics = {"rule": planned.rule}
    assert planned.rule == cell.rule, f"refused by another rule: {planned.message}"
    name = workbench.tables.hardware[cell.hardware].name
    assert name in planned.message, f"the message does not name {name}: {planned.message}"
    offered = find_backends(planned.message)
    proof.metrics["works_instead"] = offered
    assert offered or "--" in planned.message, f"no way out is named: {planned.message}"
    for backend in offered:
        other = plan(replace(request, backend=backend))
        assert other.ok, f"--backend {backend} is offered, and refused, too: {other.to_json()}"


def find_backends(message: str) -> list[str]:
    """Backends that a refusal offers: `works here: --backend reference | decode`."""
    found = re.search(r"works here: --backend ([\w|\- ]+)", message)
    return [name.strip() for name in found[1].split("|")] if found else []
