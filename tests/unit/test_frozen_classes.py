"""Dataclasses are values: what may be changed after it was made is listed here."""

from __future__ import annotations

import ast
from pathlib import Path

import quantmatrix

PACKAGE = Path(quantmatrix.__file__).parent
CHANGED = {
    "checkpoints/gguf.py": {"_Source"},
    "fleet/cluster.py": {"Site"},
    "fleet/driver.py": {"Outcome"},
    "fleet/intake.py": {"Taken"},
    "fleet/on_node.py": {"Ended"},
    "fleet/progress.py": {"Running", "Lane"},
    "harness/recorder.py": {"Proof"},
    "kernels/launching.py": {"Watch"},
    "measure/bench/timing.py": {"Part"},
    "measure/layers.py": {"LayerErrors"},
    "measure/trace_census.py": {"LayerTrace", "Census"},
    "measure/trace_events.py": {"Event"},
    "measure/true_size.py": {"Measured", "TrueSize"},
    "measure/validate.py": {"Validation"},
    "proof/normal_form.py": {"Scope"},
    "proof/source_modules.py": {"Module"},
    "runtime/run.py": {"Run"},
    "runtime/sharded_weights.py": {"Slot"},
    "runtime/steps.py": {"Steps"},
    "tables/table.py": {"Table"},
    "tools/dequantize.py": {"Parts"},
}
"""Classes whose fields are filled one by one, by module."""


def is_dataclass(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).partition("(")[0] == "dataclass"


def is_frozen(decorator: ast.expr) -> bool:
    given = decorator.keywords if isinstance(decorator, ast.Call) else []
    return any(word.arg == "frozen" and ast.unparse(word.value) == "True" for word in given)


def test_every_other_dataclass_is_frozen() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "@dataclass" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            marks = node.decorator_list if isinstance(node, ast.ClassDef) else []
            if any(is_dataclass(mark) and not is_frozen(mark) for mark in marks):
                module = path.relative_to(PACKAGE).as_posix()
                found.setdefault(module, set()).add(node.name)  # type: ignore[attr-defined]
    assert found == CHANGED
