"""Bundle: suites, tables and limits of a project as one text, laid out again on a node.

A node needs the package and pytest, and no checkout: what it runs is what the driver has.

    matrix/*.csv          the tables
    tests/suites/*.py     the suites
    conftest.py           where there is one
    reports/*.csv         limits and spreads
    pytest.ini            says where the tables are
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import quantmatrix
from quantmatrix.errors import UsageError

TABLES = "matrix"
INI = f"""[pytest]
quantmatrix_tables = {TABLES}
addopts = --strict-markers --strict-config
xfail_strict = true
strict_parametrization_ids = true
empty_parameter_set_mark = fail_at_collect
"""


def pack(root: Path, suites: Iterable[str]) -> bytes:
    """The files of a project by their paths, as JSON; `suites` are files or folders in it.

    Raises UsageError where tables or suites are missing.
    """
    paths = sorted((root / TABLES).glob("*.csv"))
    if not paths:
        raise UsageError(f"{root / TABLES}: no tables; name a checkout with --project")
    for name in suites:
        found = [root / name] if (root / name).is_file() else sorted((root / name).glob("*.py"))
        if not found:
            raise UsageError(f"{root / name}: no suites; name a checkout with --project")
        paths += found
    others = [root / "conftest.py", root / "reports" / "limits.csv", root / "reports/spread.csv"]
    paths += [path for path in others if path.is_file()]
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in paths}
    return json.dumps({**texts, "pytest.ini": INI}, sort_keys=True).encode()


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
