"""Recommend: the ranked answer for one hardware and one model, from what `quantmatrix report` rendered.

`reports/answers.json` holds every option with its numbers. It is read where it was rendered from the tables
and records as they lie there, so an answer takes no time; otherwise everything is joined again, which
takes seconds, and that is said. What an installed package carries was rendered when it was built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.proof import packaged, plans
from quantmatrix.proof.reports_folder import find_source
from quantmatrix.report import answers, ranking
from quantmatrix.report.answers import MIB, Answers, No, Option
from quantmatrix.report.ranking import FITS, OFFLOADS

if TYPE_CHECKING:
    import os

    from quantmatrix.tables.rows import HardwareRow, Matrix


@dataclass(frozen=True)
class Recommendation:
    """What to use for one model on one hardware, the best first, and what is no option."""

    hardware: str
    model: str
    memory_gib: float
    """Of the device; 0: no limit."""
    prefer: str
    ranked: tuple[tuple[int, Option], ...]
    """Position in `ranking.FITS`, and the option."""
    refused: tuple[No, ...]

    @property
    def usable(self) -> tuple[tuple[int, Option], ...]:
        """Options that fit, with an offload or without."""
        return tuple(pair for pair in self.ranked if pair[0] < len(FITS) - 1)

    @property
    def reason(self) -> str:
        """Why there is no answer; empty where there is one."""
        if self.usable:
            return ""
        if self.ranked:
            least = min(self.ranked, key=lambda pair: pair[1].layerwise_mib)[1]
            return (
                f"nothing fits into {self.memory_gib:g} GiB: {least.checkpoint} needs the least, "
                f"{least.layerwise_mib / 1024:.1f} GiB with --dit-layerwise-offload"
            )
        if self.refused:
            first = self.refused[0]
            rule = f" [{first.rule}]" if first.rule else ""
            return f"no checkpoint of {self.model} runs on {self.hardware}: {first.checkpoint}{rule}: {first.message}"
        return f"the tables have no checkpoint of {self.model}: see `quantmatrix inspect` for one of yours"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "hardware": self.hardware,
            "model": self.model,
            "memory_gib": self.memory_gib,
            "prefer": self.prefer,
            "reason": self.reason,
            "ranked": [describe(fit, option) for fit, option in self.ranked],
            "refused": [vars(no) for no in self.refused],
        }


def describe(fit: int, option: Option) -> dict[str, Any]:
    """An option as plain data, with its commands as they are to be run."""
    return {
        **vars(option),
        "proof": answers.PROOFS[option.proof],
        "fits": FITS[fit],
        "commands": list(list_commands(fit, option)),
    }


def list_commands(fit: int, option: Option) -> tuple[str, ...]:
    """Commands of an option, the offload that makes it fit included."""
    *first, last = option.commands or ("",)
    added = OFFLOADS[fit] if OFFLOADS[fit].strip() not in last.split() else ""
    return (*first, f"{last}{added}") if last else ()


def recommend(
    found: Answers,
    tables: Matrix,
    hardware: str,
    model: str,
    memory_gib: float | None = None,
    prefer: str = ranking.PREFERENCES[0],
) -> Recommendation:
    """The answer for ids of the tables; without `memory_gib` (GiB of one device) it is that of the row.

    Raises UsageError for memory that is not a positive number, and for an unknown preference.
    """
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise UsageError(f"--memory-gib {memory_gib:g}: expected GiB of one device, such as 16")
    memory = tables.hardware[hardware].memory_gib if memory_gib is None else memory_gib
    pair = (hardware, model)
    options = [one for one in found.options if (one.hardware, one.model) == pair]
    refused = tuple(no for no in found.refused if (no.hardware, no.model) == pair)
    ranked = ranking.rank(options, memory * 1024, prefer)
    return Recommendation(hardware, model, memory, prefer, tuple(ranked), refused)


def find_model(tables: Matrix, name: str) -> str:
    """The id of a model by its id, its name or its repository; UsageError for another name."""
    wanted = name.casefold().rstrip("/")
    for row in tables.models.values():
        if wanted in (row.id, row.name.casefold(), row.repo.casefold()):
            return row.id
    raise UsageError(f"--model {name}: not in models.csv; known: {', '.join(tables.models)}")


def find_hardware(tables: Matrix, name: str) -> HardwareRow:
    """The row of an id, of a product's name, or of this machine (`auto`).

    Raises UsageError for another name, MachineError where this machine is no row.
    """
    from quantmatrix.tables.identify import resolve

    wanted = resolve(name, tables.hardware)
    for row in tables.hardware.values():
        if wanted.casefold() in (row.id, row.name.casefold()):
            return row
    known = ", ".join(tables.hardware)
    raise UsageError(f"--hardware {name}: not in hardware.csv; known: {known}, or auto")


def read_answers(tables: Matrix, reports: str | os.PathLike[str] | None = None) -> Answers:
    """Rendered answers where nothing changed since, else worked out now; errors of the records' reader."""
    source = find_source(reports)
    file = source / answers.FILE
    if file.is_file():
        found = answers.decode(read_file(file), file)
        if source == packaged.FOLDER or found.inputs == answers.digest_inputs(tables, source):
            return found
        import logging  # which an answer at once needs not

        logging.getLogger(__name__).info(
            "%s is older than tables or records: joining them again", file
        )
    return work_out(tables, source)


def read_file(file: Path) -> bytes:
    """The bytes of rendered answers; QuantmatrixError for what is no file, or too large to be one."""
    try:
        return strict_json.read_bytes(file)
    except (OSError, strict_json.JsonError) as error:
        raise QuantmatrixError(
            f"{file}: cannot be read: {error}; write it again with `quantmatrix report`"
        ) from error


def work_out(tables: Matrix, source: Path) -> Answers:
    """Answers by the tables, records, plans and code as they are now."""
    from quantmatrix.proof.freshness import read_now
    from quantmatrix.proof.joined import Joined
    from quantmatrix.proof.states import stand_all
    from quantmatrix.report.render import read_evidence

    evidence = read_evidence(source)
    now = read_now(source, evidence)
    joined = Joined(tables, stand_all(tables, evidence, now), code=now.code)
    return answers.collect(joined, evidence, plans.read_plans(source / plans.FILE))


def show_mib(value: int | None) -> str:
    """`11.7 GiB`, or nothing."""
    return "" if value is None else f"{value * MIB / 2**30:.1f} GiB"
