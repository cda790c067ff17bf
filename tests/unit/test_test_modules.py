"""The tests as pytest collects them: folders without packages share one space of module names."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from quantmatrix.harness.plugin import COLLECTED

TESTS = Path(__file__).parents[1]


def test_no_two_test_modules_share_a_name() -> None:
    """pytest imports them by name alone: the second of a pair cannot be collected with the first."""
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []


def test_processes_that_tests_start_collect_as_seldom() -> None:
    """The numbers are written again where they begin: an import of the plugin would take seconds."""
    text = (TESTS / "unit" / "children" / "sitecustomize.py").read_text()
    own = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    [found] = [node.value for node in own if ast.unparse(node.targets[0]) == "COLLECTED"]
    assert ast.literal_eval(found) == COLLECTED
