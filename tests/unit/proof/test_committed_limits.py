"""The committed records beside the committed limits: running a row again would not loosen its gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantmatrix.harness.outcomes import find_loosened
from quantmatrix.proof import known_limits, store
from quantmatrix.proof.limit_classes import read_class
from quantmatrix.proof.limits import Ledger, is_judged
from quantmatrix.proof.record import Evidence
from quantmatrix.proof.scopes import STAND_IN, read_scope

REPORTS = Path(__file__).parents[3] / "reports"
LEDGER = known_limits.read(REPORTS)
RECORDS = {
    name: record
    for name, record in store.read_folder(REPORTS / "evidence").items()
    if record.cell["hardware"] == "cpu"
    and read_scope(record) == STAND_IN
    and "latents" in record.checks
    and is_judged(record.checks["latents"])
}


def list_wider(record: Evidence, ledger: Ledger) -> list[str]:
    """Limits of the latents that are wider now than when the record was written."""
    check, cell = record.checks["latents"], record.cell
    allowed = ledger.find(read_class(check), cell["model"], cell["hardware"])
    known = allowed.to_json()
    return find_loosened({n: v for n, v in check.limits.items() if n in known}, known)


def test_records_are_held_to_the_limits_as_they_are() -> None:
    """A run says so, too, after minutes: limits that were measured anew and then taken back."""
    found = {name: wider for name, one in RECORDS.items() if (wider := list_wider(one, LEDGER))}
    assert found == {}, "run these rows again with --evidence-dir and commit their records"
    assert len(RECORDS) > 200


def test_wider_limits_would_be_found() -> None:
    name, record = next(iter(RECORDS.items()))
    kind, model = read_class(record.checks["latents"]), record.cell["model"]
    wider = [
        replace(s, psnr_db=s.psnr_db - 1) if (s.kind, s.model) == (kind, model) else s
        for s in LEDGER.samples
    ]
    [line] = list_wider(record, Ledger(wider, LEDGER.spreads))
    before = record.checks["latents"].limits["psnr_db"]["at_least"]
    assert line.startswith(f"psnr_db: at_least {before:g} became "), name
    assert float(line.rpartition(" ")[2]) == pytest.approx(before - 1, abs=0.01)
