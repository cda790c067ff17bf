"""Ratios: how much longer the quantized form takes than BF16, from timings taken in turn.

Both forms run in one process, one timing of each per round, the first one changing from round to
round (A B, B A, A B ...). A slow neighbour or a falling clock meets both, and a habit of the order
cancels. From the rounds' ratios q/b, in logarithms, come:

| verdict      | meaning |
| ------------ | ------- |
| `ratio`      | median of the averages of every two rounds (Hodges and Lehmann): below 1 is faster |
| `low`, `high`| interval that holds the true ratio in at least 95 of 100 measurements (Wilcoxon's |
|              | signed ranks, exact): no normal distribution is assumed, and in twenty rounds single |
|              | outliers, the usual sickness of timings, hardly widen it |
| `detectable` | relative change that this measurement would have noticed in 80 of 100 repetitions, |
|              | judged from the width of its own interval |
| `verdict`    | one of `VERDICTS` |

An interval that holds 1 is no measurable difference, however the ratio looks: that is a result, and
`detectable` says how large a difference could have hidden. Rounds are taken as independent; a
disturbance that lasts for many rounds makes the interval too narrow. Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from quantmatrix.errors import UsageError

CONFIDENCE = 0.95
POWER = 0.80
FEWEST = 6
"""Rounds below which no interval reaches `CONFIDENCE`."""
FASTER, SLOWER = "faster", "slower"
NO_GAIN, NO_LOSS = "no measurable gain", "no measurable loss"
VERDICTS = (FASTER, SLOWER, NO_GAIN, NO_LOSS)
"""What a timing can be called. The last two: it looks faster (slower), but within the noise."""
SIZES = ("smaller", "larger", "same")
"""What a number of bytes can be called; bytes are counted, so nothing is left to chance."""
DIGITS = 6


@dataclass(frozen=True)
class Ratio:
    """Quantized time over BF16 time; see the module's table."""

    ratio: float
    low: float
    high: float
    detectable: float
    verdict: str


def compare_pairs(bf16: Sequence[float], quantized: Sequence[float]) -> Ratio:
    """The ratio of timings (any unit) whose n-th values were taken in the same round.

    Raises UsageError for fewer than `FEWEST` rounds, for lists of unequal length and for times that
    are not positive.
    """
    if len(bf16) != len(quantized) or len(bf16) < FEWEST:
        raise UsageError(
            f"{len(bf16)} and {len(quantized)} timings: expected the same number of each, "
            f"{FEWEST} or more: fewer cannot give an interval of {CONFIDENCE:.0%}"
        )
    if not all(0 < time < math.inf for time in (*bf16, *quantized)):
        raise UsageError("a timing is not positive: the clock is too coarse, time longer bursts")
    logs = [math.log(ours / theirs) for theirs, ours in zip(bf16, quantized, strict=True)]
    averages = sorted(
        (first + second) / 2 for n, first in enumerate(logs) for second in logs[: n + 1]
    )
    cut = find_cut(len(logs))
    low, high = averages[cut], averages[-1 - cut]
    ratio, least, most = (
        float(f"{math.exp(value):.{DIGITS}g}") for value in (statistics.median(averages), low, high)
    )
    return Ratio(ratio, least, most, find_detectable(low, high), name_verdict(ratio, least, most))


@lru_cache(maxsize=64)
def find_cut(rounds: int) -> int:
    """How many averages of two rounds lie outside the interval on each side."""
    ways = [1]  # ways[w]: subsets of the ranks so far whose sum is w
    for rank in range(1, rounds + 1):
        ways += [0] * rank
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    budget = (1 - CONFIDENCE) / 2 * 2**rounds
    cut, tail = -1, 0
    while tail + ways[cut + 1] <= budget:
        cut += 1
        tail += ways[cut]
    return cut


def find_detectable(low: float, high: float) -> float:
    """Smallest relative change that is noticed with `POWER`, of an interval in logarithms."""
    certain = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    powerful = NormalDist().inv_cdf(POWER)
    change = math.expm1((high - low) / 2 * (1 + powerful / certain))
    return float(f"{change:.3g}")


def name_verdict(ratio: float, low: float, high: float) -> str:
    """The verdict on an interval."""
    if high < 1:
        return FASTER
    if low > 1:
        return SLOWER
    return NO_GAIN if ratio <= 1 else NO_LOSS


def name_size(bf16: int, quantized: int) -> str:
    """The verdict on two numbers of bytes."""
    if quantized == bf16:
        return "same"
    return "smaller" if quantized < bf16 else "larger"
