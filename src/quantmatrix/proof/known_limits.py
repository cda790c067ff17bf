"""Known limits: those that a project measured, and ours where it has none.

A limit is a measurement of arithmetic, not of a project, so ours holds for foreign tables, too; what was borrowed
so is said in its `source`. What nobody measured has no limit: a row that meets it is `unjudged`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.proof import limits, packaged
from quantmatrix.tables import source

if TYPE_CHECKING:
    from quantmatrix.proof.limits import Ledger

FILE = "limits.csv"


def own_reports() -> Path:
    """The folder of our own limits: `reports/` of the checkout, else what the package carries."""
    checkout = source.own_folder().parent / "reports"
    return checkout if (checkout / FILE).is_file() else packaged.FOLDER


def read(reports: Path) -> Ledger:
    """The limits of a reports folder, with ours behind them; LimitsError for damaged ones."""
    ours = own_reports() / FILE
    path = reports / FILE
    if path.resolve() == ours.resolve():
        return limits.read(path)
    return limits.read(path, limits.read(ours))
