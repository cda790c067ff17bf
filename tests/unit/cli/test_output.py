"""Output: the package's log, which a command shows and a program that uses the package has to itself."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import pytest

from quantmatrix.cli import output
from quantmatrix.cli.main import build_parser, main

FLUX = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev"]
LOGGER = logging.getLogger("quantmatrix")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", *FLUX], False),
        (["plan", *FLUX, "--verbose"], True),
        (["--verbose", "plan", *FLUX], True),
        (["plan", *FLUX, "--json", "--verbose"], True),
    ],
)
def test_what_a_command_says_of_its_work(
    words: list[str], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    found = capsys.readouterr()
    line = "quantmatrix: planned transformer of flux-1: black-forest-labs/FLUX.1-dev is family None"
    assert (line in found.err) is said
    assert line not in found.out
    assert LOGGER.handlers == []
    assert LOGGER.level == logging.NOTSET


def list_parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, str]]:
    """(words, help) of a parser and of all its commands."""
    yield name, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from list_parsers(inner, f"{name} {word}".lstrip())


def test_every_command_has_it() -> None:
    found = dict(list_parsers(build_parser()))
    assert len(found) > 30
    assert [name for name, text in found.items() if "--verbose" not in text] == []


def test_a_log_is_not_shown_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.getChild("runtime.load").debug("loaded")
    output.report_progress("working")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terminal", "verbose", "lines"),
    [
        (False, False, ["bad"]),
        (True, False, ["doing", "bad"]),
        (False, True, ["detail", "doing", "bad"]),
    ],
)
def test_progress_is_for_a_terminal(
    terminal: bool,
    verbose: bool,
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with output.shown_log(verbose=verbose):
        LOGGER.getChild("runtime").debug("%s", "detail")
        output.report_progress("doing")
        output.report_problems(["bad"])
    assert capsys.readouterr().err == "".join(f"quantmatrix: {line}\n" for line in lines)


def test_names_of_strangers_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with output.shown_log(verbose=True):
        LOGGER.debug("read %s of 100 %%", "a\x1b[31m")
        output.report_problems(["100 % \x1b[0m"])
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "of 100 %\n" in said
    assert "quantmatrix: 100 % " in said
