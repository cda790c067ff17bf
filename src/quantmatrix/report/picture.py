"""Picture: the matrix at a glance, as one hand-written SVG (hardware by family), as wide as GitHub's text.

Each box holds the states of the cells that a family has on a device, with the scope of what was
run: counts, and a bar whose segments are as wide as the counts. A colour is a state, its strength a
scope. Colours follow the reader's light or dark scheme, and nothing is shown by colour alone.
Nothing in it depends on time, so equal counts give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from quantmatrix.proof.scopes import SCOPES, WEIGHTS, order_labels, split_label

COLOURS = {
    "proven": ("#1a7f37", "#3fb950"),
    "refused": ("#6639ba", "#a371f7"),
    "failing": ("#cf222e", "#f85149"),
    "unjudged": ("#0969da", "#58a6ff"),
    "stale": ("#9a6700", "#d29922"),
    "unproven": ("#8c959f", "#6e7681"),
    "planned": ("#d0d7de", "#30363d"),
}
"""Fill of each state: (light scheme, dark scheme)."""
STRENGTHS = dict(zip(SCOPES, (0.2, 0.45, 0.7, 1.0), strict=True))
"""Opacity of each scope's colour."""
LABELS = order_labels(COLOURS)
LEFT, TOP, HEIGHT, GAP = 108, 64, 54, 4
PAGE = 888
"""Width of the picture, unless there are more families than fit: GitHub would make it smaller, text and all."""
NARROWEST = 92
"""Width of a box at least: a line of its text."""
LINE = 12

Counts = Mapping[str, int]


def draw_matrix(
    families: Sequence[str], hardware: Sequence[str], counts: Mapping[tuple[str, str], Counts]
) -> bytes:
    """The SVG of `counts[family, hardware] = {label: cells}`, a label being a state with its scope;
    a missing box is drawn empty."""
    box = max(NARROWEST, (PAGE - LEFT - GAP) // max(len(families), 1) - GAP)
    width = max(LEFT + len(families) * (box + GAP) + GAP, LEGEND_WIDTH)
    height = TOP + len(hardware) * (HEIGHT + GAP) + 76
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title desc">',
        '<title id="title">Support matrix: quant family by hardware</title>',
        f'<desc id="desc">{escape(describe_counts(families, hardware, counts))}</desc>',
        f"<style>{write_style()}</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        f'<text class="head" x="{GAP * 3}" y="28">quantmatrix: what is claimed, what is proven'
        "</text>",
    ]
    for column, name in enumerate(families):
        x = LEFT + column * (box + GAP) + box // 2
        parts.append(f'<text class="name" x="{x}" y="{TOP - 8}" text-anchor="middle">')
        parts.append(f"{escape(name)}</text>")
    for row, name in enumerate(hardware):
        y = TOP + row * (HEIGHT + GAP)
        parts.append(f'<text class="name" x="{GAP * 3}" y="{y + HEIGHT // 2 + 4}">')
        parts.append(f"{escape(name)}</text>")
        for column, family in enumerate(families):
            x = LEFT + column * (box + GAP)
            parts += draw_box(x, y, box, counts.get((family, name), {}))
    parts += draw_legend(TOP + len(hardware) * (HEIGHT + GAP) + 22)
    parts.append("</svg>\n")
    return "\n".join(parts).encode()


def write_style() -> str:
    """The style sheet: one class per state and scheme."""
    light = "".join(f".{state}{{fill:{fill}}}" for state, (fill, _) in COLOURS.items())
    dark = "".join(f".{state}{{fill:{fill}}}" for state, (_, fill) in COLOURS.items())
    strengths = "".join(f".{name_class(s)}{{fill-opacity:{v}}}" for s, v in STRENGTHS.items())
    return (
        "text{font:11px ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;"
        "fill:#1f2328}.head{font-size:15px;font-weight:600}.name{font-weight:600}"
        ".page{fill:#ffffff}.box{fill:#f6f8fa;stroke:#d0d7de}.none{fill:none;stroke:#d0d7de}"
        f"{light}{strengths}@media (prefers-color-scheme:dark){{text{{fill:#e6edf3}}.page{{fill:#0d1117}}"
        f".box{{fill:#161b22;stroke:#30363d}}.none{{stroke:#21262d}}{dark}}}"
    )


def draw_box(x: int, y: int, width: int, counts: Counts) -> list[str]:
    """One box: at most three lines of text, of what is proven its scope, and the bar below them."""
    shown = [(label, counts[label]) for label in LABELS if counts.get(label)]
    if not shown:
        return [f'<rect class="none" x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="4"/>']
    parts = [f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="4"/>']
    for line, (label, count) in enumerate(shown[:3]):
        more = " ..." if line == 2 and len(shown) > 3 else ""
        top = y + 13 + line * LINE
        state, scope = split_label(label)
        text = f"{count} {scope}" if state == "proven" else f"{count} {state}"
        parts.append(f'<text x="{x + 6}" y="{top}">{text}{more}')
        parts.append(f"<title>{count} {label}</title></text>")
    total = sum(count for _, count in shown)
    start = 0
    done = 0
    for label, count in shown:
        state, scope = split_label(label)
        done += count
        stop = round((width - 8) * done / total)
        parts.append(
            f'<rect class="{f"{state} {name_class(scope)}".strip()}" x="{x + 4 + start}" y="{y + HEIGHT - 8}" '
            f'width="{stop - start}" height="5"/>'
        )
        start = stop
    return parts


LEGEND_WIDTH = 560


def draw_legend(y: int) -> list[str]:
    """One square and name per state, and below it one per scope."""
    parts = []
    for index, state in enumerate(COLOURS):
        x = GAP * 3 + index * 76
        parts.append(f'<rect class="{state}" x="{x}" y="{y - 9}" width="10" height="10" rx="2"/>')
        parts.append(f'<text x="{x + 15}" y="{y}">{state}</text>')
    for index, scope in enumerate(SCOPES):
        x, line = GAP * 3 + index % 2 * 268, y + 18 + index // 2 * 16
        style = f"proven {name_class(scope)}"
        parts.append(
            f'<rect class="{style}" x="{x}" y="{line - 9}" width="10" height="10" rx="2"/>'
        )
        parts.append(f'<text x="{x + 15}" y="{line}">{scope}: {WEIGHTS[scope]}</text>')
    return parts


def name_class(scope: str) -> str:
    """The class of what a scope colours; empty without a scope."""
    return scope.replace(" ", "-")


def describe_counts(
    families: Sequence[str], hardware: Sequence[str], counts: Mapping[tuple[str, str], Counts]
) -> str:
    """The picture as text, for those who do not see it."""
    sentences = []
    for family in families:
        boxes = []
        for name in hardware:
            found = counts.get((family, name), {})
            counted = ", ".join(f"{found[s]} {s}" for s in LABELS if found.get(s))
            if counted:
                boxes.append(f"{name}: {counted}")
        sentences.append(f"{family}: {'; '.join(boxes) or 'no cell'}.")
    return " ".join(sentences)
