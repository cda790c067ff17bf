"""Packaged: what an installed package knows of the evidence, for use outside a checkout.

A wheel carries `quantmatrix/reports/`:

| file           | content |
| -------------- | ------- |
| `records.json` | every record of `reports/evidence`, without pictures, steps and paths |
| `runtimes.json`| every record of `reports/runtimes`, without logs |
| `*.csv`        | the files of `reports/` that judge, and plans: limits, spreads, carried digests |
| `answers.json` | what `quantmatrix recommend` answers, as it was rendered |

`hatch_build.py` writes it when a wheel is built. A summary is a record still: what `explain`,
`agreement` and `matrix list` look at is untouched, so they say the same as inside the checkout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.proof.scopes import key_of

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence

FOLDER = Path(__file__).parents[1] / "reports"
"""Where the package has it; not there in a checkout."""
RECORDS = "records.json"
ANSWERS = "answers.json"
TABLES = ("limits.csv", "spread.csv", "carried.csv", "plans.csv")
"""Files of the reports folder that a wheel carries, those that are there."""
OMITTED_METRICS = ("thumbnails", "steps", "final", "media", "stages")
OMITTED_FACTS = ("files", "config_from", "why", "reference")
"""Of a planned component: folders of the machine that made the record."""


def summarize(evidence: Iterable[Evidence]) -> bytes:
    """records.json of these records: one a line, in the order of their keys."""
    records = {key_of(record): shorten(record).to_json() for record in evidence}
    lines = (json.dumps(records[key], sort_keys=True, allow_nan=False) for key in sorted(records))
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def shorten(record: Evidence) -> Evidence:
    """A record without what takes room and nobody judges by."""
    checks = {
        name: replace(check, metrics=leave_out(check.metrics, OMITTED_METRICS))
        for name, check in record.checks.items()
    }
    parts = record.plan.get("components")
    plan = dict(record.plan)
    if isinstance(parts, Mapping):
        plan["components"] = {name: leave_out(part, OMITTED_FACTS) for name, part in parts.items()}
    return replace(record, checks=checks, plan=plan)


def leave_out(value: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Plain data without some of its keys."""
    return {key: item for key, item in value.items() if key not in set(names)}


def read_records(path: Path) -> dict[str, Evidence]:
    """The records of a summary, by key; raises EvidenceError when it is damaged."""
    from quantmatrix.proof import record as records
    from quantmatrix.proof import store

    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise records.EvidenceError(f"{path}: not a summary of records: {error}") from error
    if not isinstance(listed, list):
        raise records.EvidenceError(f"{path}: expected a list of records")
    found = [store.decode(json.dumps(one).encode(), path) for one in listed]
    return {key_of(record): record for record in found}


def write_folder(reports: Path, folder: Path) -> None:
    """What a wheel carries of a reports folder."""
    from quantmatrix.proof import columns, store

    folder.mkdir(parents=True, exist_ok=True)
    found = store.read_folder(reports / "evidence")
    (folder / RECORDS).write_bytes(summarize(found.values()))
    others = columns.read_folder(reports / columns.RUNTIMES)
    (folder / columns.SUMMARY).write_bytes(columns.summarize(others.values()))
    for name in (*TABLES, ANSWERS):
        if (reports / name).is_file():
            (folder / name).write_bytes((reports / name).read_bytes())
