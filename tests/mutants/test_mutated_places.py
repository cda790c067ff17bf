"""Which tests are run for a place of the source."""

from __future__ import annotations

import ast
from pathlib import Path

import places
import pytest
from places import Seen

TEXT = '''"""A module."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT_OF_TYPES = 1

LIMITS = (
    1,
    2,
)


@cache
def find(
    values: list[int], start: int = 3
) -> int | None:
    if start > 4:
        return max(
            values[0],
            5,
        )
    return None


class Thing:
    size: int | None = 6
'''
TREE = ast.parse(TEXT)
LINE = {text.strip(): number for number, text in enumerate(TEXT.splitlines(), 1)}
SEEN = Seen(
    {
        "src/a.py": {
            15: ["t/x.py::one"],
            16: ["t/x.py::one", "t/y.py::two"],
            18: ["t/y.py::two"],
            22: [],
        }
    },
    {"t/x.py::one": 5.0, "t/y.py::two": 1.0, "t/y.py::three": 0.5, "t/z.py::four": 0.1},
)


@pytest.mark.parametrize(
    ("text", "span", "at_import"),
    [
        ("2,", (7, 10), True),
        ("@cache", (13, 16), True),
        ("values: list[int], start: int = 3", (13, 16), True),
        ("if start > 4:", (17, 17), False),
        ("values[0],", (18, 21), False),
        ("return None", (22, 22), False),
        ("size: int | None = 6", (26, 26), True),
    ],
)
def test_statements_of_places(text: str, span: tuple[int, int], at_import: bool) -> None:
    assert places.span_of(TREE, LINE[text]) == (span, at_import)


@pytest.mark.parametrize(
    ("text", "part", "unseen"),
    [
        ("LIMIT_OF_TYPES = 1", "1", True),
        ("values: list[int], start: int = 3", "list", True),
        ("values: list[int], start: int = 3", "3", False),
        (") -> int | None:", "|", True),
        ("size: int | None = 6", "|", True),
        ("size: int | None = 6", "6", False),
        ("if start > 4:", ">", False),
    ],
)
def test_what_is_never_executed(text: str, part: str, unseen: bool) -> None:
    line = LINE[text]
    assert places.is_unseen(TREE, (line, TEXT.splitlines()[line - 1].index(part))) is unseen


def choose(
    line: int, importers: tuple[str, ...] = (), budget: float = 99.0
) -> tuple[list[str], int]:
    return places.choose_tests(SEEN, "src/a.py", TREE, line, importers, budget)


def test_tests_of_a_line_are_those_that_executed_it() -> None:
    assert choose(LINE["values[0],"]) == (["t/y.py::two"], 0)
    assert choose(LINE["return None"]) == ([], 0)
    assert places.choose_tests(SEEN, "src/b.py", TREE, 17, (), 99.0) == ([], 0)


def test_what_runs_at_import_is_seen_by_importers_first() -> None:
    """Then by whatever executed the module, the quickest first, within the budget."""
    assert choose(LINE["2,"]) == (["t/y.py::two", "t/x.py::one"], 0)
    order = ["t/z.py::four", "t/y.py::two", "t/x.py::one"]
    assert choose(LINE["2,"], ("t/z.py",)) == (order, 0)
    assert choose(LINE["2,"], ("t/z.py",), 1.1) == (order[:2], 1)
    assert choose(LINE["2,"], ("t/z.py",), 0.0) == (order[:1], 2)


FOUND = {
    "t/test_a.py::own[1]": 0.2,
    "t/test_a.py::own[2]": 0.25,
    "t/test_a.py::long": 30.0,
    "t/far.py::one[1]": 0.1,
    "t/far.py::one[2]": 0.2,
    "t/far.py::two": 0.3,
    "t/near.py::three": 2.0,
    "t/near.py::four": 2.4,
}
MANY = Seen({"src/a.py": {22: list(FOUND)}}, FOUND)


def choose_of_many(budget: float) -> tuple[list[str], int]:
    return places.choose_tests(
        MANY, "src/a.py", TREE, LINE["return None"], ("t/near.py", "t/test_a.py"), budget
    )


def test_the_own_file_comes_first_then_every_file_then_every_function() -> None:
    own = ["t/test_a.py::own[1]", "t/test_a.py::own[2]", "t/test_a.py::long"]
    rest = ["t/near.py::three", "t/far.py::one[1]", "t/near.py::four", "t/far.py::two"]
    assert choose_of_many(99.0) == ([*own, *rest, "t/far.py::one[2]"], 0)


def test_what_is_long_comes_last_and_what_does_not_fit_makes_room() -> None:
    own = ["t/test_a.py::own[1]", "t/test_a.py::own[2]"]
    short, long = ["t/far.py::one[1]", "t/far.py::one[2]"], ["t/near.py::three", "t/near.py::four"]
    two = "t/far.py::two"
    assert choose_of_many(8.0) == ([*own, short[0], two, short[1], *long], 1)
    assert choose_of_many(4.0) == ([*own, *short, long[0], two], 2)
    assert choose_of_many(0.0) == (own[:1], 7)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("src/quantmatrix/kernels/linear_fp8.py", "/test_linear_fp8.py"),
        ("src/quantmatrix/families/fp8/__init__.py", "/test_fp8.py"),
    ],
)
def test_the_own_file_of_a_module(path: str, name: str) -> None:
    assert places.name_own_file(path) == name


def test_what_ran_while_tests_were_collected_is_seen_by_importers() -> None:
    assert choose(LINE["return None"], ("t/y.py",)) == (["t/y.py::three", "t/y.py::two"], 0)
    assert choose(LINE["values[0],"], ("t/z.py",)) == (["t/y.py::two"], 0)


def test_what_no_test_was_seen_to_execute_is_seen_by_importers() -> None:
    """A process that is killed, or has an environment of its own, records nothing."""
    line = LINE["if start > 4:"]
    assert choose(line, ("t/z.py",)) == (["t/z.py::four"], 0)
    assert choose(line) == ([], 0)


def test_names_of_modules() -> None:
    source = Path("src")
    assert places.module_of(source / "a" / "b.py", source) == "a.b"
    assert places.module_of(source / "a" / "__init__.py", source) == "a"
    tree = ast.parse("import a.b\ndef f():\n    from c import d as e\n")
    assert places.imports_of(tree) == {"a.b", "c", "c.d"}


def test_data_of_a_model_is_seen_by_tests_that_name_it() -> None:
    """Models are loaded by their ids: only the first test to load one executes its lines."""
    one, other = "t/f.py::one[fp8-flux-1-krea@cpu]", "t/f.py::one[fp8-flux-1@cpu]"
    seen = Seen({}, {one: 1.0, other: 1.0, "t/g.py::flux_1_krea": 1.0})
    tree = ast.parse("SIZE = 3")
    for path, tests in (
        ("src/quantmatrix/models/further/flux_1_krea.py", [one]),
        ("src/quantmatrix/models/flux_1.py", [one, other]),
        ("src/quantmatrix/measure/flux_1.py", []),
    ):
        assert places.choose_tests(seen, path, tree, 1, (), 60)[0] == tests


def test_a_definition_is_seen_by_tests_that_read_it() -> None:
    reads = f"{places.READERS[0]}::test_every_other_dataclass_is_frozen"
    seen = Seen({"src/a.py": {2: ["t/x.py::one"]}}, {"t/x.py::one": 1.0, reads: 0.5})
    tree = ast.parse("SIZE = 3\ndef find(): return 4")
    assert set(places.choose_tests(seen, "src/a.py", tree, 1, (), 60)[0]) == {reads, "t/x.py::one"}
    assert places.choose_tests(seen, "src/a.py", tree, 2, (), 60)[0] == ["t/x.py::one"]
