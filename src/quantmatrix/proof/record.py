"""Evidence: what one run of one cell of the matrix showed, as one small JSON file.

Claims are written by people in `matrix/`; evidence is written by runs, one file per cell at
`reports/evidence/<hardware>/<row>[+<backend>].json`, one more for each further scope (see
`quantmatrix.proof.scopes`). The report joins the two and never edits either. A record holds:

| key              | content |
| ---------------- | ------- |
| `schema`         | 1; readers refuse every other number |
| `cell`           | the row as it was then, a digest of it and of its checkpoint's row, two of its code |
|                  | (see `code_digest`), one of its hardware's and its model's row |
| `command`        | the command line that a person can copy |
| `machine`        | what was probed: processor, instruction set, system, threads, device |
| `versions`       | versions of the packages that took part |
| `commit`         | commit of this project's code, with `+changes` when files differed |
| `checkpoint`     | `digest` over names and contents of the weight files, `files`, `bytes`, and the |
|                  | `repository` with its `revision` where the hub's client downloaded them |
| `plan`           | the plan as `quantmatrix plan --json` prints it, or its refusal |
| `checks`         | per check: `verdict`, `metrics` (with `thumbnails`, see that module, where there are |
|                  | pictures), the `limits` they were held to, `message` |
| `witness`        | per component, what its decoded layers beside the base model's showed (see |
|                  | `witness`); empty, or missing in older records: nobody looked |
| `timings`        | seconds per stage |
| `latents_digest` | digest of the latents of every step |
| `made`           | UTC time, seconds |

Numbers are finite, keys sorted, files replaced whole: a run that is killed leaves the old record or
the new one. Paths of the machine are replaced by `$NAMES` before a record is written.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import QuantmatrixError
from quantmatrix.proof import scopes

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, CheckpointRow, HardwareRow, Matrix, ModelRow

SCHEMA = 1
VERSIONED = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "quantmatrix",
    "safetensors",
    "torch",
    "transformers",
)
"""Packages whose versions every record names."""
CELL_KEYS = (
    "id",
    "row",
    "family",
    "model",
    "checkpoint",
    "hardware",
    "backend",
    "flags",
    "checks",
    "claim",
    "rule",
    "row_digest",
)
HARDWARE_COLUMNS = ("vendor", "arch", "memory_gib", "devices", "packages")
"""Columns of hardware.csv that decide what a run there shows; names and labels do not."""
OMITTED = ("notes", "line", "scope")
"""Columns that may change without making evidence stale."""


class EvidenceError(QuantmatrixError, ValueError):
    """A record that is not what this page says; the message lists every problem."""


@dataclass(frozen=True)
class CheckResult:
    """What one check of a cell found."""

    verdict: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class Evidence:
    """The record of one cell; see the module's table."""

    cell: Mapping[str, Any]
    checks: Mapping[str, CheckResult]
    command: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    witness: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    latents_digest: str = ""
    made: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, `schema` included."""
        return {"schema": SCHEMA, **asdict(self)}


def path_of(key: str) -> PurePosixPath:
    """Where a record lies, relative to the evidence folder, by its cell's id or its key.

    >>> str(path_of("flux-1-fp8@cpu+decode"))
    'cpu/flux-1-fp8+decode.json'
    >>> str(path_of("flux-1-fp8@cpu:true-size"))
    'cpu/flux-1-fp8.true-size.json'
    """
    cell_id, colon, scope = key.partition(":")
    row, _, where = cell_id.partition("@")
    hardware, plus, backend = where.partition("+")
    return PurePosixPath(hardware, f"{row}{plus}{backend}{colon and '.'}{scope}.json")


def describe_cell(cell: Cell, tables: Matrix) -> dict[str, Any]:
    """The part of a row that evidence is about; it is stale once `row_digest` differs.

    A check that is added to a row leaves the results of the others as fresh as they were.
    `place_digest` is that of what the hardware's and the model's rows say; it is not part of the
    row, and older records do not have it. What the cell computes is added by `freshness.sign`.
    """
    described = {key: _plain(getattr(cell, key)) for key in CELL_KEYS if key != "row_digest"}
    fields = _describe_checkpoint(tables.checkpoints[cell.checkpoint])
    claimed = {key: value for key, value in described.items() if key != "checks"}
    return {
        **described,
        "row_digest": digest_json({"cell": claimed, "checkpoint": fields}),
        "place_digest": _digest_hardware(tables.hardware[cell.hardware], tables.models[cell.model]),
    }


@lru_cache(maxsize=1 << 12)
def _digest_hardware(hardware: HardwareRow, model: ModelRow) -> str:
    fields = {name: _plain(getattr(hardware, name)) for name in HARDWARE_COLUMNS}
    return digest_json([fields, model.repo, list(model.transformers)])


@lru_cache(maxsize=1 << 12)
def _describe_checkpoint(row: CheckpointRow) -> Mapping[str, Any]:
    return {key: _plain(value) for key, value in vars(row).items() if key not in OMITTED}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, frozenset)) else value


def digest_json(value: Any) -> str:
    """`sha256:...` of plain data, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_files(files: Iterable[str | Path]) -> dict[str, Any]:
    """`digest` over (name, content) of the files, their names, their size in bytes together, and
    `repository` and `revision` of a download."""
    files = list(files)
    paths = sorted({Path(file) for file in files}, key=lambda path: (path.name, str(path)))
    contents = [(path.name, digest_file(path)) for path in paths]
    return {
        "digest": digest_json(contents),
        "files": [name for name, _ in contents],
        "bytes": sum(path.stat().st_size for path in paths),
        **scopes.find_origin(files),
    }


def list_versions(packages: Iterable[str] = VERSIONED) -> dict[str, str]:
    """Version of each package that is installed."""
    import importlib.metadata  # a tenth of a second, which `recommend` has not

    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_commit(package: Path | None = None) -> str:
    """Commit of the checkout that the package runs from; empty when there is no checkout."""
    package = package or Path(__file__).parents[1]
    root = package.parents[1]
    if not (root / ".git").exists():
        return ""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--", "src", "matrix")
        return ask("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def tell_time() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_portable(value: Any, folders: Mapping[str, str]) -> Any:
    """Plain data with folders of this machine replaced, `{"/home/me/hub": "$HUB"}`."""
    if isinstance(value, str):
        for folder in sorted(folders, key=len, reverse=True):
            value = value.replace(folder, folders[folder]) if folder else value
        return value
    if isinstance(value, Mapping):
        return {key: make_portable(item, folders) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [make_portable(item, folders) for item in value]
    return value


def merge(older: Evidence, newer: Evidence) -> Evidence:
    """The newer record, with the older one's other checks where both speak of the same thing.

    Same means: cell, checkpoint, code, versions and machine. Otherwise the older one is dropped: a
    record never mixes two programs.
    """
    about = ("cell", "checkpoint", "commit", "versions", "machine")
    if any(getattr(older, name) != getattr(newer, name) for name in about):
        return newer
    merged = {f.name: getattr(newer, f.name) or getattr(older, f.name) for f in fields(newer)}
    merged["checks"] = {**older.checks, **newer.checks}
    merged["timings"] = {**older.timings, **newer.timings}
    return Evidence(**merged)


def _list(what: object, problems: Iterable[str]) -> str:
    return "\n".join(f"{what}: {problem}" for problem in problems)
