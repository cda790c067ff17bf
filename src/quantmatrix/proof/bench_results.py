"""Bench results: timings as files, and readers that take no empty or partial one for a measurement.

A file holds `{"schema": 1, "planned": [...], "results": [...]}`. `planned` names everything that was
to be measured; a file that lacks one of them is partial, and an error. A result is keyed by `what`
(a cell's id, or a request as text), `size` and `device`, and holds:

| key          | content |
| ------------ | ------- |
| `components` | per transformer component `layers`, `step`, `load`, `memory` (see `quantmatrix.measure.bench.timing`) |
| `size`       | `tiny`: a stand-in of small shapes; `full`: the real ones. Their ratios have nothing in common |
| `backends`   | quantized layers by kernel, per component |
| `settings`   | rounds of each comparison, confidence, power |
| `cell`, `command`, `machine`, `commit`, `made` | the row as it was then (cells only), and where from |

Every comparison keeps its samples, and its reader computes ratio, interval and verdict from them
again: a number that was written by hand is found. Files are replaced whole. The matrix's own results
lie in `reports/benchmarks/<hardware>/<cell>.json`. What the parts are says `quantmatrix.proof.shapes`; imports of this
module are of the standard library alone, for nox reads it before anything is installed.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import UsageError
from quantmatrix.files import write_whole
from quantmatrix.proof import record as records
from quantmatrix.proof.ratios import compare_pairs, name_size
from quantmatrix.proof.record import path_of
from quantmatrix.proof.scopes import PUBLISHED, STAND_IN
from quantmatrix.quoting import quote_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from quantmatrix.proof.code_digest import Code
    from quantmatrix.tables.rows import Cell, Matrix

SCHEMA = 1
BENCHMARKS = "benchmarks"
"""Folder of the results, below the reports."""
FORMS = ("bf16", "quantized")
"""The two sides of every comparison."""
Result = Mapping[str, Any]
Key = tuple[str, str]


class BenchmarkError(UsageError):
    """A result that is damaged, empty or partial, or cannot be held against another."""


def key_of(result: Result) -> Key:
    """What was measured, at which size, and on which device."""
    return f"{result['what']} ({result['size']})", result["device"]


def list_comparisons(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, comparison) of every timing of a result."""
    for component, found in result["components"].items():
        for layer in found["layers"]:
            yield f"{component} {name_layer(layer)}", layer
        for what in ("step", "load"):
            if what in found:
                yield f"{component} {what}", found[what]


def name_layer(layer: Mapping[str, Any]) -> str:
    """`layer 528x3072->12288 FP8 decode`: what makes a kind of layer."""
    shape = f"{layer['rows']}x{layer['in']}->{layer['out']}"
    return f"layer {shape} {layer['scheme']} {layer['backend']}"


def list_problems(result: Any, *, deep: bool = True) -> list[str]:
    """What is wrong with plain data that should be a result; empty when nothing is."""
    from quantmatrix.proof import shapes  # which nox, that reads this module, need not have

    if not isinstance(result, dict):
        return ["not a JSON object"]
    problems = [
        f"{key}: {quote_json(value)} is not one line of printable characters"
        for key, value in result.items()
        if isinstance(value, str) and not value.isprintable()
    ] or shapes.list_problems(result, shapes.Result)
    if problems:
        return problems
    problems = [p for name, part in result["components"].items() for p in check_sizes(name, part)]
    return problems or (check_samples(result) if deep else [])


def check_sizes(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Ratios and verdicts that are not those of the bytes of a component."""
    for what in ("weights", "peak"):
        sizes = [found["memory"][form][what] for form in FORMS]
        stated = found["memory"].get(f"{what}_ratio"), found["memory"].get(f"{what}_verdict")
        if stated != describe_sizes(*sizes):
            yield f"components.{name}.memory.{what}: {sizes} bytes are not {stated}"


def describe_sizes(bf16: int, quantized: int) -> tuple[float, str]:
    """(ratio, verdict) of two numbers of bytes."""
    return float(f"{quantized / bf16:.6g}"), name_size(bf16, quantized)


def summarize(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What follows from the samples of a comparison: the ratio, and the median of each form."""
    medians = {form: float(f"{statistics.median(samples[form]):.5g}") for form in FORMS}
    return {**asdict(compare_pairs(samples["bf16"], samples["quantized"])), "median": medians}


def check_samples(result: Result) -> list[str]:
    """Comparisons that say something else than their samples."""
    problems = []
    for label, timing in list_comparisons(result):
        try:
            summary = summarize(timing["milliseconds"])
        except UsageError as error:
            problems.append(f"{label}: {error}")
            continue
        if {key: timing[key] for key in summary} != summary:
            problems.append(f"{label}: its samples give {show_ratio(summary)}, it says otherwise")
    return problems


def show_ratio(timing: Mapping[str, Any]) -> str:
    """`0.710 (0.700 to 0.730)`."""
    return f"{timing['ratio']:.3f} ({timing['low']:.3f} to {timing['high']:.3f})"


def encode(results: Sequence[Result], planned: Iterable[str]) -> bytes:
    """The bytes of a file; raises BenchmarkError for results that its reader would reject."""
    whole = {"schema": SCHEMA, "planned": list(planned), "results": list(results)}
    check_file(whole, "results")
    text = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False)
    return (re.sub(r"\[[\s\d.,e+-]+\]", join_numbers, text) + "\n").encode()


def join_numbers(found: re.Match[str]) -> str:
    """A list of numbers on one line."""
    return f"[{' '.join(found[0][1:-1].split())}]"


def check_file(whole: Any, where: object, *, deep: bool = True) -> None:
    """Raise BenchmarkError for a file that is empty, partial or damaged, with every problem.

    `deep` computes ratio, interval and verdict from the samples again.
    """
    if not isinstance(whole, dict) or whole.get("schema") != SCHEMA:
        raise BenchmarkError(f"{where}: not a file of `quantmatrix bench` (schema {SCHEMA})")
    results, planned = whole.get("results"), whole.get("planned")
    if not results or not planned:
        raise BenchmarkError(f"{where}: empty: nothing was measured; run the benchmark again")
    for name, listed in (("results", results), ("planned", planned)):
        if not isinstance(listed, list):
            raise BenchmarkError(f"{where}: {name}: expected a list, found {listed!r:.80}")
    if unknown := [name for name in planned if not isinstance(name, str)]:
        raise BenchmarkError(f"{where}: planned: expected names, found {unknown[0]!r:.80}")
    problems = [f"{where}: {p}" for result in results for p in list_problems(result, deep=deep)]
    if not problems:
        problems = list_missing(planned, [result["what"] for result in results], where)
        keys = [key_of(result) for result in results]
        problems += [f"{where}: {k} appears twice" for k in sorted(set(keys)) if keys.count(k) > 1]
    if problems:
        raise BenchmarkError("\n".join(problems))


def list_missing(planned: Iterable[str], measured: Iterable[str], where: object) -> list[str]:
    """A line for each planned measurement that is not there."""
    there = set(measured)
    return [
        f"{where}: partial: {name} was planned and not measured; run it again"
        for name in planned
        if name not in there
    ]


def decode(data: bytes, where: object, *, deep: bool = True) -> list[dict[str, Any]]:
    """The results in a file's bytes; raises BenchmarkError naming `where` and every problem."""
    if not data.strip():
        raise BenchmarkError(f"{where}: empty file: the run measured nothing (workers? an error?)")
    try:
        whole = strict_json.parse(data)
    except ValueError as error:
        raise BenchmarkError(f"{where}: not JSON: {error}") from error
    check_file(whole, where, deep=deep)
    found: list[dict[str, Any]] = whole["results"]
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The results of a file, or of every .json file of a folder.

    Raises BenchmarkError for an empty folder, and a file that cannot be read, is partial or was
    changed by hand.
    """
    if path.is_dir():
        files = sorted(path.rglob("[!.]*.json"))
        if not files:
            raise BenchmarkError(f"{path}: no .json file in it: nothing was measured")
        return [result for file in files for result in read(file)]
    try:
        data = strict_json.read_bytes(path)
    except (OSError, strict_json.JsonError) as error:
        raise BenchmarkError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return decode(data, path)


def read_reports(reports: Path, *, deep: bool = False) -> dict[str, dict[str, Any]]:
    """Results of cells below a reports folder, by cell id; BenchmarkError for a wrong path."""
    folder = reports / BENCHMARKS
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/[!.]*.json")):
        results = decode(path.read_bytes(), path, deep=deep)
        name = results[0]["what"]
        if len(results) != 1 or path.parts[-2:] != path_of(name).parts:
            raise BenchmarkError(f"{path}: expected one result, of the cell that it is named after")
        found[name] = results[0]
    return found


def write(results: Sequence[Result], planned: Iterable[str], path: Path) -> Path:
    """Write a file, whole or not at all; raises BenchmarkError for an empty or partial one."""
    write_whole(path, encode(results, planned))
    return path


def write_cell(result: Result, folder: Path) -> Path:
    """Write the result of a cell below a folder of results."""
    return write([result], [result["what"]], folder / path_of(result["what"]))


def read_pytest(path: Path, planned: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """`extra_info` of each benchmark of a pytest-benchmark file, by its `what`, else its name.

    With workers pytest-benchmark measures nothing, leaves a file of 0 bytes or `stats: null`, and
    ends well. Raises BenchmarkError for such a file, and where a planned row is missing.
    """
    try:
        data = strict_json.read_bytes(path) if path.is_file() else b""
        if not data.strip():
            raise BenchmarkError(f"{path}: missing or empty: was it run with workers (-n)?")
        found = strict_json.parse(data)["benchmarks"]
        entries = {b["extra_info"].get("what", b["fullname"]): b for b in found}
    except BenchmarkError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path}: not a file of pytest-benchmark: {error!r}") from error
    problems = [f"{path}: {n}: no statistics" for n, b in entries.items() if not b.get("stats")]
    problems += [] if entries else [f"{path}: no benchmark in it: nothing was measured"]
    problems += list_missing(planned, entries, path)
    if problems:
        raise BenchmarkError("\n".join(problems))
    return {name: entry["extra_info"] for name, entry in entries.items()}


def find_change(result: Result, cell: Cell, tables: Matrix, code: Code | None = None) -> str:
    """What changed since a result was made, as text; empty when nothing did.

    Without `code` that is not looked at.
    """
    now: dict[str, Any] = records.describe_cell(cell, tables)
    if code is not None:
        now = sign(now, result, tables, code)
    then = result.get("cell") or {}
    names = {"row_digest": "the row", "device_digest": "the code", "shared_digest": "the code"}
    changes = (label for key, label in names.items() if key in now and then.get(key) != now[key])
    changed = list(dict.fromkeys(changes))
    return f"{' and '.join(changed)} changed since" if changed else ""


def describe_plan(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result tells of its plan, as a record's plan does: backends and schemes."""
    parts = {}
    for name, backends in result["backends"].items():
        layers = result["components"].get(name, {}).get("layers", ())
        schemes = sorted({str(layer["scheme"]) for layer in layers})
        parts[name] = {"backends": backends, "precision": " + ".join(schemes)}
    return {"components": parts}


def find_scope(result: Mapping[str, Any]) -> str:
    """The scope that a record of a result's size has."""
    return STAND_IN if result["size"] == "tiny" else PUBLISHED


def sign(
    cell: Mapping[str, Any], result: Mapping[str, Any], tables: Matrix, code: Code | None = None
) -> dict[str, Any]:
    """A result's `cell` with the digests of the code that runs here, or of another."""
    from quantmatrix.proof.code_digest import own_code

    row, plan = tables.hardware[cell["hardware"]], describe_plan(result)
    found = (code or own_code()).describe(cell, plan, (row.vendor, row.arch), find_scope(result))
    return {**cell, **found}
