"""Recordings: which tests executed which lines, kept for a state of the source, renewed by files of tests.

A folder has a `part-NNN` for each recording: coverage files, `seconds.json`, and `files.json`, the files
of tests that were recorded with their digests. A later part replaces what earlier ones say of its files.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import places
from places import Seen

SOURCE = "src/quantmatrix/"


def digest_tests(tree: Path, tests: Sequence[str]) -> dict[str, str]:
    """Digest of every file of tests, with the modules beside tests that it imports, and its conftests."""
    helpers = {path.stem: path for path in sorted((tree / "tests/unit").glob("*.py"))}
    found: dict[str, str] = {}
    for name in tests:
        path = tree / name
        for file in sorted(path.rglob("test_*.py")) if path.is_dir() else [path]:
            above = [folder / "conftest.py" for folder in file.parents if folder != tree]
            used = [one for one in above if one.is_file()] + follow_imports(file, helpers)
            digest = hashlib.sha256(b"".join(one.read_bytes() for one in used))
            found[str(file.relative_to(tree))] = digest.hexdigest()
    return found


def follow_imports(file: Path, helpers: dict[str, Path]) -> list[Path]:
    """A file and the helpers that it imports, and those that these import."""
    used, pending = [file], [file]
    while pending:
        for name in sorted(places.imports_of(ast.parse(pending.pop().read_bytes()))):
            helper = helpers.get(name)
            if helper is not None and helper not in used:
                used.append(helper)
                pending.append(helper)
    return used


def read(folder: Path, copies: Path) -> tuple[Seen, dict[str, str]]:
    """(what was seen, digests of the files of tests that were recorded) of all parts of a folder.

    Lines are those of sources in the copies of the checkout below `copies`: a test may write modules.
    """
    import coverage

    lines: dict[str, dict[int, list[str]]] = {}
    seconds: dict[str, float] = {}
    known: dict[str, str] = {}
    for part in sorted(folder.glob("part-*")):
        files = json.loads((part / "files.json").read_text())
        for tests in (tests for numbers in lines.values() for tests in numbers.values()):
            tests[:] = [test for test in tests if places.test_file(test) not in files]
        seconds = {t: took for t, took in seconds.items() if places.test_file(t) not in files}
        seconds |= json.loads((part / "seconds.json").read_text())
        known |= files
        for file in part.glob("coverage.*"):
            data = coverage.CoverageData(basename=str(file))
            data.read()
            for source in data.measured_files():
                _, below, rest = source.rpartition(f"/{SOURCE}")
                if not below or not Path(source).is_relative_to(copies):
                    continue
                numbers = lines.setdefault(f"{SOURCE}{rest}", {})
                for line, contexts in data.contexts_by_lineno(source).items():
                    numbers.setdefault(line, []).extend(test for test in contexts if test)
    return Seen(lines, seconds), known
