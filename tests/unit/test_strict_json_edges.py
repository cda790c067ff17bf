"""Strict JSON at the edge of each limit: the last that is read, and the first that is not."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from quantmatrix import links, strict_json
from quantmatrix.errors import CheckpointError
from quantmatrix.strict_json import JsonError, NotJsonError, estimate_memory, parse


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_levels(opening: str, closing: str) -> None:
    levels = len(opening.replace('"a":', ""))
    count = 65 // levels
    text = opening * count + "[" * (65 % levels) + "1" + "]" * (65 % levels) + closing * count
    assert parse(text) == json.loads(text)
    said = "^it is nested more than 64 levels deep$"
    with pytest.raises(JsonError, match=said):
        parse(f"[{text}]")
    with pytest.raises(JsonError, match=said):
        parse(f'{{"b": {text}, "c": 1}}')
    parse("[[]," * 64 + "1" + "]" * 64)


@pytest.mark.parametrize("sign", ["", "-"])
def test_digits(sign: str) -> None:
    most = 20 - len(sign)
    assert parse(f"[{sign}{'7' * most}]") == [int(f"{sign}{'7' * most}")]
    text = f"{sign}{'7' * (most + 1)}"
    with pytest.raises(JsonError, match=f"^a number has 21 digits, at most 20: {text}$"):
        parse(f"[{text}]")


def test_names() -> None:
    assert parse(json.dumps({"n" * 200: 1, "": 2, "ü": 3})) == {"n" * 200: 1, "": 2, "ü": 3}
    assert parse("{}") == {}
    long = "m" * 201
    text = json.dumps({"a": 1, long: 2})
    with pytest.raises(JsonError, match=r"^a name has 201 characters, at most 200: m+"):
        parse(text)
    with pytest.raises(JsonError, match=r"^a name has control characters: b\\x07$"):
        parse('{"a": 1, "b\\u0007": 2}')
    made = parse(text, make=lambda table: sorted(table))
    assert made == ["a", long]
    with pytest.raises(JsonError, match="201 characters"):
        parse(text, make=lambda table: table)


def test_names_that_stand_twice() -> None:
    with pytest.raises(JsonError, match=r"^'b' appears twice$"):
        parse('{"a": 1, "b": 2, "b": 2, "c": 3}')
    with pytest.raises(JsonError, match=r"^'b' appears twice$"):
        parse('{"b": 1, "b": 2}', make=lambda table: None)


@pytest.mark.parametrize(
    ("text", "endless", "value"),
    [
        ("Infinity", True, math.inf),
        ("-Infinity", True, -math.inf),
        ("1.5", True, 1.5),
        ("Infinity", False, "Infinity is not a finite number"),
        ("-Infinity", False, "-Infinity is not a finite number"),
        ("NaN", True, "NaN is not a finite number"),
        ("NaN", False, "NaN is not a finite number"),
        ("1e999", True, "1e999 is not a finite number"),
        ("-1e999", False, "-1e999 is not a finite number"),
    ],
)
def test_numbers_without_an_end(text: str, endless: bool, value: Any) -> None:
    if isinstance(value, float):
        assert parse(f"[{text}]", endless=endless) == [value]
        return
    with pytest.raises(JsonError, match=f"^{value}$"):
        parse(f"[{text}]", endless=endless)


def test_text_that_is_no_json() -> None:
    with pytest.raises(NotJsonError, match=r"^Expecting value: line 1 column 2 \(char 1\)$"):
        parse("[")
    with pytest.raises(NotJsonError):
        parse(b"\xff\xff[1]")
    with pytest.raises(JsonError) as caught:
        parse('{"a": 1, "a": 2}')
    assert not isinstance(caught.value, NotJsonError)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (b"", 0),
        (b"12345", 10),
        (b"[1,2,3]", 2 * 7 + 2 * 60 + 64),
        (b'{"ab":1}', 2 * 8 + 184 + 200),
        (b'{"ab":[1,2],"cd":{}}', 2 * 20 + 2 * 60 + 64 + 2 * 184 + 2 * 200),
        (b'{"dtype":1,"shape":2,"data_offsets":3,"x":4}', 2 * 44 + 3 * 60 + 184 + 200),
    ],
)
def test_memory_of_a_text(text: bytes, size: int) -> None:
    assert estimate_memory(text) == size


def test_the_most_memory_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert strict_json.MEMORY == 100_000_000
    size = estimate_memory(b"[1,2,3]")
    monkeypatch.setattr(strict_json, "MEMORY", size)
    assert parse("[1,2,3]") == [1, 2, 3]
    monkeypatch.setattr(strict_json, "MEMORY", size - 1)
    said = f"^its values would take about {size} bytes, the limit is {size - 1}$"
    with pytest.raises(JsonError, match=said):
        parse("[1,2,3]")
    monkeypatch.setattr(strict_json, "MEMORY", 11)
    with pytest.raises(JsonError, match="would take about 12 bytes"):
        parse('"üü"')


def test_the_most_bytes_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert strict_json.LIMIT == 33_554_432
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    monkeypatch.setattr(strict_json, "LIMIT", 6)
    assert strict_json.read_bytes(path) == b"[1, 2]"
    assert strict_json.read(path) == [1, 2]
    monkeypatch.setattr(strict_json, "LIMIT", 5)
    with pytest.raises(JsonError, match=r"^it has 6 bytes, the limit is 5$"):
        strict_json.read_bytes(path)
    with pytest.raises(FileNotFoundError):
        strict_json.read(tmp_path / "b.json")
    monkeypatch.undo()
    with pytest.raises(IsADirectoryError):
        strict_json.read(tmp_path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(JsonError, match=r"^it is not a regular file$"):
        strict_json.read(tmp_path / "pipe.json")


def test_links_stay_in_their_folder(tmp_path: Path) -> None:
    inside, out = tmp_path / "in", tmp_path / "out.json"
    (inside / "deep").mkdir(parents=True)
    out.write_text("1")
    (inside / "a.json").write_text("2")
    (inside / "deep" / "link.json").symlink_to(inside / "a.json")
    (inside / "bad.json").symlink_to(out)
    (inside / "loop.json").symlink_to(inside / "loop.json")
    assert links.explain_link(inside / "a.json", inside) is None
    assert links.explain_link(inside / "deep" / "link.json", inside) is None
    assert strict_json.read_bytes(inside / "deep" / "link.json", inside) == b"2"
    why = (
        f"leads to {out}, which is not in {{}}: expected the file itself. If you trust it, name the "
        "path that it leads to, or replace it by a copy"
    )
    assert links.explain_link(inside / "bad.json", inside) == why.format(inside)
    assert links.explain_link(inside / "..", inside) is not None
    assert links.explain_link(inside / ".." / "out.json", inside) == why.format(inside)
    with pytest.raises(JsonError, match=f"^it leads to {re.escape(str(inside / 'a.json'))}, which"):
        strict_json.read_bytes(inside / "deep" / "link.json")
    assert links.check_link(inside / "a.json", inside) == inside / "a.json"
    bad = inside / "bad.json"
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{bad}: {why.format(inside)}')}$"):
        links.check_link(bad, inside)
    circle = links.explain_link(inside / "loop.json", inside)
    assert circle is None or circle.startswith("cannot be followed: ")


def test_links_of_a_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--some--repo"
    snapshot = repo / "snapshots" / "abc"
    assert links.find_blobs(snapshot) == [repo / "blobs"]
    assert links.find_blobs(snapshot / "transformer") == [repo / "blobs"]
    assert links.find_blobs(repo / "snapshots") == [repo / "blobs"]
    assert links.find_blobs(repo) == []
    assert links.find_blobs(tmp_path / "repo" / "snapshots" / "abc") == []
    (snapshot).mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "1").write_text("3")
    (snapshot / "a.json").symlink_to(repo / "blobs" / "1")
    assert links.explain_link(snapshot / "a.json", snapshot) is None
    assert links.is_plain(repo / "blobs" / "1")
    assert not links.is_plain(snapshot / "a.json")
    assert not links.is_plain(snapshot / "b.json")


DO_NOT = "the checkpoint is damaged, or was made to read your other files: do not use it"


@pytest.mark.parametrize("name", ["a", "a/b", ".a", "a..b", "x" * 255, "ü" * 127, "a/" * 200 + "b"])
def test_names_of_files_in_a_folder(name: str) -> None:
    links.check_name(name, "index.json")


@pytest.mark.parametrize(
    ("name", "shown", "what"),
    [
        ("../x", "../x", "leads out of the folder"),
        ("a/../x", "a/../x", "leads out of the folder"),
        ("/x", "/x", "leads out of the folder"),
        ("a\0b", r"a\x00b", "leads out of the folder"),
        ("ü" * 128, "ü" * 128, "is longer than the name of any file"),
        ("a/" + "x" * 197, "a/" + "x" * 197, ""),
        ("ü" * 128 + "/a", "ü" * 128 + "/a", "is longer than the name of any file"),
    ],
)
def test_names_of_files_that_are_not_in_a_folder(name: str, shown: str, what: str) -> None:
    if not what:
        links.check_name(name, "index.json")
        return
    said = f"index.json: the name {shown} {what}: expected a file in it; {DO_NOT}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
        links.check_name(name, "index.json")
