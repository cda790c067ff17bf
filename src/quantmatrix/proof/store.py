"""Store: records as files; reading, writing, refusing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from quantmatrix import files, strict_json
from quantmatrix.files import write_whole
from quantmatrix.proof import form, scopes, shapes, thumbnails
from quantmatrix.proof.record import (
    SCHEMA,
    CheckResult,
    Evidence,
    EvidenceError,
    _list,
    path_of,
)
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from typing import Any


def list_problems(record: Any) -> list[str]:
    """What is wrong with plain data that should be a record; empty when nothing is."""
    problems = _form_problems(record)
    return problems if _is_json(record) else problems + _number_problems("", record)


def _form_problems(record: Any) -> list[str]:
    """The same, numbers left out."""
    if not isinstance(record, dict):
        return ["not a JSON object"]
    if record.get("schema") != SCHEMA:
        return [f"schema: found {record.get('schema')!r}, expected {SCHEMA}"]
    problems = shapes.list_problems(record, shapes.Record)
    if problems:
        return problems
    for name, check in record["checks"].items():
        problems += _check_problems(f"checks.{name}", check)
    return problems or form.list_problems(record)


def _check_problems(where: str, check: dict[str, Any]) -> list[str]:
    problems = []
    if check["verdict"] == "fail" and not check["message"]:
        problems.append(f"{where}.message: empty, although the check failed")
    if "thumbnails" in check["metrics"]:
        found = thumbnails.list_problems(check["metrics"]["thumbnails"])
        problems += [f"{where}.metrics.thumbnails: {problem}" for problem in found]
    return problems


def _is_json(value: Any) -> bool:
    """Whether plain data is JSON with finite numbers; the quick answer, without names."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _number_problems(where: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        found = [_number_problems(f"{where}.{key}".lstrip("."), v) for key, v in value.items()]
    elif isinstance(value, (list, tuple)):
        found = [_number_problems(f"{where}[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, float) and not math.isfinite(value):
        return [f"{where}: {value} is not a finite number"]
    elif value is None or isinstance(value, (str, bool, int, float)):
        return []
    else:
        return [f"{where}: {type(value).__name__} is not JSON"]
    return [problem for problems in found for problem in problems]


def encode(evidence: Evidence) -> bytes:
    """The bytes of a record's file; raises EvidenceError for what is not a valid record."""
    record = json.loads(json.dumps(evidence.to_json(), default=_refuse, allow_nan=True))
    if problems := list_problems(record):
        raise EvidenceError(_list(evidence.cell.get("id", "evidence"), problems))
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _refuse(value: Any) -> Any:
    raise EvidenceError(f"evidence: {type(value).__name__} is not JSON: {value!r}")


def decode(data: bytes, where: object = "evidence") -> Evidence:
    """The record in a file's bytes; raises EvidenceError naming `where` and every problem."""
    try:
        strict_json.check_size(data)
        try:
            record = msgspec.json.decode(data)
            look = _form_problems
        except (
            msgspec.DecodeError
        ):  # or a number that is not finite: the slower reader says where it is
            record = json.loads(data)
            look = list_problems
        strict_json.check_depth(record)
        problems = look(record)
    except RecursionError as error:
        raise EvidenceError(f"{where}: nested too deeply to be a record") from error
    except ValueError as error:
        raise EvidenceError(f"{where}: not JSON: {quote(str(error))}") from error
    if problems:
        raise EvidenceError(_list(where, problems))
    del record["schema"]
    record["checks"] = {name: CheckResult(**check) for name, check in record["checks"].items()}
    return Evidence(**record)


def write(evidence: Evidence, folder: Path) -> Path:
    """Write a record below the evidence folder, whole or not at all."""
    data = encode(evidence)
    path = folder / path_of(scopes.key_of(evidence))
    write_whole(path, data)
    return path


def write_aside(several: Iterable[Evidence], folder: Path) -> list[Path]:
    """Write records below a folder that nobody reads before it is complete; the disk has all of them at
    the end."""
    paths = []
    for evidence in several:
        path = folder / path_of(scopes.key_of(evidence))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(evidence))
        paths.append(path)
    files.settle(paths)
    return paths


def remove_leftovers(folder: Path, older_than: float = 3600.0) -> None:
    """Delete what killed runs left half-written; what is younger than this many seconds stays."""
    files.remove_leftovers(folder, "*/.*.tmp", older_than)


def read(path: Path) -> Evidence:
    """One record; raises EvidenceError when it is damaged or lies under a wrong name."""
    try:
        data = strict_json.read_bytes(path)
    except strict_json.JsonError as error:
        raise EvidenceError(f"{path}: {error}: expected a record") from error
    evidence = decode(data, path)
    expected = path_of(scopes.key_of(evidence))
    if not f"/{path.as_posix()}".endswith(f"/{expected}"):
        raise EvidenceError(f"{path}: holds the record of {evidence.cell['id']}, see {expected}")
    return evidence


def read_folder(folder: Path) -> dict[str, Evidence]:
    """Every record below an evidence folder, by its key (`scopes.key_of`).

    The key is the cell's id for records of scope `stand-in`. Raises one EvidenceError for all that
    cannot be read.
    """
    found: dict[str, Evidence] = {}
    problems = []
    for path in sorted(folder.glob("*/[!.]*.json")):
        try:
            evidence = read(path)
        except EvidenceError as error:
            problems.append(str(error))
        else:
            found[scopes.key_of(evidence)] = evidence
    if problems:
        raise EvidenceError("\n".join(problems))
    return found
