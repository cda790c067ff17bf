"""Recorder: collects what the checks of a cell show, and writes one record per cell.

The checks of a cell run one after another in one process. Each leaves a verdict and a `Proof`; once
the last is done the record is written, so a run that is killed loses the cell at hand only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.proof import facts, scopes, store
from quantmatrix.proof import record as records
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, Matrix


@dataclass
class Proof:
    """What a check shows besides its verdict; a suite fills it in."""

    metrics: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    witness: dict[str, Any] = field(default_factory=dict)
    """What the witness found, by component."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds per stage."""
    latents_digest: str = ""
    files: tuple[str, ...] = ()
    """Weight files of the checkpoint."""
    command: str = ""
    """The command that was run, where it is more than the row's."""
    folders: dict[str, str] = field(default_factory=dict)
    """Folders of this machine, and the names that stand for them in the record."""


def normalize(record: Evidence) -> Evidence:
    """The record as it would be read from its file; EvidenceError for what is none."""
    return store.decode(store.encode(record))


def today() -> date:
    """The day of today, UTC."""
    return datetime.now(timezone.utc).date()


class Recorder:
    """Verdicts and proofs of the cells that are being checked."""

    def __init__(
        self,
        tables: Callable[[], Matrix],
        folder: Path | None,
        expected: Path | None,
        *,
        tiny: bool = True,
        rewrite: bool = False,
    ) -> None:
        """`folder` takes the records; `expected` holds those whose verdicts must be met.

        Of a run of real checkpoints (`tiny` is False) those are the records of published weights.
        `rewrite` writes records again that say nothing new.
        """
        self.rewrite = rewrite
        self.loaded = scopes.STAND_IN if tiny else scopes.PUBLISHED
        self.tables = tables
        self.folder = folder
        self.expected = expected
        self.written: list[Path] = []
        self.kept = 0
        """Records that said nothing new."""
        self._results: dict[str, dict[str, CheckResult]] = {}
        self._proofs: dict[str, dict[str, Proof]] = {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Machine, versions and commit, looked up once."""
        from quantmatrix.hardware import probe

        return {
            "machine": probe.fingerprint(),
            "versions": records.list_versions(),
            "commit": records.find_commit(),
        }

    def add(self, cell: Cell, check: str, verdict: str, message: str, proof: Proof) -> None:
        """Keep the outcome of a check; a later failure (in its teardown) replaces a pass."""
        message, metrics = (
            records.make_portable(one, proof.folders) for one in (message, proof.metrics)
        )
        result = CheckResult(verdict, metrics, proof.limits, message)
        self._results.setdefault(cell.id, {})[check] = result
        self._proofs.setdefault(cell.id, {})[check] = proof

    def expected_result(self, cell: Cell, check: str) -> CheckResult | None:
        """Result of the check in the expected record, if there is one of the row as it stands."""
        if self.expected is None:
            return None
        key = scopes.make_key(cell.id, scopes.OWN_CHECKS.get(check, self.loaded))
        path = self.expected / records.path_of(key)
        if not path.is_file():
            return None
        record = store.read(path)
        described = records.describe_cell(cell, self.tables())
        if record.cell["row_digest"] != described["row_digest"]:
            return None
        return record.checks.get(check)

    def finish(self, cell: Cell) -> list[Path]:
        """Write the records of a cell, each joined with an earlier one of the same code and machine.

        One that says nothing new leaves the earlier one as it is (see `quantmatrix.proof.facts`).

        An earlier one that is damaged is replaced, as if it was not there. EvidenceError for results
        that are no record: a metric that is not finite, a pass that exceeds its limit.
        """
        results = self._results.pop(cell.id, {})
        proofs = self._proofs.pop(cell.id, {})
        if self.folder is None:
            return []
        groups: dict[str, list[str]] = {}
        for check in results:
            groups.setdefault(scopes.OWN_CHECKS.get(check, ""), []).append(check)
        built = [
            self._build(cell, {c: results[c] for c in checks}, [proofs[c] for c in checks])
            for checks in groups.values()
        ]
        return [self._keep(record, self.folder) for record in built]

    def _keep(self, record: Evidence, folder: Path) -> Path:
        path = folder / records.path_of(scopes.key_of(record))
        with suppress(FileNotFoundError, records.EvidenceError):
            older = store.read(path)
            if not self.rewrite and not facts.is_news(older, normalize(record), today()):
                self.kept += 1
                return path
            record = records.merge(older, record)
        self.written.append(store.write(record, folder))
        return path

    def _build(
        self, cell: Cell, results: Mapping[str, CheckResult], proofs: list[Proof]
    ) -> Evidence:
        def last(name: str) -> Any:
            values = [getattr(proof, name) for proof in proofs]
            return next((value for value in reversed(values) if value), values[-1])

        tables = self.tables()
        timings = {key: round(s, 4) for proof in proofs for key, s in proof.timings.items()}
        folders = {key: value for proof in proofs for key, value in proof.folders.items()}
        record = Evidence(
            cell=records.describe_cell(cell, tables),
            checks=results,
            command=last("command") or cell.shell(tables),
            checkpoint=records.describe_files(last("files")),
            plan=records.make_portable(last("plan"), folders),
            witness=records.make_portable(last("witness"), folders),
            timings=timings,
            latents_digest=last("latents_digest"),
            made=records.tell_time(),
            **self.environment,
        )
        return sign(record, tables.hardware[cell.hardware])
