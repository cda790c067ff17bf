"""The matrix: seven tables written by people, read into typed rows, every problem named at once.

| table             | one line is |
| ----------------- | ----------- |
| `families.csv`    | a quant family, as the quantization guide describes it |
| `models.csv`      | a base model and its transformer components |
| `hardware.csv`    | a machine: vendor, architecture, memory, devices, groups, packages there |
| `checkpoints.csv` | a quantized checkpoint: how a user names it, and what is in it |
| `cases.csv`       | a claim: this checkpoint, there, with these flags, passes these checks |
| `runtimes.csv`    | a program that loads such checkpoints, `quantmatrix` among them |
| `statements.csv`  | what a runtime's documentation says of a family's checkpoints, with its source |

A line of cases.csv names any number of hardware ids, groups (`hopper`, or `all`) and backends, and
stands for one `Cell` for each of them: `<row>@<hardware>`, with `+<backend>` where the row names
more than one. A blank backend is the one that the hardware runs by default. A checkpoint, a hardware
and another runtime than ours make a `RuntimeCell`, `<checkpoint>@<hardware>~<runtime>`, which
nobody claims: a run of that runtime fills it (see `quantmatrix.peers`). Claims:

| claim       | meaning |
| ----------- | ------- |
| `validated` | the quantization guide says that it works |
| `expected`  | we say so, besides the guide |
| `refused`   | it must end in the refusal `rule`; `notes` tell why |
| `failing`   | it is known not to work: the check that `rule` names fails; `notes` tell why |
| `planned`   | nobody says so yet; `notes` tell what is missing |

Nothing here writes into the tables. Only the standard library is needed, so that commands and test
collection stay quick.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from quantmatrix.errors import QuantmatrixError

CLAIMS = ("validated", "expected", "refused", "failing", "planned")
CHECKS = ("load", "latents", "generate", "refuse", "bench", "trace", "true-size", "compile")
ON_REQUEST = ("true-size",)
"""Checks that run only where `--check` names them: they take a GPU's seconds, or a CPU's minute."""
PLAIN_BACKENDS = ("reference", "decode", "merged")
"""Backends made of torch alone: they start no kernel of ours, so their cells have no check `compile`."""
VENDORS = ("cpu", "nvidia", "amd", "ascend")
SELECTORS: Mapping[str, tuple[str, ...]] = {
    "component-folder": ("--transformer-path", "--transformer-weights-path"),
    "single-file": ("--transformer-weights-path",),
    "sharded": ("--transformer-path", "--transformer-weights-path"),
    "raw": ("--transformer-weights-path", "--model-path"),
    "comfyui": ("--transformer-weights-path",),
    "scaled-fp8": ("--transformer-weights-path",),
    "fp8r": ("--transformer-weights-path",),
    "e5m2": ("--transformer-weights-path",),
    "mxfp8": ("--transformer-weights-path",),
    "compressed-tensors": ("--transformer-path", "--transformer-weights-path"),
    "gguf-file": ("--transformer-weights-path",),
    "pipeline": ("--model-path", "--transformer-path"),
    "online": ("--quantization",),
}
"""Forms of a checkpoint, each with the flags that may name one."""
EVERYWHERE = "all"
"""The group that every hardware belongs to."""
PROMPT = "a curious pikachu"
"""Prompt of a row that names none, from the guide's first example."""
ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=\S+")
"""An environment variable at the start of a row's flags."""


class MatrixError(QuantmatrixError, ValueError):
    """Tables that cannot be used; the message has one line per problem, with file and line."""

    def __init__(self, problems: Collection[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class FamilyRow:
    """A quant family, as the guide describes it."""

    id: str
    """Name of a family that the package has, such as `modelopt-fp8`."""
    checkpoint_form: str
    """What its checkpoints look like, as text (Markdown)."""
    canonical_cli: str
    """The flag that names one, as text (Markdown)."""
    supported_models: str
    """The models, as text."""
    extra_dependency: str
    """Packages that it needs, as text; `None` for none."""
    notes: str
    """What else the page says of it (Markdown)."""
    models: tuple[str, ...]
    """Ids of the models that the guide names for the family."""


@dataclass(frozen=True)
class ModelRow:
    """A base model."""

    id: str
    """Name of a model that the package has, such as `flux-1`."""
    name: str
    """What people call it."""
    repo: str
    """Hub id of its pipeline in full precision."""
    transformers: tuple[str, ...]
    """Its transformer components, primary first."""
    notes: str
    """What it makes."""


@dataclass(frozen=True)
class HardwareRow:
    """A machine that claims are made about."""

    id: str
    """Name that rows and `--hardware` say."""
    name: str
    """What people call it."""
    vendor: str
    """Who makes it; decides how it is probed."""
    arch: str
    """Architecture as a probe names it: `sm90`, `gfx942`, `cpu`."""
    memory_gib: float
    """Memory of one device in GiB; 0 where the row does not limit it."""
    devices: int
    """Devices that work together on each generation."""
    group: tuple[str, ...]
    """Groups that it belongs to; a row may name a group instead of each hardware."""
    packages: tuple[str, ...]
    """Import names of optional packages that are assumed there."""
    job: str
    """Name of the CI job that tests it."""
    label: str
    """Label of the runner of that job."""

    @property
    def wanted(self) -> str:
        """What its job wants, as text."""
        return f"one {self.name}" if self.devices == 1 else self.name


@dataclass(frozen=True)
class CheckpointRow:
    """A quantized checkpoint."""

    id: str
    """Name that rows of cases.csv say."""
    family: str
    """A row of families.csv."""
    model: str
    """A row of models.csv."""
    form: str
    """What it is on disk."""
    selector: str
    """The flag that names it."""
    reference: str
    """What the user passes with that flag."""
    base: str
    """The same model in full precision."""
    revision: str
    """Commit of the repository, 40 hexadecimal digits."""
    scheme: str
    """How its layers are stored, as a name in the family's SCHEMES."""
    kept: str
    """Name of the set of layers left in full precision, in the model's FALLBACKS."""
    components: tuple[str, ...]
    """Transformer components that are quantized."""
    algo: str
    """Label of the algorithm in the table of checkpoints; a blank one leaves the row out of that table."""
    cli: str
    """The preferred flag, as that table says it."""
    scope: str
    """What was validated, as text (Markdown)."""
    notes: str
    """What else there is to say (Markdown)."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The flags that name base model and checkpoint."""
        if self.selector == "--model-path":
            return ("--model-path", self.reference)
        return ("--model-path", self.base, self.selector, self.reference)

    @property
    def repositories(self) -> tuple[str, ...]:
        """The hub ids and paths that a run of it reads."""
        return (self.base,) if self.form == "online" else (self.base, self.reference)


@dataclass(frozen=True)
class Cell:
    """One claim about one checkpoint on one hardware with one backend."""

    id: str
    row: str
    checkpoint: str
    family: str
    model: str
    hardware: str
    backend: str
    """Empty: whatever the hardware runs by default."""
    flags: tuple[str, ...]
    checks: tuple[str, ...]
    claim: str
    rule: str
    notes: str
    line: int
    """Line of cases.csv."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the row, written as `NAME=value` at the start of its flags."""
        pairs = (flag.partition("=") for flag in self.flags if ASSIGNMENT.fullmatch(flag))
        return {name: value for name, _, value in pairs}

    def command(self, matrix: Matrix) -> list[str]:
        """The command that the cell stands for, `environment` left out."""
        flags = [flag for flag in self.flags if not ASSIGNMENT.fullmatch(flag)]
        backend = ["--backend", self.backend] if self.backend else []
        prompt = [] if "--prompt" in flags else ["--prompt", PROMPT]
        argv = matrix.checkpoints[self.checkpoint].arguments
        return ["quantmatrix", "generate", *argv, *flags, *backend, *prompt]

    def shell(self, matrix: Matrix) -> str:
        """The command quoted for a shell on one line, `environment` included."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command(matrix))])


OWN = "quantmatrix"
"""The runtime that the cells of cases.csv are of."""
KINDS = ("own", "library", "program", "server")
"""What a runtime is: ours, a Python package, a command, or something that listens."""
SAYS = ("works", "refuses")
"""What a statement may say."""


@dataclass(frozen=True)
class RuntimeRow:
    """A program that loads quantized checkpoints; its adapter is `quantmatrix/peers/<id>.py`."""

    id: str
    name: str
    kind: str
    found: str
    """How it is found: the package, command or environment variable that the adapter looks for."""
    minimum: str
    """The oldest version that the adapter knows; blank for any."""
    hardware: tuple[str, ...]
    """Ids and groups of the hardware that it runs on."""
    home: str
    """Where it says itself what it supports."""
    notes: str


@dataclass(frozen=True)
class StatementRow:
    """What somebody else's documentation says of a runtime; never a claim of ours."""

    id: str
    runtime: str
    family: str
    models: tuple[str, ...]
    """Ids of the models that it speaks of; none: all of the family."""
    forms: tuple[str, ...]
    """Forms of a checkpoint that it speaks of; none: all."""
    says: str
    version: str
    date: str
    source: str
    """Address or path of the page."""
    quote: str
    """Its words, shortened."""

    def speaks_of(self, row: CheckpointRow) -> bool:
        """Whether it says something of a checkpoint."""
        fits = row.model in (self.models or (row.model,)) and row.form in (
            self.forms or (row.form,)
        )
        return row.family == self.family and fits


@dataclass(frozen=True)
class RuntimeCell:
    """One checkpoint on one hardware in one other runtime."""

    checkpoint: str
    hardware: str
    runtime: str

    @property
    def id(self) -> str:
        """`<checkpoint>@<hardware>~<runtime>`."""
        return f"{self.checkpoint}@{self.hardware}~{self.runtime}"


@dataclass(frozen=True)
class Matrix:
    """The tables; each row lies under its id, in the order of the file."""

    families: Mapping[str, FamilyRow]
    models: Mapping[str, ModelRow]
    hardware: Mapping[str, HardwareRow]
    checkpoints: Mapping[str, CheckpointRow]
    cells: tuple[Cell, ...]
    runtimes: Mapping[str, RuntimeRow] = field(default_factory=dict)
    statements: Mapping[str, StatementRow] = field(default_factory=dict)

    @property
    def runtime_cells(self) -> Iterator[RuntimeCell]:
        """Every checkpoint in every other runtime, on each hardware that the runtime runs on."""
        groups = self.groups
        for runtime in self.runtimes.values():
            if runtime.id == OWN:
                continue
            for hardware in [h for name in runtime.hardware for h in groups.get(name, (name,))]:
                for checkpoint in self.checkpoints:
                    yield RuntimeCell(checkpoint, hardware, runtime.id)

    def find_statements(self, runtime: str, checkpoint: str) -> list[StatementRow]:
        """What is said of a checkpoint in a runtime."""
        row = self.checkpoints[checkpoint]
        said = self.statements.values()
        return [one for one in said if one.runtime == runtime and one.speaks_of(row)]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Hardware ids of each group."""
        return group_hardware(self.hardware)

    @property
    def repositories(self) -> tuple[str, ...]:
        """Every hub id and path that a cell reads, once; what is only planned is left out."""
        used = {cell.checkpoint for cell in self.cells if cell.claim != "planned"}
        bases = [model.repo for model in self.models.values()]
        named = [n for row in self.checkpoints.values() if row.id in used for n in row.repositories]
        return tuple(dict.fromkeys([*bases, *named]))

    def select(
        self,
        family: Collection[str] = (),
        model: Collection[str] = (),
        hardware: Collection[str] = (),
        claim: Collection[str] = (),
        check: Collection[str] = (),
    ) -> list[Cell]:
        """Cells that match each filter that is not empty; `hardware` takes ids and groups."""
        groups = self.groups
        ids = {row_id for name in hardware for row_id in groups.get(name, (name,))}
        return [
            cell
            for cell in self.cells
            if (not family or cell.family in family)
            and (not model or cell.model in model)
            and (not hardware or cell.hardware in ids)
            and (not claim or cell.claim in claim)
            and (not check or not set(check).isdisjoint(cell.checks))
        ]


def group_hardware(hardware: Mapping[str, HardwareRow]) -> dict[str, tuple[str, ...]]:
    """Hardware ids of each group, `all` included."""
    groups: dict[str, tuple[str, ...]] = {EVERYWHERE: tuple(hardware)}
    for row in hardware.values():
        for name in row.group:
            groups[name] = (*groups.get(name, ()), row.id)
    return groups


@lru_cache(maxsize=4096)
def split_flags(text: str) -> tuple[str, ...]:
    """The arguments of a `flags` cell, quoted as in a shell; ValueError for an open quote."""
    quoted = any(mark in text for mark in "'\"\\")
    return tuple(shlex.split(text) if quoted else text.split())


AUTO = "auto"
"""The name that stands for the row of this machine."""
