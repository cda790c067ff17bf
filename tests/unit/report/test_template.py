"""Templates: one base, everything escaped, and no page is put together elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

import quantmatrix
from quantmatrix.report import template

PACKAGE = Path(quantmatrix.__file__).parent
PAGES = sorted(path.name for path in (PACKAGE / "report" / "templates").glob("*.html"))
EVIL = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; "


@pytest.mark.parametrize("name", [name for name in PAGES if name != "base.html"])
def test_every_page_extends_the_base(name: str) -> None:
    text = template.read_file(name)
    assert text.startswith('{% extends "base.html" %}\n')
    assert "|safe" not in text.replace(" ", "")  # nor is anything let through unescaped
    assert "<html" not in text
    assert "<head>" not in text


def test_there_is_one_base() -> None:
    assert "base.html" in PAGES
    assert len(PAGES) > 2
    assert POLICY in template.read_file("base.html")


def test_no_page_is_put_together_elsewhere() -> None:
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(mark in path.read_text(encoding="utf-8") for mark in ("<html", "<body", "<!doctype"))
    ]
    assert found == []


def test_whatever_a_page_is_given_is_escaped() -> None:
    given = {"script": "", "details": "", "measured": [EVIL], "preferences": [EVIL]}
    page = template.draw("index.html", **given, data=EVIL, others=False)
    assert EVIL not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{ 7 * 7 }}" in page
    assert template.read_part("page.css") in page
    assert POLICY in page
    assert page.endswith("</html>\n")


def test_a_value_that_nobody_gave_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="script"):
        template.draw(
            "index.html", details="", data="", measured=[], preferences=["a"], others=False
        )
