"""Strict JSON: the only reader of JSON that somebody else wrote.

Weight files, configs, indexes, packets and records are untrusted. Python's own reader takes a
file of any size, forty times its size in memory, names that stand twice, NaN, and numbers of
thousands of digits, which take a time that grows with the square of their length. Here a text is
judged in time linear in its bytes, and what is refused is refused before it takes memory:

| limit | of what |
| ----- | ------- |
| `LIMIT` | bytes of a file, read off its size before it is opened |
| `MEMORY` | bytes that the values would take, estimated from brackets, commas and colons |
| `DEPTH` | lists and objects inside one another |
| `DIGITS` | digits of a whole number; no number of 64 bits has more |
| `NAME` | characters of a key, none of them a control character |
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantmatrix.links import explain_link
from quantmatrix.quoting import quote

LIMIT = 32 * 2**20
MEMORY = 100 * 10**6
DEPTH = 64
DIGITS = 20
NAME = 200

VALUE, LIST, OBJECT, KEY = 60, 64, 184, 200
"""Bytes that Python takes for a short value in a list, an empty list, an object, and a new name in it."""
KNOWN = (b'"dtype":', b'"shape":', b'"data_offsets":')
"""Names that every entry of a header has: Python keeps each of them once."""

Make = Callable[[dict[str, Any]], Any]


class JsonError(ValueError):
    """JSON that is too much, or that nobody honest writes; the message says what is wrong."""


class NotJsonError(JsonError):
    """Text that is not valid JSON."""


def read(path: Path) -> Any:
    """The value in a file; JsonError for one that `read_bytes` refuses, or that is damaged."""
    return parse(read_bytes(path))


def read_bytes(path: Path, base: Path | None = None) -> bytes:
    """The bytes of a regular file of at most LIMIT; of another one nothing is read.

    Nor is a link followed that leads out of `base` (None: the file's own folder). Raises JsonError
    for both, OSError where there is no such file.
    """
    if why := explain_link(path, base or path.parent):
        raise JsonError(f"it {why}")
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise JsonError("it is not a regular file")
    if found.st_size > LIMIT:
        raise JsonError(f"it has {found.st_size} bytes, the limit is {LIMIT}")
    with path.open("rb") as file:
        return file.read(LIMIT)


def parse(text: bytes | str, make: Make | None = None, *, endless: bool = False) -> Any:
    """The value of a text; `make` may replace each object by something smaller.

    `endless` takes the names `Infinity` and `-Infinity`, which Python writes, for numbers.
    Raises JsonError for a text that exceeds a limit, has a name twice or a number that is not
    finite, and NotJsonError for one that is not valid JSON.
    """
    check_size(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)

    def join(pairs: list[tuple[str, Any]]) -> Any:
        table = dict(pairs)
        if len(table) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise JsonError(f"{quote(twice)!r} appears twice")
        built = table if make is None else make(table)
        if built is table:  # what is made of known names needs no look at them
            check_names(table)
        return built

    try:
        value = json.loads(
            text,
            object_pairs_hook=join,
            parse_int=read_int,
            parse_float=read_float,
            parse_constant=read_endless if endless else read_float,
        )
    except RecursionError as error:
        raise JsonError(f"it is nested more than {DEPTH} levels deep") from error
    except JsonError:
        raise
    except ValueError as error:
        raise NotJsonError(quote(str(error))) from error
    check_depth(value)
    return value


def check_size(data: bytes) -> None:
    """JsonError for a JSON text whose values, with itself, may take more than MEMORY bytes."""
    size = estimate_memory(data)
    if size > MEMORY:
        raise JsonError(f"its values would take about {size} bytes, the limit is {MEMORY}")


def estimate_memory(data: bytes) -> int:
    """Bytes that reading a JSON text takes at most: the text twice, and its values."""
    names = data.count(b":") - sum(map(data.count, KNOWN))
    values = VALUE * data.count(b",") + LIST * data.count(b"[") + OBJECT * data.count(b"{")
    return 2 * len(data) + values + KEY * names


def check_names(table: Mapping[str, Any]) -> None:
    """JsonError for a key of an object that cannot be shown as it is."""
    if max(map(len, table), default=0) <= NAME and "".join(table).isprintable():
        return
    for name in table:
        if len(name) > NAME:
            raise JsonError(f"a name has {len(name)} characters, at most {NAME}: {quote(name)}")
        if not name.isprintable():
            raise JsonError(f"a name has control characters: {quote(name)}")


def read_int(text: str) -> int:
    """A whole number of at most 20 digits; raises JsonError for a longer one."""
    if len(text) > DIGITS:
        raise JsonError(f"a number has {len(text)} digits, at most {DIGITS}: {quote(text)}")
    return int(text)


def read_float(text: str) -> float:
    """A number with a fraction or an exponent; raises JsonError for NaN and Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"{quote(text)} is not a finite number")
    return value


def read_endless(text: str) -> float:
    """Infinity, of either sign; raises JsonError for NaN."""
    return read_float(text) if text == "NaN" else float(text)


def check_depth(value: Any) -> None:
    """JsonError for lists and objects more than DEPTH levels inside one another."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH + 1):
        inner: list[Any] = []
        for outer in level:
            inner += outer.values() if isinstance(outer, dict) else outer
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return
    raise JsonError(f"it is nested more than {DEPTH} levels deep")
