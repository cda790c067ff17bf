"""The tests as pytest collects them: folders without packages share one space of module names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_two_test_modules_share_a_name() -> None:
    """pytest imports them by name alone: the second of a pair cannot be collected with the first."""
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []
