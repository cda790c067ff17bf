"""Bundle: tables, limits and suites of a project as one text, laid out again on a node.

A node needs the package and pytest, and no checkout: what it runs is what the driver has.

    matrix/*.csv          the tables
    reports/*.csv         limits and spreads, where the project has some
    tests/suites/*.py     suites of a folder, or a suite and its conftest beside each other, as they lie
    pytest.ini            says where the tables are
    suites.json           what pytest is given
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import quantmatrix
from quantmatrix.errors import UsageError

TABLES = "matrix"
PACKAGED = "quantmatrix.suites"
"""Suites that come with the package."""
FOLDER = "tests/suites"
"""Where those of a folder are laid out."""
LIST = "suites.json"
LIMITS = ("limits.csv", "spread.csv")
INI = f"""[pytest]
quantmatrix_tables = {TABLES}
addopts = --strict-markers --strict-config
xfail_strict = true
strict_parametrization_ids = true
empty_parameter_set_mark = fail_at_collect
"""


def pack(tables: Path, suites: Sequence[Path] = ()) -> bytes:
    """The files of a project by their paths, as JSON; `tables` is its folder of tables.

    `suites` are files or folders; where none is named, those of the package run. Raises UsageError where
    tables or suites are missing.
    """
    texts = {f"{TABLES}/{path.name}": path for path in sorted(tables.glob("*.csv"))}
    if not texts:
        raise UsageError(f"{tables}: no tables there")
    reports = tables.parent / "reports"
    texts.update({f"reports/{name}": reports / name for name in LIMITS})
    arguments: list[str] = []
    for path in suites or find_suites(tables):
        found = {f"{FOLDER}/{one.name}": one for one in sorted(path.glob("*.py"))}
        if path.is_file():
            found = {path.name: path, "conftest.py": path.parent / "conftest.py"}
        if not found:
            raise UsageError(f"--suites {path}: no suites there")
        texts.update(found)
        arguments.append(FOLDER if path.is_dir() else path.name)
    files = {
        name: path.read_text(encoding="utf-8") for name, path in texts.items() if path.is_file()
    }
    files[LIST] = json.dumps(arguments or ["--pyargs", PACKAGED])
    return json.dumps({**files, "pytest.ini": INI}, sort_keys=True).encode()


def find_suites(tables: Path) -> list[Path]:
    """The suites of a checkout, where the package has none of its own."""
    if importlib.util.find_spec(PACKAGED) is not None:
        return []
    return [tables.parent / FOLDER]


def unpack(data: bytes, folder: Path) -> None:
    """Lay the files out; UsageError for a path that leads out of the folder."""
    for name, text in json.loads(data).items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{name}: a file of a bundle lies in its folder")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def digest_source(package: Path | None = None) -> str:
    """sha256 over the names and bytes of the package's modules: nodes must have the driver's."""
    package = package or Path(quantmatrix.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
