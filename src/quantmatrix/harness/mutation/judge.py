"""Mutation: every fault injected into every row, and the row's own checks run on it.

The sound checkpoint is a tiny stand-in; the faulty one lies in a hub folder of its own that links
to everything else, so the command, the flags and the limits are the row's. The gates are those of
the suites, with the same functions and the same `reports/limits.csv`:

| gate       | what it looks at |
| ---------- | ---------------- |
| `plan`     | headers and declaration: planned, of the row's family, the row's components, no kept layer |
| `witness`  | a few decoded layers of each kind beside the base model's own (see `witness`) |
| `load`     | every tensor is used, scales are finite, the census equals the plan |
| `weights`  | every weight is as near the base model's as rounding brings it (`rounding_bounds`) |
| `generate` | a picture or clip that shows something |
| `latents`  | the worst step against the limit of the row's class; not identical to BF16 |
| `layers`   | every layer on its own input against the limit of the class |

A gate that cannot be reached any more is empty; the witness is asked apart from the loading, so that
it hides no other gate, nor is hidden by one. A row is sound if no gate objects to it unchanged;
the faults of an unsound row prove nothing, and are an error.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.errors import QuantmatrixError, UsageError, WitnessError
from quantmatrix.files import share_file
from quantmatrix.harness.mutation.faults import FAULTS, Fault
from quantmatrix.measure import latents
from quantmatrix.measure.census import find_differences
from quantmatrix.measure.layers import LayerErrors, watch_layers
from quantmatrix.measure.rounding_bounds import judge_weights
from quantmatrix.measure.workbench import Workbench
from quantmatrix.proof import limit_classes, limits
from quantmatrix.request import Request
from quantmatrix.runtime import media
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan, Refusal
from quantmatrix.runtime.run import Run
from quantmatrix.runtime.witness import verdict
from quantmatrix.tables.rows import Cell, CheckpointRow, Matrix
from quantmatrix.tiny import hub as tiny
from quantmatrix.tiny.checkpoints import write_checkpoint

GATES = ("plan", "witness", "load", "weights", "generate", "latents", "layers")
LIGHT_GATES = ("plan", "witness")
"""Gates that need no model."""


@dataclass(frozen=True)
class Outcome:
    """What the gates said about one fault in one row."""

    fault: str
    row: str
    family: str
    model: str
    part: str
    """The layer, or the part of the model, that was changed."""
    gates: dict[str, str] = field(default_factory=dict)
    """Gates that objected, and what they said."""

    @property
    def caught(self) -> bool:
        """Whether any gate objected."""
        return bool(self.gates)


def choose_rows(tables: Matrix, patterns: Sequence[str]) -> list[Cell]:
    """One cell per family, model, scheme and number of components, which runs exact arithmetic on a CPU;
    by globs.

    What is planned claims nothing that a fault could break. A whole quantized pipeline of a further model
    names no base model (its classes are another's), so the witness cannot be held to anything.

    Raises UsageError where the globs leave none.
    """
    cells: dict[tuple[str, str, str, int], Cell] = {}
    for cell in tables.cells:
        row = tables.checkpoints[cell.checkpoint]
        plain = row.form not in ("online", "sharded") and not row.reference.startswith("/path")
        claimed = cell.claim != "planned"
        plain = plain and not (row.selector == "--model-path" and row.model in models.further.IDS)
        if cell.hardware == "cpu" and cell.backend == "reference" and plain and claimed:
            cells.setdefault((cell.family, cell.model, row.scheme, len(row.components)), cell)
    found = [c for c in cells.values() if not patterns or any(matches(c, p) for p in patterns)]
    if not found:
        raise UsageError(f"{' '.join(patterns)}: no row; known: {', '.join(list_ids(cells))}")
    return found


def matches(cell: Cell, pattern: str) -> bool:
    """Whether a glob is about a cell: its id, its row, its family or its model."""
    return any(fnmatchcase(x, pattern) for x in (cell.id, cell.row, cell.family, cell.model))


def list_ids(cells: Any) -> list[str]:
    """Rows of cells by group."""
    return [cell.row for cell in cells.values()]


class Mutator:
    """Injects faults into rows; BF16 runs are computed once per model."""

    def __init__(self, tables: Matrix, samples: Path, gates: Sequence[str] = GATES) -> None:
        """`gates` are those that are asked; the first two read a few tensors, the others run models."""
        self.gates = tuple(gates)
        self.tables = tables
        self.limits = limits.read(samples)
        self.bench = Workbench(tables)

    def run(self, cells: Sequence[Cell], faults: Sequence[Fault], say: Callable[[str], None]) -> (
        list[Outcome]
    ):  # fmt: skip
        """Every fault in every cell that it can happen to.

        Raises QuantmatrixError for a cell that is not sound without a fault.
        """
        outcomes = []
        for cell in cells:
            request = self.bench.request(cell)
            sound = self.judge(cell, request, request, None)
            if sound:
                raise QuantmatrixError(f"{cell.id} is not sound, and proves nothing: {sound}")
            for fault in faults:
                say(f"{cell.row}: {fault.name}")
                found = self.inject(cell, request, fault)
                if found is not None:
                    outcomes.append(found)
        return outcomes

    def inject(self, cell: Cell, request: Request, fault: Fault) -> Outcome | None:
        """The outcome of one fault, or None where it cannot happen."""
        about = (fault.name, cell.row, cell.family, cell.model)
        if fault.model is not None:
            try:
                return Outcome(*about, "model", self.judge(cell, request, request, fault))
            except NotApplicable:
                return None
        with tempfile.TemporaryDirectory() as folder:
            stand_in = self.write_faulty(cell, request, fault, Path(folder))
            if stand_in is None:
                return None
            hub, part = stand_in
            faulty = replace(request, hub=tiny.hub(hub))
            return Outcome(*about, part, self.judge(cell, request, faulty, None))

    def write_faulty(
        self, cell: Cell, request: Request, fault: Fault, folder: Path
    ) -> tuple[Path, str] | None:
        """(hub folder, what was changed), everything but the row's repository being linked."""
        sound = self.bench.plan(request)
        row = self.tables.checkpoints[cell.checkpoint]
        source = Path(str(sound.request.hub.cache_dir))
        repository = tiny.repository_of(row.reference)
        hub, content = folder / "hub", folder / "content"
        hub.mkdir()
        content.mkdir()
        link_all(tiny.find_snapshot(repository, source), content)
        if fault.files is not None:
            base = tiny.find_snapshot(self.tables.models[cell.model].repo, source)
            part = rewrite(row, fault, base, folder, content, repository)
        else:
            part = change_layer(sound, fault, content, tiny.find_snapshot(repository, source))
        if part is None:
            return None
        link_all(source, hub, without=tiny.path_of(repository, source).name)
        tiny.move_into_place(
            tiny.wrap_snapshot(content, folder / "cache"), tiny.path_of(repository, hub)
        )
        return hub, part

    def judge(
        self, cell: Cell, sound: Request, request: Request, fault: Fault | None
    ) -> dict[str, str]:
        """What each gate says against a request; a model fault is put in after loading.

        Raises NotApplicable where such a fault cannot happen, or no gate that was asked for loads
        the model.
        """
        try:
            planned = plan(request)
        except WitnessError as error:
            return {"witness": str(error)}
        except QuantmatrixError as error:
            return {"plan": str(error)}
        if isinstance(planned, Refusal):
            return {"plan": planned.message}
        if problems := judge_plan(self.tables.checkpoints[cell.checkpoint], planned):
            return {"plan": problems}
        if fault is not None and fault.model is not None and not set(self.gates) - {*LIGHT_GATES}:
            raise NotApplicable
        found = judge_witness(planned) if "witness" in self.gates else {}
        if not set(self.gates) - {*LIGHT_GATES}:
            return found
        base = self.bench.plan(self.bench.base_request(cell, sound))
        baseline = self.bench.baseline(cell, sound)
        planned = replace(planned, request=replace(planned.request, witness="off"))
        try:
            pipeline = build_pipeline(planned)
        except QuantmatrixError as error:
            return found | {"load": str(error)}
        if (
            fault is not None
            and fault.model is not None
            and not fault.model(pipeline, planned, base)
        ):
            raise NotApplicable
        differences = [
            f"{module}: {why}"
            for name, part in planned.components.items()
            for module, why in find_differences(part, getattr(pipeline, name)).items()
        ]
        if differences:
            found["load"] = "; ".join(differences)
        if problems_of_weights := judge_weights(planned, base):
            found["weights"] = "; ".join(problems_of_weights)
        with watch_layers(pipeline, planned, base) as errors:
            run = generate(request, plan=planned, pipeline=pipeline)
        return found | self.judge_run(cell, planned, baseline, run, errors)

    def judge_run(
        self, cell: Cell, planned: Plan, baseline: Run, run: Run, errors: LayerErrors
    ) -> dict[str, str]:
        """What the gates that look at a run say."""
        kind = limit_classes.name_run(planned.components.values())
        allowed = self.limits.find(kind, cell.model, cell.hardware)
        found = {}
        if why := media.find_degeneration(media.stack_frames(run.media)):
            found["generate"] = why
        steps = latents.compare_trajectories(baseline.latents, run.latents)
        if problems := latents.judge(steps, allowed):
            found["latents"] = "; ".join(problems)
        wrong = [
            f"{name}.{layer}: relative error {error:.4g}, the limit is {allowed.layer_error:.4g}"
            for name, layers in errors.found.items()
            for layer, error in layers.items()
            if not error <= allowed.layer_error
        ]
        if wrong:
            found["layers"] = "; ".join(wrong)
        return found


class NotApplicable(Exception):
    """A model fault found nothing that it could change."""


def judge_witness(planned: Plan) -> dict[str, str]:
    """What `--witness require` refuses in the components of a plan; a warning catches nothing."""
    reports = verdict.examine_plan(
        replace(planned, request=replace(planned.request, witness="require"))
    )
    problems = [text for report in reports for text in report.problems]
    return {"witness": "; ".join(problems)} if problems else {}


def judge_plan(row: CheckpointRow, planned: Plan) -> str:
    """How a plan differs from what the row claims; empty when it does not."""
    quantized = {name: part for name, part in planned.components.items() if part.layers}
    if set(quantized) != set(row.components):
        return f"quantized components are {sorted(quantized)}, the row has {row.components}"
    sets = models.load(row.model).FALLBACKS
    for name, part in quantized.items():
        if part.family != row.family:
            return f"{name} was taken for {part.family}"
        kept = [
            layer
            for layer in part.layers
            if any(re.fullmatch(p, layer) for name in row.kept.split() for p in sets[name])
        ]
        if kept:
            return f"quantized, although the row keeps {row.kept}: {', '.join(kept[:4])}"
    return ""


def link_all(source: Path, target: Path, without: str = "") -> None:
    """Share every file of a folder with another; folders are made, or linked beside `without`."""
    for path in source.iterdir():
        if path.name == without or path.name.startswith("."):
            continue
        if path.is_dir() and not without:
            (target / path.name).mkdir()
            link_all(path, target / path.name)
        elif path.is_dir():
            (target / path.name).symlink_to(path.resolve(), target_is_directory=True)
        else:
            share_file(path, target / path.name)


def rewrite(
    row: CheckpointRow, fault: Fault, base: Path, folder: Path, content: Path, repository: str
) -> str | None:
    """Write the row's checkpoint again, as a fault of files has it."""
    import shutil

    assert fault.files is not None
    empty = folder / "base"
    empty.mkdir()
    changed = fault.files(row, base, empty)
    if changed is None:
        return None
    shutil.rmtree(content)
    content.mkdir()
    inner = row.reference.removeprefix(repository).strip("/")
    with tiny.one_thread(), fault.exporting():
        write_checkpoint(changed[0], inner, content, changed[1])
    return "files"


def change_layer(planned: Plan, fault: Fault, content: Path, snapshot: Path) -> str | None:
    """Change the middle one of the layers that a fault of tensors can happen to."""
    assert fault.tensors is not None
    name, part = next((n, p) for n, p in planned.components.items() if p.layers)
    by_file = {file: read_file(part.checkpoint, file) for file in part.checkpoint.files}
    possible = []
    for layer in dict.fromkeys(piece.layer for piece in part.pieces()):
        file = next(f for f, ts in by_file.items() if any(n.startswith(f"{layer}.") for n in ts))
        prefix = f"{layer}."
        own = {n.removeprefix(prefix): t for n, t in by_file[file].items() if n.startswith(prefix)}
        changed = fault.tensors(own)
        if changed is not None and is_other(own, changed):
            possible.append((file, layer, changed))
    if not possible:
        return None
    file, layer, changed = possible[len(possible) // 2]
    rest = {n: t for n, t in by_file[file].items() if not n.startswith(f"{layer}.")}
    rest |= {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in changed.items()}
    target = content / Path(file).relative_to(snapshot.resolve() if Path(file).is_relative_to(
        snapshot.resolve()) else snapshot)  # fmt: skip
    target.unlink()
    write_like(part.checkpoint, file, rest, target)
    return f"{name}.{layer}"


def read_file(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """Tensors of one file of a checkpoint as they are stored, by their names there."""
    from quantmatrix.checkpoints.reader import TensorReader

    with TensorReader(checkpoint, "cpu") as reader:
        own = [header for header in checkpoint.tensors.values() if header.file == file]
        return {header.on_disk: reader.read(header.name) for header in own}


def write_like(checkpoint: Checkpoint, file: str, tensors: dict[str, Any], target: Path) -> None:
    """Tensors as a file of the form, and with the metadata, of one of a checkpoint's."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from quantmatrix.checkpoints import gguf, gguf_writer
    from quantmatrix.scheme import BLOCKS

    if gguf.is_gguf(file):
        headers = checkpoint.tensors.values()
        blocks = {header.on_disk: header.dtype for header in headers if header.dtype in BLOCKS}
        texts = {"general.architecture": checkpoint.metadata["general.architecture"]}
        gguf_writer.write_file(target, tensors, blocks, texts)
        return
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    save_file(tensors, target, metadata=metadata)


def is_other(own: dict[str, Any], changed: dict[str, Any]) -> bool:
    """Whether any bit is different."""
    import torch

    def raw(tensor: Any) -> Any:
        return tensor.contiguous().flatten().view(torch.uint8)

    return set(own) != set(changed) or any(
        not torch.equal(raw(own[name]), raw(changed[name])) for name in own
    )


def choose_gates(names: Sequence[str]) -> tuple[str, ...]:
    """The gates to ask: all, or `plan` and `witness`, which need no model.

    Raises UsageError for any other.
    """
    if not names:
        return GATES
    if unknown := [name for name in names if name not in LIGHT_GATES]:
        raise UsageError(
            f"--gates {unknown[0]}: expected {' '.join(LIGHT_GATES)}, which need no model; the "
            "others come together, when the flag is left out"
        )
    return LIGHT_GATES


def choose_faults(names: Sequence[str]) -> list[Fault]:
    """Faults by name, all when none is named; raises UsageError for an unknown one."""
    known = {fault.name: fault for fault in FAULTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--faults {unknown[0]}: no such fault; known: {', '.join(known)}")
    return [known[name] for name in names] or list(FAULTS)
