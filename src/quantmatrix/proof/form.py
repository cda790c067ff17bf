"""Record form: what the parts of an evidence record look like, and whether they agree.

`quantmatrix.proof.record` looks at the keys of a record; this module looks below them, so that whoever
reads a record may rely on it: a number is a number, a list of names is a list of names. What a run
may leave out (a machine without devices, a plan that is a refusal) may be missing here, too.

A record that was edited by hand, or that two runs wrote into, is found where it contradicts itself:

| a check that passed | must not tell |
| ------------------- | ------------- |
| any                 | a metric beyond the limit beside it |
| `latents`           | a layer beyond `layer_error`, or latents that equal the base model's |
| `refuse`            | another rule than the row claims, or a plan that is no refusal |
| `compile`           | no program, one with a fault, or one of another architecture than the plan's |
| all but `refuse`    | a plan that is a refusal |

Nothing here proves that a run took place; that is what packets and their latents are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantmatrix.proof.scopes import find_foreign

SLACK = 1e-5
"""Share by which a rounded metric may miss its rounded limit."""
LARGEST = 10**300
"""A whole number beyond this is no measurement."""
LISTS = ("flags", "checks")
"""Columns of a row that hold several words."""
Kinds = type | tuple[type, ...]
NUMBER = (int, float)
FORMS: Mapping[str, Mapping[str, Kinds]] = {
    "machine": {"devices": list, "processor": str, "versions": dict},
    "checkpoint": {
        "digest": str,
        "files": list,
        "bytes": int,
        "repository": str,
        "revision": str,
    },
    "plan": {"components": dict, "warnings": list, "machine": dict, "ok": bool},
}
"""Kinds of what a part tells, where it tells it."""
COMPONENT: Mapping[str, Kinds] = {"backends": dict, "quantized_layers": int, "total_layers": int}
"""What every component of a plan tells."""
WITNESSED: Mapping[str, Kinds] = {
    **dict.fromkeys(("kind", "limit", "reading", "verdict"), str),
    **dict.fromkeys(("cosine", "coded_cosine", "relative_l2", "gain", "scale_error"), NUMBER),
}
"""What a witness tells of each kind of layers."""
LATENTS: Mapping[str, Kinds] = {"worst": dict, "layers": dict, "steps": list, "class": str}
COMPILE: Mapping[str, Kinds] = {
    "arch": str, "triton": str, "kernels": str, "programs": list, "problems": list
}  # fmt: skip
PROGRAM: Mapping[str, Kinds] = {
    **dict.fromkeys(("kernel", "arch", "specialised", "digest"), str),
    **dict.fromkeys(("registers", "spilled", "shared", "shared_limit", "warps"), int),
    "faults": list,
}
"""What every program of a check `compile` tells."""
WORST = ("psnr_db", "cosine", "relative_l2")


def list_problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong below the keys of a record; `evidence` has looked at the keys."""
    problems = [*check_cell(record["cell"]), *check_parts(record), *check_plan(record["plan"])]
    if foreign := find_foreign(record["checks"]):
        problems.append(f"checks: {', '.join(foreign)} makes a record of its own")
    problems += check_witness(record.get("witness", {}))
    for name, check in record["checks"].items():
        problems += check_kinds(f"checks.{name}", check, {"metrics": dict, "limits": dict})
        if not problems and name == "latents":
            problems += check_latents(check["metrics"])
        if not problems and name == "compile":
            problems += check_programs(check["metrics"])
    if problems:
        return problems
    return [problem for name in record["checks"] for problem in find_contradictions(record, name)]


def check_kinds(where: str, value: Mapping[str, Any], kinds: Mapping[str, Kinds]) -> Iterator[str]:
    """A line for each part that is told and is not of its kind."""
    for key, kind in kinds.items():
        if key in value and not is_kind(value[key], kind):
            yield f"{where}.{key}: expected {name_kind(kind)}, found {value[key]!r:.80}"


def is_kind(value: Any, kind: Kinds) -> bool:
    """Whether a value is of a kind; `true` is no number, nor is `nan`, nor what no float can hold."""
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        return False
    return not isinstance(value, NUMBER) or abs(value) <= LARGEST


def name_kind(kind: Kinds) -> str:
    """A kind in words."""
    return "a number" if kind == NUMBER else getattr(kind, "__name__", str(kind))


def check_all(where: str, values: Mapping[str, Any], kind: Kinds) -> Iterator[str]:
    """A line for each value of an object that is not of a kind."""
    return check_kinds(where, values, dict.fromkeys(values, kind))


def check_words(where: str, values: Any) -> Iterator[str]:
    """A line for a list that holds something else than texts."""
    if not isinstance(values, list) or not all(isinstance(word, str) for word in values):
        yield f"{where}: expected a list of texts, found {values!r:.80}"


def check_cell(cell: Mapping[str, Any]) -> Iterator[str]:
    """Columns are texts or lists of texts, and the id is made of row and hardware."""
    problems = list(check_all("cell", {k: v for k, v in cell.items() if k not in LISTS}, str))
    for name in LISTS:
        problems += check_words(f"cell.{name}", cell[name])
    yield from problems
    place = f"{cell['row']}@{cell['hardware']}"
    if not problems and cell["id"] not in (place, f"{place}+{cell['backend']}"):
        yield f"cell.id: {cell['id']!r} is not a cell of {place}"


def check_parts(record: Mapping[str, Any]) -> Iterator[str]:
    """Versions are texts, timings numbers, and what machine and checkpoint tell is as expected."""
    yield from check_all("versions", record["versions"], str)
    yield from check_all("timings", record["timings"], NUMBER)
    for part, kinds in FORMS.items():
        yield from check_kinds(part, record[part], kinds)
    for part, key in (("machine", "devices"), ("checkpoint", "files")):
        yield from check_words(f"{part}.{key}", record[part].get(key, []))


def check_plan(plan: Mapping[str, Any]) -> Iterator[str]:
    """A refusal is null or an object; components are objects that tell layers and kernels."""
    if not isinstance(plan.get("refusal"), (dict, type(None))):
        yield f"plan.refusal: expected an object or null, found {plan['refusal']!r:.80}"
    components = plan.get("components", {})
    for name, part in components.items() if isinstance(components, dict) else ():
        where = f"plan.components.{name}"
        if not isinstance(part, dict):
            yield f"{where}: expected an object, found {part!r:.80}"
            continue
        yield from check_kinds(where, part, COMPONENT)
        yield from (f"{where}.{key}: missing" for key in COMPONENT if key not in part)


def check_witness(witness: Mapping[str, Any]) -> Iterator[str]:
    """What a witness found of a component: a verdict, and numbers per kind of layers."""
    for name, part in witness.items():
        where = f"witness.{name}"
        if not isinstance(part, dict) or not isinstance(part.get("kinds"), list):
            yield f"{where}: expected an object with a list of kinds"
            continue
        yield from check_kinds(where, part, {"verdict": str, "layers": int, "bytes": int})
        for number, kind in enumerate(part["kinds"]):
            place = f"{where}.kinds[{number}]"
            if not isinstance(kind, dict):
                yield f"{place}: expected an object, found {kind!r:.80}"
                continue
            yield from check_kinds(place, kind, WITNESSED)
            yield from (f"{place}.{key}: missing" for key in WITNESSED if key not in kind)


def check_latents(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Steps, the worst of them, and the worst layer of each component are objects of numbers."""
    where = "checks.latents.metrics"
    problems = list(check_kinds(where, metrics, LATENTS))
    yield from problems
    if problems:
        return
    worst = metrics.get("worst", {})
    told = {name: worst[name] for name in WORST if worst.get(name) is not None}
    yield from check_all(f"{where}.worst", told, NUMBER)
    for name, part in metrics.get("layers", {}).items():
        if not isinstance(part, dict) or not is_kind(part.get("worst"), NUMBER):
            yield f"{where}.layers.{name}: expected an object with the number `worst`"
    if not all(isinstance(step, dict) for step in metrics.get("steps", [])):
        yield f"{where}.steps: expected a list of objects"


def check_programs(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Programs are objects that tell what they take; a check that failed early may tell nothing."""
    where = "checks.compile.metrics"
    problems = list(check_kinds(where, metrics, COMPILE))
    if metrics:
        problems += [f"{where}.{key}: missing" for key in COMPILE if key not in metrics]
    yield from problems
    for number, program in enumerate(metrics.get("programs", []) if not problems else []):
        at = f"{where}.programs[{number}]"
        if not isinstance(program, dict):
            yield f"{at}: expected an object, found {program!r:.80}"
            continue
        yield from check_kinds(at, program, PROGRAM)
        yield from (f"{at}.{key}: missing" for key in PROGRAM if key not in program)


def find_faults(record: Mapping[str, Any]) -> Iterator[str]:
    """Where a check `compile` tells of programs that are none, or of another architecture."""
    metrics = record["checks"]["compile"]["metrics"]
    if not metrics.get("programs"):
        yield "no program was built"
    if metrics.get("problems"):
        yield f"it tells of problems: {metrics['problems'][0]}"
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
        beyond = [*list_beyond(check), *(find_faults(record) if name == "compile" else ())]
        yield from (f"{where}: passed, although {why}" for why in beyond)
        return
    for told in (check["metrics"], refusal or {}):
        if told.get("rule", cell["rule"]) != cell["rule"]:
            yield f"{where}: passed, although {told['rule']!r} refused it, not {cell['rule']!r}"
    if plan.get("ok"):
        yield f"{where}: passed, although the plan is no refusal"


def list_beyond(check: Mapping[str, Any]) -> Iterator[str]:
    """Metrics of a check that are beyond the limits beside them, in words."""
    metrics, limits = check["metrics"], check["limits"]
    worst = metrics.get("worst")
    told = {**metrics, **(worst if isinstance(worst, dict) else {})}
    layers = metrics.get("layers")
    parts = layers.values() if isinstance(layers, dict) else ()
    if found := [part["worst"] for part in parts if isinstance(part, dict) and "worst" in part]:
        told["layer_error"] = max(found, key=lambda error: error if is_kind(error, NUMBER) else 0)
    for name, limit in limits.items():
        value = told.get(name)
        if not isinstance(limit, dict):
            if name in ("identical", "repeats", "constant") and value not in (None, limit):
                yield f"{name} is {value}, not {limit}"
        elif is_kind(value, NUMBER):
            for word, sign in (("at_least", 1), ("at_most", -1)):
                bound: Any = limit.get(word)
                if is_kind(bound, NUMBER) and sign * (bound - value) > SLACK * abs(bound):
                    yield f"{name} is {value:g}, {word.replace('_', ' ')} {bound:g} is allowed"
