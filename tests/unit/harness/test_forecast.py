"""A run says how many checks it has and about how long they take, from records and from its own pace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.harness import forecast
from quantmatrix.harness.forecast import Forecast, tell_time
from quantmatrix.tables import read

CELLS = {cell.id: cell for cell in read.read().cells if cell.claim != "planned"}
LOCAL = [
    name for name, cell in CELLS.items() if cell.hardware == "cpu" and cell.checks[0] == "load"
]
ELSEWHERE = [name for name, cell in CELLS.items() if cell.hardware == "h200"]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(lines: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Forecast:
    """Every cell that is run takes 40 s by its record, which is 20 for each of two checks."""
    monkeypatch.setattr(
        forecast, "estimate_cells", lambda cells, folder: {cell.id: 40.0 for cell in cells}
    )
    local = lambda cell: cell.hardware != "cpu"  # noqa: E731
    return Forecast(lambda: CELLS, Path("none"), lines.append, 2, local, clock)


def name_tests(names: list[str], checks: tuple[str, ...] = ("load", "trace")) -> list[str]:
    return [f"test_{check}.py::test_{check}[{name}]" for name in names for check in checks]


def finish(run: Forecast, test: str) -> None:
    for when in ("setup", "call", "teardown"):
        run.pytest_runtest_logreport(SimpleNamespace(nodeid=test, when=when))


def test_what_is_to_come(run: Forecast, lines: list[str]) -> None:
    tests = name_tests(LOCAL[:30]) + name_tests(ELSEWHERE[:10], ("compile",))
    run.pytest_xdist_node_collection_finished([*tests, "test_other.py::test_a[x]", "test_b"])
    run.pytest_xdist_node_collection_finished(tests)  # the second worker collects them, too
    assert lines == [
        "70 checks of 40 cells: about 10 min with 2 workers, as long as their last records took"
    ]


def test_how_far_it_is(run: Forecast, lines: list[str], clock: Clock) -> None:
    tests = name_tests(LOCAL[:20])
    run.begin(tests)
    lines.clear()
    for number, test in enumerate(tests[:-1], 1):
        clock.now += 10
        finish(run, test)
        finish(run, test)
        if number < 6:
            assert lines == []
    assert lines[0] == "6 of 40 checks after 1 min, about 6 min left"
    assert lines[-1] == "36 of 40 checks after 6 min, less than a minute left"
    assert len(lines) == 6


def test_the_first_check_tells_no_pace(run: Forecast, lines: list[str], clock: Clock) -> None:
    tests = name_tests(LOCAL[:20])
    run.begin(tests)
    lines.clear()
    clock.now += 200
    finish(run, tests[0])
    assert lines == []
    finish(run, tests[1])
    assert lines == ["2 of 40 checks after 3 min, about 63 min left"]


def test_a_few_checks_need_no_forecast(run: Forecast, lines: list[str], clock: Clock) -> None:
    tests = name_tests(LOCAL[:9])
    run.begin(tests)
    for test in tests:
        clock.now += 100
        finish(run, test)
    assert lines == []


def test_records_tell_the_seconds(tmp_path: Path) -> None:
    """One that cannot be read counts as the median of the others on its hardware."""
    evidence: Any = Path(__file__).parents[3] / "reports" / "evidence"
    cells = [CELLS[name] for name in LOCAL[:5]]
    known = forecast.estimate_cells(cells, evidence)
    assert list(known) == LOCAL[:5]
    assert all(0 < seconds < 200 for seconds in known.values())
    assert len(set(known.values())) > 1
    assert set(forecast.estimate_cells(cells, tmp_path).values()) == {300.0}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (59.9, "less than a minute"),
        (61, "about 1 min"),
        (150, "about 2 min"),
        (600, "about 10 min"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert tell_time(seconds) == words
