"""Source: whose tables are read, and who said so.

The first of these that says something decides:

| who                            | what |
| ------------------------------ | ---- |
| `--tables DIR`                 | of a command, or of pytest |
| `QUANTMATRIX_TABLES`           | environment variable |
| `[tool.quantmatrix]`           | `tables = "DIR"` in the nearest `pyproject.toml` upwards, relative to it |
| `quantmatrix_tables = DIR`     | in pytest's configuration, for the plugin alone |
| nobody                         | `matrix/` of the checkout, or the tables in the installed package |

A project's records and limits lie in `reports/` beside its tables, unless `[tool.quantmatrix]` also says
`reports = "DIR"`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from quantmatrix.errors import UsageError

VARIABLE = "QUANTMATRIX_TABLES"
FLAG = "--tables"
SECTION = "tool.quantmatrix"
KEYS = ("tables", "reports")
"""What `[tool.quantmatrix]` may say."""
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Source:
    """A folder of tables."""

    folder: Path
    named_by: str
    """What named the folder: a flag, a variable or a file; for our own, what they belong to."""
    reports: Path | None = None
    """The folder of the reports, where the project names one."""

    def __str__(self) -> str:
        return f"{self.folder} ({self.named_by})"


_by_flag: list[str] = []
"""Folder that a flag named, while its command runs: the innermost is last."""


def own_folder() -> Path:
    """`matrix/` of the checkout that the package runs from, else the copy in the package."""
    checkout = PACKAGE.parents[1] / "matrix"
    return checkout if (checkout / "cases.csv").is_file() else PACKAGE / "tables"


def find() -> Source:
    """The tables that commands read here; UsageError for a named folder that is not there."""
    named = os.environ.get(VARIABLE)
    if named:
        by_flag = bool(_by_flag) and _by_flag[-1] == named
        return check(Source(Path(named).absolute(), FLAG if by_flag else VARIABLE))
    return find_in_project(Path.cwd()) or own()


def own() -> Source:
    """Our own tables."""
    folder = own_folder()
    owner = "the installed package" if folder.parent == PACKAGE else "this checkout"
    return Source(folder, f"the tables of {owner}")


def check(source: Source) -> Source:
    """The source itself; UsageError where its folder is not there."""
    if not source.folder.is_dir():
        raise UsageError(
            f"{source.named_by} {source.folder}: not a directory; expected one that holds cases.csv; "
            f"`quantmatrix init {source.folder}` writes a first set of tables"
        )
    return source


@contextmanager
def use(folder: str | None) -> Iterator[None]:
    """Read the tables of a folder, in child processes too; None leaves the choice to the others."""
    if folder is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    absolute = str(check(Source(Path(folder).absolute(), FLAG)).folder)
    os.environ[VARIABLE] = absolute
    _by_flag.append(absolute)
    try:
        yield
    finally:
        _by_flag.pop()
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def find_in_project(folder: Path) -> Source | None:
    """The tables that the nearest pyproject.toml with a `[tool.quantmatrix]` names, or None."""
    for parent in (folder, *folder.parents):
        path = parent / "pyproject.toml"
        if path.is_file() and (settings := read_settings(path, path.stat().st_mtime_ns)):
            reports = settings.get("reports")
            source = Source(
                parent / settings["tables"],
                f"[{SECTION}] of {path}",
                parent / reports if reports else None,
            )
            return check(source)
    return None


@lru_cache(maxsize=32)
def read_settings(path: Path, changed: int) -> dict[str, str]:
    """`[tool.quantmatrix]` of a file, as it is at a time of change; empty where there is none.

    UsageError for a file that is not TOML, an unknown key, or one that is not text.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if SECTION not in text:
        return {}
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        settings = toml.loads(text).get("tool", {}).get("quantmatrix", {})
    except toml.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    for key, value in settings.items():
        if key not in KEYS:
            raise UsageError(f"{path}: [{SECTION}] {key}: unknown; known: {', '.join(KEYS)}")
        if not isinstance(value, str):
            raise UsageError(f"{path}: [{SECTION}] {key}: expected a folder, found {value!r}")
    if settings and "tables" not in settings:
        raise UsageError(f'{path}: [{SECTION}] lacks tables = "DIR", the folder of the tables')
    return dict(settings)
