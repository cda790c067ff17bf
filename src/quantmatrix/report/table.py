"""Table: rows as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; line breaks and bars inside cells are escaped.

    Cells are Markdown: untrusted text in one goes through `quoting.escape_markdown`.
    """

    def line(cells: Sequence[str]) -> str:
        clean = (str(c).replace("\n", " ").replace("\\|", "|").replace("|", "\\|") for c in cells)
        return f"| {' | '.join(clean)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *(line(row) for row in rows)])
