"""Help: examples that work, flags that are used, and no flag without a word on it."""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import quantmatrix
from quantmatrix.cli.examples import EXAMPLES
from quantmatrix.cli.flags import GENERATION, list_parsers
from quantmatrix.cli.main import build_parser, main
from quantmatrix.exit_codes import EXIT_USAGE
from quantmatrix.proof.definitions import Package
from quantmatrix.proof.source_modules import Definition

PARSERS = {p.prog.removeprefix("quantmatrix "): p for p in list_parsers(build_parser())}
LEAVES = {
    name: parser
    for name, parser in PARSERS.items()
    if name != "quantmatrix"
    and not any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)
}
"""Parsers of commands and actions, by name."""
REQUESTS = ("request", "resolved", "short", "plain", "arguments")
"""What a request, and parsed flags, are called where they are read."""
CHOSEN = {"families": "schemes", "models": "call_arguments"}
"""Packages whose modules are chosen while a command runs, and the name by which one notices."""


@pytest.mark.parametrize("name", [name for name in PARSERS if name != "quantmatrix"])
def test_help_ends_with_examples_that_the_command_takes(name: str) -> None:
    assert EXAMPLES.get(name), f"add an example of `{name}` to cli/examples.py"
    text = PARSERS[name].format_help()
    for example in EXAMPLES[name]:
        assert f"\n  quantmatrix {example}\n" in text
        argv = shlex.split(example.partition(" > ")[0])
        assert argv[: len(name.split())] == name.split() or name in ("matrix", "evidence", "packet")
        arguments, rest = build_parser().parse_known_args(argv)
        assert hasattr(arguments, "handler")
        assert not rest or (arguments.takes_overrides and rest[0] == "--transformer-path")


def test_every_example_has_its_command() -> None:
    assert set(EXAMPLES) == set(PARSERS) - {"quantmatrix"}


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_every_flag_says_what_it_does(name: str) -> None:
    silent = [
        a.option_strings[-1] for a in PARSERS[name]._actions if a.option_strings and not a.help
    ]
    assert not silent


@cache
def package() -> Package:
    return Package(Path(quantmatrix.__file__).parent)


@cache
def list_reached(module: str, name: str) -> frozenset[Definition]:
    """All definitions that one leads to."""
    found: set[Definition] = set()
    pending = [Definition(module, name)]
    while pending:
        definition = pending.pop()
        if definition not in found:
            found.add(definition)
            pending += package().list_named(definition)
    return frozenset(found)


@cache
def list_reads(definition: Definition) -> frozenset[str]:
    """Names of flags that a definition may read: of a request, of parsed flags, or as a text."""
    return frozenset(read_names(ast.Module(package().list_statements(definition), [])))


def read_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if (
                ast.unparse(node.value).rpartition(".")[2] in REQUESTS
                or node.attr in CHOSEN.values()
            ):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def read_chosen(folder: str) -> frozenset[str]:
    """What the modules of a package read of a request."""
    paths = (Path(quantmatrix.__file__).parent / folder).rglob("*.py")
    return frozenset(n for path in paths for n in read_names(ast.parse(path.read_text("utf-8"))))


def list_read(handler: object) -> set[str]:
    """Names of flags that a command may read."""
    module = str(getattr(handler, "__module__", "")).removeprefix("quantmatrix.")
    start = list_reached(module, str(getattr(handler, "__name__", "")))
    parts = {d for d in start if d.module != "request" and not d.name.startswith(("add_", "_add_"))}
    found = {name for definition in parts for name in list_reads(definition)}
    for folder, mark in CHOSEN.items():
        if mark in found:
            found |= read_chosen(folder)
    return found | set(
        read_names(ast.Module(package().list_statements(Definition("cli.main", "run_command")), []))
    )


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_help_shows_only_flags_that_the_command_reads(name: str) -> None:
    parser = LEAVES[name]
    read = list_read(parser.get_default("handler"))
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
    unread = [action.option_strings or action.dest for action in shown if action.dest not in read]
    assert not unread, f"{name} shows flags that it never reads"


def test_a_flag_that_nothing_reads_would_be_found() -> None:
    assert "prompt" in list_read(LEAVES["generate"].get_default("handler"))
    for name in ("dequantize", "plan"):
        assert not {"seed", "save_output"} & list_read(LEAVES[name].get_default("handler"))


@pytest.mark.parametrize("flag", GENERATION)
def test_dequantize_takes_no_flag_of_a_generation(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "dequantize",
        "--model-path",
        "x",
        "--output-path",
        "y",
        f"--{flag.replace('_', '-')}",
        "1",
    ]
    assert main(words) == EXIT_USAGE
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_command_of_generate_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" not in LEAVES["plan"].format_help()
    arguments, rest = build_parser().parse_known_args(
        ["plan", "--model-path", "x", "--prompt", "a fox", "--seed", "1", "--save-output"]
    )
    assert (arguments.prompt, rest) == (["a fox"], [])


def test_version_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quantmatrix {quantmatrix.__version__}\n"
    assert main(["--version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantmatrix"] == quantmatrix.__version__
    assert found["packages"]["torch"]


def test_completion_of_bash_names_every_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    ask = "COMP_WORDS=(quantmatrix expl); COMP_CWORD=1; COMP_LINE='quantmatrix expl'\n"
    ask += '_shtab_quantmatrix quantmatrix expl quantmatrix; echo "${COMPREPLY[@]}"\n'
    said = subprocess.run(["bash"], input=script + ask, capture_output=True, text=True)
    assert said.stdout.split() == ["explain"]


def test_flags_are_not_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    """A shortened flag means another one as soon as a flag is added."""
    for argv in (["--versio"], ["plan", "--model-pat", "x"], ["recommend", "--hardwar", "cpu"]):
        assert main(argv) == EXIT_USAGE, argv
        assert capsys.readouterr().out == ""
