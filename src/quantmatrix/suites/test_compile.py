"""Compile: every kernel of ours that the row's plan starts can be built for its hardware, and fits.

Building needs no device, so these cells run for every hardware of the tables, at the true sizes of
their models. A record of this check is one of its own: it shows nothing of any number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.compiled import Builder
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.tables.rows import Cell


@pytest.fixture(scope="session")
def builder() -> Builder:
    from quantmatrix.measure import compiled

    return compiled.Builder(compiled.default_folder())


@pytest.mark.check("compile")
def test_compile(cell: Cell, workbench: Workbench, proof: Proof, builder: Builder) -> None:
    from quantmatrix.kernels import compiling
    from quantmatrix.kernels.launching import has_triton

    if not has_triton():
        pytest.skip(compiling.INSTALL)
    plan = workbench.plan(workbench.planned_request(cell))
    proof.command = f"quantmatrix compile --hardware {cell.hardware} --row {cell.id}"
    proof.folders = workbench.folders(plan.request)
    proof.plan = plan.to_json()
    found = builder.compile_plan(plan)
    proof.metrics = found.to_metrics()
    proof.limits = found.to_limits()
    assert not found.faults, "; ".join(found.faults)
    assert found.programs, f"{cell.id}: its plan starts no kernel of ours; drop the check compile"
