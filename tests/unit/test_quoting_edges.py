"""Names and values of strangers as they are shown: where they are cut, and what is escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantmatrix.quoting import (
    escape,
    escape_lines,
    escape_markdown,
    limit_message,
    quote,
    quote_json,
)


@pytest.mark.parametrize(
    ("value", "most", "shown"),
    [
        ("abc", 3, "abc"),
        ("", 3, ""),
        ("a" * 200, 200, "a" * 200),
        ("a\nb", 4, "a\\nb"),
        (
            "x" * 20 + "y" * 60,
            70,
            "x" * 9 + "...(80 characters)..." + "y" * 40,
        ),
        ("\n" * 50, 70, "\\n" * 4 + "\\" + "...(50 characters)..." + "\\n" * 20),
        ({"a": [1, None]}, 200, '{"a": [1, null]}'),
        (Path("a/b"), 200, '"a/b"'),
        (7, 200, "7"),
        ([1] * 100, 12, "[1, 1, 1,..."),
    ],
)
def test_values(value: Any, most: int, shown: str) -> None:
    found = quote(value, most)
    assert found == shown
    assert len(found) <= most


def test_a_value_of_200_characters_is_shown_whole_by_default() -> None:
    assert quote("a" * 200) == "a" * 200
    found = quote("a" * 160 + "b" * 41)
    assert found == "a" * 138 + "...(201 characters)..." + "b" * 40
    assert len(found) == 200


def test_texts_as_json_have_their_marks() -> None:
    assert quote_json("a") == '"a"'
    assert quote_json("a\n") == '"a\\n"'
    assert len(quote_json("b" * 300, 100)) == 100
    assert quote_json(["ab", "cd"], 12) == '["ab", "cd"]'
    assert quote_json(["ab", "cde"], 12) == '["ab", "c...'
    assert json.loads(quote_json({"a": 1.5})) == {"a": 1.5}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ü", "ü"),
        ("ü\x1b[0m", "ü\\x1b[0m"),
        ("a'\tb", "a'\\tb"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters(text: str, shown: str) -> None:
    assert escape(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\rc", "a\nb\\rc"),
        ("::error::x", "\\::error::x"),
        ("  ::error::x\ny ::z", "  \\::error::x\ny ::z"),
        (":single", ":single"),
        ("##[error]", "#\\#[error]"),
        ("a ##[error] ## b", "a #\\#[error] ## b"),
        ("one\n::two", "one\n\\::two"),
    ],
)
def test_lines(text: str, shown: str) -> None:
    assert escape_lines(text) == shown


def test_messages() -> None:
    assert limit_message("a" * 2000, 3000) == quote("a" * 2000)
    words = "word " * 399 + "words"
    assert len(words) == 2000
    assert limit_message(words) == words
    end = "... (2001 bytes)"
    assert limit_message(words + "!") == words[: 2000 - len(end)] + end
    assert limit_message("a" * 200 + " b") == "a" * 200 + " b"
    assert limit_message("a" * 201 + " b") == quote("a" * 201) + " b"
    assert limit_message("ü ü ü ü ü ü ü ü ü ", 27) == "ü ü ü ü ü ü ü ü ü "


@pytest.mark.parametrize(
    ("most", "shown"),
    [(26, "ü ü ü ü ... (27 bytes)"), (25, "ü ü ü ü... (27 bytes)"), (24, "ü ü ü ... (27 bytes)")],
)
def test_a_message_is_cut_between_characters(most: int, shown: str) -> None:
    assert limit_message("ü ü ü ü ü ü ü ü ü ", most) == shown
    assert len(shown.encode()) <= most


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("snake_case_name", "snake_case_name"),
        ("_a_ b_ c", "\\_a\\_ b\\_ c"),
        ("__", "\\_\\_"),
        ("a*b[c](d)<e>&#!|~@$`\\", "a\\*b\\[c\\](d)\\<e\\>\\&\\#\\!\\|\\~\\@\\$\\`\\\\"),
        ("http://a www.b WWW.c ftp:x", "http:\\//a www\\.b WWW\\.c ftp:x"),
        (["a"], '\\["a"\\]'),
    ],
)
def test_markdown(value: Any, shown: str) -> None:
    assert escape_markdown(value) == shown
