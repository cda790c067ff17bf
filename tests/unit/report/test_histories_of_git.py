"""Histories that git tells, with git replaced: what is asked, what is made of it, what is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import QuantmatrixError
from quantmatrix.proof.record import EvidenceError
from quantmatrix.report import history
from quantmatrix.report.history import Skipped, Version

ROOT = Path("root")
VERSION = Version("stand-in", "", "own", "pass", 40.0, None)


def git(texts: Mapping[str, str], code: int = 0) -> Any:
    """What git prints, by the first word that it is asked."""
    asked: list[tuple[str, ...]] = []

    def ask(root: Path, *words: str) -> Any:
        assert root == ROOT
        asked.append(words)
        text = texts[words[0]].encode()
        return SimpleNamespace(returncode=code, stdout=text, stderr=b" went wrong \n")

    ask.asked = asked  # type: ignore[attr-defined]
    return ask


def test_commits_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ask_git", git({"log": "aa 2026-11-01\nbb 2026-11-02\n"}))
    assert list(history.list_commits("a/b", ROOT)) == [("aa", "2026-11-01"), ("bb", "2026-11-02")]
    monkeypatch.setattr(history, "ask_git", git({"log": ""}))
    assert list(history.list_commits("a/b", ROOT)) == []
    monkeypatch.setattr(history, "ask_git", git({"log": ""}, code=128))
    with pytest.raises(QuantmatrixError, match=r"^git log a/b: went wrong$"):
        list(history.list_commits("a/b", ROOT))


@pytest.mark.parametrize(("text", "shallow"), [("true\n", True), ("false\n", False), ("", False)])
def test_shallow_clones(text: str, shallow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ask_git", git({"rev-parse": text}))
    assert history.is_shallow(ROOT) is shallow


def test_versions_in_the_order_of_days(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "stand-in": [("c1", "2026-11-01"), ("c2", "2026-11-03"), ("c3", "2026-11-05")],
        "published": [("c4", "2026-11-02"), ("c5", "2026-11-04")],
    }

    def list_commits(path: str, root: Path) -> Any:
        return texts["published" if "published" in path else "stand-in"] if path in PATHS else []

    PATHS = (
        "reports/evidence/cpu/a.json",
        "reports/evidence/cpu/a.published.json",
    )
    numbers = {"c1": 40.0, "c3": 41.0, "c4": 30.0, "c5": 29.0}

    def decode(data: bytes) -> Any:
        if data == b"c2":
            raise EvidenceError("another form")
        return data.decode()

    monkeypatch.setattr(history, "list_commits", list_commits)
    monkeypatch.setattr(
        history, "read_files", lambda commit, root, paths: {paths[0]: commit.encode()}
    )
    monkeypatch.setattr(history, "decode", decode)
    monkeypatch.setattr(history, "describe", lambda name: replace(VERSION, psnr_db=numbers[name]))
    cell: Any = SimpleNamespace(id="a@cpu")
    found, skipped = history.read_history(cell, ROOT)
    assert [(one.commit, one.date, one.trend) for one in found] == [
        ("c1", "2026-11-01", "first"),
        ("c4", "2026-11-02", "first"),
        ("c5", "2026-11-04", "worse"),
        ("c3", "2026-11-05", "better"),
    ]
    assert skipped == [Skipped("2026-11-03", "c2", "another form")]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (": schema 0\nmore", "schema 0"),
        ("x: - no JSON -", "x: - no JSON"),
        (":\n- one\n- two", "one"),
        ("plain", "plain"),
    ],
)
def test_the_first_problem_of_a_record(
    text: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: bytes, name: str) -> None:
        assert name == ""
        raise EvidenceError(text)

    monkeypatch.setattr(history.store, "decode", fail)
    with pytest.raises(EvidenceError) as caught:
        history.decode(b"")
    assert str(caught.value) == first


def test_lines_as_they_would_have_been_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = [("c1", "2026-11-01"), ("c2", "2026-11-02"), ("c3", "2026-11-03")]
    files = "reports/evidence/cpu/b.json\nreports/evidence/cpu/a.json\nreports/evidence/x.json\n"
    files += "reports/evidence/cpu/deep/c.json\nreports/evidence/cpu/d.md\n"
    asked: list[list[str]] = []

    def read_files(commit: str, root: Path, paths: list[str]) -> dict[str, bytes]:
        asked.append(paths)
        return {path: f"{commit} {path}".encode() for path in paths}

    def decode(data: bytes) -> Any:
        commit, path = data.decode().split()
        if (commit, path[-6]) == ("c2", "b"):
            raise EvidenceError("damaged")
        return SimpleNamespace(cell={"id": path[-6] + "@cpu"}, number=int(commit[1]))

    def describe(record: Any) -> Version:
        same = record.cell["id"] == "a@cpu"
        return replace(VERSION, psnr_db=40.0 if same else 40.0 + 2 * record.number)

    monkeypatch.setattr(history, "list_commits", lambda path, root: commits)
    monkeypatch.setattr(history, "ask_git", git({"show": files}))
    monkeypatch.setattr(history, "read_files", read_files)
    monkeypatch.setattr(history, "decode", decode)
    monkeypatch.setattr(history, "describe", describe)
    lines, skipped = history.rebuild(ROOT)
    assert asked == [["reports/evidence/cpu/a.json", "reports/evidence/cpu/b.json"]] * 3
    assert {name: [one.trend for one in found] for name, found in lines.items()} == {
        "a@cpu": ["first"],
        "b@cpu": ["first", "better"],
    }
    assert [one.psnr_db for one in lines["b@cpu"]] == [42.0, 46.0]
    assert skipped == [Skipped("2026-11-02", "c2", "damaged")]
    monkeypatch.setattr("quantmatrix.report.changes.find_checkout", lambda command: ROOT)
    assert history.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/history.csv: 3 lines\nskipped 1 version (2026-11-02): damaged\n"
    )
    assert history.read_lines(tmp_path / "history.csv") == lines


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ({"load": "pass", "latents": "pass"}, "pass"),
        ({"refuse": "pass"}, "refused"),
        (
            {"load": "pass", "latents": "fail", "generate": "error"},
            "latents: fail, generate: error",
        ),
        ({"refuse": "fail"}, "refuse: fail"),
    ],
)
def test_what_a_record_says(
    checks: dict[str, str], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = SimpleNamespace(
        checks={name: SimpleNamespace(verdict=v, metrics={}) for name, v in checks.items()},
        made="2026-11-23T10:00:00Z", commit="c" * 40, cell={"hardware": "h100"},
        timings={"step quantized": 1.0, "step bf16": 8.0},
    )  # fmt: skip
    monkeypatch.setattr(history, "read_scope", lambda record: "published")
    monkeypatch.setattr(history, "read_error", lambda record: {"psnr_db": 41.5})
    expected = Version("published", "2026-11-23", "c" * 40, verdict, 41.5, 0.125)
    assert history.describe(found) == expected
