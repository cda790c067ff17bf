"""Columns: what runs of other programs showed, one record per cell of a runtime's column.

A record lies at `reports/runtimes/<runtime>/<hardware>/<checkpoint>.json`, apart from the evidence of our
own cells, and holds (see `shapes.RuntimeRecord`) the cell, digests of its rows and of the adapter's code,
the verdict with the runtime's own words, the command, versions, machine, scope, metrics beside the
limits, bytes in memory by dtype, and an excerpt of the log.

| state of a cell | meaning |
| --------------- | ------- |
| a verdict (see `VERDICTS`) | its record is of the rows and the adapter as they stand |
| `stale`         | the checkpoint's or the runtime's row, or the adapter's code, changed since |
| `unproven`      | nobody has run it |
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.files import write_whole
from quantmatrix.proof import record as records
from quantmatrix.proof import shapes
from quantmatrix.proof.code_digest import own_code
from quantmatrix.proof.definitions import hash_texts
from quantmatrix.proof.record import OMITTED, EvidenceError, digest_json
from quantmatrix.proof.source_modules import Definition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantmatrix.proof.code_digest import Code
    from quantmatrix.tables.rows import Matrix, RuntimeCell, StatementRow

RUNTIMES = "runtimes"
"""Folder of the records, below the reports."""
SUMMARY = "runtimes.json"
"""What a wheel carries of them."""
SCHEMA = 1
VERDICTS = ("works", "wrong numbers", "not quantized", "refuses", "crashes", "not installed")
STALE, UNPROVEN = "stale", "unproven"
ENTRIES = ("probe", "ways", "command", "run", "explain")
"""Names of an adapter that decide what its record shows."""
JUDGES = (
    ("peers.verdict", "judge_ending"),
    ("peers.verdict", "judge_numbers"),
    ("peers.session", "Session"),
    ("peers.worker", "answer"),
)
FACTS = ("cell", "verdict", "reason", "version", "versions", "checkpoint", "scope", "tried")
"""What of a record must differ for a new one to replace it."""


@dataclass(frozen=True)
class RuntimeRecord:
    """The record of one cell; see the module's text."""

    cell: Mapping[str, str]
    verdict: str
    reason: str
    command: str
    again: str
    """The command of ours that makes the record again."""
    version: str
    """Of the runtime."""
    scope: str
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the transformer in memory, by dtype."""
    tried: tuple[str, ...] = ()
    """Other documented ways of loading, each with its verdict and reason."""
    log: str = ""
    """The end of what it printed, escaped."""
    seconds: float = 0.0
    peak_bytes: int = 0
    commit: str = ""
    made: str = ""

    @property
    def id(self) -> str:
        """Id of the cell."""
        return self.cell["id"]

    def to_json(self) -> dict[str, Any]:
        """Plain data, `schema` included."""
        return {"schema": SCHEMA, **asdict(self), "tried": list(self.tried)}


def path_of(cell_id: str) -> PurePosixPath:
    """Where a record lies below `RUNTIMES`.

    >>> str(path_of("flux-1-fp8@cpu~diffusers"))
    'diffusers/cpu/flux-1-fp8.json'
    """
    checkpoint, _, where = cell_id.partition("@")
    hardware, _, runtime = where.partition("~")
    return PurePosixPath(runtime) / hardware / f"{checkpoint}.json"


def describe_cell(cell: RuntimeCell, tables: Matrix, code: Code | None = None) -> dict[str, str]:
    """The cell with digests of its checkpoint's row, of its runtime's, and of the adapter's code."""
    row = vars(tables.checkpoints[cell.checkpoint]).items()
    facts = {key: plain(value) for key, value in row if key not in OMITTED}
    runtime = tables.runtimes[cell.runtime]
    return {
        "id": cell.id,
        "checkpoint": cell.checkpoint,
        "hardware": cell.hardware,
        "runtime": cell.runtime,
        "checkpoint_digest": digest_json(facts),
        "runtime_digest": digest_json([runtime.id, runtime.kind, runtime.found, runtime.minimum]),
        "adapter_digest": digest_adapter(cell.runtime, code or own_code()),
    }


def plain(value: Any) -> Any:
    """A column as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


@cache
def digest_adapter(runtime: str, code: Code) -> str:
    """`sha256:...` of the definitions that an adapter and its judge compute with; empty without one."""
    module = f"peers.{runtime.replace('-', '_')}"
    if not code.package.find_module(module):
        return ""
    named = [(module, name) for name in ENTRIES if code.package.has(module, name)]
    found = [(name, code.package.find(where, name)) for where, name in [*named, *JUDGES]]
    digests = [f"{n}={code.package.digest(d)}" for n, d in found if isinstance(d, Definition)]
    return f"sha256:{hash_texts(sorted(digests))}"


def explain_state(
    cell: RuntimeCell, record: RuntimeRecord | None, tables: Matrix, code: Code | None = None
) -> tuple[str, str]:
    """(state, the reason as text); see the module's table."""
    if record is None:
        return UNPROVEN, "no run yet"
    now = describe_cell(cell, tables, code)
    for key, what in (
        ("checkpoint_digest", f"the row of checkpoint {cell.checkpoint}"),
        ("runtime_digest", f"the row of runtime {cell.runtime}"),
        ("adapter_digest", f"the adapter of {cell.runtime}"),
    ):
        if now[key] != record.cell[key]:
            return STALE, f"{what} changed since; it was {record.verdict}"
    return record.verdict, record.reason


def compare_said(state: str, said: Iterable[StatementRow]) -> str:
    """A record beside what its runtime's documentation says, in few words, or nothing.

    >>> compare_said("works", [])
    'undocumented'
    """
    claims = {one.says for one in said}
    if state in (STALE, UNPROVEN):
        return " and ".join(f"documented: {claim}" for claim in sorted(claims))
    if state == "not installed":
        return ""
    if not claims:
        return "undocumented" if state == "works" else ""
    if "works" in claims:
        return "documented" if state == "works" else "documented to work"
    return "documented to refuse" if state == "works" else "documented"


def encode(record: RuntimeRecord) -> bytes:
    """The bytes of a record's file; EvidenceError for what is not a valid record."""
    data = json.loads(json.dumps(record.to_json(), allow_nan=False))
    check(data, record.cell.get("id", "record"))
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def check(data: Any, where: object) -> None:
    """Raise EvidenceError with every problem of plain data that should be a record."""
    if problems := shapes.list_problems(data, shapes.RuntimeRecord):
        raise EvidenceError("\n".join(f"{where}: {problem}" for problem in problems))


def decode(data: bytes, where: object) -> RuntimeRecord:
    """The record in a file's bytes; EvidenceError naming `where` and every problem."""
    try:
        found = strict_json.parse(data)
    except ValueError as error:
        raise EvidenceError(f"{where}: {error}") from error
    check(found, where)
    del found["schema"]
    return RuntimeRecord(**{**found, "tried": tuple(found["tried"])})


def write(record: RuntimeRecord, folder: Path) -> bool:
    """Write a record below a folder, unless one is there that says the same; whether it was written."""
    data = encode(record)
    path = folder / path_of(record.id)
    if path.is_file():
        older = json.loads(path.read_bytes())
        newer = json.loads(data)
        if all(older.get(name) == newer[name] for name in FACTS):
            return False
    write_whole(path, data)
    return True


def read_folder(folder: Path) -> dict[str, RuntimeRecord]:
    """Every record below a folder, by the id of its cell; EvidenceError for one that is damaged."""
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        record = decode(path.read_bytes(), path)
        if folder / path_of(record.id) != path:
            raise EvidenceError(f"{path}: it is the record of {record.id}, which lies elsewhere")
        found[record.id] = record
    return found


def read_reports(reports: Path) -> dict[str, RuntimeRecord]:
    """The records below a reports folder, or those of the summary that a wheel carries."""
    summary = reports / SUMMARY
    if (reports / RUNTIMES).is_dir() or not summary.is_file():
        return read_folder(reports / RUNTIMES)
    listed = [json.dumps(one).encode() for one in strict_json.read(summary)]
    found = [decode(data, summary) for data in listed]
    return {record.id: record for record in found}


def summarize(found: Iterable[RuntimeRecord]) -> bytes:
    """runtimes.json of these records: what a wheel carries, without logs."""
    listed = [{**record.to_json(), "log": ""} for record in found]
    return (json.dumps(listed, sort_keys=True, allow_nan=False) + "\n").encode()


def stamp() -> dict[str, str]:
    """Day and commit of a record that is made now."""
    return {"made": records.tell_time(), "commit": records.find_commit()}
