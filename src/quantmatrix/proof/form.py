"""Record form: whether the parts of an evidence record agree with one another.

`quantmatrix.proof.shapes` says what the parts are, so that whoever reads a record may rely on it: a number is a
number, a list of names is a list of names.

A record that was edited by hand, or that two runs wrote into, is found where it contradicts itself:

| a check that passed | must not tell |
| ------------------- | ------------- |
| any                 | a metric that exceeds the limit beside it |
| `latents`           | a layer that exceeds `layer_error`, or latents that equal the base model's |
| `refuse`            | another rule than the row claims, or a plan that is not a refusal |
| `compile`           | no program, one with a fault, or one of another architecture than the plan's |
| all but `refuse`    | a plan that is a refusal |

Nothing here proves that a run took place; that is what packets and their latents are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantmatrix.proof import shapes
from quantmatrix.proof.scopes import find_foreign

SLACK = 1e-5
"""Share by which a rounded metric may miss its rounded limit."""
LARGEST = 10**300
"""A larger whole number is not a measurement."""
LISTS = ("flags", "checks")
"""Columns of a row that hold several names."""


def list_problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong below the keys of a record that has the shape of one."""
    problems = list(check_cell(record["cell"]))
    if foreign := find_foreign(record["checks"]):
        problems.append(f"checks: {', '.join(foreign)} makes a record of its own")
    for name, kind in shapes.CHECKS.items():
        metrics = record["checks"].get(name, {}).get("metrics")
        if metrics:  # a check that failed early may tell nothing
            problems += shapes.list_problems(metrics, kind, f"checks.{name}.metrics")
    if problems:
        return problems
    return [problem for name in record["checks"] for problem in find_contradictions(record, name)]


def is_number(value: Any) -> bool:
    """Whether a value is a number; `true` is none, nor is `nan`, nor what no float can hold."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    return whole and abs(value) <= LARGEST


def check_cell(cell: Mapping[str, Any]) -> Iterator[str]:
    """Columns are texts or lists of texts, and the id is made of row and hardware."""
    problems = [
        f"cell.{name}: expected a text, found {value!r:.80}"
        for name, value in cell.items()
        if name not in LISTS and not isinstance(value, str)
    ]
    yield from problems
    name = f"{cell['row']}@{cell['hardware']}"
    if not problems and cell["id"] not in (name, f"{name}+{cell['backend']}"):
        yield f"cell.id: {cell['id']!r} is not a cell of {name}"


def find_faults(record: Mapping[str, Any]) -> Iterator[str]:
    """Where a check `compile` tells of programs that are none, or of another architecture."""
    metrics = record["checks"]["compile"]["metrics"]
    if not metrics.get("programs"):
        yield "no program was built"
    if metrics.get("problems"):
        yield f"it reports problems: {metrics['problems'][0]}"
    wanted = record["plan"].get("machine", {}).get("arch")
    for program in metrics.get("programs", ()):
        if program["faults"]:
            yield f"{program['kernel']} has a fault: {program['faults'][0]}"
        if wanted is not None and program["arch"] != wanted:
            yield f"{program['kernel']} was built for {program['arch']}, the plan is for {wanted}"


def find_contradictions(record: Mapping[str, Any], name: str) -> Iterator[str]:
    """Where a check that passed tells of a failure."""
    check, plan, cell = record["checks"][name], record["plan"], record["cell"]
    if check["verdict"] != "pass":
        return
    where = f"checks.{name}"
    refusal = plan.get("refusal")
    if name != "refuse":
        if refusal:
            yield f"{where}: passed, although the plan is a refusal: {refusal.get('rule')}"
        exceeded = [*list_exceeded(check), *(find_faults(record) if name == "compile" else ())]
        yield from (f"{where}: passed, although {why}" for why in exceeded)
        return
    for source in (check["metrics"], refusal or {}):
        if source.get("rule", cell["rule"]) != cell["rule"]:
            yield f"{where}: passed, although {source['rule']!r} refused it, not {cell['rule']!r}"
    if plan.get("ok"):
        yield f"{where}: passed, although the plan is not a refusal"


def list_exceeded(check: Mapping[str, Any]) -> Iterator[str]:
    """Metrics of a check that exceed the limits beside them, as text."""
    metrics, limits = check["metrics"], check["limits"]
    worst = metrics.get("worst")
    values = {**metrics, **(worst if isinstance(worst, dict) else {})}
    layers = metrics.get("layers")
    parts = layers.values() if isinstance(layers, dict) else ()
    if found := [part["worst"] for part in parts if isinstance(part, dict) and "worst" in part]:
        values["layer_error"] = max(found, key=lambda error: error if is_number(error) else 0)
    for name, limit in limits.items():
        value = values.get(name)
        if not isinstance(limit, dict):
            if name in ("identical", "repeats", "constant") and value not in (None, limit):
                yield f"{name} is {value}, not {limit}"
        elif is_number(value):
            for bound_name, sign in (("at_least", 1), ("at_most", -1)):
                bound: Any = limit.get(bound_name)
                if is_number(bound) and sign * (bound - value) > SLACK * abs(bound):
                    yield f"{name} is {value:g}, {bound_name.replace('_', ' ')} {bound:g} is allowed"
