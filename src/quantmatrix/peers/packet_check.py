"""Packet check: whether the packet of a column is whole, of the rows as they stand, and says what its runs show.

1. Every file has the digest of `SHA256SUMS`, and there is no other.
2. Every record has its form, lies in its place and is of today's rows and adapter.
3. A verdict that rests on numbers (`works`, `wrong numbers`, `not quantized`) is found again from the runs that
   `runs.json` names, by the limits of this project; so are the metrics. What a program said is taken as sent.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import QuantmatrixError
from quantmatrix.harness.packets import compare_metrics
from quantmatrix.peers.column import read_side
from quantmatrix.peers.near_limits import NearLimits
from quantmatrix.peers.packet import ABOUT
from quantmatrix.peers.verdict import Verdict, judge_numbers
from quantmatrix.proof import columns
from quantmatrix.proof.record import digest_file
from quantmatrix.quoting import quote
from quantmatrix.tables.rows import RuntimeCell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantmatrix.proof.columns import RuntimeRecord
    from quantmatrix.tables.rows import Matrix

SUMS = "SHA256SUMS"
LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[^\n]+)")
NUMBERS = ("works", "wrong numbers", "not quantized")
"""Verdicts that rest on numbers."""


def is_column(folder: Path) -> bool:
    """Whether a packet is that of a column."""
    return (folder / columns.RUNTIMES).is_dir() or (folder / ABOUT).exists()


def check(folder: Path, tables: Matrix, limits: NearLimits | None = None) -> list[str]:
    """What is wrong with the packet of a column, one line each; empty when it is sound."""
    try:
        problems = list_file_problems(folder)
        if problems:
            return [f"{folder}: {problem}" for problem in problems]
        about = strict_json.read(folder / ABOUT)
        records = columns.read_folder(folder / columns.RUNTIMES)
    except (QuantmatrixError, OSError, ValueError) as error:
        return [f"{folder}: {error}"]
    if not isinstance(about, dict) or set(about) != set(records):
        return [
            f"{folder}: {ABOUT} is not about the records: expected {', '.join(sorted(records)) or 'one'}"
        ]
    problems = []
    for name, record in records.items():
        problems += [
            f"{name}: {text}" for text in list_problems(folder, record, about[name], tables, limits)
        ]
    return [f"{folder}: {problem}" for problem in problems]


def list_file_problems(folder: Path) -> list[str]:
    """Files that are missing, changed, or that nobody asked for."""
    text = strict_json.read_bytes(folder / SUMS).decode("utf-8")
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    listed = {match["name"]: match["digest"] for match in found if match}
    if len(listed) != len(found):
        return [f"{SUMS}: expected lines of a digest, two spaces and a name, each name once"]
    here = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()
    }
    here.pop(SUMS, None)
    problems = [f"{quote(name)}: missing" for name in sorted(set(listed) - set(here))]
    problems += [f"{quote(name)}: not in {SUMS}" for name in sorted(set(here) - set(listed))]
    for name, path in sorted(here.items()):
        if path.is_symlink() or not path.is_file():
            problems.append(f"{quote(name)}: a link or a device, expected a file")
        elif name in listed and digest_file(path) != listed[name]:
            problems.append(f"{quote(name)}: has another digest than {SUMS} says: it was changed")
    return problems


def list_problems(
    folder: Path, record: RuntimeRecord, about: Any, tables: Matrix, limits: NearLimits | None
) -> list[str]:
    """What is wrong with one record, beside the rows and beside its runs."""
    cell = RuntimeCell(*(record.cell[name] for name in ("checkpoint", "hardware", "runtime")))
    if cell not in tables.runtime_cells:
        return ["no such cell in the tables: are its rows part of the contribution?"]
    state, why = columns.explain_state(cell, record, tables)
    if state == columns.STALE:
        return [why]
    if record.verdict not in NUMBERS:
        return []
    limits = limits or NearLimits(tables, cell.hardware)
    try:
        found = judge_again(folder, record, about, limits, tables)
    except (QuantmatrixError, OSError, KeyError, TypeError, ValueError) as error:
        return [f"its runs cannot be read: {type(error).__name__}: {error}"]
    if found.verdict != record.verdict:
        return [f"the record says {record.verdict}, its runs say {found.verdict}: {found.reason}"]
    return compare_metrics(record.metrics, found.metrics)


def judge_again(
    folder: Path,
    record: RuntimeRecord,
    about: Mapping[str, Any],
    limits: NearLimits,
    tables: Matrix,
) -> Verdict:
    """The verdict that follows from the files of the two runs of a record.

    Raises ValueError for a folder that leads out of the packet, and what reading damaged files raises.
    """
    run, beside = about["run"], about["beside"]
    for side in (run, beside):
        for part in (side["folder"], side["media"]):
            if Path(part).is_absolute() or ".." in Path(part).parts:
                raise ValueError(f"{quote(part)} leads out of the packet")
    paths = [folder / "runs" / side["folder"] for side in (beside, run)]
    media = [side["media"] for side in (beside, run)]
    if run["latents"] != beside["latents"] and not about["decoded"]:
        return Verdict("wrong numbers", "only one of the two runs gave latents")
    base, found = (
        read_side(path, name, latents=run["latents"])
        for path, name in zip(paths, media, strict=True)
    )
    allowed = limits.find(tables.checkpoints[record.cell["checkpoint"]])
    return judge_numbers(base, found, record.weights, allowed, decoded=about["decoded"])
