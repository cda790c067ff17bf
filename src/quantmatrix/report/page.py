"""Page: `reports/index.html`, the question, the matrix and all its evidence in one file that loads nothing.

The template, its style and its scripts lie in `templates/`; this module puts the data in, in two blocks:
what the page needs to answer, and what an open cell needs. The scripts draw table rows as they are scrolled
to, so ten thousand cells open at once. Text from records is data: the scripts never read it as HTML, and the
page forbids itself every connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmatrix.report import programs, ranking, template
from quantmatrix.report.answers import PROOFS
from quantmatrix.report.page_data import DETAILS, collect

if TYPE_CHECKING:
    from quantmatrix.proof.joined import Joined
    from quantmatrix.report.answers import Answers
    from quantmatrix.report.history import Version
    from quantmatrix.report.runtimes import Runtimes

SCRIPTS = ("page.js", "cell.js", "programs.js", "question.js", "speed.js", "start.js")
"""In the order in which they run."""


def write_page(
    joined: Joined,
    runtimes: Runtimes,
    found: Answers,
    measured: Sequence[str] = (),
    past: Mapping[str, Sequence[Version]] | None = None,
) -> bytes:
    """index.html; equal input gives equal bytes. `measured` are pages of measurements below the folder, `past` is
    the history of cells."""
    from markupsafe import Markup

    data = {**collect(joined, found, past or {}), **programs.collect(runtimes)}
    data["ranking"] = {
        "buckets": ranking.BUCKETS,
        "proofs": PROOFS,
        "fits": ranking.FITS,
        "offloads": ranking.OFFLOADS,
    }
    details = {name: data.pop(name) for name in DETAILS}
    return template.draw(
        "index.html",
        script=Markup("\n").join(template.read_part(name) for name in SCRIPTS),
        data=Markup(encode_data(data)),
        details=Markup(encode_data(details)),
        others=bool(data["programs"]),
        measured=measured,
        preferences=ranking.PREFERENCES,
    ).encode()


def encode_data(data: Any) -> str:
    """JSON that may stand in a script element: no `<` that could end it, no line separators."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
