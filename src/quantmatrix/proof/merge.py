"""Merging: the evidence of any set of shards, from any machines, as one folder.

Records of different cells lie beside each other. Of one cell there may be several: a shard that was
run again, checks that were run apart, an older commit. The order in which the folders are named
never matters:

* two results for one row, device and commit that differ are an error, and nothing is written;
* records of one program on one machine are joined, the newer check wins;
* of the rest the newest is taken.

A record that cannot be read counts as not there, and is named. `MergeError` is raised for results
that differ; what is planned and not there is found by `quantmatrix.harness.completeness`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.files import check_writable, put, staging
from quantmatrix.proof import facts, store
from quantmatrix.proof import record as records
from quantmatrix.proof.scopes import key_of

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence

SUBJECT = ("cell", "checkpoint", "commit", "versions", "machine")
"""Records that agree in these are of one program on one machine."""


class MergeError(QuantmatrixError, ValueError):
    """Two different results for one row, device and commit."""


@dataclass(frozen=True)
class Found:
    """A record and the file that it was read from."""

    record: Evidence
    path: Path

    @property
    def age(self) -> tuple[str, bytes]:
        """What records of one cell are ordered by, the newest last."""
        return self.record.made, store.encode(self.record)


@dataclass(frozen=True)
class Merged:
    """What came of merging."""

    records: dict[str, Evidence]
    """One per cell and scope, by key."""
    damaged: tuple[str, ...]
    """Files that are no records, each with the reason."""


def merge_folders(folders: Iterable[Path]) -> Merged:
    """One record per cell and scope of all evidence folders; see the module for the rules.

    Raises UsageError for a folder that is not there, MergeError for results that contradict.
    """
    by_cell: dict[str, list[Found]] = {}
    damaged = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of evidence")
        for path in sorted(folder.glob("*/[!.]*.json")):
            try:
                record = store.read(path)
            except (records.EvidenceError, UnicodeDecodeError) as error:
                damaged.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
            else:
                by_cell.setdefault(key_of(record), []).append(Found(record, path))
    conflicts = [line for name in sorted(by_cell) for line in find_conflicts(by_cell[name])]
    if conflicts:
        raise MergeError("\n".join([*conflicts, REMEDY]))
    merged = {name: join(by_cell[name]) for name in sorted(by_cell)}
    return Merged(merged, tuple(sorted(damaged)))


REMEDY = (
    "one program gave two results: run the cells again until they repeat, or leave one folder out"
)


def find_conflicts(found: Sequence[Found]) -> list[str]:
    """Results of one cell that differ although row, device and commit are the same, as text."""
    lines = []
    groups: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: (one.age, str(one.path))):
        groups.setdefault(name_program(one.record), []).append(one)
    for group in groups.values():
        first: dict[str, tuple[Any, Path]] = {}
        for one in group:
            for what, value in list_results(one.record).items():
                other, path = first.setdefault(what, (value, one.path))
                if other != value:
                    lines.append(
                        f"{one.record.cell['id']}: {what} is {other} in {path}, "
                        f"and {value} in {one.path}"
                    )
    return lines


def name_program(record: Evidence) -> str:
    """Row, device, code and commit of a record: the same give the same result."""
    machine = record.machine
    # The number of devices that a shard may see says nothing about what they compute.
    device = sorted(set(machine.get("devices", ()))) or machine.get("processor", "")
    code = [record.cell.get(f"{what}_digest", "") for what in ("row", "device", "shared")]
    return json.dumps([device, record.commit, *code])


def list_results(record: Evidence) -> dict[str, str]:
    """What must repeat: verdicts and digests, not times; what a record does not tell is left out."""
    results = {f"check {name}": check.verdict for name, check in record.checks.items()}
    results["digest of the latents"] = record.latents_digest
    results["digest of the checkpoint"] = str(record.checkpoint.get("digest", ""))
    return {what: value for what, value in results.items() if value}


def join(found: Sequence[Found]) -> Evidence:
    """The record of a cell: those of one program joined, the newest of different ones."""
    groups: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: one.age):
        subject = [getattr(one.record, name) for name in SUBJECT]
        groups.setdefault(json.dumps(subject, sort_keys=True), []).append(one)
    newest = max(groups.values(), key=lambda group: group[-1].age)
    return reduce(records.merge, (one.record for one in newest))


def join_kept(record: Evidence, folder: Path) -> Evidence:
    """A record joined with the one of its cell and scope that lies in an evidence folder, if any can be
    read; no other file is.

    Raises MergeError where the two contradict each other.
    """
    path = folder / records.path_of(key_of(record))
    try:
        found = [Found(store.read(path), path), Found(record, Path("the new record"))]
    except (OSError, records.EvidenceError):
        return record
    if conflicts := find_conflicts(found):
        raise MergeError("\n".join([*conflicts, REMEDY]))
    return join(found)


def is_news(path: Path, target: Path) -> bool:
    """Whether a new record says more than the one it would replace, if there is one that can be
    read."""
    try:
        older = store.read(target)
    except (OSError, records.EvidenceError):
        return True
    return facts.is_news(older, store.decode(path.read_bytes()), datetime.now(timezone.utc).date())


def write(merged: Iterable[Evidence], folder: Path) -> list[Path]:
    """Put records into an evidence folder; those of other cells stay. Returns the changed files.

    One that says nothing new leaves the record there as it is (see `quantmatrix.proof.facts`).
    All of them are written beside the folder first, so a full disk leaves it as it was.
    """
    check_writable(folder / "record")
    changed = []
    with staging(folder) as beside:
        for path in store.write_aside(merged, beside):
            target = folder / path.relative_to(beside)
            if target.exists() and not is_news(path, target):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            put(path, target)
            changed.append(target)
    return changed
