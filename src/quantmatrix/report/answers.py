"""Answers: which checkpoint of a model to use on a hardware, as options; what `recommend` and the page know.

For each checkpoint, hardware and backend there is an `Option`, from three sources:

| source     | gives |
| ---------- | ----- |
| records    | state and scope of the cell; error against BF16, step and peak at true size |
| plans.csv  | weights at true size, kernels of what no row claims, and the rule where there are none |
| the tables | command, and whether the checkpoint can be downloaded |

A number that was not measured on the hardware itself is that of the same checkpoint with the same kernel
elsewhere (`error_on`, `step_on`, `peak_on` say where); a step never goes from a CPU to a GPU or back.

Which of them is the best is the matter of `ranking`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import QuantmatrixError
from quantmatrix.proof import packaged
from quantmatrix.proof import record as records
from quantmatrix.proof.offers import is_invented, offer
from quantmatrix.proof.reports_folder import EVIDENCE
from quantmatrix.proof.scopes import (
    COMPILED,
    SCOPES,
    TRUE_SIZE,
    find_records,
    key_of,
    label,
    make_key,
)

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.proof.joined import Joined
    from quantmatrix.proof.plans import Key, PlanLine
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

SCHEMA = 1
FILE = packaged.ANSWERS
PROOFS = ("ran here", "kernels compiled", "claimed, not run", "plan alone")
"""How much of an option was run on the hardware, the most first."""
USABLE = ("proven", "unjudged", "stale", "unproven")
"""States of cells that are an option."""
ERRORS = ("psnr_db", "relative_l2")
"""Metrics of the worst step that an option has."""
MIB = 2**20


@dataclass(frozen=True)
class Option:
    """One checkpoint on one hardware with one backend."""

    checkpoint: str
    model: str
    hardware: str
    family: str
    reference: str
    kernel: str
    """Backends of its layers; empty where neither a record nor a plan says."""
    cell: str = ""
    """The cell that claims it; empty where only the plan speaks."""
    state: str = ""
    scope: str = ""
    proof: int = len(PROOFS) - 1
    """Position in `PROOFS`."""
    psnr_db: float | None = None
    """Of the latents against BF16 at the worst step; None: not measured anywhere."""
    relative_l2: float | None = None
    error_on: str = ""
    """`h200, true size`."""
    step: float | None = None
    """Seconds of a step over those of BF16 on the same device, at true size."""
    step_on: str = ""
    peak_mib: int | None = None
    peak_on: str = ""
    weights_mib: int | None = None
    """All transformers at true size; None: not planned."""
    largest_mib: int = 0
    layerwise_mib: int = 0
    movable: bool = False
    commands: tuple[str, ...] = ()
    """With published weights; the last one runs it, one before makes the checkpoint."""
    made: bool = False
    """Whether it has to be made from the base model first."""
    evidence: str = ""
    """Path of the record below the reports folder."""

    @property
    def scope_label(self) -> str:
        """`proven · true size`, or that there is a plan alone."""
        return label(self.state, self.scope) if self.cell else PROOFS[-1]


@dataclass(frozen=True)
class No:
    """Why a checkpoint is no option on a hardware."""

    checkpoint: str
    model: str
    hardware: str
    rule: str
    message: str


@dataclass(frozen=True)
class Answers:
    """All options and refusals, in the order of the tables."""

    options: tuple[Option, ...]
    refused: tuple[No, ...]
    inputs: str = ""
    """Digest of the files that they were worked out from."""

    def to_json(self) -> dict[str, Any]:
        """Plain data: names of columns, and a list per line, empty values as null."""
        return {
            "schema": SCHEMA,
            "inputs": self.inputs,
            "option": [field.name for field in fields(Option)],
            "options": [list(asdict(one).values()) for one in self.options],
            "refusal": [field.name for field in fields(No)],
            "refused": [list(asdict(one).values()) for one in self.refused],
        }


def encode(answers: Answers) -> bytes:
    """answers.json: a line for each option, so that changes can be read."""
    plain = answers.to_json()
    lines = []
    for name, value in plain.items():
        if name in ("options", "refused"):
            inner = ",\n".join(f"  {json.dumps(one, allow_nan=False)}" for one in value)
            lines.append(f' "{name}": [\n{inner}\n ]' if value else f' "{name}": []')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def decode(data: bytes, where: object) -> Answers:
    """The answers in a file; QuantmatrixError, which names it, for another form."""
    try:
        plain = strict_json.parse(data)
        known = [f.name for f in fields(Option)], [f.name for f in fields(No)]
        if plain["schema"] != SCHEMA or (plain["option"], plain["refusal"]) != known:
            raise QuantmatrixError(f"schema {plain['schema']} has other columns than {SCHEMA}")
        options = [dict(zip(known[0], one, strict=True)) for one in plain["options"]]
        for one in options:
            one["commands"] = tuple(one["commands"])
        refused = tuple(No(*one) for one in plain["refused"])
        return Answers(tuple(Option(**one) for one in options), refused, plain["inputs"])
    except (QuantmatrixError, ValueError, KeyError, TypeError) as error:
        raise QuantmatrixError(
            f"{where}: no answers of this version: {error}; write it again with `quantmatrix report`"
        ) from error


def digest_inputs(tables: Matrix, reports: Path) -> str:
    """sha256 of the tables in use and of all below a reports folder that answers are worked out from.

    Records of cells that the tables do not have are left out, as they are from the answers.
    """
    from quantmatrix.tables import read

    folder = read.tables_folder()
    known = {str(records.path_of(make_key(c.id, scope))) for c in tables.cells for scope in SCOPES}
    files = [(f"tables/{path.name}", path) for path in sorted(folder.glob("*.csv"))]
    files += [(name, reports / name) for name in packaged.TABLES if (reports / name).is_file()]
    for path in sorted((reports / EVIDENCE).glob("*/[!.]*.json")):
        name = f"{path.parent.name}/{path.name}"
        files += [(name, path)] if name in known else []
    digest = hashlib.sha256()
    for name, path in files:
        data = path.read_bytes()
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return f"sha256:{digest.hexdigest()}"


def collect(
    joined: Joined,
    evidence: Mapping[str, Evidence],
    plans: Mapping[Key, PlanLine],
    inputs: str = "",
) -> Answers:
    """Every option of every hardware, and why other checkpoints are none."""
    known = Measured(joined, evidence)
    options: list[Option] = []
    refused: list[No] = []
    by_pair: dict[tuple[str, str], list[Cell]] = {}
    for cell in joined.tables.cells:
        by_pair.setdefault((cell.checkpoint, cell.hardware), []).append(cell)
    for checkpoint in joined.tables.checkpoints:
        for hardware in joined.tables.hardware:
            cells = by_pair.get((checkpoint, hardware), [])
            found = list(list_options(joined, known, plans, (checkpoint, hardware), cells))
            options += found
            if not found:
                refused.append(say_no(joined, plans, (checkpoint, hardware), cells))
    return Answers(tuple(options), tuple(refused), inputs)


def list_options(
    joined: Joined,
    known: Measured,
    plans: Mapping[Key, PlanLine],
    pair: tuple[str, str],
    cells: Sequence[Cell],
) -> Iterator[Option]:
    """Options of a checkpoint on a hardware: cells that may work, else the plan."""
    usable = [
        c
        for c in cells
        if c.claim not in ("refused", "failing", "planned") and joined.states[c.id] in USABLE
    ]
    for cell in usable:
        plan = plans.get((*pair, cell.backend))
        if plan is None or not plan.rule or joined.states[cell.id] == "proven":
            yield describe_cell(joined, known, plan, cell)
    default = plans.get((*pair, ""))
    if not usable and default is not None and not default.rule:
        yield describe_plan(joined, known, default, pair)


def say_no(
    joined: Joined, plans: Mapping[Key, PlanLine], pair: tuple[str, str], cells: Sequence[Cell]
) -> No:
    """Why there is no option: what the plan says, else the failure or the claim of a row."""
    row = joined.tables.checkpoints[pair[0]]
    where = (row.id, row.model, pair[1])
    line = plans.get((*pair, ""))
    if line is not None and line.rule:
        return No(*where, line.rule, line.message)
    failing = next((c for c in cells if joined.states[c.id] == "failing"), None)
    if failing is not None:
        return No(*where, failing.rule or "failing", joined.reasons[failing.id].partition("\n")[0])
    refused = next((c for c in cells if c.claim == "refused"), None)
    if refused is not None:
        return No(*where, refused.rule, refused.notes or f"refused by the rule {refused.rule}")
    return No(*where, "", "no row claims it, and no plan was made: see `quantmatrix plan`")


def describe_cell(joined: Joined, known: Measured, plan: PlanLine | None, cell: Cell) -> Option:
    """The option of a cell."""
    standing = joined.standings[cell.id]
    ran = standing.state in ("proven", "unjudged")
    proof = 0 if ran and standing.scope != COMPILED else 1 if ran else 2
    offered = offer(cell, joined.tables, standing.record, standing.scope)
    kernel = list_kernels(standing.record) or (plan.backends if plan else ())
    numerics = list_numerics(standing.record) or (plan.numerics if plan else ())
    record = standing.record
    return Option(
        **describe_checkpoint(joined.tables, cell.checkpoint, cell.hardware),
        kernel=" + ".join(kernel or ((cell.backend,) if cell.backend else ())),
        cell=cell.id,
        state=standing.state,
        scope=standing.scope,
        proof=proof,
        **known.find_error(cell, numerics),
        **known.find_step(cell, cell.backend or "".join(kernel[:1])),
        **known.find_peak(cell, cell.backend or "".join(kernel[:1])),
        **describe_size(plan),
        commands=offered.commands,
        evidence=f"{EVIDENCE}/{records.path_of(key_of(record))}" if record else "",
    )


def describe_plan(joined: Joined, known: Measured, line: PlanLine, pair: tuple[str, str]) -> Option:
    """The option of a plan that no row claims."""
    checkpoint, hardware = pair
    like = next((c for c in joined.tables.cells if c.checkpoint == checkpoint), None)
    commands: tuple[str, ...] = ()
    numbers: dict[str, Any] = {}
    if like is not None:
        here = replace(like, id="", hardware=hardware, backend="")
        commands = offer(here, joined.tables).commands
        numbers |= known.find_error(here, line.numerics)
        backend = "".join(line.backends[:1])
        numbers |= known.find_step(here, backend) | known.find_peak(here, backend)
    return Option(
        **describe_checkpoint(joined.tables, checkpoint, hardware),
        kernel=" + ".join(line.backends),
        **numbers,
        **describe_size(line),
        commands=commands,
    )


def describe_checkpoint(tables: Matrix, checkpoint: str, hardware: str) -> dict[str, Any]:
    """Fields of an option that its checkpoint's row gives."""
    row = tables.checkpoints[checkpoint]
    return {
        "checkpoint": row.id,
        "model": row.model,
        "hardware": hardware,
        "family": row.family,
        "reference": row.reference,
        "made": row.form != "online" and is_invented(row.reference),
    }


def describe_size(line: PlanLine | None) -> dict[str, Any]:
    """Fields of an option that its plan gives."""
    if line is None or line.rule:
        return {}
    return {
        "weights_mib": line.whole_mib,
        "largest_mib": line.largest_mib,
        "layerwise_mib": line.layerwise_mib,
        "movable": line.movable,
    }


def list_parts(record: Evidence | None) -> list[Mapping[str, Any]]:
    """Quantized components of a record's plan."""
    parts = record.plan.get("components", {}).values() if record else ()
    return [part for part in parts if part.get("backends")]


def list_kernels(record: Evidence | None) -> tuple[str, ...]:
    """Backends of a record's layers."""
    return tuple(dict.fromkeys(name for part in list_parts(record) for name in part["backends"]))


def list_numerics(record: Evidence | None) -> tuple[str, ...]:
    """Numerics of a record's layers, sorted; older records have none."""
    named = [part.get("numerics") for part in list_parts(record)]
    return tuple(sorted({str(n) for one in named if isinstance(one, Mapping) for n in one}))


class Measured:
    """Numbers of records that count, by checkpoint, and whose they are."""

    def __init__(self, joined: Joined, evidence: Mapping[str, Evidence]) -> None:
        self.vendors = {row.id: row.vendor for row in joined.tables.hardware.values()}
        models = joined.tables.models.values()
        self.transformers = {row.id: len(row.transformers) for row in models}
        self.by_checkpoint: dict[str, list[tuple[Cell, str, Evidence]]] = {}
        for cell in joined.tables.cells:
            standing = joined.standings[cell.id]
            counted = {standing.scope: standing.state, **dict(standing.others)}
            for scope, record in find_records(evidence, cell.id).items():
                if counted.get(scope) in ("proven", "unjudged") and cell.claim != "refused":
                    self.by_checkpoint.setdefault(cell.checkpoint, []).append((cell, scope, record))

    def list_near(self, cell: Cell, test: Any) -> list[tuple[Cell, str, Evidence]]:
        """Records of a cell's checkpoint that pass a test: of the cell, of its hardware, of its vendor's,
        of others; of each the strongest scope first."""
        scopes, vendor = ("published", "true size", "stand-in"), self.vendors[cell.hardware]

        def rank(one: tuple[Cell, str, Evidence]) -> tuple[bool, bool, bool, int]:
            other, scope, _ = one
            far = other.hardware != cell.hardware, self.vendors[other.hardware] != vendor
            return other.id != cell.id, *far, scopes.index(scope)

        found = [
            one
            for one in self.by_checkpoint.get(cell.checkpoint, ())
            if one[1] in scopes and test(*one)
        ]
        return sorted(found, key=rank)

    def find_error(self, cell: Cell, numerics: Sequence[str]) -> dict[str, Any]:
        """Distance of the latents from BF16, by layers that compute with the same numerics."""

        def is_like(other: Cell, scope: str, record: Evidence) -> bool:
            same = bool(numerics) and list_numerics(record) == tuple(numerics)
            return (other.id == cell.id or same) and bool(read_error(record))

        for other, scope, record in self.list_near(cell, is_like)[:1]:
            return {**read_error(record), "error_on": f"{other.hardware}, {scope}"}
        return {}

    def find_step(self, cell: Cell, backend: str) -> dict[str, Any]:
        """Time of a step over that of BF16, with this backend on a device of the vendor."""
        for other, record in self.list_timed(cell, backend):
            times = [record.timings.get(f"step {form}") for form in ("quantized", "bf16")]
            if times[0] and times[1]:
                return {"step": round(times[0] / times[1], 3), "step_on": other.hardware}
        return {}

    def find_peak(self, cell: Cell, backend: str) -> dict[str, Any]:
        """Peak memory of a step, with this backend on a device of the vendor."""
        for other, record in self.list_timed(cell, backend):
            peak = read_number(record.checks["true-size"].metrics, "peak", "quantized_bytes")
            if peak:
                one = ", one transformer" if self.transformers[cell.model] > 1 else ""
                return {"peak_mib": round(peak / MIB), "peak_on": f"{other.hardware}{one}"}
        return {}

    def list_timed(self, cell: Cell, backend: str) -> Iterator[tuple[Cell, Evidence]]:
        """Records of true size with a backend on a device of the vendor, the nearest first."""
        vendor = self.vendors[cell.hardware]

        def is_like(other: Cell, scope: str, record: Evidence) -> bool:
            same = backend in list_kernels(record) and self.vendors[other.hardware] == vendor
            return scope == TRUE_SIZE and same

        for other, _, record in self.list_near(cell, is_like):
            yield other, record


def read_number(metrics: Mapping[str, Any], part: str, name: str) -> float | None:
    """A number inside a part of a check's metrics, or None: metrics have no fixed form."""
    found = metrics.get(part)
    value = found.get(name) if isinstance(found, Mapping) else None
    return value if isinstance(value, (int, float)) else None


def read_error(record: Evidence) -> Mapping[str, Any]:
    """Worst-step metrics of the latents, or of the steps at true size; empty where there are none."""
    for name in ("latents", "true-size"):
        check = record.checks.get(name)
        if check is not None:
            numbers = {n: read_number(check.metrics, "worst", n) for n in ERRORS}
            if numbers["relative_l2"] is not None:
                return numbers
    return {}
