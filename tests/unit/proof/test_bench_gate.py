"""The gate of benchmarks: worse is found, noise is not, and what cannot be compared is no pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
from benched import DEVICE, make_result, make_timing

from quantmatrix.proof.bench_gate import BETTER, EQUAL, WORSE, compare_results, judge
from quantmatrix.proof.bench_results import BenchmarkError

KEY = ("some-row@cpu", DEVICE)


def verdicts(kept: list[Any], found: list[Any], tolerance: float | None = None) -> dict[str, str]:
    return {f.name: f.verdict for f in compare_results(kept, found, tolerance)}


def test_the_same_again_is_no_change() -> None:
    found = verdicts([make_result()], [make_result()])
    assert set(found.values()) == {EQUAL}
    assert list(found) == [
        "transformer layer 16x256->512 FP8 decode",
        "transformer step",
        "transformer load",
        "transformer weights",
        "transformer peak",
    ]


@pytest.mark.parametrize(
    ("step", "word"), [(0.84, EQUAL), (0.95, WORSE), (1.6, WORSE), (0.75, EQUAL), (0.6, BETTER)]
)
def test_a_step_against_one_of_four_fifths(step: float, word: str) -> None:
    found = verdicts([make_result()], [make_result(step=step)])
    assert found.pop("transformer step") == word
    assert set(found.values()) == {EQUAL}


def test_more_memory_is_worse() -> None:
    found = verdicts([make_result()], [make_result(weights=2**24 + 2**22)])
    assert found["transformer weights"] == found["transformer peak"] == WORSE
    found = verdicts([make_result()], [make_result(weights=2**23)])
    assert found["transformer weights"] == BETTER


@pytest.mark.parametrize(
    ("kept", "found", "word"),
    [
        ((1.0, 0.9, 1.3), (1.4, 1.29, 1.5), EQUAL),  # the kept interval allows more than 10 %
        ((1.0, 0.9, 1.3), (1.4, 1.31, 1.5), WORSE),
        ((1.0, 0.99, 1.01), (1.15, 1.09, 1.2), EQUAL),  # the new interval reaches what is allowed
        ((1.0, 0.99, 1.01), (1.15, 1.11, 1.2), WORSE),
        ((1.0, 0.7, 1.1), (0.8, 0.71, 0.85), EQUAL),
        ((1.0, 0.99, 1.1), (0.8, 0.71, 0.85), BETTER),
    ],
)
def test_intervals(kept: Any, found: Any, word: str) -> None:
    assert judge(KEY, "step", kept, found, 1.1).verdict == word


def test_a_tolerance_is_stated_and_no_less_than_one() -> None:
    assert verdicts([make_result()], [make_result(step=0.95)], 1.5)["transformer step"] == EQUAL
    assert verdicts([make_result()], [make_result(step=0.83)], 1.0)["transformer step"] == WORSE
    for wrong in (0.9, math.nan, math.inf):
        with pytest.raises(BenchmarkError, match=f"--tolerance {wrong}: expected 1 or more"):
            verdicts([make_result()], [make_result(step=9.0)], wrong)


def test_a_layer_alone_is_allowed_more_than_a_step() -> None:
    whole = make_result()
    for ratio, word in ((1.1, EQUAL), (1.3, WORSE)):
        found = make_result()
        found["components"]["transformer"]["layers"][0] |= make_timing(ratio)
        assert verdicts([whole], [found])["transformer layer 16x256->512 FP8 decode"] == word
    found["components"]["transformer"]["layers"][0] |= make_timing(1.1)
    assert verdicts([whole], [found], 1.1)["transformer layer 16x256->512 FP8 decode"] == WORSE


def test_another_device_is_an_error() -> None:
    other = make_result(device="Other CPU, 1 thread")
    with pytest.raises(BenchmarkError, match=f"kept for {DEVICE}, measured on Other CPU"):
        compare_results([make_result()], [other])
    assert compare_results([make_result(), other], [make_result()])  # each device has its own


def test_another_size_is_another_key() -> None:
    with pytest.raises(BenchmarkError, match=r"some-row@cpu \(full\) .*do not have it"):
        compare_results([make_result()], [{**make_result(), "size": "full"}])


def test_a_key_that_is_not_kept_is_an_error() -> None:
    with pytest.raises(
        BenchmarkError, match=r"new@cpu \(tiny\) on .*: the kept results do not have it"
    ):
        compare_results([make_result()], [make_result(), make_result("new@cpu")])


def test_a_kept_row_that_was_not_measured_is_an_error() -> None:
    kept = [make_result(), make_result("gone@cpu")]
    with pytest.raises(BenchmarkError, match=r"gone@cpu \(tiny\): .* not measured now: partial"):
        compare_results(kept, [make_result()])


@pytest.mark.parametrize("side", ["kept", "new"])
def test_a_timing_that_one_side_lacks_is_an_error(side: str) -> None:
    short, whole = make_result(), make_result()
    del short["components"]["transformer"]["load"]
    pair = ([whole], [short]) if side == "kept" else ([short], [whole])
    with pytest.raises(BenchmarkError, match=f"transformer load: only the {side} result has it"):
        compare_results(*pair)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="nothing was measured"):
        compare_results([make_result()], [])


def test_findings_say_all_numbers() -> None:
    found = next(
        f for f in compare_results([make_result()], [make_result(step=1.6)]) if f.verdict == WORSE
    )
    assert found.tell().startswith(
        "some-row@cpu (tiny): transformer step: ratio to BF16 was 0.8, is 1.6"
    )
    assert "allowed 0.88: worse" in found.tell()
