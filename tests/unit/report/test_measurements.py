"""The page of measured goals is what its results give, and says `missed` where a goal is missed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = sorted((ROOT / "reports" / "evidence").glob("*/measurements"))
PAGE: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "hopper_page.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_page_is_what_the_results_give(folder: Path) -> None:
    assert (folder / "README.md").read_text() == PAGE["render"](*PAGE["read_folder"](folder))


def test_a_later_run_replaces_forms_with_their_own_baselines(tmp_path: Path) -> None:
    results = json.loads((FOLDERS[0] / "hopper.json").read_text())
    stage, form = "step flux-1", "msmodelslim W8A8 int8"
    found = dict(results["stages"][stage][form], ms={"bf16": 100.0, "quantized": 50.0})
    later = {"machine": results["machine"], "stages": {stage: {form: found}}}
    (tmp_path / "hopper.json").write_text(json.dumps(results))
    (tmp_path / "hopper-again.json").write_text(json.dumps(later))
    joined, again = PAGE["read_folder"](tmp_path)
    assert again == {(stage, form)}
    assert f"{form} (flux-1)" in PAGE["render"](joined, again)
    assert "| 50.0 | 100.0 | 0.500 |" in PAGE["render"](joined, again)
    found = dict(found, ms={"bf16": 100.0, "quantized": 40.0})
    last = {"machine": results["machine"], "stages": {stage: {form: found}}}
    (tmp_path / "hopper-again-2.json").write_text(json.dumps(last))
    assert "| 40.0 | 100.0 | 0.400 |" in PAGE["render"](*PAGE["read_folder"](tmp_path))
    later["machine"] = {**results["machine"], "name": "another"}
    (tmp_path / "hopper-again.json").write_text(json.dumps(later))
    with pytest.raises(SystemExit, match="another machine"):
        PAGE["read_folder"](tmp_path)


def test_the_page_shows_several_gpus_and_the_first_picture(tmp_path: Path) -> None:
    results = json.loads((FOLDERS[0] / "hopper.json").read_text())
    (tmp_path / "hopper.json").write_text(json.dumps(results))
    sizes = {"peak_bytes": 3 * 2**30}
    old, new = (
        {
            "alone": {"ms": 80.0, **sizes},
            "shared": {"ms": ms, "peak_bytes": 2**31},
            "ratio": ms / 80,
        }
        for ms in (60.0, 50.0)
    )
    missing = {"not_reached": "7 s left"}
    for name, forms in (("", {"a": old, "b": missing}), ("-again", {"a": new})):
        (tmp_path / f"several-gpus{name}.json").write_text(json.dumps({"forms": forms}))
    seconds = {"built": 15.9, "first forward": 35.3}
    (tmp_path / "first-picture.json").write_text(json.dumps({"flux-1": {"empty": seconds}}))
    page = PAGE["render"](*PAGE["read_folder"](tmp_path))
    assert "| a | 80.0 | 50.0 | 0.625 | 3.00 | 2.00 |" in page
    assert "| b |" not in page
    assert "| flux-1 | empty | 15.9 | 35.3 |" in page


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


def test_the_page_of_offload_has_the_measured_numbers() -> None:
    folder = ROOT / "reports" / "evidence" / "h100" / "offload"
    results = json.loads((folder / "offload.json").read_text())
    lines = (folder / "README.md").read_text().splitlines()
    for form, found in results["forms"].items():
        resident, streamed = found["resident_bytes"], found["streamed_bytes"]
        numbers = f"{resident / 2**30:.2f} | {streamed / 2**30:.2f} | {streamed / resident:.3f}"
        assert f"| {form} | {numbers} | {1e3 * found['streamed_seconds']:.0f} |" in lines
        assert streamed <= 0.5 * resident


def test_the_page_of_gguf_memory_has_the_measured_numbers() -> None:
    folder = ROOT / "reports" / "evidence" / "cpu" / "gguf-memory"
    found = json.loads((folder / "gguf-memory.json").read_text())
    lines = (folder / "README.md").read_text().splitlines()
    size = found["file_bytes"]
    for what, key in (
        ("file", "file_bytes"),
        ("tensors kept by the model", "kept_bytes"),
        ("peak of the process, pages of the mapped file included", "peak_bytes"),
        ("memory of its own, without them", "own_bytes"),
    ):
        assert f"| {what} | {found[key] / 1e9:.2f} | {found[key] / size:.3f} |" in lines
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "gguf_memory.py"))
    assert size >= 12e9
    assert max(found["peak_bytes"], found["own_bytes"]) <= benchmark["MOST"] * size
    assert found["passed"]
