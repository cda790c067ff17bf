"""The page of the transformer classes: which ones load quantized, and how far they are from BF16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.quoting import escape_markdown
from quantmatrix.report.table import write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantmatrix.proof.transformer_classes import ClassLine

PAGE = "transformer-classes.md"
NOTICE = (
    "<!-- Rendered by `quantmatrix report` from reports/transformer-classes.csv: do not edit. -->"
)


def summarize(lines: Sequence[ClassLine]) -> str:
    """One sentence with a link to the page; empty where nothing was measured."""
    if not lines:
        return ""
    every = {line.class_name for line in lines}
    proved = {line.class_name for line in lines if not line.reason}
    return (
        f"{len(proved)} of the {len(every)} transformer classes of diffusers {lines[0].diffusers} load "
        f"quantized, small and with random weights: [the list]({PAGE})."
    )


def write_classes(lines: Sequence[ClassLine]) -> str:
    """transformer-classes.md: a row for each class, a column for each form."""
    forms = list(dict.fromkeys((line.family, line.scheme) for line in lines if line.family))
    found: dict[str, dict[tuple[str, str], ClassLine]] = {}
    for line in lines:
        if not line.reason:
            found.setdefault(line.class_name, {})[line.family, line.scheme] = line
    rows = [
        (
            f"`{name}`",
            show_layers(list(own.values())),
            *(show_error(own.get(form)) for form in forms),
        )
        for name, own in found.items()
    ]
    others = [
        (f"`{line.class_name}`", escape_markdown(line.reason)) for line in lines if line.reason
    ]
    parts = [
        NOTICE,
        "# Transformer classes",
        "A small model of each class of diffusers, random weights, one block of each kind: quantized, "
        "written, planned, loaded with every tensor accounted for, its quantized layers counted, "
        "compared with the base weights by the witness, and run. A number is the relative L2 distance "
        "of its output to that of the BF16 model (backend `reference`). Written by "
        "`python -m quantmatrix.measure.classes`.",
        write_table(
            [
                "class",
                "quantized of linear layers",
                *(f"{family} {scheme}" for family, scheme in forms),
            ],
            rows,
        ),
    ]
    if others:
        parts += ["## Not shown", write_table(["class", "why"], others)]
    return "\n\n".join(parts) + "\n"


def show_layers(lines: Sequence[ClassLine]) -> str:
    """Quantized of linear layers; a range where forms differ, as with widths that NVFP4 cannot store."""
    counts = sorted({line.quantized for line in lines})
    shown = "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return f"{shown} of {lines[0].linear}"


def show_error(line: ClassLine | None) -> str:
    """An error, with what the witness said where it is not that the weights agree."""
    if line is None:
        return ""
    return f"{line.error:.3f}" + ("" if line.witness == "agrees" else f" (witness {line.witness})")
