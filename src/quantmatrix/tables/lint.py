"""Lint: how the tables are read, and what they must not say.

A problem reads `matrix/cases.csv:17: claim: "suported" is not one of validated, expected, ...`.
Reading goes on after a problem, so that one run names them all. What needs more than the standard
library (does the family know the scheme, does a kernel have the rule) is left to the tests.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.tables.lint_flags import list_flag_problems
from quantmatrix.tables.rows import (
    AUTO,
    CHECKS,
    CLAIMS,
    EVERYWHERE,
    KINDS,
    OWN,
    PLAIN_BACKENDS,
    SAYS,
    SELECTORS,
    VENDORS,
    CheckpointRow,
    FamilyRow,
    HardwareRow,
    Matrix,
    ModelRow,
    RuntimeRow,
    StatementRow,
)
from quantmatrix.tables.table import ID

if TYPE_CHECKING:
    from quantmatrix.tables.table import CaseRow, Table


REVISION = re.compile(r"([0-9a-f]{40})?")
ARCHITECTURES = {
    "cpu": r"cpu|mps",
    "nvidia": r"sm[0-9]{2,3}[a-z]?(-[a-z0-9]+)*",
    "amd": r"gfx[0-9a-f]+",
    "ascend": r"[0-9]+[a-z]?",
}
"""How a probe of each vendor's devices names them (see `quantmatrix.hardware.probe`)."""
PACKAGE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_ID = re.compile(r'^ID = "([a-z0-9-]+)"$', re.MULTILINE)
"""The line in which a module of a family or a model names itself."""
DAY = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]")
RESERVED = (EVERYWHERE, AUTO)
"""Names that stand for hardware wherever it is asked for, so that nothing else may be called so."""


def check_families(table: Table[FamilyRow], tables: Matrix, *, whole: bool = False) -> None:
    """Ids are those of the modules in families/, models are known."""
    check_modules(table, "families", whole=whole)
    for line, row in table.rows:
        table.check(line, "models", row.models, tables.models)


def check_models(table: Table[ModelRow], *, whole: bool = False) -> None:
    """Ids are those of the modules in models/ and models/further/, each of another repository."""
    further = tuple(list_modules(Path(__file__).parents[1] / "models/further"))
    check_modules(table, "models", besides=further, whole=whole)
    repos: dict[str, int] = {}
    for line, row in table.rows:
        check_reference(table, line, "repo", row.repo)
        if (first := repos.setdefault(row.repo, line)) != line:
            table.note(line, f"repo: {row.repo} is the repo of line {first}, too")
        table.check(line, "transformers", row.transformers, row.transformers)


def check_reference(table: Table[Any], line: int, column: str, text: str) -> None:
    """A hub id or path is one argument, and none that a command would take for a flag."""
    if text.startswith("-") or len(text.split()) > 1:
        table.note(line, f'{column}: "{text}" is neither a hub id nor a path')


def check_modules(
    table: Table[Any], *packages: str, besides: tuple[str, ...] = (), whole: bool
) -> None:
    """Every row has its module `quantmatrix/<package>/<id>`; with `whole` every module has its row."""
    modules: dict[str, str] = {}
    for package in packages:
        modules |= list_modules(Path(__file__).parents[1] / package)
    for line, row in table.rows:
        table.check(line, "id", [row.id], [*modules, *besides])
    listed = {row.id for _, row in table.rows}
    for name, module in modules.items():
        if whole and name not in listed:
            table.problems.append(f"{table.name}: no row for {name}, the module {module}")


@lru_cache(maxsize=8)
def list_modules(folder: Path) -> dict[str, str]:
    """File or folder of every module in a package that names itself with an `ID`, by that id.

    The texts are read, never imported: what lints the tables does not lean on what they describe.
    """
    found = {}
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        if named := OWN_ID.search(path.read_text(encoding="utf-8")):
            module = path.parent if path.name == "__init__.py" else path
            found[named[1]] = f"{folder.name}/{module.name}"
    return found


def check_hardware(table: Table[HardwareRow]) -> None:
    """Vendors are known and have such devices, and no group is named like a hardware."""
    ids = {row.id for _, row in table.rows}
    for line, row in table.rows:
        if table.check(line, "vendor", [row.vendor], VENDORS):
            form = ARCHITECTURES[row.vendor]
            if row.arch and not re.fullmatch(form, row.arch):
                table.note(line, f'arch: "{row.arch}" is none of {row.vendor}, expected {form}')
        for name in sorted(ids.intersection(row.group)):
            table.note(line, f'group: "{name}" is the id of a hardware')
        for name in (row.id, *row.group):
            if name in RESERVED:
                table.note(line, f'"{name}" already stands for other hardware; choose another name')
        table.check(line, "group", row.group, row.group)
        table.check(line, "packages", row.packages, row.packages)
        for column, shape in (("group", ID), ("packages", PACKAGE)):
            for name in getattr(row, column):
                if not shape.fullmatch(name):
                    table.note(line, f'{column}: "{name}" is not a valid name')


def check_checkpoints(table: Table[CheckpointRow], tables: Matrix) -> None:
    """Foreign keys, a flag that can name the form, and one content per reference."""
    contents: dict[str, tuple[int, tuple[Any, ...]]] = {}
    for line, row in table.rows:
        table.check(line, "family", [row.family], tables.families)
        if table.check(line, "model", [row.model], tables.models):
            known = tables.models[row.model].transformers
            table.check(line, "components", row.components, known)
        if table.check(line, "form", [row.form], SELECTORS):
            table.check(line, f"selector of a {row.form}", [row.selector], SELECTORS[row.form])
        if not REVISION.fullmatch(row.revision):
            table.note(line, f'revision: "{row.revision}" is not a commit of 40 digits')
        for column in ("reference", "base"):
            check_reference(table, line, column, getattr(row, column))
        if row.form == "online":
            continue
        if row.reference and row.reference == row.base:
            table.note(line, f"reference: {row.reference} is its own base, the full precision")
        content = (row.family, row.model, row.form, row.scheme, row.kept, row.components)
        first, expected = contents.setdefault(row.reference, (line, content))
        if content != expected:
            table.note(line, f"reference: {row.reference} has another content in line {first}")


def check_runtimes(table: Table[RuntimeRow], tables: Matrix, *, whole: bool) -> None:
    """Ids are those of the adapters in peers/, ours aside; kinds and hardware are known."""
    check_modules(table, "peers", besides=(OWN,), whole=whole)
    for line, row in table.rows:
        table.check(line, "kind", [row.kind], KINDS)
        if (row.kind == "own") != (row.id == OWN):
            table.note(line, f'kind: "{row.kind}", but only {OWN} is our own, and it always is')
        table.check(line, "hardware", row.hardware, [*tables.hardware, *tables.groups])
        listed = [p for w in row.hardware for p in tables.groups.get(w, (w,))]
        for name in {p for p in listed if listed.count(p) > 1}:
            table.note(line, f"hardware: {name} is named twice, once by a group")
        for column in ("found", "home"):
            if row.id != OWN and not getattr(row, column):
                table.note(line, f"{column}: blank")


def check_statements(table: Table[StatementRow], tables: Matrix) -> None:
    """Known runtimes, families, models and forms; a day, so that its age is known."""
    for line, row in table.rows:
        table.check(line, "runtime", [row.runtime], tables.runtimes)
        table.check(line, "family", [row.family], tables.families)
        table.check(line, "models", row.models, tables.models)
        table.check(line, "forms", row.forms, SELECTORS)
        table.check(line, "says", [row.says], SAYS)
        if not DAY.fullmatch(row.date):
            table.note(line, f'date: "{row.date}" is not a day, year-month-day')


def list_checks(checks: tuple[str, ...], backend: str) -> tuple[str, ...]:
    """The checks of a row that its cell of a backend has."""
    return tuple(c for c in checks if c != "compile" or backend not in PLAIN_BACKENDS)


def check_case(table: Table[CaseRow], line: int, row: CaseRow, tables: Matrix) -> None:
    """What one line of cases.csv must say, whatever the other lines say."""
    if table.check(line, "checkpoint", [row.checkpoint], tables.checkpoints):
        checkpoint = tables.checkpoints[row.checkpoint]
        for column in ("family", "model"):
            found, expected = getattr(row, column), getattr(checkpoint, column)
            if found and found != expected:
                table.note(line, f"{column}: {found}, but {row.checkpoint} is of {expected}")
        for why in list_flag_problems(row.flags, checkpoint):
            table.note(line, f"flags: {why}")
    for name in row.backend:
        if not ID.fullmatch(name) or row.backend.count(name) > 1:
            table.note(line, f'backend: "{name}" is not a valid name, or is repeated')
    table.check(line, "checks", row.checks, CHECKS)
    if table.check(line, "claim", [row.claim], CLAIMS):
        check_claim(table, line, row, tables)


def check_claim(table: Table[CaseRow], line: int, row: CaseRow, tables: Matrix) -> None:
    """A reason wherever something is refused, and only there; the guide behind `validated`."""
    if row.claim == "refused":
        if not row.rule or not row.notes:
            table.note(line, "a refused row needs a rule, and the reason in notes")
        elif not ID.fullmatch(row.rule):
            table.note(line, f'rule: "{row.rule}" is not made of a-z, 0-9, dot, dash, underscore')
        if row.checks != ("refuse",):
            table.note(line, f"checks: a refused row has the check refuse, not {row.checks}")
        return
    if row.claim == "failing":
        if row.rule not in row.checks or not row.notes:
            table.note(line, "a failing row needs one of its checks as rule, the reason in notes")
    elif row.rule:
        table.note(line, f"rule: {row.rule}, but the row is not refused")
    if "refuse" in row.checks:
        table.note(line, "checks: refuse, but the row is not refused")
    if row.claim == "planned" and not row.notes:
        table.note(line, "notes: blank; a planned row says what is missing")
    family = tables.families.get(row.family)
    if row.claim == "validated" and family and row.model not in family.models:
        table.note(
            line,
            f"claim: the guide does not name {row.model} for {row.family}, whose models are "
            f"{', '.join(family.models)}; say expected",
        )


def check_sharing(table: Table[CaseRow], line: int, row: CaseRow, hardware: HardwareRow) -> None:
    """`--nproc-per-node` is the number of devices of the hardware; processes of a CPU share it."""
    text = " ".join(row.flags).replace("_", "-").replace("=", " ")
    found = re.search(r"--nproc-per-node (\S+)", text)
    given = found[1] if found else "1"
    if hardware.vendor != "cpu" and given != str(hardware.devices):
        table.note(
            line,
            f"flags: --nproc-per-node {given}, but {hardware.id} has devices: {hardware.devices}",
        )


def check_twin(
    table: Table[CaseRow],
    line: int,
    row: CaseRow,
    hardware: str,
    backend: str,
    seen: dict[tuple[Any, ...], int],
) -> None:
    """No cell stands in two lines; where a row without flags is refused, nothing is claimed."""
    key = (row.checkpoint, hardware, backend)
    text = " ".join(filter(None, key))
    first = seen.setdefault((*key, row.flags), line)
    if first != line:
        table.note(line, f"{text}: the same cell as in line {first}")
        return
    refused = row.claim == "refused"
    if refused and row.flags:
        return
    seen.setdefault((*key, refused), line)
    if other := seen.get((*key, not refused)):
        table.note(line, f"{text}: line {other} claims the opposite")
