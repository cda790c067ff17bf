"""Page: `reports/index.html`, the matrix and all its evidence in one file that loads nothing.

The template, its style and its script lie in `templates/`; this module puts the data in. The script
draws table rows as they are scrolled to, so ten thousand cells open at once. Text from records is
data: the script never reads it as HTML, and the page forbids itself every connection.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from quantmatrix.report.page_data import collect

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined

TEMPLATES = "templates"
MARKS = {"style": "/*STYLE*/", "script": "/*SCRIPT*/", "data": "DATA"}
"""What the template has in the places of its parts."""


def write_page(joined: Joined) -> bytes:
    """index.html; equal input gives equal bytes."""
    parts = {
        "style": read_template("page.css"),
        "script": read_template("page.js"),
        "data": encode_data(collect(joined)),
    }
    page = read_template("index.html")
    for name, mark in MARKS.items():
        before, found, after = page.partition(f"<!--{mark}-->" if name == "data" else mark)
        assert found, f"the template has no place for its {name}"
        page = before + parts[name] + after
    return page.encode()


def read_template(name: str) -> str:
    """A file of the package's templates."""
    return (resources.files("quantmatrix.report") / TEMPLATES / name).read_text(encoding="utf-8")


def encode_data(data: Any) -> str:
    """JSON that may stand in a script element: no `<` that could end it, no line separators."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
