"""Quoting: names and values out of untrusted files, as messages and pages show them.

A tensor's name may hold a line break and `::error::`, which a CI takes for a command, an escape
sequence that a terminal obeys, or a megabyte. What is quoted has none of these: characters that
cannot be printed are escaped as Python writes them, and what is too long is cut.
"""

from __future__ import annotations

import json
import re

VALUE = 200
"""Characters of a value that are shown."""
TAIL = 40
"""Characters of its end that a value keeps when it is cut: a path ends in the file's name."""
MESSAGE = 2000
"""Bytes of the longest message."""
LONG_NAME = re.compile(rf"\S{{{VALUE + 1},}}")
COMMAND = re.compile(r"^(\s*):(?=:)|##(?=\[)", re.MULTILINE)
"""What a GitHub runner takes for a command: two colons that begin a line, `##[` anywhere."""
MARKDOWN = re.compile(
    r"([\\`*\[\]<>&#!|~@$]|(?<![^\W_])_|_(?![^\W_]))|(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE
)
"""What Markdown reads as more than text: marks, tags, entities, mentions, bare addresses."""


def quote(value: object, most: int = VALUE) -> str:
    """A value in at most `most` printable characters; what is not a text is shown as JSON."""
    if not isinstance(value, str):
        return quote_json(value, most)
    shown = escape(value[: most + 1])
    if len(shown) <= most:
        return shown
    middle, end = f"...({len(value)} characters)...", escape(value[-TAIL:])[-TAIL:]
    return shown[: most - len(middle) - len(end)] + middle + end


def quote_json(value: object, most: int = VALUE) -> str:
    """A value as JSON, a text in its quotation marks, in at most `most` printable characters."""
    return quote(_write(value, most), most)


def _write(value: object, most: int) -> str:
    """The JSON of a value, as far as it is needed: a large one is not written to its end."""
    text = ""
    for part in json.JSONEncoder(default=str).iterencode(value):
        text += part
        if len(text) > most:
            return f"{text[: most - 3]}..."
    return text


def escape(text: str) -> str:
    """A text without control characters, line breaks included: each as Python writes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def escape_lines(text: str) -> str:
    """A text of lines of ours: line breaks stay, other control characters are escaped.

    No line of it is a command to a CI.
    """
    return COMMAND.sub(_break_command, "\n".join(map(escape, text.split("\n"))))


def _break_command(match: re.Match[str]) -> str:
    return "#\\#" if match[0] == "##" else f"{match[1]}\\:"


def limit_message(text: str, most: int = MESSAGE) -> str:
    """A message as a terminal or a log may show it: escaped, with long names and its end cut."""
    lines = LONG_NAME.sub(lambda match: quote(match[0]), escape_lines(text))
    data = lines.encode()
    if len(data) <= most:
        return lines
    more = f"... ({len(data)} bytes)"
    return data[: most - len(more)].decode("utf-8", "ignore") + more


def escape_markdown(value: object, most: int = VALUE) -> str:
    """A value as Markdown that shows it and does nothing: no link, no tag, no mention."""
    return MARKDOWN.sub(lambda match: f"\\{match[1] or ''}", quote(value, most))
