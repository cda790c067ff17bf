"""Ranking: which option is the best for a device, a memory and a wish; `templates/question.js` does the same.

Options are ranked by (1) whether the weights fit, without offload first, (2) how much of it was run,
(3) what is preferred, in steps too wide for noise, (4) a download before one that has to be made, (5) the
exact number. A checkpoint is named once, by its best option.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.report.answers import Option

PREFERENCES = ("quality", "speed", "memory")
"""What may be preferred; the first is meant where nobody says."""
BUCKETS = {"quality": 3.0, "speed": 0.05, "memory": 512}
"""Differences that decide before a download does: dB, ratio to BF16, MiB."""
FITS = ("fits", "fits with --dit-cpu-offload", "fits with --dit-layerwise-offload", "does not fit")
OFFLOADS = ("", " --dit-cpu-offload", " --dit-layerwise-offload", "")
"""What is added to the command, by the position in `FITS`."""


def find_fit(option: Option, memory_mib: float) -> int:
    """Position in `FITS` for a device with this memory; 0 MiB is no limit, nor are unknown weights.

    What a step takes on top of the weights is counted where a peak was measured.
    """
    if not memory_mib or option.weights_mib is None:
        return 0
    peak = option.peak_mib or 0
    loaded = option.weights_mib if peak >= option.weights_mib else option.largest_mib
    room = memory_mib - max(0, peak - loaded)
    two = option.movable and option.largest_mib < option.weights_mib
    fits = (
        option.weights_mib <= room,
        two and option.largest_mib <= room,
        option.layerwise_mib <= room,
        True,
    )
    return fits.index(True)


def weigh(option: Option, prefer: str) -> float:
    """What is preferred as a number, smaller is better; what was not measured comes last."""
    value: float | None
    if prefer == "quality":
        value = None if option.psnr_db is None else -option.psnr_db
    elif prefer == "speed":
        value = option.step
    else:
        value = option.weights_mib
    return float("inf") if value is None else value


def order(option: Option, prefer: str) -> tuple[float, ...]:
    """What decides among options that fit equally; see the module."""
    exact = weigh(option, prefer)
    step = exact if exact == float("inf") else math.floor(exact / BUCKETS[prefer])
    return option.proof, step, option.made, exact


def rank(
    options: Iterable[Option], memory_mib: float = 0, prefer: str = PREFERENCES[0]
) -> list[tuple[int, Option]]:
    """(position in `FITS`, option), the best first, every checkpoint once.

    Raises UsageError for another preference than those of `PREFERENCES`.
    """
    if prefer not in PREFERENCES:
        raise UsageError(f"--prefer {prefer}: known: {', '.join(PREFERENCES)}")
    ranked = sorted(
        ((find_fit(one, memory_mib), one) for one in options),
        key=lambda pair: (pair[0], *order(pair[1], prefer)),
    )
    best: dict[str, tuple[int, Option]] = {}
    for pair in ranked:
        best.setdefault(pair[1].checkpoint, pair)
    return list(best.values())
