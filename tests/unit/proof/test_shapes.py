"""Shapes: the published schema, by a small reader of JSON Schema of its own, and words for what is
not a record."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from quantmatrix.cli.main import main
from quantmatrix.harness import packets
from quantmatrix.proof import shapes, store

REPORTS = Path(__file__).parents[3] / "reports"
RECORDS = sorted(REPORTS.glob("evidence/*/*.json"))
BENCHMARKS = sorted(REPORTS.glob("benchmarks/*/*.json"))
TYPES: Mapping[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip
KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "type", "properties", "enum"),
    *("required", "additionalProperties", "minProperties", "maxProperties", "items", "minItems"),
    *("anyOf", "allOf", "minimum", "maximum"),
}


class Schema:
    """Holds values against a schema, by the words of the specification, as far as ours uses them."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self.whole = whole

    def allows(self, value: Any, rule: Mapping[str, Any] | bool) -> bool:
        if isinstance(rule, bool):
            return rule
        assert set(rule) <= KNOWN, set(rule) - KNOWN
        if "$ref" in rule:
            target: Any = self.whole
            for name in rule["$ref"].removeprefix("#/").split("/"):
                target = target[name]
            if not self.allows(value, target):
                return False
        if "type" in rule:
            kind = TYPES[rule["type"]]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                return False
        return (
            (
                "enum" not in rule
                or any(
                    value is one or (value == one and type(value) is type(one))
                    for one in rule["enum"]
                )
            )
            and all(self.allows(value, part) for part in rule.get("allOf", ()))
            and ("anyOf" not in rule or any(self.allows(value, part) for part in rule["anyOf"]))
            and self.allows_inside(value, rule)
        )

    def allows_inside(self, value: Any, rule: Mapping[str, Any]) -> bool:
        if isinstance(value, dict):
            named = rule.get("properties", {})
            others = rule.get("additionalProperties", True)
            return (
                all(name in value for name in rule.get("required", ()))
                and rule.get("minProperties", 0)
                <= len(value)
                <= rule.get("maxProperties", math.inf)
                and all(self.allows(item, named.get(key, others)) for key, item in value.items())
            )
        if isinstance(value, list):
            return len(value) >= rule.get("minItems", 0) and all(
                self.allows(item, rule.get("items", True)) for item in value
            )
        if isinstance(value, (int, float)):
            return rule.get("minimum", -math.inf) <= value <= rule.get("maximum", math.inf)
        return True


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(json.loads(json.dumps(shapes.schema())))


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evidence", "schema"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == shapes.schema()
    assert said["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_committed_records_and_benchmarks_are_of_the_schema(schema: Schema) -> None:
    assert len(RECORDS) > 500
    assert len(BENCHMARKS) > 20
    for kind, paths in (("Record", RECORDS), ("Benchmark", BENCHMARKS)):
        rule = {"$ref": f"#/$defs/{kind}"}
        wrong = [p.name for p in paths if not schema.allows(json.loads(p.read_bytes()), rule)]
        assert wrong == []


def test_records_on_disk_are_read_and_written_to_the_byte() -> None:
    said = [path.read_bytes() for path in RECORDS[::7]]
    said = [data for data in said if b'"witness":' in data]  # older ones get an empty one
    assert len(said) > 50
    for data in said:
        assert store.encode(store.decode(data)) == data


@pytest.fixture(params=["latents", "compile", "refuse", "benchmark", "packet"])
def example(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """(shape, a file of it): a committed record with a check, a benchmark, or the card of a packet."""
    if request.param == "benchmark":
        return shapes.Benchmark, json.loads(BENCHMARKS[0].read_bytes())
    if request.param == "packet":
        name = "cpu/fp8-flux-1+decode.json"
        files = {name: {"bytes": 3, "sha256": "ab"}, packets.LATENTS: {"bytes": 4, "sha256": "cd"}}
        said = {"cell": "fp8-flux-1@cpu+decode", "command": "quantmatrix generate", "metrics": {}}
        return shapes.Packet, {"schema": 1, "files": files, **said}
    records = (json.loads(path.read_bytes()) for path in RECORDS)
    return shapes.Record, next(one for one in records if request.param in one["checks"])


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data; of a list the first."""
    items = list(value.items()) if isinstance(value, dict) else []
    items = [(0, value[0])] if isinstance(value, list) and value else items
    return [p for key, item in items for p in [(*path, key), *list_places(item, (*path, key))]]


def list_damages(whole: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(place, the same data) with one value gone, or replaced by others, until the next is asked for."""
    for place in list_places(whole):
        inner: Any = whole
        for key in place[:-1]:
            inner = inner[key]
        kept = copy.copy(inner)
        for value in ("gone", None, 3, -1.5, True, "x", [], {}, {"a": 1}, 10**400):
            if value == "gone":
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            yield place, whole
            inner.clear()
            inner.update(kept) if isinstance(inner, dict) else inner.extend(kept)


def test_words_and_schema_say_the_same(example: tuple[Any, dict[str, Any]], schema: Schema) -> None:
    """What the schema allows is of the shape, and what it does not has its place named."""
    kind, whole = example
    rule = {"$ref": f"#/$defs/{kind.__name__}"}
    assert schema.allows(whole, rule)
    assert shapes.list_problems(whole, kind) == []
    refused = 0
    for place, changed in list_damages(whole):
        problems = shapes.list_problems(changed, kind)
        for name, inner in shapes.CHECKS.items() if kind is shapes.Record and not problems else ():
            if metrics := changed["checks"].get(name, {}).get("metrics"):
                problems += shapes.list_problems(metrics, inner, f"checks.{name}.metrics")
        cell = changed.get("cell")
        if kind is shapes.Record and isinstance(cell, dict) and not problems:
            lists = ("flags", "checks")
            problems += [f"cell.{k}" for k, v in cell.items() if k not in lists and v != str(v)]
        assert schema.allows(changed, rule) is (not problems), (place, problems)
        if problems:
            refused += 1
            assert str(place[0]) in problems[0]
            assert len(problems) == 1 or kind is not shapes.Record or len(problems) < 20
    assert refused > 20


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (3, shapes.Record, "expected an object, found 3"),
        ({"verdict": "ok", "metrics": {}, "limits": {}, "message": ""}, shapes.Check,
         "verdict: expected pass or fail or unjudged, found 'ok'"),
        ({"verdict": "pass", "metrics": {}, "limits": {}, "message": "", "x": 1}, shapes.Check,
         "x: not a known key"),
        ({"refusal": 3}, shapes.Plan, "refusal: expected an object or null, found 3"),
        ({"components": {"a": {"backends": {}, "total_layers": -1, "quantized_layers": 1}}},
         shapes.Plan, "components.a.total_layers: expected a count, found -1"),
        ({"worst": {"psnr_db": "x"}}, shapes.Latents,
         "worst.psnr_db: expected a number or null, found 'x'"),
        ({"\ud800": 1}, shapes.Machine,
         r"'utf-8' codec can't encode character '\ud800' in position 0: surrogates not allowed"),
        ({"class": 1}, shapes.Latents, "class: expected a text, found 1"),
        ({"devices": ["a", 2]}, shapes.Machine, "devices[1]: expected a text, found 2"),
        ({"ok": 1}, shapes.Plan, "ok: expected true or false, found 1"),
    ],
)  # fmt: skip
def test_each_problem_names_place_expected_and_found(value: Any, kind: Any, said: str) -> None:
    assert shapes.list_problems(value, kind) == [said]


def test_every_problem_is_named_at_once() -> None:
    said = shapes.list_problems({"versions": 1, "devices": [1, "a", 2]}, shapes.Machine, "machine")
    assert [line.partition(":")[0] for line in said] == [
        "machine.devices[0]", "machine.devices[2]", "machine.versions",
    ]  # fmt: skip


def test_nox_reads_its_modules_without_any_package() -> None:
    """`noxfile.py` imports tables and sessions before anything is installed."""
    code = (
        "import sys; sys.modules['msgspec'] = None; sys.modules['jinja2'] = None\n"
        "from quantmatrix.harness import sessions\nfrom quantmatrix.tables import read\n"
        "read.read()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
