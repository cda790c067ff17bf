"""Limits are listed with their samples, and every loosening ends in exit code 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantmatrix.cli.main import main
from quantmatrix.cli.thresholds import read_older
from quantmatrix.proof import limits, witness_limits
from quantmatrix.proof.limit_samples import Sample

REPORTS = Path(__file__).parents[3] / "reports"


def ask(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["thresholds", "--json", *words]) == code
    return json.loads(capsys.readouterr().out)


def write_with(sample: Sample, folder: Path) -> Path:
    """The samples of this project with one in the place of its like, and the spreads."""
    ledger = limits.read(REPORTS / "limits.csv")
    others = [s for s in ledger.samples if not limits.is_same_key(s, sample)]
    limits.write(replace(ledger, samples=[*others, sample]), folder / "limits.csv")
    return folder / "limits.csv"


def test_every_limit_tells_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys)
    ledger = limits.read(REPORTS / "limits.csv")
    assert len(found["limits"]) == len(ledger.samples)
    assert set(found["spreads"]) == set(ledger.spreads)
    for sample, row in zip(ledger.samples, found["limits"], strict=True):
        assert sample.cell in row["source"]
        spread = f"{ledger.spreads[sample.model].psnr_db:g} dB"
        assert (spread in row["source"]) != witness_limits.is_witness(sample.kind)
        assert row["decided"] == sample.decided
    assert main(["thresholds"]) == 0
    out = capsys.readouterr().out
    assert ledger.samples[0].cell in out
    assert f"decided by: {ledger.samples[0].decided}" in out


@pytest.mark.parametrize(
    ("name", "factor"),
    [("psnr_db", 1.01), ("cosine", 1.0001), ("relative_l2", 0.99), ("layer_error", 0.99)],
)
def test_each_bound_counts(
    name: str, factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = limits.read(REPORTS / "limits.csv").samples[3]
    tighter = write_with(
        replace(sample, **{name: getattr(sample, name) * factor}), make_folder(tmp_path, "tighter")
    )
    [line] = ask(capsys, "--diff", str(tighter), code=1)["loosened"]
    assert line.startswith(f"{sample.kind} on {sample.model} ({sample.side}): {name}")
    looser = write_with(
        replace(sample, **{name: getattr(sample, name) / factor}), make_folder(tmp_path, "looser")
    )
    assert ask(capsys, "--diff", str(looser))["loosened"] == []


def make_folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_a_limit_that_vanished_is_loosened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = limits.read(REPORTS / "limits.csv")
    limits.write(replace(ledger, samples=ledger.samples[1:]), tmp_path / "limits.csv")
    words = ("--reports", str(tmp_path), "--diff", str(REPORTS / "limits.csv"))
    assert "no longer measured" in ask(capsys, *words, code=1)["loosened"][0]


def test_an_older_file_has_no_spread_and_no_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only rounding allows is loosened against a file that knew measurements alone."""
    ledger = limits.read(REPORTS / "limits.csv")
    lines = (REPORTS / "limits.csv").read_text().splitlines()
    older = tmp_path / "older.csv"
    older.write_text("".join(f"{line.rsplit(',', 3)[0]}\n" for line in without_commas(lines)))
    wider = [s for s in ledger.samples if s.decided != "measured"]
    found = ask(capsys, "--diff", str(older), code=1 if wider else 0)["loosened"]
    assert len(found) == len(wider)
    near = replace(ledger.samples[0], layer_error=0.01)
    new = write_with(near, make_folder(tmp_path, "new"))
    lines = new.read_text().splitlines()
    older.write_text("".join(f"{line.rsplit(',', 3)[0]}\n" for line in without_commas(lines)))
    words = ("--reports", str(new.parent), "--diff", str(older))
    found = ask(capsys, *words, code=1)["loosened"]
    assert any("layer_error 0.015 -> 0.135225" in line for line in found)


def without_commas(lines: list[str]) -> list[str]:
    """Lines whose last column, which may hold commas, is empty."""
    return [line.partition('"')[0] if '"' in line else line for line in lines]


def test_measuring_the_spread_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = limits.read(REPORTS / "limits.csv")
    limits.write(ledger, tmp_path / "limits.csv")
    wide = {m: replace(s, psnr_db=s.psnr_db - 30.0) for m, s in ledger.spreads.items()}
    monkeypatch.setattr("quantmatrix.measure.spread.measure_all", lambda tables, say: wide)
    words = ("--measure-spread", "--reports", str(tmp_path))
    loosened = ask(capsys, *words, code=1)["loosened"]
    assert len(loosened) > 10
    assert all("psnr_db" in line for line in loosened)
    assert limits.read(tmp_path / "limits.csv").spreads == wide
    assert ask(capsys, *words)["loosened"] == []  # measured again, nothing is looser
    assert "psnr_db by spread" in (tmp_path / "limits.csv").read_text()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"\xff\xfe" + data, "limits.csv: not UTF-8 text"),
        (lambda data: data + data.splitlines(keepends=True)[-1], "has a sample of"),
    ],
)
def test_files_that_were_damaged_or_added_to(
    damage: Callable[[bytes], bytes],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("limits.csv", "spread.csv"):
        (tmp_path / name).write_bytes((REPORTS / name).read_bytes())
    path = tmp_path / "limits.csv"
    path.write_bytes(damage(path.read_bytes()))
    for given in (["--reports", str(tmp_path)], ["--diff", str(path)]):
        assert words in ask(capsys, *given, code=1)["error"]["message"]


def test_revisions_and_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quantmatrix.proof.revisions import ask_git

    done = ask_git(REPORTS.parent, "show", "HEAD:reports/limits.csv")
    if done.returncode == 0:
        own = limits.read(REPORTS / "limits.csv")
        expected = limits.list_loosened(read_older("HEAD"), own)
        found = ask(capsys, "--diff", "HEAD", code=1 if expected else 0)
        assert found["loosened"] == expected
    reason = "neither a file" if (REPORTS.parent / ".git").exists() else "is not a git checkout"
    assert reason in ask(capsys, "--diff", "no-such", code=2)["error"]["message"]
    assert "no such file" in ask(capsys, "--reports", str(tmp_path), code=2)["error"]["message"]
