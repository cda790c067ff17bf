"""Bench form: what the parts of a benchmark result look like, so that its readers may rely on it.

| part    | tells |
| ------- | ----- |
| timing  | `ratio`, `low`, `high`, `detectable` as numbers, `median` per form, `verdict` in words, and the |
|         | `milliseconds` of every round per form |
| layer   | a timing, and `rows`, `in`, `out`, `scheme`, `backend` of the kind of layer |
| memory  | bytes of `weights`, `working` and `peak` per form, and what they were `counted_by` |

Whether ratio, interval and verdict are those of the samples is asked by `bench_results`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantmatrix.proof.form import NUMBER, Kinds, check_kinds, is_kind

FORMS = ("bf16", "quantized")
MEMORY_KEYS = ("weights", "working", "peak")
TIMING: Mapping[str, Kinds] = {
    **dict.fromkeys(("ratio", "low", "high", "detectable"), NUMBER),
    "verdict": str,
    "median": dict,
    "milliseconds": dict,
}
LAYER: Mapping[str, Kinds] = {
    **dict.fromkeys(("rows", "in", "out"), int),
    **dict.fromkeys(("scheme", "backend"), str),
}


def check_told(where: str, value: Any, kinds: Mapping[str, Kinds]) -> Iterator[str]:
    """A line for what is missing from an object, or is not of its kind."""
    if not isinstance(value, dict):
        yield f"{where}: expected an object, found {value!r:.80}"
        return
    yield from (f"{where}.{key}: missing" for key in kinds if key not in value)
    yield from check_kinds(where, value, kinds)


def check_timing(where: str, timing: Any) -> Iterator[str]:
    """A line for everything in which a comparison is none."""
    problems = list(check_told(where, timing, TIMING))
    if problems:
        yield from problems
        return
    yield from check_told(f"{where}.median", timing["median"], dict.fromkeys(FORMS, NUMBER))
    for form in FORMS:
        times = timing["milliseconds"].get(form)
        if not isinstance(times, list) or not all(is_kind(time, NUMBER) for time in times):
            yield f"{where}.milliseconds.{form}: expected a list of numbers, found {times!r:.80}"
        elif not times:
            yield f"{where}.milliseconds.{form}: empty; nothing was measured"


def check_memory(where: str, memory: Any) -> Iterator[str]:
    """A line for everything in which memory is no count of bytes; a model without any is none."""
    problems = list(check_told(where, memory, {**dict.fromkeys(FORMS, dict), "counted_by": str}))
    yield from problems
    for form in FORMS if not problems else ():
        for key in MEMORY_KEYS:
            least = 0 if key == "working" else 1
            if not is_kind(memory[form].get(key), int) or memory[form][key] < least:
                yield f"{where}.{form}.{key}: not a number of bytes"


def check_part(where: str, part: Any) -> Iterator[str]:
    """A line for everything in which a component's result is none."""
    problems = list(check_told(where, part, {"layers": list, "step": dict, "memory": dict}))
    if problems:
        yield from problems
        return
    if not part["layers"]:
        yield f"{where}.layers: empty; no quantized layer was measured"
    for number, layer in enumerate(part["layers"]):
        yield from check_told(f"{where}.layers[{number}]", layer, LAYER)
        yield from check_timing(f"{where}.layers[{number}]", layer)
    for what in ("step", "load"):
        if what in part:
            yield from check_timing(f"{where}.{what}", part[what])
    yield from check_memory(f"{where}.memory", part["memory"])
