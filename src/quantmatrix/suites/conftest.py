"""What the suites share: a row's request and plan, the run of its command, and the evidence that every
check leaves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from quantmatrix.proof import known_limits
from quantmatrix.suites.command import Commanded, run_command
from quantmatrix.tables import read

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.request import Request
    from quantmatrix.runtime.plan.types import Plan
    from quantmatrix.tables.rows import Cell


@dataclass(frozen=True)
class Job:
    """A cell that is planned on this machine."""

    cell: Cell
    request: Request
    plan: Plan

    @property
    def quantized(self) -> dict[str, Any]:
        """Components of the plan that have quantized layers."""
        return {name: part for name, part in self.plan.components.items() if part.layers}


def plan_or_skip(workbench: Workbench, request: Request) -> Plan:
    """The plan; where this very machine computes the row's backend wrongly, nothing is proven."""
    from quantmatrix.errors import RefusedError
    from quantmatrix.hardware.probe import SATURATING

    try:
        return workbench.plan(request)
    except RefusedError as refusal:
        if refusal.rule == SATURATING.rule:
            pytest.skip(str(refusal))
        raise


@pytest.fixture
def job(cell: Cell, workbench: Workbench, proof: Proof) -> Job:
    """The cell's request and plan; its checkpoint, plan and command go to the evidence."""
    proof.command = workbench.command(cell)
    request = workbench.request(cell)
    plan = plan_or_skip(workbench, request)
    job = Job(cell, request, plan)
    proof.folders = workbench.folders(plan.request)
    proof.plan = plan.to_json()
    proof.files = tuple(f for part in job.quantized.values() for f in part.checkpoint.files)
    return job


@pytest.fixture(scope="session")
def commanded() -> dict[str, Commanded]:
    """What the command of the cell at hand left, by the cell's id; empty before the first."""
    return {}


@pytest.fixture
def command(
    job: Job,
    workbench: Workbench,
    commanded: dict[str, Commanded],
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[], Commanded]:
    """The row's command, which runs when it is called, and once for all checks of a cell."""

    def run() -> Commanded:
        if job.cell.id not in commanded:
            commanded.clear()
            folder = tmp_path_factory.mktemp("command")
            commanded[job.cell.id] = run_command(job, workbench, folder, capfd)
        return commanded[job.cell.id]

    return run


@pytest.fixture(scope="session")
def read_once() -> Callable[..., Any]:
    """What reads the tables, each folder once in a session."""
    return cache(read.read_tables)


@pytest.fixture(scope="session")
def read_limits_once() -> Callable[..., Any]:
    """What reads the limits, each folder's once in a session."""
    return cache(known_limits.read)


@pytest.fixture(autouse=True)
def unchanging_tables(
    read_once: Callable[..., Any],
    read_limits_once: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each plan for a hardware reads the tables again, and each check the limits; no check changes them."""
    monkeypatch.setattr(read, "read_tables", read_once)
    monkeypatch.setattr(known_limits, "read", read_limits_once)
