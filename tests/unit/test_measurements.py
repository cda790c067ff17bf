"""The page of measured goals is what its results give, and says `missed` where a goal is missed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "reports" / "evidence").glob("*/measurements"))
PAGE: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "hopper_page.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_page_is_what_the_results_give(folder: Path) -> None:
    results = json.loads((folder / "hopper.json").read_text())
    assert (folder / "README.md").read_text() == PAGE["render"](results)


def test_there_are_results() -> None:
    assert FOLDERS


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (("x", 0.70, 0.70, "at most"), "met"),
        (("x", 0.7001, 0.70, "at most"), "missed"),
        (("x", 0.649, 0.65, "at least"), "missed"),
        (("x", 0.651, 0.65, "at least"), "met"),
        (("x", None, 0.65, "at least"), "not measured"),
    ],
)
def test_verdicts(goal: tuple[str, float | None, float, str], verdict: str) -> None:
    assert verdict in PAGE["show_goal"](goal)
