"""Mutation reports: shares of caught faults, and the table fault x gate as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError
from quantmatrix.files import write_whole
from quantmatrix.harness.mutation.faults import FAULTS, MUST, WITNESSED
from quantmatrix.harness.mutation.judge import GATES, Outcome

LEAST_CAUGHT = 0.95
USER_GATES = ("plan", "witness", "load", "generate")
"""Gates of every run; the others need a BF16 run beside it."""


def summarize(outcomes: Sequence[Outcome], gates: Sequence[str] = GATES) -> dict[str, Any]:
    """Plain data: shares, what was missed, and `problems`: why the suite fails.

    Where not all gates were asked, the witness alone is held to what it must catch. Raises
    UsageError where nothing was injected.
    """
    if not outcomes:
        raise UsageError("no fault can happen to the chosen rows: nothing was tested")
    missed = [outcome for outcome in outcomes if not outcome.caught]
    alone = [o for o in outcomes if set(o.gates) == {"witness"}]
    share = 1 - len(missed) / len(outcomes)
    whole = tuple(gates) == GATES
    problems = [
        f"{o.fault} in {o.row} ({o.part}) was missed, which must never happen"
        for o in missed
        if whole and o.fault in MUST
    ]
    problems += [
        f"{o.fault} in {o.row} ({o.part}): the witness does not report it, and must"
        for o in outcomes
        if o.fault in WITNESSED and not {"witness", "plan"} & set(o.gates)
    ]
    if whole and share < LEAST_CAUGHT:
        problems.append(
            f"{share:.1%} of the faults were caught, at least {LEAST_CAUGHT:.0%} is required"
        )
    return {
        "ok": not problems,
        "problems": problems,
        "injected": len(outcomes),
        "caught": len(outcomes) - len(missed),
        "share": round(share, 6),
        "missed": [f"{o.fault} in {o.row} ({o.part})" for o in missed],
        "by_witness_alone": [f"{o.fault} in {o.row} ({o.part})" for o in alone],
        "outcomes": [vars(outcome) for outcome in outcomes],
    }


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """Fault x row x gate: 1 for a gate that objected, 0 else."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["fault", "row", "family", "model", "place", "caught", *GATES])
    for o in sorted(outcomes, key=lambda o: (o.fault, o.row)):
        marks = [int(gate in o.gates) for gate in GATES]
        writer.writerow([o.fault, o.row, o.family, o.model, o.part, int(o.caught), *marks])
    return stream.getvalue()


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """The table fault x gate: how many of the injected faults each gate objected to."""
    count = len(outcomes)
    caught = sum(o.caught for o in outcomes)
    lines = [
        "# Which gate catches which fault",
        "",
        f"{count} faults injected into {len({o.row for o in outcomes})} rows, {caught} caught "
        f"({caught / count:.1%}). Made by `quantmatrix mutate --write`.",
        "",
        f"| fault | injected | caught | {' | '.join(GATES)} |",
        f"|---|---|---|{'---|' * len(GATES)}",
    ]
    for fault in FAULTS:
        own = [o for o in outcomes if o.fault == fault.name]
        if own:
            marks = " | ".join(str(sum(g in o.gates for o in own) or "") for g in GATES)
            label = (
                f"{fault.name}: {fault.what}{' **(never missed)**' if fault.name in MUST else ''}"
            )
            lines.append(f"| {label} | {len(own)} | {sum(o.caught for o in own)} | {marks} |")
    missed = [f"- {o.fault} in `{o.row}` ({o.part})" for o in outcomes if not o.caught]
    lines += ["", *(["Missed:", "", *missed, ""] if missed else [])]
    return "\n".join([*lines, *list_caught_by_witness(outcomes)])


def list_caught_by_witness(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Lines about what only the witness caught: of all gates, and of those that a user passes."""
    passed = [o for o in outcomes if set(o.gates) & set(USER_GATES) == {"witness"}]
    counts = Counter(o.fault for o in passed)
    caught = ", ".join(f"{fault} ({count})" for fault, count in counts.most_common())
    yield (
        f"Caught by the witness alone, of the gates that a user passes ({', '.join(USER_GATES)}): "
        f"{caught or 'none'}."
    )
    yield ""
    alone = [f"- {o.fault} in `{o.row}` ({o.part})" for o in outcomes if {*o.gates} == {"witness"}]
    yield f"Caught by the witness alone, of all gates:{'' if alone else ' none.'}"
    yield ""
    if alone:
        yield from (*alone, "")


def write_reports(outcomes: Sequence[Outcome], folder: Path) -> Iterator[Path]:
    """Write mutation.csv and mutation.md, each whole or not at all."""
    texts = {"mutation.csv": to_csv(outcomes), "mutation.md": to_markdown(outcomes)}
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
        yield folder / name
