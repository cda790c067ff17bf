"""Into: a rendered table between two marked lines of somebody else's page; the rest stays, byte for byte.

    <!-- quantmatrix:begin families -->
    <!-- quantmatrix:end families -->

A mark is a line that holds `quantmatrix:begin NAME`, in whatever comment the page's format has (`.. ` in
reStructuredText, `#` in a CSV file). Line breaks are those of the line that opens the mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from quantmatrix.errors import UsageError
from quantmatrix.files import write_whole

MARK = re.compile(rb"quantmatrix:(begin|end)[ \t]+([a-z]+)\b")
SUFFIXES = {
    ".md": "md",
    ".mdx": "md",
    ".rst": "rst",
    ".html": "html",
    ".htm": "html",
    ".csv": "csv",
}
"""The format of a page, by the ending of its name."""


def choose_format(path: Path) -> str:
    """The format that a page's name says; UsageError for a name that says none."""
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise UsageError(f"--into {path}: of which format? Say it with --format") from None


def fill(data: bytes, name: str, render: Callable[[str], str], tables: Collection[str]) -> bytes:
    """The bytes of a page with every marked table rendered; `tables` limits that to some.

    UsageError names the line of a mark that is not closed, not opened, or of an unknown table.
    """
    out: list[bytes] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        found = MARK.search(line)
        kind, table = (found[1].decode(), found[2].decode()) if found else ("", "")
        if kind == "begin" and opened is not None:
            raise UsageError(f"{name}:{number}: {opened[0]} of line {opened[1]} is not closed yet")
        if kind == "end" and (opened is None or opened[0] != table):
            raise UsageError(f"{name}:{number}: the end of {table}, which was not opened")
        if kind == "end":
            opened = None
        if opened is None or opened[0] not in tables:
            out.append(line)
        if kind == "begin":
            opened = (table, number)
            if table in tables:
                out.append(write_block(line, render(table)))
    if opened is not None:
        raise UsageError(
            f"{name}:{opened[1]}: no line `quantmatrix:end {opened[0]}` closes this mark"
        )
    return b"".join(out)


def write_block(mark: bytes, text: str) -> bytes:
    """The lines of a table below its mark, with the line break of that."""
    end = b"\r\n" if mark.endswith(b"\r\n") else b"\n"
    return b"".join(line.encode() + end for line in text.split("\n"))


def list_marked(data: bytes) -> list[str]:
    """Names of the tables that a page has marks for, in order."""
    found = [m[2].decode() for m in MARK.finditer(data) if m[1] == b"begin"]
    return list(dict.fromkeys(found))


def update(
    path: Path, render: Callable[[str], str], tables: Collection[str], *, check: bool
) -> list[str]:
    """Fill a page; returns a line for what was written or, with `check`, what differs.

    UsageError for a page that is not there, or has no marks for one of the tables.
    """
    if not path.is_file():
        raise UsageError(f"--into {path}: no such file")
    data = path.read_bytes()
    marked = list_marked(data)
    for name in tables or ("families",):
        if (tables or not marked) and name not in marked:
            raise UsageError(
                f"--into {path}: no mark for {name}; write the lines "
                f"<!-- quantmatrix:begin {name} --> and <!-- quantmatrix:end {name} --> where it belongs"
            )
    filled = fill(data, str(path), render, tables or marked)
    if filled == data:
        return [] if check else [f"{path}: unchanged"]
    if check:
        line = find_difference(data, filled)
        return [f"{path}:{line}: differs from claims and evidence; run the same without --check"]
    write_whole(path, filled)
    return [f"{path}: written"]


def find_difference(data: bytes, filled: bytes) -> int:
    """The first line that differs."""
    lines = data.splitlines(), filled.splitlines()
    pairs = zip(*lines, strict=False)
    same = next((n for n, (old, new) in enumerate(pairs, 1) if old != new), None)
    return same or min(map(len, lines)) + 1
