"""plans.csv: what it says, line by line, and that it says it of every checkpoint and hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantmatrix.proof.plans import COMMAND, FILE, PlanLine, PlansError, read_plans, write_plans
from quantmatrix.tables import read

ROOT = Path(__file__).parents[3]
RUNS = PlanLine("a", ("cpu",), "", ("torch:W8A8", "decode:W8A16"), "", "", 100, 60, 7, True)
REFUSED = PlanLine("a", ("b200",), "npu", (), "npu-only", "no kernel, use cpu")


def test_lines_survive_and_share_hardware(tmp_path: Path) -> None:
    same = PlanLine(**{**vars(RUNS), "hardware": ("h200",)})
    text = write_plans([RUNS, REFUSED, same])
    assert text.splitlines()[1:] == [
        "a,cpu h200,,torch:W8A8 decode:W8A16,,,100,60,7,1",
        'a,b200,npu,,npu-only,"no kernel, use cpu",0,0,0,0',
    ]
    (tmp_path / FILE).write_text(text)
    found = read_plans(tmp_path / FILE)
    assert set(found) == {("a", "cpu", ""), ("a", "h200", ""), ("a", "b200", "npu")}
    line = found["a", "h200", ""]
    assert line == PlanLine(**{**vars(RUNS), "hardware": ("cpu", "h200")})
    assert (line.backends, line.numerics) == (("torch", "decode"), ("W8A16", "W8A8"))
    assert found["a", "b200", "npu"] == REFUSED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", r"plans\.csv: columns are \['a', 'b'\]"),
        (write_plans([RUNS]).replace("100", "many"), r"plans\.csv:2: .*'many'"),
        (write_plans([RUNS]).replace(",100,60,7,1", ""), r"plans\.csv:2: "),
    ],
)
def test_damage_is_named_with_the_remedy(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(PlansError, match=said) as caught:
        read_plans(tmp_path / FILE)
    assert COMMAND in str(caught.value)


def test_no_file_is_no_plan(tmp_path: Path) -> None:
    assert read_plans(tmp_path / FILE) == {}


def test_every_checkpoint_is_planned_on_every_hardware() -> None:
    tables = read.read(ROOT / "matrix")
    found = read_plans(ROOT / "reports" / FILE)
    wanted = {(name, place, "") for name in tables.checkpoints for place in tables.hardware}
    wanted |= {
        (cell.checkpoint, cell.hardware, cell.backend)
        for cell in tables.cells
        if cell.claim not in ("refused", "planned")
    }
    assert set(found) == wanted, f"write reports/{FILE} again: {COMMAND}"
