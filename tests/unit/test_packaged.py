"""Packaged: outside a checkout the installed package answers as inside, from what the wheel carries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import wheels

from quantmatrix.cli.main import main
from quantmatrix.exit_codes import EXIT_USAGE
from quantmatrix.harness import packets
from quantmatrix.proof import packaged, reports_folder
from quantmatrix.proof import store as records
from quantmatrix.proof.record import EvidenceError
from quantmatrix.report import render
from quantmatrix.tables import read

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ["explain", "--checkpoint", "fp8-guide", "--hardware", "all"],
    ["agreement", "--today", "2026-11-28"],
    ["thresholds"],
    ["matrix", "list"],
]


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of this checkout carries."""
    folder = tmp_path_factory.mktemp("wheel") / "reports"
    packaged.write_folder(ROOT / "reports", folder)
    return folder


@pytest.fixture
def outside(carried: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the package was installed, without a checkout around it."""
    monkeypatch.setattr(packaged, "FOLDER", carried)
    monkeypatch.setattr(reports_folder, "is_checkout", lambda: False)
    return carried


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_the_same_is_said_outside(
    words: list[str],
    carried: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = [main(words), main([*words, "--json"])]
    inside = capsys.readouterr()
    monkeypatch.setattr(packaged, "FOLDER", carried)
    monkeypatch.setattr(reports_folder, "is_checkout", lambda: False)
    assert [main(words), main([*words, "--json"])] == codes
    found = capsys.readouterr()
    assert "read from" not in inside.err
    assert f"read from {carried} (the summary in the installed package" in found.err
    said, expected = (text.out.partition("\n{\n") for text in (found, inside))
    assert said[0] == expected[0]
    pair = [json.loads("{" + part[2]) for part in (said, expected)]
    assert str(carried) in pair[0].pop("read_from")
    assert str(ROOT / "reports") in pair[1].pop("read_from")
    assert pair[0] == pair[1]


def test_a_summary_is_small_and_gives_every_standing(carried: Path) -> None:
    whole = records.read_folder(ROOT / "reports" / "evidence")
    short = packaged.read_records(carried / packaged.RECORDS)
    assert list(short) == sorted(whole)
    tables = read.read()
    said = [
        {name: (one.label, one.reason, one.others) for name, one in standings.items()}
        for standings in (render.stand_all(tables, found) for found in (whole, short))
    ]
    assert said[0] == said[1]
    assert (carried / packaged.RECORDS).stat().st_size < 6000 * len(whole)
    assert "data:image" not in (carried / packaged.RECORDS).read_text()


def test_a_packet_is_judged_by_the_packaged_limits(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("quantmatrix.proof.known_limits.own_reports", lambda: outside)
    monkeypatch.setattr("quantmatrix.proof.limits.read", lambda path: seen.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packets.read_ledger()
    assert seen == [outside / "limits.csv"]


def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(reports_folder, "is_checkout", lambda: False)
    for words in COMMANDS:
        assert main(words) == EXIT_USAGE
        assert "has no" in capsys.readouterr().err
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "tables")
    assert main(["matrix", "diff", "A..B"]) == EXIT_USAGE
    assert "is not a git checkout" in capsys.readouterr().err


def test_limits_are_never_measured_into_the_package(
    outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["thresholds", "--measure-spread"]) == EXIT_USAGE
    assert "name --reports DIR" in capsys.readouterr().err


def test_a_damaged_summary_is_refused(outside: Path, tmp_path: Path) -> None:
    damaged = tmp_path / packaged.RECORDS
    for text in ("[", "{}", '[{"schema": 1}]'):
        damaged.write_text(text)
        with pytest.raises(EvidenceError, match=packaged.RECORDS):
            packaged.read_records(damaged)


ASK = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from quantmatrix.cli.main import main

said = []
for words in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(words)
    said.append([code, out.getvalue(), err.getvalue()])
json.dump(said, sys.stdout)
"""
"""Runs commands, a list of words each; prints what each of them ended with and said."""


def ask(words: list[list[str]], package: Path, folder: Path) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each command by the package in a folder of packages."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=folder,
        env={"PYTHONPATH": wheels.join(package), "PATH": ""},
        input=json.dumps(words),
        check=True,
        capture_output=True,
        text=True,
    )
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, installed."""
    return wheels.install(tmp_path_factory)


def test_a_wheel_says_that_it_is_typed(installed: Path) -> None:
    assert (installed / "quantmatrix" / "py.typed").is_file()


def test_a_wheel_answers_without_a_checkout(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = installed / "quantmatrix" / packaged.FOLDER.name
    for words, (code, out, err) in zip(COMMANDS, ask(COMMANDS, installed, tmp_path), strict=True):
        assert (code, out) == (main(words), capsys.readouterr().out)
        assert f"read from {summary} (the summary in the installed package" in err


def test_what_a_wheel_lacks_is_said(installed: Path, tmp_path: Path) -> None:
    commands = {
        ("matrix", "diff", "A..B"): "is not a git checkout",
        ("thresholds", "--diff", "HEAD"): "is not a git checkout",
        ("report",): "no evidence",
        ("report", "--check"): "no evidence",
    }
    found = ask([list(words) for words in commands], installed, tmp_path)
    for (code, out, err), reason in zip(found, commands.values(), strict=True):
        assert (code, out) == (EXIT_USAGE, "")
        assert reason in err
    assert list(tmp_path.iterdir()) == []
