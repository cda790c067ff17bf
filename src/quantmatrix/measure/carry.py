"""Carry: shows that a change of the shared code computes nothing else, by running twins twice.

The `cpu` twin of a record (same checkpoint, flags and seed) is run by the code of a revision and by the
code here, one after the other on this machine, each with the files that it writes itself:

| record      | twin | compared |
| ----------- | ---- | -------- |
| `stand-in`  | the cell's command on a CPU | latents, weights of the stand-in |
| `true size` | the true-size check of the row on a CPU, at the stand-ins' width, as | latents of BF16 and |
|             | deep as the stand-ins | of the quantized form, layer errors, weights of the checkpoint |

Where every twin of a pair of shared digests gives the same to the last bit, the pair goes to
`carried.csv`. A single twin that differs, or that one side cannot run, and the pair is left out: its
records are stale. Records of other scopes have no twin. The revision may have its modules elsewhere.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantmatrix.errors import QuantmatrixError
from quantmatrix.files import write_whole
from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.carried import CARRIED, Carried, Pair
from quantmatrix.proof.code_digest import Code, own_code
from quantmatrix.proof.freshness import describe
from quantmatrix.proof.revisions import SOURCES, extract, find_commit
from quantmatrix.proof.scopes import STAND_IN, TRUE_SIZE, find_records, make_key

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

RUNNER = """
import hashlib, importlib, json, sys, tempfile, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch

def get(name, *modules):
    for module in modules:
        try:
            found = importlib.import_module(f"quantmatrix.{module}")
            if hasattr(found, name):
                return getattr(found, name)
        except ModuleNotFoundError as error:
            if not f"quantmatrix.{module}.".startswith(f"{error.name}."):
                raise
    raise ImportError(f"{name}: none of quantmatrix.{', '.join(modules)} is there")

def run_stand_in(request):
    run = get("generate", "api", "runtime.generate", "run")(request)
    files = [f for part in run.plan.components.values() for f in part.checkpoint.files]
    return {"latents": digest_latents(run.latents), "files": describe_files(files)["digest"]}

def run_true_size(request, row):
    narrow = {name: dict(get("load", "models")(name).TINY) for name in get("IDS", "models")}
    for name, options in narrow.items():
        get("load", "models")(name).FULL = options
    try:
        get("FULL_OPTIONS", "runtime.empty_model", "synthetic").update(narrow)
    except ImportError:
        pass
    tables = get("read", "tables.read", "matrix")()
    measure = get("measure", "measure.true_size", "true_size")
    with tempfile.TemporaryDirectory() as folder:
        run = measure(tables.checkpoints[row], request, tables, Path(folder), deep=True)
        files = [f for part in run.plan.components.values() for f in part.checkpoint.files]
        errors = json.dumps(run.errors.found, sort_keys=True).encode()
        return {
            "latents": digest_latents([*run.bf16.latents, *run.quantized.latents]),
            "files": describe_files(files)["digest"],
            "errors": hashlib.sha256(errors).hexdigest(),
        }

digest_latents = get("digest_latents", "measure.latents", "compare")
describe_files = get("describe_files", "proof.record", "evidence")
Request = get("Request", "request")
torch.set_num_threads(1)
warnings.simplefilter("ignore")
for line in sys.stdin:
    words, row = json.loads(line)
    try:
        request = Request.from_words(words, device="cpu")
        told = run_true_size(request, row) if row else run_stand_in(request)
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(told), flush=True)
"""
"""Runs twins, a line each, by whichever package stands on the path, and prints a line each; names are
looked for in today's module, then in the one that earlier revisions have them in."""
ACCELERATOR = {"--cuda-graph": 1, "--compile": 1, "--nproc-per-node": 2, "--shard-weights": 1}
"""Flags that a twin leaves out, and how many arguments each takes."""
NAMES = {"latents": "latents", "weights of the checkpoint": "files", "layer errors": "errors"}
SCOPES = (STAND_IN, TRUE_SIZE)
"""Of records that have a twin on a CPU."""
SOURCES_ROOT = "src"
Say = Callable[[str], object]


class Twin(NamedTuple):
    """What is run instead of a record's cell."""

    argv: tuple[str, ...]
    """Of the command, from the flags on."""
    row: str = ""
    """Of the checkpoint that is measured as of true size; empty for a stand-in."""

    def name(self) -> str:
        """The command of a stand-in; of another one its row and arguments."""
        argv = shlex.join(self.argv)
        return f"true size of {self.row}: {argv}" if self.row else f"quantmatrix generate {argv}"


@dataclass(frozen=True)
class Candidates:
    """Records whose shared digest the code here has no more, by their pair of digests."""

    twins: Mapping[tuple[str, str], tuple[Twin, ...]]
    cells: Mapping[tuple[str, str], tuple[str, ...]]
    foreign: tuple[str, ...]
    """Keys of records of neither code."""

    def list_twins(self) -> list[Twin]:
        """The twins of all pairs, each once."""
        return list(dict.fromkeys(twin for own in self.twins.values() for twin in own))


@dataclass(frozen=True)
class Outcome:
    """What running the twins of the pairs showed."""

    pairs: tuple[Pair, ...]
    cells: tuple[str, ...]
    """Keys of the records that the pairs carry."""
    differing: Mapping[str, str]
    """By the twin's name: why its pairs are left out."""
    foreign: tuple[str, ...]


def list_candidates(
    tables: Matrix,
    evidence: Mapping[str, Evidence],
    before: Code,
    after: Code,
    carried: Carried,
) -> Candidates:
    """Which pairs would carry records of the code before to the code here, and their twins.

    Records of stand-ins and of true size; refusals are left out, for any machine plans them again.
    """
    twins: dict[tuple[str, str], dict[Twin, None]] = {}
    keys: dict[tuple[str, str], list[str]] = {}
    foreign = []
    for cell, scope, record in list_records(tables, evidence):
        then, key = record.cell.get("shared_digest"), make_key(cell.id, scope)
        row = tables.hardware[cell.hardware]
        old, new = (describe(record, row, code)["shared_digest"] for code in (before, after))
        if then is None or then == new or carried.find_way(then, new):
            continue
        if then != old and not carried.find_way(then, old):
            foreign.append(key)
            continue
        twins.setdefault((old, new), {})[name_twin(cell, tables, scope)] = None
        keys.setdefault((old, new), []).append(key)
    return Candidates(
        {pair: tuple(found) for pair, found in twins.items()},
        {pair: tuple(found) for pair, found in keys.items()},
        tuple(foreign),
    )


def list_records(
    tables: Matrix, evidence: Mapping[str, Evidence]
) -> Iterator[tuple[Cell, str, Evidence]]:
    """(cell, scope, record) of what has a twin on a CPU."""
    for cell in tables.cells:
        if cell.claim not in ("refused", "planned"):
            for scope, record in find_records(evidence, cell.id).items():
                if scope in SCOPES:
                    yield cell, scope, record


def name_twin(cell: Cell, tables: Matrix, scope: str) -> Twin:
    """A cell's twin; a stand-in of a CPU is its own."""
    argv = [*cell.command(tables)[2:], "--tiny"]
    kept: list[str] = []
    while argv:
        argument = argv.pop(0)
        count = ACCELERATOR.get(argument, 0)
        if argument == "--backend" and tables.hardware[cell.hardware].vendor != "cpu":
            count = 2
        if count:
            del argv[: count - 1]
        else:
            kept.append(argument)
    return Twin(tuple(kept), cell.checkpoint if scope == TRUE_SIZE else "")


def run_twins(sources: Path, twins: Sequence[Twin], say: Say) -> list[dict[str, str]]:
    """What each twin gives by the package below a folder of sources, in a process of its own.

    Raises QuantmatrixError where that process ends before the last twin.
    """
    argv = [sys.executable, "-c", RUNNER, str(sources)]
    found: list[dict[str, str]] = []
    with tempfile.TemporaryFile("w+") as given:
        given.writelines(f"{json.dumps(twin)}\n" for twin in twins)
        given.seek(0)
        with subprocess.Popen(argv, stdin=given, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found.append(json.loads(line))
                say(f"{len(found)} of {len(twins)} twins by {sources}")
    if len(found) != len(twins):
        raise QuantmatrixError(
            f"{sources}: the process that runs the twins ended with {process.returncode} after "
            f"{len(found)} of {len(twins)}; its message stands above"
        )
    return found


def explain_difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Why two runs of a twin are not the same, as text; empty where they are."""
    for side, result in (("before", old), ("after", new)):
        if "error" in result:
            return f"{side}: {result['error'].partition(chr(10))[0]}"
    changed = [name for name, key in NAMES.items() if old.get(key) != new.get(key)]
    return f"other {' and other '.join(changed)}" if changed else ""


def judge(
    found: Candidates, old: Sequence[Mapping[str, str]], new: Sequence[Mapping[str, str]]
) -> Outcome:
    """The pairs of which every twin gave the same before and after.

    `old` and `new` are what the twins of `found.list_twins()` gave, in that order.
    """
    twins = found.list_twins()
    gave = dict(zip(twins, new, strict=True))
    differing = {
        twin: why
        for twin, one, other in zip(twins, old, new, strict=True)
        if (why := explain_difference(one, other))
    }
    commit, machine = records.find_commit() or "unknown", name_machine()
    pairs, cells = [], list[str]()
    for pair, own in found.twins.items():
        if differing.keys().isdisjoint(own):
            latents = records.digest_json(
                [[*twin.argv, twin.row, gave[twin]["latents"]] for twin in sorted(own)]
            )
            pairs.append(Pair(*pair, commit, machine, latents, str(len(own))))
            cells += found.cells[pair]
    reasons = {twin.name(): why for twin, why in differing.items()}
    return Outcome(tuple(pairs), tuple(cells), reasons, found.foreign)


def name_machine() -> str:
    """Processor and system of this machine."""
    from quantmatrix.hardware import probe

    facts = probe.fingerprint()
    return f"{facts['processor']}, {facts['system']}"


def carry(revision: str, reports: Path, say: Say) -> Outcome:
    """Run twins by a revision's code and by the code here, and write the pairs that compute nothing
    else to the carried.csv of a reports folder. UsageError for a revision without code.
    """
    from quantmatrix.tables import read

    package = Path(__file__).parents[1]
    root = package.parents[1]
    tables, evidence = read.read(), store.read_folder(reports / "evidence")
    known = Carried.read(reports / CARRIED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract(find_commit(revision, root), root, folder)
        before = Code(folder / SOURCES)
        found = list_candidates(tables, evidence, before, own_code(), known)
        twins = found.list_twins()
        old, new = (
            run_twins(sources, twins, say) if twins else []
            for sources in (folder / SOURCES_ROOT, package.parent)
        )
    outcome = judge(found, old, new)
    if outcome.pairs:
        write_whole(reports / CARRIED, known.add(outcome.pairs).encode())
    return outcome
