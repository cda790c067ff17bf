"""Overview: support-matrix.md, the quantization guide's two big tables with our proof beside each claim.

GitHub shows about a hundred characters of a table before it scrolls, and cuts long lines off: a cell has 120
characters at most, a line 400, and a proof is one link to the family page. What is longer stands there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantmatrix.proof.agreement import is_compiled
from quantmatrix.proof.carried import CARRIED
from quantmatrix.proof.freshness import CARRYING
from quantmatrix.proof.scopes import COMPILED, SCOPES, WEIGHTS, split_label
from quantmatrix.report.markdown import NOTICE, SIGNS
from quantmatrix.report.table import write_table

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined
    from quantmatrix.tables.rows import CheckpointRow

LONGEST = 120
"""Characters of a cell."""
LONGEST_LINE = 400
COMPILED_SIGN = "⚙"
"""Of what is proven for as far as kernels compile."""
LEGEND = (
    f"{SIGNS['proven']} proven by a run, {COMPILED_SIGN} kernels compiled and nothing run, "
    f"{SIGNS['refused']} refused as claimed, {SIGNS['failing']} failing, "
    f"{SIGNS['unjudged']} no limit known, {SIGNS['stale']} changed since, "
    f"{SIGNS['unproven']} not run, {SIGNS['planned']} planned; the number is that of cells."
)


def write_overview(joined: Joined, classes: str = "") -> str:
    """support-matrix.md: the picture, the counts, and the guide's two tables with our proof.

    `classes` is a sentence on the transformer classes that were proved.
    """
    tables = joined.tables
    claims = [cell for cell in tables.cells if cell.claim != "planned"]
    agreeing = sum(joined.agrees(cell) for cell in claims)
    share = f"{1000 * agreeing // len(claims) / 10} %" if claims else "no"
    counts = joined.count(tables.cells)
    picture = "![Support matrix: quant family by hardware](support-matrix.svg)"
    rows = [row for row in tables.checkpoints.values() if row.algo]
    parts = [
        NOTICE,
        "# Support matrix",
        f"{agreeing} of {len(claims)} claims ({share}) are backed by a run of the row as it "
        "stands. Every state links to its evidence, and names its scope: what was run.",
        "Which checkpoint for your card: `quantmatrix recommend --hardware rtx-4090 --model flux-1`, or "
        "the question at the top of [index.html](index.html).",
        write_scopes(joined),
        *write_carried(joined),
        picture,
        write_table(["state and scope", "cells"], [(name, str(n)) for name, n in counts.items()]),
        "## Families and hardware",
        LEGEND,
        write_grid(joined),
        "## Quant families",
        "`quant_family` means a checkpoint and loading family with shared usage and loader "
        "behaviour, not just a numeric precision or a kernel backend.",
        *write_families(joined),
        *([classes] if classes else []),
        "## Validated ModelOpt checkpoints",
        *write_checkpoints(joined, rows),
        *(
            ["## Other programs", "Which of them loads which file: [runtimes.md](runtimes.md)."]
            if tables.runtimes
            else []
        ),
    ]
    return "\n\n".join(parts) + "\n"


def write_scopes(joined: Joined) -> str:
    """What each scope means, and how many cells agree with their claim by a record of it."""
    rows = []
    for scope in SCOPES:
        cells = [cell for cell in joined.tables.cells if joined.standings[cell.id].scope == scope]
        shown = [c for c in cells if joined.agrees(c) or is_compiled(joined.standings[c.id])]
        rows.append([f"`{scope}`", WEIGHTS[scope], str(len(shown))])
    return write_table(["scope", "what was run", "claims"], rows)


def write_carried(joined: Joined) -> list[str]:
    """A line on the records that are carried, where there are some."""
    carried = sum(reason.startswith(CARRYING) for reason in joined.reasons.values())
    return (
        [
            f"{carried} of these records are *carried*: the code has changed since, and the latents of "
            f"the same cells on a CPU have not, to the last bit ([{CARRIED}]({CARRIED}))."
        ]
        if carried
        else []
    )


def write_grid(joined: Joined) -> str:
    """Hardware by families, as signs with counts; a page is longer than it is wide."""
    tables = joined.tables
    boxes: dict[tuple[str, str], list[str]] = {}
    for cell in tables.cells:
        label = joined.standings[cell.id].label
        boxes.setdefault((cell.hardware, cell.family), []).append(label)
    rows = [
        [f"`{name}`", *(show_signs(Counter(boxes.get((name, f), ()))) for f in tables.families)]
        for name in tables.hardware
    ]
    heads = [f"[`{family}`](families/{family}.md)" for family in tables.families]
    return write_table(["hardware", *heads], rows)


def show_signs(counts: Mapping[str, int]) -> str:
    """`✓ 84 ⚙ 5 ⊘ 5`, by labels (`proven · stand-in`)."""
    found = Counter[str]()
    for label, count in counts.items():
        state, scope = split_label(label)
        compiled = state == "proven" and scope == COMPILED
        found[COMPILED_SIGN if compiled else SIGNS[state]] += count
    order = [SIGNS["proven"], COMPILED_SIGN, *(s for n, s in SIGNS.items() if n != "proven")]
    return " ".join(f"{sign} {found[sign]}" for sign in order if found[sign]) or "–"


def write_families(joined: Joined) -> list[str]:
    """The guide's table of families with our proof in the last column, and their notes below it."""
    head = ["quant_family", "checkpoint form", "canonical CLI", "supported models"]
    rows, notes = [], []
    for family in joined.tables.families.values():
        cells = [cell for cell in joined.tables.cells if cell.family == family.id]
        proof = f"[{show_signs(joined.count(cells))}](families/{family.id}.md)"
        facts = [family.checkpoint_form, family.canonical_cli, family.supported_models]
        dependency = family.extra_dependency
        rows.append([f"`{family.id}`", *map(shorten, [*facts, dependency]), proof])
        notes.append(f"- `{family.id}`: {family.notes}")
    return [write_table([*head, "extra dependency", "proof"], rows), "\n".join(notes)]


def write_checkpoints(joined: Joined, rows: Iterable[CheckpointRow]) -> list[str]:
    """The guide's table of validated checkpoints with our proof in the last column, notes below it."""
    head = ["Quant Algo", "Base Model", "Preferred CLI", "HF Repo", "Proof"]
    lines, notes = [], []
    for row in rows:
        cells = [cell for cell in joined.tables.cells if cell.checkpoint == row.id]
        link = f"families/{row.family}.md#{row.id}"
        facts = [f"`{row.algo}`", f"`{row.base}`", f"`{row.cli}`", f"`{row.reference}`"]
        lines.append([*facts, f"[{show_signs(joined.count(cells))}]({link})"])
        notes.append(f"- `{row.reference}`: {'; '.join(t for t in (row.scope, row.notes) if t)}")
    return [write_table([*head], lines), *(["\n".join(notes)] if notes else [])]


def shorten(text: str) -> str:
    """Markdown of at most `LONGEST` characters; what is cut off stands on the family's page."""
    if len(text) <= LONGEST:
        return text
    short = text[: LONGEST - 4].rpartition(" ")[0]
    return f"{short}{'`' * (short.count('`') % 2)} ..."
