"""Page: `reports/index.html`, the matrix and all its evidence in one file that loads nothing.

The template, its style and its script lie in `templates/`; this module puts the data in. The script
draws table rows as they are scrolled to, so ten thousand cells open at once. Text from records is
data: the script never reads it as HTML, and the page forbids itself every connection.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from quantmatrix.report import runtimes as columns
from quantmatrix.report import template
from quantmatrix.report.page_data import collect

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined
    from quantmatrix.report.runtimes import Runtimes


def write_page(joined: Joined, runtimes: Runtimes) -> bytes:
    """index.html; equal input gives equal bytes."""
    from markupsafe import Markup

    data = Markup(encode_data(collect(joined)))
    script = template.read_part("page.js")
    others = columns.collect(runtimes) if joined.tables.runtimes else None
    return template.draw("index.html", script=script, data=data, runtimes=others).encode()


def encode_data(data: Any) -> str:
    """JSON that may stand in a script element: no `<` that could end it, no line separators."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
