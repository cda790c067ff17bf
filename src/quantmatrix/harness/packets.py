"""Packets: evidence that somebody with another machine can contribute, and anybody can check.

A packet is one folder:

| file                     | content |
| ------------------------ | ------- |
| `packet.json`            | `schema`, `cell`, `command`, `metrics`, and per other file `bytes` and `sha256` |
| `<hardware>/<row>.json`  | the record of the run, as `reports/evidence` keeps it |
| `latents.safetensors`    | `baseline.000` ... and `candidate.000` ...: the latents of every step |

So a packet is an evidence folder, too: what `check` finds sound, `quantmatrix evidence merge` takes.
`check` believes nothing that it can compute: digests of files, metrics of every step (within one
unit of the sixth digit), the digest of the latents, and the verdict under this project's limits. What
nobody could compute again from latents, a check of another kind, is not part of a packet.
Pictures, and the distances of media, are not in the latents: of those only the form is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import CheckpointError, QuantmatrixError, UsageError
from quantmatrix.files import check_writable, whole
from quantmatrix.proof import record as records
from quantmatrix.proof import shapes, store
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence, EvidenceError
from quantmatrix.proof.scopes import PUBLISHED, STAND_IN, make_key
from quantmatrix.proof.states import find_other_row
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    import torch

    from quantmatrix.proof.limits import Ledger, Limits
    from quantmatrix.runtime.run import Run
    from quantmatrix.tables.rows import Cell, Matrix

SCHEMA = 1
CARD = "packet.json"
LATENTS = "latents.safetensors"
KEYS = {"schema", "cell", "command", "metrics", "files"}
SIDES = ("baseline", "candidate")
CELL_ID = re.compile(r"[a-z0-9][a-z0-9._-]*@[a-z0-9-]+(\+[a-z0-9_-]+)?")
"""What may become the name of a file."""
TOLERANCE = 2e-6
"""Relative: metrics are written with six digits."""


def make(tables: Matrix, cell: Cell, folder: Path, *, tiny: bool = False) -> Path:
    """Run the latents check of a cell here and write its packet; nothing is left on failure.

    Raises UsageError for a folder that exists, MachineError when this is not the cell's hardware,
    RefusedError when the plan is a refusal.
    """
    from quantmatrix.hardware import probe
    from quantmatrix.measure.workbench import Workbench

    if folder.exists():
        raise UsageError(f"--output-path {folder} exists; name a new folder")
    check_writable(folder)
    bench = Workbench(tables, tiny=tiny)
    request = bench.request(cell)
    plan = bench.plan(request)
    baseline = bench.baseline(cell, request)
    run = bench.run(request, plan)
    quantized = [part for part in plan.components.values() if part.layers]
    record = Evidence(
        cell=records.describe_cell(cell, tables),
        checks={"latents": measure(cell, baseline, run)},
        command=bench.command(cell),
        checkpoint=records.describe_files(f for part in quantized for f in part.checkpoint.files),
        plan=records.make_portable(plan.to_json(), bench.folders(plan.request)),
        timings={name: round(seconds, 4) for name, seconds in run.seconds.items()},
        latents_digest=digest(run.latents),
        made=records.tell_time(),
        machine=probe.fingerprint(),
        versions=records.list_versions(),
        commit=records.find_commit(),
    )
    record = sign(record, tables.hardware[cell.hardware])
    write(record, baseline.latents, run.latents, folder)
    return folder


def measure(cell: Cell, baseline: Run, run: Run) -> CheckResult:
    """The latents check of a run: metrics, this project's limits, and the verdict."""
    from quantmatrix.measure import latents as measure_latents
    from quantmatrix.measure import pictures, thumbnails
    from quantmatrix.proof.limit_classes import name_run
    from quantmatrix.runtime import media

    steps = measure_latents.compare_trajectories(baseline.latents, run.latents)
    kind = name_run(run.plan.components.values())
    frames = [media.stack_frames(one.media) for one in (baseline, run)]
    metrics = {
        **measure_latents.summarize(steps),
        "class": kind,
        "media": pictures.measure_frames(*frames),
        "thumbnails": thumbnails.draw(*frames),
    }
    allowed = find_limits(kind, cell.model, cell.hardware)
    if allowed is None:
        why = f"there are no limits for {kind} on {cell.model}: measured, not judged"
        return CheckResult("unjudged", metrics, {}, why)
    problems = measure_latents.judge(steps, allowed)
    verdict = "fail" if problems else "pass"
    return CheckResult(verdict, metrics, allowed.to_json(), "; ".join(problems))


def read_ledger() -> Ledger:
    """The limits of the tables in use, with ours behind them."""
    from quantmatrix.proof import known_limits, reports_folder

    return known_limits.read(reports_folder.find_source(None))


def find_limits(kind: str, model: str, hardware: str) -> Limits | None:
    """This project's limits of a class of arithmetic on a device, or None when it was never
    measured.

    LimitsError when the file of samples is damaged.
    """
    from quantmatrix.proof.limit_samples import LimitsError

    ledger = read_ledger()
    try:
        return ledger.find(kind, model, hardware)
    except LimitsError:
        return None


def digest(latents: Sequence[torch.Tensor]) -> str:
    """Digest of a trajectory, tensors of any shape and dtype, as evidence keeps it."""
    from quantmatrix.measure.latents import digest_latents

    return digest_latents(latents)


def write(
    record: Evidence,
    baseline: Sequence[torch.Tensor],
    candidate: Sequence[torch.Tensor],
    folder: Path,
) -> None:
    """Write a packet; the folder appears whole or not at all.

    Latents are one tensor per step, of any shape and dtype, which are kept. Raises OSError where it
    cannot be written.
    """
    from quantmatrix.checkpoints.writer import save_tensors

    sides = zip(SIDES, (baseline, candidate), strict=True)
    tensors = {f"{side}.{n:03}": t.contiguous() for side, ts in sides for n, t in enumerate(ts)}
    with whole(folder) as temporary:
        path = store.write(record, temporary)
        save_tensors(tensors, temporary / LATENTS)
        files = [path, temporary / LATENTS]
        card = {
            "schema": SCHEMA,
            "cell": record.cell["id"],
            "command": record.command,
            "metrics": recompute(baseline, candidate),
            "files": {f.relative_to(temporary).as_posix(): describe(f) for f in files},
        }
        text = json.dumps(card, indent=1, sort_keys=True, allow_nan=False)
        (temporary / CARD).write_text(f"{text}\n", encoding="utf-8")


def describe(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "sha256": records.digest_file(path)}


def recompute(
    baseline: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Metrics of every step, the worst and the last; tensors of any shape and dtype, one per step.

    Raises ShapeError where the two runs differ in form.
    """
    from quantmatrix.measure.latents import compare_trajectories, summarize

    return summarize(compare_trajectories(baseline, candidate))


def check(folder: Path, tables: Matrix) -> list[str]:
    """What is wrong with a packet, one line each; empty when it is sound."""
    try:
        card = strict_json.read(folder / CARD)
    except (OSError, ValueError) as error:
        return [f"{folder / CARD}: cannot be read: {error}"]
    if problems := list_card_problems(card) or list_file_problems(folder, card["files"]):
        return [f"{folder}: {problem}" for problem in problems]
    try:
        record = store.read(folder / find_record(card["files"]))
        sides = read_latents(folder / LATENTS)
        metrics = recompute(*sides)
    except (QuantmatrixError, OSError, ValueError) as error:
        return [f"{folder}: {error}"]
    problems = list_row_problems(record, tables)
    if card["command"] != record.command:
        problems.append(f"{CARD}: command is {card['command']!r:.80}, the record has another")
    problems += [f"{CARD}: {text}" for text in compare_metrics(card["metrics"], metrics)]
    problems += list_record_problems(record, metrics)
    if record.latents_digest != digest(sides[1]):
        problems.append("latents_digest of the record is not that of the candidate's latents")
    problems += list_verdict_problems(record, sides)
    return [f"{folder}: {problem}" for problem in problems]


def list_card_problems(card: Any) -> list[str]:
    """What is wrong with the form of packet.json."""
    if not isinstance(card, dict) or set(card) != KEYS:
        return [f"{CARD}: expected an object with {', '.join(sorted(KEYS))}"]
    if card["schema"] != SCHEMA:
        return [f"{CARD}: schema {card['schema']!r}, expected {SCHEMA}"]
    if not isinstance(card["cell"], str) or not CELL_ID.fullmatch(card["cell"]):
        return [f"{CARD}: cell {card['cell']!r} is not the id of a cell"]
    keys = [make_key(card["cell"], scope) for scope in (STAND_IN, PUBLISHED)]
    wanted = [{LATENTS, str(records.path_of(key))} for key in keys]
    if not isinstance(card["files"], dict) or set(card["files"]) not in wanted:
        return [f"{CARD}: files are {card['files']!r:.200}, expected {sorted(wanted[0])}"]
    return [f"{CARD}: {problem}" for problem in shapes.list_problems(card, shapes.Packet)]


def find_record(files: Iterable[str]) -> str:
    """The record among the files of a packet."""
    return next(name for name in files if name != LATENTS)


def list_file_problems(folder: Path, listed: Mapping[str, Any]) -> list[str]:
    """Files that are missing, changed, or that nobody asked for."""
    problems = []
    for name, wanted in sorted(listed.items()):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            problems.append(f"{name}: missing")
        elif why := explain_change(path, wanted):
            problems.append(f"{name}: {why}")
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unknown = sorted(here - {CARD, *listed})
    return problems + [f"{name}: not a part of a packet" for name in unknown]


def explain_change(path: Path, wanted: Any) -> str | None:
    """Why a file is not the one that a card describes: size and header first, then its bytes."""
    from quantmatrix.checkpoints.header import read_header

    size = path.stat().st_size
    if not isinstance(wanted, Mapping) or wanted.get("bytes") != size:
        return f"has {size} bytes, {CARD} says {quote(wanted)}: the file was changed"
    try:
        if path.name == LATENTS:
            read_header(path)
    except CheckpointError as error:
        return str(error)
    found = describe(path)
    if found == wanted:
        return None
    return f"is {found}, {CARD} says {quote(wanted)}: the file was changed"


def read_latents(path: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(baseline, candidate): latents per step, of the shape and dtype in the file (any shape).

    Raises EvidenceError for other names or damaged files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise EvidenceError(f"{path.name}: {error}") from error
    count = len(tensors) // 2
    names = [[f"{side}.{number:03}" for number in range(count)] for side in SIDES]
    if not count or set(tensors) != {*names[0], *names[1]}:
        raise EvidenceError(f"{path.name}: holds {sorted(tensors)}, expected pairs per step")
    return [tensors[name] for name in names[0]], [tensors[name] for name in names[1]]


def list_row_problems(record: Evidence, tables: Matrix) -> list[str]:
    """Why the record is not about a row as it stands here."""
    cell = next((cell for cell in tables.cells if cell.id == record.cell["id"]), None)
    if cell is None:
        return [f"no cell {record.cell['id']} in the tables: is the row part of the contribution?"]
    now = records.describe_cell(cell, tables)
    if now["row_digest"] != record.cell["row_digest"]:
        return [f"{cell.id}: the row or its checkpoint's row changed since the run"]
    if not record.plan.get("machine"):
        return ["the plan in the record names no machine: was it run?"]
    why = find_other_row(cell, record, tables, now)
    return [why] if why else []


def list_record_problems(record: Evidence, metrics: Mapping[str, Any]) -> list[str]:
    """Where the latents check of the record does not say what its latents say."""
    found = record.checks.get("latents")
    if found is None:
        return ["the record has no latents check"]
    if others := sorted(set(record.checks) - {"latents"}):
        return [f"checks: {', '.join(others)}: latents prove nothing of these; leave them out"]
    recorded = {name: found.metrics.get(name) for name in metrics}
    return [f"checks.latents.metrics.{text}" for text in compare_metrics(recorded, metrics)]


def is_near(recorded: Any, found: Any) -> bool:
    """Whether two values are numbers that agree but for the sixth digit."""
    if not (isinstance(recorded, int | float) and isinstance(found, int | float)):
        return False
    try:
        return math.isclose(recorded, found, rel_tol=TOLERANCE, abs_tol=1e-9)
    except OverflowError:  # an integer that no float holds
        return False


def compare_metrics(recorded: Any, found: Any, where: str = "metrics") -> list[str]:
    """Differences of nested metrics, as text; numbers may differ in the sixth digit."""
    if isinstance(found, Mapping) and isinstance(recorded, Mapping) and set(recorded) == set(found):
        pairs = [(f"{where}.{name}", recorded[name], found[name]) for name in sorted(found)]
    elif isinstance(found, list) and isinstance(recorded, list) and len(recorded) == len(found):
        pairs = [
            (f"{where}[{n}]", *pair) for n, pair in enumerate(zip(recorded, found, strict=True))
        ]
    else:
        same = recorded == found or is_near(recorded, found)
        return [] if same else [f"{where} is {recorded!r:.80}, the latents give {found!r:.80}"]
    return [
        problem for where, one, other in pairs for problem in compare_metrics(one, other, where)
    ]


def list_verdict_problems(
    record: Evidence, sides: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> list[str]:
    """Whether the verdict is the one that this project's limits give, where there are any.

    `sides` are (baseline, candidate), latents per step of any shape and dtype.
    """
    from quantmatrix.measure.latents import compare_trajectories, judge

    recorded = record.checks.get("latents")
    if recorded is None or recorded.verdict != "pass":
        return []
    kind = str(recorded.metrics.get("class", ""))
    allowed = find_limits(kind, record.cell["model"], record.cell["hardware"])
    if allowed is None:
        return [f"the record says pass, but no limit is known for {kind or 'a run without class'}"]
    problems = judge(compare_trajectories(*sides), allowed)
    return [f"the record says pass, but {problem}" for problem in problems]
