"""Limits are listed with their samples, and every loosening ends in exit code 1."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantmatrix import limits
from quantmatrix.cli import main

REPORTS = Path(__file__).parents[2] / "reports"


def ask(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["thresholds", "--json", *words]) == code
    return json.loads(capsys.readouterr().out)


def test_every_limit_tells_its_sample(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys)
    samples = limits.read_samples(REPORTS / "limits.csv")
    assert len(found["limits"]) == len(samples)
    assert all(s.cell in row["source"] for s, row in zip(samples, found["limits"], strict=True))
    assert main(["thresholds"]) == 0
    assert samples[0].cell in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "factor"),
    [("psnr_db", 1.01), ("cosine", 1.0001), ("relative_l2", 0.99), ("layer_error", 0.99)],
)
def test_each_bound_counts(
    name: str, factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = limits.read_samples(REPORTS / "limits.csv")
    tighter = replace(samples[3], **{name: getattr(samples[3], name) * factor})
    older = tmp_path / "older.csv"
    older.write_text(limits.write_samples([*samples[:3], tighter, *samples[4:]]))
    [line] = ask(capsys, "--diff", str(older), code=1)["loosened"]
    assert line.startswith(f"{samples[3].kind} on {samples[3].model}")
    looser = replace(samples[3], **{name: getattr(samples[3], name) / factor})
    older.write_text(limits.write_samples([*samples[:3], looser, *samples[4:]]))
    assert ask(capsys, "--diff", str(older))["loosened"] == []


def test_a_limit_that_vanished_is_loosened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = limits.read_samples(REPORTS / "limits.csv")
    (tmp_path / "limits.csv").write_text(limits.write_samples(samples[1:]))
    words = ("--reports", str(tmp_path), "--diff", str(REPORTS / "limits.csv"))
    assert "no longer measured" in ask(capsys, *words, code=1)["loosened"][0]


def test_revisions_and_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quantmatrix.matrix_changes import ask_git

    done = ask_git(REPORTS.parent, "show", "HEAD:reports/limits.csv")
    if done.returncode == 0:
        committed = limits.parse_samples(done.stdout.decode(), "HEAD")
        own = limits.read_samples(REPORTS / "limits.csv")
        expected = limits.list_loosened(committed, own)
        found = ask(capsys, "--diff", "HEAD", code=1 if expected else 0)
        assert found["loosened"] == expected
    assert "neither a file" in ask(capsys, "--diff", "no-such", code=2)["error"]["message"]
    assert "no such file" in ask(capsys, "--reports", str(tmp_path), code=2)["error"]["message"]
