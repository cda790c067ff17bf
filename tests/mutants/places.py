"""Places: which tests can see a change of one place of the source, and which places nobody can see.

| place | seen by |
| ----- | ------- |
| a line of a function | the tests that executed it (coverage contexts, recorded by `watch_tests`) |
| what runs at import: constants, defaults | tests of files that import the module, then those that ran it |
| the data of a module that is loaded by its id (`BY_ID`) | also tests whose parameters name it |
| what ran while tests were collected: data of a test file | tests of files that import the module |
| what no test was seen to execute: it may run where nothing is recorded | the same |
| an annotation, the body of `if TYPE_CHECKING` | nobody: it is never executed |

Standard library only.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Span = tuple[int, int]
"""First and last line, counted from 1."""
LONG = 1 / 20
"""Share of the budget that a test may take without being left for the end."""
BY_ID = ("models", "further", "families", "peers")
"""Folders whose modules are loaded by their ids: no test imports them by name."""
READERS = ("tests/unit/test_frozen_classes.py",)
"""Tests that read every module as text: what they see of a definition, no recording shows."""
COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Seen:
    """What a run of the tests showed."""

    lines: Mapping[str, Mapping[int, list[str]]] = field(default_factory=dict)
    """Tests by line, by path of the source file."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each test, set-up included."""


def span_of(tree: ast.Module, line: int) -> tuple[Span, bool]:
    """(lines of the innermost statement at a line, whether it runs at import).

    Of a compound statement it is the head alone; a function's head (defaults, decorators) runs where
    its definition does.
    """
    best: Span = (line, line)
    at_import = True
    for node, inside in walk(tree.body, inside=False):
        first, last = head_of(node)
        if first <= line <= last:
            best, at_import = (first, last), not inside
    return best, at_import


def walk(body: Iterable[ast.stmt], *, inside: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """(statement, whether it is inside a function) of a body, outer ones first."""
    for node in body:
        yield node, inside
        below = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for part in ("body", "orelse", "finalbody"):
            yield from walk(getattr(node, part, []), inside=below)
        for handler in getattr(node, "handlers", []):
            yield from walk(handler.body, inside=below)


def head_of(node: ast.stmt) -> Span:
    """Lines of a statement, of a compound one those before its body."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(item.lineno for item in decorators)])
    if isinstance(node, COMPOUND):
        return first, max(first, node.lineno, node.body[0].lineno - 1)
    return first, node.end_lineno or node.lineno


def list_unseen(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of what is never executed, as (line, column) from (1, 0)."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) or (
            isinstance(node, ast.arg) and node.annotation is not None
        ):
            found.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            found.append(node.returns)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found.append(node)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset))  # type: ignore[attr-defined]
        for n in found
    ]


def is_unseen(tree: ast.Module, position: tuple[int, int]) -> bool:
    """Whether a place (line, column) is never executed."""
    return any(start <= position < end for start, end in list_unseen(tree))


def module_of(path: Path, source: Path) -> str:
    """`quantmatrix.kernels.linear_fp8` of a file below the folder that holds the package."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module) -> set[str]:
    """Modules that a file imports by name, at any depth; `from a import b` is `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def choose_tests(
    seen: Seen,
    path: str,
    tree: ast.Module,
    line: int,
    importers: Iterable[str],
    budget: float,
) -> tuple[list[str], int]:
    """(tests to run, the likeliest to see a change first, within a budget of seconds; how many were left out).

    `importers` are test files that import the module. Tests of the module's own file come first, for
    half of the budget, then the others in the order of `order_tests`. A test that does not fit into
    what is left makes room for shorter ones. One test is run in any case.
    """
    (first, last), at_import = span_of(tree, line)
    lines = seen.lines.get(path, {})
    near = set(importers)
    if at_import:
        near |= set(READERS)
        numbers: Collection[int] = list(lines)
    else:
        numbers = range(first, last + 1)
    found = {test for number in numbers for test in lines.get(number, ())}
    if at_import or not found:
        found |= {test for test in seen.seconds if test.partition("::")[0] in near}
        found |= find_named(seen.seconds, Path(path))
    own = name_own_file(path)
    ordered = order_tests(found, near, seen.seconds, budget * LONG)
    chosen = take_fitting(
        [t for t in ordered if test_file(t).endswith(own)], seen.seconds, budget / 2
    )
    chosen |= take_fitting(
        [test for test in ordered if test not in chosen],
        seen.seconds,
        budget - sum(chosen.values()),
    )
    if ordered and not chosen:
        chosen = dict.fromkeys(ordered[:1], budget)
    return list(chosen), len(ordered) - len(chosen)


def find_named(tests: Iterable[str], path: Path) -> set[str]:
    """Tests whose parameters name a module that is loaded by its id: `test_load[fp8-flux-1-krea@cpu]`."""
    if path.parent.name not in BY_ID:
        return set()
    name = path.stem.replace("_", "-")
    return {test for test in tests if name in test.partition("[")[2]}


def name_own_file(path: str) -> str:
    """The name of the test file of a module; of a package's `__init__` that of its folder."""
    parts = Path(path).with_suffix("").parts
    return f"/test_{parts[-2] if parts[-1] == '__init__' else parts[-1]}.py"


def order_tests(
    tests: Iterable[str], near: Collection[str], seconds: Mapping[str, float], long: float
) -> list[str]:
    """The quickest test of every file, then of every function, then the rest, the quickest first.

    In each of these turns, files that import the module come first. Cases of one function mostly see
    the same changes, other files see others. What takes more than `long` seconds comes last.
    """
    quickest = sorted(tests, key=lambda test: (seconds.get(test, 0.0), test))
    files: set[str] = set()
    functions: set[str] = set()
    turns: dict[str, int] = {}
    for test in quickest:
        file, function = test_file(test), test.partition("[")[0]
        turns[test] = 0 if file not in files else 1 if function not in functions else 2
        if seconds.get(test, 0.0) > long:
            turns[test] = 3
        files.add(file)
        functions.add(function)
    return sorted(quickest, key=lambda test: (turns[test], test_file(test) not in near))


def take_fitting(
    tests: Iterable[str], seconds: Mapping[str, float], budget: float
) -> dict[str, float]:
    """Seconds of those tests that fit into a budget, taken in their order."""
    taken: dict[str, float] = {}
    left = budget
    for test in tests:
        if seconds.get(test, 0.0) <= left:
            taken[test] = seconds.get(test, 0.0)
            left -= taken[test]
    return taken


def test_file(test: str) -> str:
    """The file in a test's id."""
    return test.partition("::")[0]


test_file.__test__ = False  # type: ignore[attr-defined]
