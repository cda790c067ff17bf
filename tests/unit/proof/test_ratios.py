"""Ratios of timings: what the interval holds, what it can see, what it is called."""

from __future__ import annotations

import math
import random

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.proof.ratios import (
    CONFIDENCE,
    FASTER,
    FEWEST,
    NO_GAIN,
    NO_LOSS,
    POWER,
    SLOWER,
    VERDICTS,
    Ratio,
    compare_pairs,
    find_cut,
    name_size,
    name_verdict,
)

TRIALS = 1500


def measure(
    dice: random.Random, rounds: int, true: float, spread: float = 0.03, outliers: float = 0.0
) -> Ratio:
    """A made-up measurement: load that both feel, noise of each, and now and then a hiccup."""

    def noise() -> float:
        hiccup = 1 + 3 * dice.random() if dice.random() < outliers else 1
        return math.exp(dice.gauss(0, spread)) * hiccup

    load = [1 + dice.random() for _ in range(rounds)]
    bf16 = [5 * slow * noise() for slow in load]
    return compare_pairs(bf16, [5 * true * slow * noise() for slow in load])


@pytest.mark.parametrize("rounds", [FEWEST, 10, 20])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
@pytest.mark.parametrize("true", [0.7, 1.0])
def test_the_interval_holds_the_true_ratio(rounds: int, outliers: float, true: float) -> None:
    dice = random.Random(f"{rounds} {outliers} {true}")
    found = [measure(dice, rounds, true, outliers=outliers) for _ in range(TRIALS)]
    share = sum(ratio.low <= true <= ratio.high for ratio in found) / TRIALS
    error = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / TRIALS)
    assert share >= CONFIDENCE - error
    assert share <= 0.99  # not by being as wide as a barn: six rounds give 31/32


def test_twenty_rounds_bear_a_hiccup_in_one_of_ten_timings() -> None:
    dice = random.Random(1)
    clean, dirty = (
        [measure(dice, 20, 0.8, outliers=share) for _ in range(300)] for share in (0.0, 0.05)
    )
    width = [sorted(math.log(r.high / r.low) for r in found)[150] for found in (clean, dirty)]
    assert width[1] < 1.5 * width[0]  # the mean's interval grows tenfold


def test_no_difference_is_seldom_called_one() -> None:
    dice = random.Random(2)
    words = [measure(dice, 12, 1.0).verdict for _ in range(TRIALS)]
    wrong = sum(word in (FASTER, SLOWER) for word in words) / TRIALS
    assert wrong <= 1 - CONFIDENCE + 0.02
    assert {NO_GAIN, NO_LOSS} <= set(words)


@pytest.mark.parametrize("rounds", [10, 20])
def test_a_detectable_change_is_detected_as_often_as_promised(rounds: int) -> None:
    dice = random.Random(rounds)
    said = sorted(measure(dice, rounds, 1.0).detectable for _ in range(400))[200]
    slower = [measure(dice, rounds, 1 + said).verdict for _ in range(TRIALS)]
    assert POWER - 0.1 <= slower.count(SLOWER) / TRIALS <= POWER + 0.1
    less = [measure(dice, rounds, 1 + said / 4).verdict for _ in range(TRIALS)]
    assert less.count(SLOWER) / TRIALS < 0.3


def test_detectable_follows_the_spread() -> None:
    dice = random.Random(3)
    quiet, loud = (measure(dice, 20, 1.0, spread=spread).detectable for spread in (0.005, 0.1))
    assert quiet < 0.02 < loud


@pytest.mark.parametrize(
    ("rounds", "cut"),
    # critical values of Wilcoxon's signed-rank test, two-sided, 5 %: the largest sum that rejects
    [(6, 0), (7, 2), (8, 3), (10, 8), (12, 13), (15, 25), (20, 52), (25, 89)],
)
def test_cuts_are_those_of_the_tables(rounds: int, cut: int) -> None:
    assert find_cut(rounds) == cut


def test_by_hand() -> None:
    found = compare_pairs([1.0] * 6, [2.0, 2.0, 2.0, 2.0, 2.0, 4.0])
    assert (found.ratio, found.low, found.high, found.verdict) == (2.0, 2.0, 4.0, SLOWER)
    same = compare_pairs([3.0] * 8, [3.0] * 8)
    assert (same.ratio, same.low, same.high, same.detectable) == (1.0, 1.0, 1.0, 0.0)
    assert same.verdict == NO_GAIN


def test_turned_round_the_ratio_is_the_inverse() -> None:
    dice = random.Random(4)
    a, b = ([1 + dice.random() for _ in range(9)] for _ in range(2))
    one, other = compare_pairs(a, b), compare_pairs(b, a)
    assert one.ratio == pytest.approx(1 / other.ratio, rel=1e-5)
    assert one.low == pytest.approx(1 / other.high, rel=1e-5)
    assert one.detectable == pytest.approx(other.detectable, rel=1e-2)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict"),
    [
        (0.8, 0.7, 0.99, FASTER),
        (0.9, 0.8, 1.0, NO_GAIN),
        (0.99, 0.9, 1.2, NO_GAIN),
        (1.01, 0.9, 1.2, NO_LOSS),
        (1.1, 1.0, 1.2, NO_LOSS),
        (1.1, 1.001, 1.2, SLOWER),
    ],
)
def test_verdicts(ratio: float, low: float, high: float, verdict: str) -> None:
    assert name_verdict(ratio, low, high) == verdict
    assert verdict in VERDICTS


def test_words_for_bytes() -> None:
    assert [name_size(4, size) for size in (3, 4, 5)] == ["smaller", "same", "larger"]


@pytest.mark.parametrize(
    ("bf16", "quantized", "said"),
    [
        ([1.0] * 5, [1.0] * 5, "6 or more"),
        ([1.0] * 8, [1.0] * 7, "8 and 7 timings"),
        ([1.0] * 8, [1.0] * 7 + [0.0], "not positive"),
        ([1.0] * 8, [1.0] * 7 + [math.nan], "not positive"),
        ([1.0] * 8, [1.0] * 7 + [-1.0], "not positive"),
        ([1.0] * 7 + [-1.0], [1.0] * 8, "not positive"),
        ([1.0] * 7 + [math.inf], [1.0] * 8, "not positive"),
    ],
)
def test_timings_that_say_nothing(bf16: list[float], quantized: list[float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compare_pairs(bf16, quantized)
