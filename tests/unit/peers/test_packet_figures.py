"""Packets, whole: what is written of a column, and every line that a check says of a damaged one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.peers import packet, packet_check
from quantmatrix.peers.column import Outcome, Pair, Ran
from quantmatrix.peers.packet import Asked
from quantmatrix.peers.protocol import DONE, Answer, Task
from quantmatrix.peers.session import Bounds
from quantmatrix.peers.verdict import Verdict
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell

TABLES = read.read()
ROW = TABLES.checkpoints["modelopt-fp8-flux-2"]
CELL = next(c for c in TABLES.runtime_cells if c.checkpoint == ROW.id)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_packet_is_written_as_it_becomes_known(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    written: list[Any] = []
    task = Task(ROW, "b", "w")
    pair = Pair(
        Ran(task, Answer(DONE, media="m"), tmp_path / "0002-x"),
        Ran(task, Answer(DONE, latents=True), tmp_path / "0001-y"),
        True,
    )
    outcomes = [
        Outcome(RuntimeCell("a", "h", "r"), "record", pair=pair),  # type: ignore[arg-type]
        Outcome(RuntimeCell("b", "h", "r"), None, "why"),
    ]

    class Column:
        def __init__(self, *given: Any, **named: Any) -> None:
            made.append((given[1:], named))

        def __enter__(self) -> Column:
            return self

        def __exit__(self, *_: object) -> None: ...

        def run(self, names: Any) -> Any:
            made.append(names)
            return iter(outcomes)

    def pack(folder: Path, archive: Path) -> Path:
        assert (folder / "runs.json").is_file()
        return archive

    monkeypatch.setattr(packet, "Column", Column)
    monkeypatch.setattr(packet.columns, "write", lambda *given: written.append(given))
    monkeypatch.setattr("quantmatrix.harness.sessions.pack", pack)
    shown: list[Outcome] = []
    folder, records = tmp_path / "out", tmp_path / "records" if recorded else None
    monkeypatch.setattr(packet, "check_writable", lambda path: path.mkdir())
    bounds = Bounds(seconds=7)
    asked = Asked("r", "h", ("a", "b"), True, bounds, 3)
    found = packet.make(TABLES, asked, folder, records, shown.append)
    assert found == (outcomes, tmp_path / "out.tar.gz")
    assert shown == outcomes
    assert made == [
        (("r", "h", folder / "runs"), {"tiny": True, "bounds": bounds, "workers": 3}),
        ("a", "b"),
    ]
    places = [folder / "runtimes", *([records] if recorded else [])]
    assert written == [("record", place) for place in places]
    assert (folder / "runs.json").read_text() == (
        '{\n "a@h~r": {\n  "beside": {\n   "folder": "0001-y",\n   "latents": true,\n   "media": ""\n'
        '  },\n  "decoded": true,\n  "run": {\n   "folder": "0002-x",\n   "latents": false,\n'
        '   "media": "m"\n  }\n }\n}\n'
    )
    with pytest.raises(UsageError) as caught:
        packet.make(TABLES, asked, folder)
    assert str(caught.value) == f"--output-path {folder} exists; name a new folder"


def put_records(folder: Path, monkeypatch: pytest.MonkeyPatch, about: Any, **records: Any) -> None:
    monkeypatch.setattr(packet_check, "list_file_problems", lambda folder: [])
    monkeypatch.setattr(packet_check.columns, "read_folder", lambda path: records)
    (folder / "runs.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("about", "records", "text"),
    [
        ({}, {"b": 1, "a": 2}, "runs.json is not about the records: expected a, b"),
        ([], {}, "runs.json is not about the records: expected one"),
        ({"x": 1}, {}, "runs.json is not about the records: expected one"),
        ({"x": 1, "y": 2}, {"x": 1}, "runs.json is not about the records: expected x"),
        ({}, {}, None),
    ],
)
def test_runs_that_belong_to_no_record(
    about: Any,
    records: dict[str, Any],
    text: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_records(tmp_path, monkeypatch, about, **records)
    expected = [] if text is None else [f"{tmp_path}: {text}"]
    assert packet_check.check(tmp_path, TABLES) == expected


def test_every_problem_is_named_with_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_records(tmp_path, monkeypatch, {"a": 1, "b": 2}, a="A", b="B")
    monkeypatch.setattr(
        packet_check,
        "list_problems",
        lambda folder, record, about, *_: [f"{record} {about}", "more"],
    )
    assert packet_check.check(tmp_path, TABLES) == [
        f"{tmp_path}: {text}" for text in ("a: A 1", "a: more", "b: B 2", "b: more")
    ]
    monkeypatch.setattr(packet_check, "list_file_problems", lambda folder: ["x: missing", "y: odd"])
    assert packet_check.check(tmp_path, TABLES) == [
        f"{tmp_path}: x: missing",
        f"{tmp_path}: y: odd",
    ]

    def fail(folder: Path) -> list[str]:
        raise OSError("unreadable")

    monkeypatch.setattr(packet_check, "list_file_problems", fail)
    assert packet_check.check(tmp_path, TABLES) == [f"{tmp_path}: unreadable"]


def record_of(verdict: str = "works", checkpoint: str = ROW.id) -> Any:
    cell = {"checkpoint": checkpoint, "hardware": CELL.hardware, "runtime": CELL.runtime}
    return SimpleNamespace(cell=cell, verdict=verdict, metrics={"steps": 3})


def test_what_is_wrong_with_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [("fresh", ""), ("stale", "the adapter changed")]
    now = [0]
    judged: list[Any] = []

    def judge(*given: Any) -> Verdict:
        judged.append(given[3])
        return Verdict("works", "", {"steps": 4})

    monkeypatch.setattr(packet_check.columns, "STALE", "stale")
    monkeypatch.setattr(packet_check.columns, "explain_state", lambda *_: states[now[0]])
    monkeypatch.setattr(packet_check, "judge_again", judge)
    monkeypatch.setattr(packet_check, "compare_metrics", lambda one, other: [f"{one} {other}"])
    limits: Any = SimpleNamespace()

    def find(record: Any, given: Any = limits) -> list[str]:
        return packet_check.list_problems(tmp_path, record, {}, TABLES, given)

    assert find(record_of(checkpoint="none")) == [
        "no such cell in the tables: are its rows part of the contribution?"
    ]
    assert find(record_of()) == ["{'steps': 3} {'steps': 4}"]
    assert judged == [limits]
    for verdict in ("wrong numbers", "not quantized"):
        assert find(record_of(verdict)) == [f"the record says {verdict}, its runs say works: "]
    for verdict in ("refuses", "crashes", "not installed"):
        assert find(record_of(verdict)) == []
    assert len(judged) == 3
    assert find(record_of(), None) != []
    assert (judged[3].hardware, judged[3].tables) == (CELL.hardware, TABLES)
    now[0] = 1
    assert find(record_of()) == ["the adapter changed"]

    def fail(*_: Any) -> Verdict:
        raise KeyError("media")

    now[0] = 0
    monkeypatch.setattr(packet_check, "judge_again", fail)
    assert find(record_of()) == ["its runs cannot be read: KeyError: 'media'"]
