"""A project of cheap cells for tests of the fleet, suites that go wrong on demand, and a pretended cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shards import INI
from tables import CHECKPOINTS, write_tables

from quantmatrix.fleet import answers
from quantmatrix.fleet.answers import GroupAnswer
from quantmatrix.fleet.cluster import Demand, Node
from quantmatrix.fleet.engine import Failure
from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell, Matrix

CPU = {"hardware": "cpu", "backend": "", "checks": "load latents", "claim": "expected"}
REFUSED = {"backend": "", "checks": "refuse", "claim": "refused", "rule": "svdq-arch"}
CASES = [
    {**CPU, "id": "fp8-a", "checkpoint": "fp8-a", "backend": "reference decode"},
    {**CPU, "id": "fp8-b", "checkpoint": "fp8-b"},
    {**CPU, "id": "svdq-a", "checkpoint": "svdq-a"},
    {**CPU, "id": "svdq-b", "checkpoint": "svdq-b"},
    {**REFUSED, "id": "svdq-a-hopper", "checkpoint": "svdq-a", "hardware": "h100", "notes": "no"},
    {
        **REFUSED,
        "id": "svdq-b-blackwell",
        "checkpoint": "svdq-b",
        "hardware": "b200",
        "notes": "no",
    },
]
FAULTY = [
    {**CPU, "id": name, "checkpoint": "fp8-a", "flags": f"--seed {number}"}
    for number, name in enumerate(("fine", "killed", "hung", "stuck", "crashed", "last"))
]
CONFTEST = """
from quantmatrix.proof import code_digest, record

# What differs between two runs of one program: the time, and the checkout that people edit.
record.tell_time = lambda: "2026-11-24T10:00:00Z"
record.find_commit = lambda: "c" * 40
# Digests of code are tested elsewhere, and take longer than all of this.
code_digest.Code.prepare = lambda self: None
code_digest.Code.describe = lambda self, *about: {"device_digest": "sha256:1", "shared_digest": "sha256:2"}
"""
SUITE = """
import os, pathlib, signal, time
import pytest

SHARED = pathlib.Path(__file__).parent / "matrix" / "shared.csv"
WHERE = pathlib.Path(SHARED.read_text()) if SHARED.is_file() else None

@pytest.mark.check("load")
def test_load(cell, proof):
    proof.metrics["layers"] = len(cell.checkpoint)
    proof.timings["load"] = 0.5
    if WHERE:  # where a test tells when to go on
        (WHERE / f"{cell.id} {os.getpid()}").touch()
        while not (WHERE / "go").exists():
            time.sleep(0.05)

@pytest.mark.check("latents")
def test_latents(cell, proof):
    if cell.row == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.row == "hung":
        time.sleep(60)
    if cell.row == "stuck":  # as in a driver: no signal gets through
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)
    if cell.row == "crashed":
        os._exit(3)
    proof.latents_digest = "sha256:a"

@pytest.mark.check("refuse")
def test_refuse(cell, proof):
    proof.metrics["rule"] = cell.rule
"""


def make_project(
    folder: Path, cases: Iterable[dict[str, str]] = CASES, shared: Path | None = None
) -> Matrix:
    """Write tables and suites; with `shared`, checks wait for a file `go` there."""
    names = {
        name: 0 if name.startswith("fp8") else 2 for name in ("fp8-a", "fp8-b", "svdq-a", "svdq-b")
    }
    checkpoints = [
        {
            **CHECKPOINTS[kind],
            "id": name,
            "reference": f"some/{name}" + (".safetensors" if kind else ""),
        }
        for name, kind in names.items()
    ]
    write_tables(folder / "matrix", cases, checkpoints)
    if shared is not None:
        (folder / "matrix" / "shared.csv").write_text(str(shared))
    (folder / "pytest.ini").write_text(INI)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_suites.py").write_text(SUITE)
    return read.read(folder / "matrix")


def make_record(cell: Cell, tables: Matrix, verdict: str = "pass", **given: object) -> Evidence:
    """The record of a run in which every check of a cell had a verdict."""
    message = "" if verdict == "pass" else "too far away"
    checks = {check: CheckResult(verdict, message=message) for check in cell.checks}
    record = Evidence(
        records.describe_cell(cell, tables),
        checks,
        machine={"processor": "a processor"},
        versions={"torch": "2.13.0"},
        commit="c" * 40,
        timings={"load": 0.5},
        made="2026-11-24T10:00:00Z",
    )
    return Evidence(**{**vars(record), **given})


def answer(found: Iterable[Evidence], **given: object) -> bytes:
    """What a node sends when all went well."""
    texts = [store.encode(record).decode() for record in found]
    sent = {"node": "a", "records": texts, "junit": [], "problems": [], "seconds": 1.0, **given}
    return answers.write(GroupAnswer(**sent))  # type: ignore[arg-type]


@dataclass
class PretendedCluster:
    """An engine without Ray: groups are answered by a function, in the order in which they come."""

    respond: Callable[[dict[str, object]], bytes | Failure]
    nodes: list[Node]
    orders: list[dict[str, object]] = field(default_factory=list)
    demands: dict[str, Demand] = field(default_factory=dict)
    most: int = 0
    """Tasks that were there at once."""
    notes: list[bytes] = field(default_factory=list)
    pending: dict[str, dict[str, object]] = field(default_factory=dict)
    address: str = "10.0.0.1:6379"
    dashboard: str = ""

    def list_nodes(self) -> list[Node]:
        return self.nodes

    def submit(self, name: str, order: bytes, demand: Demand) -> None:
        import json

        assert name not in self.pending
        self.pending[name] = json.loads(order)
        self.orders.append(self.pending[name])
        self.demands[name] = demand
        self.most = max(self.most, len(self.pending))

    def wait(self, seconds: float) -> list[tuple[str, bytes | Failure]]:
        if not self.pending:
            return []
        name = next(iter(self.pending))
        return [(name, self.respond(self.pending.pop(name)))]

    def read_notes(self) -> list[bytes]:
        notes, self.notes = self.notes, []
        return notes

    def cancel(self, name: str) -> None:
        del self.pending[name]
