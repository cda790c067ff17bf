"""The documentation: pages that come from the code say all of it, and every page is in the menu."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from quantmatrix import families
from quantmatrix.cli.flags import list_parsers
from quantmatrix.cli.main import build_parser
from quantmatrix.tables import schema

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_pages", DOCS / "write_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_menu(pages: ModuleType) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = {name for entry in settings["nav"] for name in entry.values()}
    assert settings["strict"] is True
    assert listed == {path.name for path in DOCS.glob("*.md")} | set(pages.PAGES)


def test_formats_hold_the_docstring_of_every_family(pages: ModuleType) -> None:
    text = pages.write_formats()
    for name in families.IDS:
        doc = families.load(name).__doc__ or ""
        assert f"## {name}\n" in text
        assert doc.strip().splitlines()[0] in text


def test_the_tables_reference_has_every_column(pages: ModuleType) -> None:
    text = pages.write_tables()
    for name, kind in schema.KINDS.items():
        section = text.partition(f"## {name}.csv")[2].partition("\n## ")[0]
        columns = schema.list_columns(name, kind)
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [c["name"] for c in columns]
        assert all(column["description"] for column in columns), name


def test_the_commands_page_has_every_command(pages: ModuleType) -> None:
    text = pages.write_commands()
    for parser in list_parsers(build_parser()):
        assert parser.prog == "quantmatrix" or parser.prog in text


def test_the_api_page_names_what_the_package_offers() -> None:
    import quantmatrix

    text = (DOCS / "api.md").read_text()
    named = set(re.findall(r"[a-z_]+", text))
    assert set(quantmatrix.__all__) - {"__version__"} <= named
