"""Reports folder: where records and limits are read from, in a checkout and in an installation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.errors import UsageError
from quantmatrix.proof import packaged

if TYPE_CHECKING:
    import os

EVIDENCE = "evidence"
"""Folder of the records, below the reports."""


def default_folder() -> Path:
    """`reports/` beside the tables in use, or where their project says; our own installed tables have
    theirs in the current folder."""
    from quantmatrix.tables import read, source

    folder = read.tables_folder()
    found = source.find()
    if found.folder == folder and found.reports is not None:
        return found.reports
    return folder.parent / "reports" if is_checkout() else Path("reports")


def find_source(reports: str | os.PathLike[str] | None) -> Path:
    """The folder to read from: the named one, that of the tables in use, else what the package carries.

    UsageError for a named one that is not there, and where the package carries none.
    """
    if reports is not None or is_checkout():
        return find_folder(reports)
    if not (packaged.FOLDER / packaged.RECORDS).is_file():
        raise UsageError(
            f"no evidence: there is no checkout around {Path(__file__).parents[1]}, and this installation "
            f"has no {packaged.FOLDER / packaged.RECORDS}; name a folder with --reports"
        )
    return packaged.FOLDER


def tell_source(reports: str | os.PathLike[str] | None) -> str:
    """Where evidence is read from, as text."""
    folder = find_source(reports)
    if folder != packaged.FOLDER:
        return str(folder)
    found = packaged.read_records(folder / packaged.RECORDS).values()
    newest = max((record.made for record in found), default="")
    return f"{folder} (the summary in the installed package, its newest record of {newest[:10]})"


def is_checkout() -> bool:
    """Whether the tables in use are those of a checkout or a project, not those in the package."""
    from quantmatrix.tables import read

    return read.tables_folder().parent != Path(__file__).parents[1]


def find_folder(reports: str | os.PathLike[str] | None) -> Path:
    """The reports folder; UsageError for one that is named and is not there."""
    folder = Path(reports) if reports is not None else default_folder()
    if reports is not None and not folder.is_dir():
        raise UsageError(f"--reports {folder}: no such folder; expected one that has {EVIDENCE}/")
    return folder
