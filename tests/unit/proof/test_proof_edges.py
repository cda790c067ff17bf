"""Comparisons of the proof at their edges, and its texts whole, on made-up records."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.proof import (
    agreement,
    bench_gate,
    bench_results,
    columns,
    facts,
    freshness,
    limit_classes,
    limit_samples,
    limits,
    ratios,
    scopes,
    states,
    thumbnails,
    transformer_classes,
    witness_limits,
)
from quantmatrix.proof.agreement import Share
from quantmatrix.proof.limit_samples import LimitsError, Sample, Spread
from quantmatrix.proof.limits import Ledger, Limits
from quantmatrix.proof.scopes import Standing
from quantmatrix.scheme import Scheme

# --- ratios ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "cut"),
    [(5, -1), (6, 0), (7, 2), (8, 3), (9, 5), (10, 8), (11, 10), (12, 13), (15, 25), (20, 52)],
)
def test_cuts_are_those_of_wilcoxons_table(rounds: int, cut: int) -> None:
    """Two-sided, 0.05."""
    assert ratios.find_cut(rounds) == cut


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict"),
    [
        (0.9, 0.8, 0.999, "faster"), (0.9, 0.8, 1.0, "no measurable gain"),
        (0.9, 0.8, 1.1, "no measurable gain"), (1.0, 0.9, 1.1, "no measurable gain"),
        (1.00001, 0.9, 1.1, "no measurable loss"), (1.1, 1.0, 1.2, "no measurable loss"),
        (1.1, 1.001, 1.2, "slower"),
    ],
)  # fmt: skip
def test_verdicts_on_an_interval(ratio: float, low: float, high: float, verdict: str) -> None:
    assert ratios.name_verdict(ratio, low, high) == verdict


@pytest.mark.parametrize(("low", "high", "found"), [(-0.05, 0.15, 0.154), (0.3, 0.4, 0.0741)])
def test_what_could_have_been_seen(low: float, high: float, found: float) -> None:
    """Half the interval times 1 + 0.8416 / 1.9600, as a share."""
    assert ratios.find_detectable(low, high) == found


@pytest.mark.parametrize(
    ("bf16", "quantized", "name"), [(7, 7, "same"), (7, 6, "smaller"), (7, 8, "larger")]
)
def test_sizes(bf16: int, quantized: int, name: str) -> None:
    assert ratios.name_size(bf16, quantized) == name


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (5, 5, "5 and 5 timings: expected the same number of each, 6 or more: fewer cannot give an "
         "interval of 95%"),
        (7, 6, "7 and 6 timings: expected the same number of each, 6 or more: fewer cannot give an "
         "interval of 95%"),
    ],
)  # fmt: skip
def test_timings_that_are_too_few(first: int, second: int, words: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        ratios.compare_pairs([1.0] * first, [1.0] * second)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_timings_that_are_none(wrong: float, side: int) -> None:
    words = "a timing is not positive: the clock is too coarse, time longer bursts"
    sides = [[2.0] * 6, [3.0] * 6]
    sides[side][4] = wrong
    with pytest.raises(UsageError, match=f"^{words}$"):
        ratios.compare_pairs(*sides)


def test_six_rounds_are_enough() -> None:
    found = ratios.compare_pairs([2.0] * 6, [3.0, 3.0, 3.0, 3.0, 3.0, 4.0])
    assert (found.ratio, found.low, found.high, found.verdict) == (1.5, 1.5, 2.0, "slower")


# --- the bench gate and results --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "found", "bound", "verdict"),
    [
        ((0.5, 0.4, 0.6), (0.7, 0.6, 0.8), 0.625, "no measurable change"),
        ((0.5, 0.4, 0.6), (0.7, 0.625, 0.8), 0.625, "no measurable change"),
        ((0.5, 0.4, 0.6), (0.7, 0.626, 0.8), 0.625, "worse"),
        ((0.5, 0.4, 0.75), (0.8, 0.75, 0.9), 0.75, "no measurable change"),
        ((0.5, 0.4, 0.75), (0.8, 0.76, 0.9), 0.75, "worse"),
        ((0.5, 0.45, 0.6), (0.3, 0.2, 0.4), 0.625, "no measurable change"),
        ((0.5, 0.45, 0.6), (0.3, 0.2, 0.39), 0.625, "better"),
        ((0.5, 0.3, 0.6), (0.25, 0.2, 0.3), 0.625, "no measurable change"),
        ((0.5, 0.3, 0.6), (0.25, 0.2, 0.29), 0.625, "better"),
    ],
)  # fmt: skip
def test_what_a_kept_ratio_allows(kept: Any, found: Any, bound: float, verdict: str) -> None:
    finding = bench_gate.judge(("a (tiny)", "cpu"), "t step", kept, found, 1.25)
    assert finding.bound == pytest.approx(bound, rel=1e-12)
    assert finding.verdict == verdict
    assert finding.tell() == (
        f"a (tiny): t step: ratio to BF16 was 0.5, is {found[0]:.4g} ({found[1]:.4g} to "
        f"{found[2]:.4g}), allowed {bound:.4g}: {verdict}"
    )


def test_a_layer_alone_is_allowed_more() -> None:
    assert bench_gate.choose_tolerance("transformer layer 2x3->4 FP8 decode") == 1.35
    assert bench_gate.choose_tolerance("transformer step") == 1.10
    assert bench_gate.choose_tolerance("player step") == 1.10


@pytest.mark.parametrize("tolerance", [0.99, 0.0, -2.0, math.inf, math.nan])
def test_tolerances_that_are_none(tolerance: float) -> None:
    words = f"--tolerance {tolerance}: expected 1 or more; 1.1 allows 10 % more"
    with pytest.raises(bench_results.BenchmarkError, match=f"^{re.escape(words)}$"):
        bench_gate.compare_results([], [], tolerance)


def test_a_tolerance_of_one_is_one() -> None:
    words = "nothing was measured, so there is nothing to compare"
    with pytest.raises(bench_results.BenchmarkError, match=f"^{words}$"):
        bench_gate.compare_results([], [], 1.0)


def test_keys_that_only_one_side_has() -> None:
    old: dict[Any, Any] = {("a", "z9"): {}, ("a", "h2"): {}, ("b", "cpu"): {}, ("c", "h2"): {}}
    new: dict[Any, Any] = {("a", "cpu"): {}, ("d", "cpu"): {}}
    assert sorted(bench_gate.list_unmatched(old, new)) == [
        "a: kept for h2, z9, measured on cpu: ratios of two devices cannot be compared; keep a "
        "result of this one",
        "b: kept for cpu and not measured now: partial",
        "d on cpu: the kept results do not have it; measure and keep it first",
    ]
    assert sorted(bench_gate.list_gaps(("k", "cpu"), ["x", "y"], ["y", "z"])) == [
        "k: x: only the kept result has it",
        "k: z: only the new result has it",
    ]


def test_names_of_results() -> None:
    layer = {"rows": 5, "in": 3, "out": 7, "scheme": "FP8", "backend": "decode"}
    assert bench_results.name_layer(layer) == "layer 5x3->7 FP8 decode"
    result = {"what": "w", "size": "tiny", "device": "cpu"}
    assert bench_results.key_of(result) == ("w (tiny)", "cpu")
    timing = {"ratio": 0.71049, "low": 0.7, "high": 1.23456}
    assert bench_results.show_ratio(timing) == "0.710 (0.700 to 1.235)"
    assert bench_results.describe_sizes(3, 2) == (0.666667, "smaller")
    assert bench_results.describe_sizes(2, 3) == (1.5, "larger")
    assert bench_results.find_scope({"size": "tiny"}) == "stand-in"
    assert bench_results.find_scope({"size": "full"}) == "published"
    assert bench_results.find_scope({"size": "zz"}) == "published"


def test_a_summary_of_samples() -> None:
    found = bench_results.summarize(
        {"bf16": [4.0, 4.0, 4.0, 4.0, 4.0, 4.123456], "quantized": [2.0, 2.0, 2.0, 2.0, 2.0, 1.0]}
    )
    assert found["median"] == {"bf16": 4.0, "quantized": 2.0}
    assert (found["ratio"], found["verdict"]) == (0.5, "faster")


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ([], "f: not a file of `quantmatrix bench` (schema 1)"),
        ({"schema": 2}, "f: not a file of `quantmatrix bench` (schema 1)"),
        ({"schema": 1}, "f: empty: nothing was measured; run the benchmark again"),
        ({"schema": 1, "results": [1], "planned": []},
         "f: empty: nothing was measured; run the benchmark again"),
        ({"schema": 1, "results": [], "planned": ["a"]},
         "f: empty: nothing was measured; run the benchmark again"),
        ({"schema": 1, "results": {"a": 1}, "planned": ["a"]},
         "f: results: expected a list, found {'a': 1}"),
        ({"schema": 1, "results": [1], "planned": "abc"}, "f: planned: expected a list, found 'abc'"),
        ({"schema": 1, "results": [1], "planned": ["a", 7, 8]},
         "f: planned: expected names, found 7"),
        ({"schema": 1, "results": [1, "x"], "planned": ["a"]},
         "f: not a JSON object\nf: not a JSON object"),
    ],
)  # fmt: skip
def test_files_that_are_none(whole: Any, words: str) -> None:
    with pytest.raises(bench_results.BenchmarkError, match=f"^{re.escape(words)}$"):
        bench_results.check_file(whole, "f")


def test_what_is_missing_of_a_plan() -> None:
    assert bench_results.list_missing(["a", "b", "c"], ["b"], "f") == [
        "f: partial: a was planned and not measured; run it again",
        "f: partial: c was planned and not measured; run it again",
    ]


# --- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "fresh", "percent"),
    [(0, 0, 0.0), (3, 2, 66.6), (3, 3, 100.0), (7, 1, 14.2), (2000, 1999, 99.9), (1000, 1, 0.1)],
)
def test_shares_are_rounded_down(claims: int, fresh: int, percent: float) -> None:
    share = Share(claims, {"fresh": fresh, "stale": claims - fresh})
    assert share.percent == percent
    assert share.to_json() == {
        "claims": claims, "percent": percent, "fresh": fresh, "stale": claims - fresh
    }  # fmt: skip
    assert Share(5).percent == 0.0


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({}, ""), ({"stand-in": 7}, " · stand-in"),
        ({"stand-in": 400, "true size": 9}, " · 400 stand-in, 9 true size"),
        ({"compiled": 1, "stand-in": 2, "published": 3}, " · 1 compiled, 2 stand-in, 3 published"),
    ],
)  # fmt: skip
def test_scopes_on_the_badge(counts: dict[str, int], text: str) -> None:
    assert agreement.show_scopes(counts) == text


@pytest.mark.parametrize(
    ("fresh", "message", "colour"),
    [
        (1000, "100.0 %", "brightgreen"), (900, "90.0 %", "brightgreen"), (899, "89.9 %", "green"),
        (750, "75.0 %", "green"), (749, "74.9 %", "yellow"), (500, "50.0 %", "yellow"),
        (499, "49.9 %", "orange"), (250, "25.0 %", "orange"), (249, "24.9 %", "red"), (0, "0.0 %", "red"),
    ],
)  # fmt: skip
def test_colours_of_the_badge(
    fresh: int, message: str, colour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(overall=Share(1000, {"fresh": fresh}), by_scope={})
    monkeypatch.setattr(agreement, "measure", lambda *_: found)
    badge = agreement.write_badge(None, {})  # type: ignore[arg-type]
    assert badge.decode() == (
        '{\n "schemaVersion": 1,\n "label": "claims proven",\n'
        f' "message": "{message}",\n "color": "{colour}"\n}}\n'
    )


@pytest.mark.parametrize(
    ("state", "scope", "life", "reason"),
    [
        ("proven", "stand-in", "fresh", "why"),
        ("proven", "compiled", "missing", "its kernels were compiled, nothing was run"),
        ("refused", "compiled", "fresh", "why"),
        ("failing", "stand-in", "contradicting", "why"),
        ("stale", "compiled", "stale", "why"),
        ("unjudged", "stand-in", "missing", "why"),
        ("unproven", "", "missing", "why"),
        ("proven", "published", "fresh", "why"),
        ("proven", "aa", "fresh", "why"),
    ],
)
def test_the_life_of_a_standing(state: str, scope: str, life: str, reason: str) -> None:
    standing = Standing(state, "why\nand more", scope)
    assert agreement.find_life(standing) == life
    assert agreement.explain_life(standing) == reason


def test_lives_are_counted() -> None:
    found = agreement.count_lives(iter(["stale", "fresh", "stale", "missing"]))
    assert found == Share(4, {"fresh": 1, "contradicting": 0, "stale": 2, "missing": 1})


# --- facts and freshness ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (1e6, 1e6 + 2, True), (1e6, 1e6 + 2.1, False), (1e6 + 2.1, 1e6, False), (-1e6, -1e6 - 2, True),
        (-1e6, -1e6 - 2.1, False), (0, 0.0, True), (0, 1e-9, False), (3, "3", False), (True, 2, False),
        ([1, 2], (1, 2), True), ([1, 2], [1, 2, 3], False), ([1, 2], [1, 3], False),
        ({"peak": 100}, {"peak": 102}, True), ({"peak": 100}, {"peak": 102.1}, False),
        ({"other": 100}, {"other": 102}, False), ({"peak": [100]}, {"peak": [102]}, True),
        ({"a": 1, "load_seconds": 1}, {"a": 1, "load_seconds": 9}, True),
        ({"a_share": 1}, {"b_share": 2}, True), ({"share": 1}, {"share": 2}, False),
        ({"seconds_of": 1}, {"seconds_of": 2}, False), ({"a": 1}, {"b": 1}, False),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, False),
    ],
)  # fmt: skip
def test_values_that_tell_the_same(then: Any, now: Any, same: bool) -> None:
    assert facts.is_same(then, now) is same


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("2026-11-30T10:00:00Z", None), ("2026-12-01", None),
        ("2026-12-02", "made 2026-12-02, which is after 2026-11-30"),
        ("2026-09-01", None), ("2026-08-31", "91 days old, the limit is 90"),
        ("", "made at no known time: not a date"), ("yesterday", "made yesterday: not a date"),
    ],
)  # fmt: skip
def test_the_age_of_a_record(made: str, why: str | None) -> None:
    record: Any = SimpleNamespace(made=made)
    assert freshness.find_age_problem(record, date(2026, 11, 30), 90) == why


@pytest.mark.parametrize(
    ("version", "short"),
    [("2.13.0+cpu", "2.13"), ("2.13", "2.13"), ("2", "2"), ("0.37.1.dev3", "0.37"), ("1+2.3", "1")],
)
def test_builds_and_patches_do_not_count(version: str, short: str) -> None:
    assert freshness.shorten_version(version) == short


def test_packages_that_changed() -> None:
    then = {"torch": "2.13.0", "a": "1.0.1", "z": "3", "quantmatrix": "1.0", "gone": "1"}
    now = {"z": "4", "torch": "2.14.0+cu", "a": "1.0.9", "quantmatrix": "2.0", "new": "1"}
    assert freshness.list_upgrades(then, now) == ["torch was 2.13.0, is 2.14.0+cu", "z was 3, is 4"]
    assert freshness.list_upgrades(now, now) == []


def test_backends_of_a_plan() -> None:
    plan = {
        "components": {
            "b": {"backends": {"torch": 1, "decode": 2}},
            "a": {"backends": {"torch": 3}},
        }
    }
    assert freshness.list_backends(plan) == ["decode", "torch"]
    assert freshness.list_backends({}) == []


# --- classes, samples and limits -------------------------------------------------------------------


FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")


def test_names_of_classes() -> None:
    int8 = Scheme("linear.int8", "I", "int8", "tensor", "token-dynamic")
    assert limit_classes.name_class([(FP8, "W8A8")]) == "e4m3 W8A8"
    assert limit_classes.name_class([(int8, "W8A8"), (FP8, "W8A16"), (FP8, "W8A16")], []) == (
        "e4m3 W8A16 + int8-tensor W8A8"
    )
    assert limit_classes.name_class([(FP8, "W8A8")], [(FP8, "W8A8")]) == "e4m3 W8A8 both"
    assert limit_classes.name_class() == limit_classes.name_class([], []) == ""
    assert limit_classes.swap_count("e4m3 W8A8") == "e4m3 W8A8 both"
    assert limit_classes.swap_count("e4m3 W8A8 both") == "e4m3 W8A8"


@pytest.mark.parametrize(
    ("kind", "layers", "found"),
    [
        ("k", 1, "k"), ("k", 2, "k both"), ("k both", 2, "k both"), ("k both", 1, "k both"), ("", 2, ""),
        (None, 0, ""), ("k", 0, "k"),
    ],
)  # fmt: skip
def test_the_class_of_an_older_record(kind: str | None, layers: int, found: str) -> None:
    check: Any = SimpleNamespace(
        metrics={"class": kind, "layers": {str(n): {} for n in range(layers)}}
    )
    assert limit_classes.read_class(check) == found


SAMPLE = Sample("k W8A8", "m", 40.0, 0.98, 0.02, 0.03, "row@h200+x", 7, "2.13", rounding=0.05)
SPREAD = Spread(
    "m", 30.0, 0.99, 0.01, 0.002, "a layer", 5, 3, "1x2x3", "2.14", "cpu", "c" * 9, "2026-11-29T9"
)


def test_the_loosest_source_decides() -> None:
    found = limits.join_sources(SAMPLE, SPREAD, ", and a note")
    assert found.psnr_db == 30.0
    assert found.cosine == pytest.approx(1 - 2.25 * 0.02)
    assert found.relative_l2 == pytest.approx(0.03)
    assert found.layer_error == 0.05
    assert found.decided == "measured, psnr_db by spread, layer_error by rounding"
    assert found.source == (
        "measured: 1.5 x the error of row@h200+x (torch 2.13), and a note; spread: BF16 is 30 dB, "
        "cosine 0.99, relative L2 0.01 and in a layer 0.002 away from FP32 (torch 2.14, 2026-11-29); "
        "rounding: 0.05 in a layer"
    )
    alone = limits.join_sources(SAMPLE, None)
    assert alone.psnr_db == pytest.approx(40 - 3.5218251811136247)
    assert alone.decided == "measured, layer_error by rounding"
    assert alone.source == (
        "measured: 1.5 x the error of row@h200+x (torch 2.13); rounding: 0.05 in a layer"
    )


def test_limits_as_evidence_keeps_them() -> None:
    given = Limits(30.123456, 0.9876543219, 0.12345678, 0.98765432, "s", "d")
    plain = {
        "psnr_db": {"at_least": 30.1235}, "cosine": {"at_least": 0.98765432},
        "relative_l2": {"at_most": 0.123457}, "layer_error": {"at_most": 0.987654},
        "identical": False, "source": "s", "decided": "d",
    }  # fmt: skip
    assert given.to_json() == plain
    assert Limits(30.123456, 0.9876543219, 0.12345678, 0.98765432, "s", "d", "k").to_json() == {
        "class": "k", **plain
    }  # fmt: skip
    assert Limits(1, 1, 1).layer_error == math.inf


def sample(model: str, cell: str, psnr: float, kind: str = "k W8A8") -> Sample:
    return Sample(kind, model, psnr, 0.9, 0.1, 0.1, cell, 1, "2.13")


LEDGER = Ledger(
    [
        sample("m", "a@cpu", 50.0), sample("m", "b@h200", 40.0), sample("n", "c@cpu", 30.0),
        sample("o", "d@h200", 20.0), sample("p", "e@b200", 10.0, "only W8A8 both"),
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "model", "hardware", "of", "note"),
    [
        ("k W8A8", "m", "cpu", "a@cpu", ""),
        ("k W8A8", "m", "b200", "b@h200", ""),
        ("k W8A8", "n", "b200", "c@cpu", ", borrowed from cpu"),
        ("k W8A8", "o", "cpu", "d@h200", ", borrowed from accelerator"),
        ("k W8A8", "q", "cpu", "c@cpu", ", borrowed from n"),
        ("k W8A8", "q", "b200", "d@h200", ", borrowed from o"),
        ("k W8A8 both", "m", "cpu", "a@cpu", "; of k W8A8: k W8A8 both has no sample"),
        ("only W8A8", "q", "cpu", "e@b200",
         ", borrowed from p on accelerator; of only W8A8 both: only W8A8 has no sample"),
    ],
)  # fmt: skip
def test_which_sample_limits_are_of(
    kind: str, model: str, hardware: str, of: str, note: str
) -> None:
    for ledger, more in ((LEDGER, ""), (Ledger([], {}, LEDGER), f"; {limits.BORROWED}")):
        found = ledger.find(kind, model, hardware)
        plain, _, swapped = note.partition("; of ")
        tail = f"; of {swapped}" if swapped else ""
        assert found.source == f"measured: 1.5 x the error of {of} (torch 2.13){plain}{more}{tail}"
        assert found.kind == (limit_classes.swap_count(kind) if swapped else "")


def test_what_was_never_measured() -> None:
    words = "no limits for a run without quantized layers on m"
    with pytest.raises(LimitsError, match=f"^{words}$"):
        LEDGER.find("", "m")
    words = (
        "no limits for z W8A8 on m: measure first, `python -m quantmatrix.proof.limits "
        "reports/evidence reports/limits.csv`"
    )
    with pytest.raises(limits.UnmeasuredError, match=f"^{re.escape(words)}$"):
        LEDGER.find("z W8A8", "m")


def make_record(verdict: str = "pass", layer: float = 0.1, **worst: Any) -> Any:
    check = SimpleNamespace(
        verdict=verdict,
        metrics={"class": "k W8A8", "worst": worst, "layers": {"t": {"worst": layer}}},
    )
    return SimpleNamespace(checks={"latents": check}, cell={"model": "m", "hardware": "cpu"})


@pytest.mark.parametrize(
    ("worst", "layer", "said"),
    [
        ({"psnr_db": 30.0, "cosine": 0.9, "relative_l2": 0.2}, 0.4, []),
        ({"psnr_db": 29.9998}, 0.4, []), ({"psnr_db": 29.9996}, 0.4, ["psnr_db is 29.9996, the limit is 30 now"]),
        ({"psnr_db": 31.0}, 0.400003, []), ({}, 0.41, ["layer_error is 0.41, the limit is 0.4 now"]),
        ({"relative_l2": 0.2 * (1 + 2e-5)}, 0.1, ["relative_l2 is 0.200004, the limit is 0.2 now"]),
        ({"cosine": 0.8, "relative_l2": 0.3}, 0.1,
         ["cosine is 0.8, the limit is 0.9 now", "relative_l2 is 0.3, the limit is 0.2 now"]),
        ({"psnr_db": None}, 0.1, []),
    ],
)  # fmt: skip
def test_limits_that_were_tightened(worst: dict[str, Any], layer: float, said: list[str]) -> None:
    ledger: Any = SimpleNamespace(find=lambda *_: Limits(30.0, 0.9, 0.2, 0.4))
    assert limits.list_exceeded(make_record(layer=layer, **worst), ledger) == said
    assert limits.list_exceeded(make_record("fail", 9.0, **worst), ledger) == []


@pytest.mark.parametrize(
    ("hardware", "side"), [("cpu", "cpu"), ("h200", "accelerator"), ("b", "accelerator"), ("z", "accelerator")]
)  # fmt: skip
def test_sides(hardware: str, side: str) -> None:
    assert limit_samples.name_side(hardware) == side
    assert sample("m", f"row@{hardware}+decode", 1.0).side == side


HEAD = "kind,model,psnr_db,cosine,relative_l2,layer_error,cell,cells,torch"
FULL = f"{HEAD},margin,rounding,decided"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n", f"f:1: expected the columns {FULL}"),
        ("", f"f:1: expected the columns {FULL}"),
        (f"{HEAD},margin\n", f"f:1: expected the columns {FULL}"),
        (f"{HEAD}\nk,m,x,0.9,0.1,0.1,c@cpu,1,2\n", "f:2: could not convert string to float: 'x'"),
        (f"{HEAD}\nk,m,1,0.9,0.1,0.1,,0,2\n",
         "f:2: a limit without its sample: cell, cells missing; measure instead"),
        (f"{HEAD}\nk,m,inf,0.9,nan,0.1,c@cpu,1,2\n", "f:2: psnr_db, relative_l2: not a finite number"),
        (f"{HEAD}\nk,m,1,0.9,0.1,0.1,c@cpu,1,2\nk,n,1,0.9,0.1,0.1,c@cpu,1,2\n"
         "k,m,3,0.9,0.1,0.1,d@cpu+x,1,2\n",
         "f:4: line 2 has a sample of k on m (cpu), too; delete the one that was added"),
    ],
)  # fmt: skip
def test_lines_that_are_no_samples(text: str, words: str) -> None:
    with pytest.raises(LimitsError, match=f"^{re.escape(words)}$"):
        limit_samples.parse_samples(text, "f")


def test_samples_are_written_in_order_and_read_again() -> None:
    given = [sample("n", "c@cpu", 3.0), sample("m", "b@h200", 2.0), sample("m", "a@cpu", 1.5),
             sample("z", "a@cpu", 1.0, "a")]  # fmt: skip
    text = limit_samples.write_rows(Sample, given)
    assert text.splitlines()[:3] == [
        FULL, "a,z,1.0,0.9,0.1,0.1,a@cpu,1,2.13,1.5,0.0,", "k W8A8,m,1.5,0.9,0.1,0.1,a@cpu,1,2.13,1.5,0.0,"
    ]  # fmt: skip
    assert limit_samples.parse_samples(text, "f") == [given[3], given[2], given[1], given[0]]
    old = limit_samples.parse_samples(f"{HEAD}\nk,m,1,0.9,0.1,0.1,c@cpu,3,2\n", "f")
    assert (old[0].margin, old[0].rounding, old[0].decided, old[0].cells) == (1.5, 0.0, "", 3)


# --- limits of the witness -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "kind", "count"),
    [
        (FP8, "witness e4m3 tensor", math.inf),
        (Scheme("o", "n", "int8", "channel", "none"), "witness int8 channel", 256),
        (Scheme("o", "n", "e4m3", "block", "none", block=(3, 5)), "witness e4m3 block 3x5", 15),
        (Scheme("o", "n", "int4", "group", "none", group_size=64, rank=3),
         "witness int4 group 64 low-rank", 64),
        (Scheme("o", "n", "int8", "channel", "none", group_size=64, rank=3),
         "witness int8 channel low-rank", 256),
    ],
)  # fmt: skip
def test_kinds_of_storage(scheme: Scheme, kind: str, count: float) -> None:
    assert witness_limits.name_kind(scheme) == kind
    assert witness_limits.count_group(kind) == count
    assert witness_limits.is_witness(kind)
    assert not witness_limits.is_witness(kind[3:])


def test_bounds_of_a_witness() -> None:
    found = witness_limits.derive(sample("m", "a@cpu", 9.0, "witness e2m1 group 16"), ", x")
    assert found.cosine == pytest.approx(0.9 * (1 - 2.25 * 0.1))
    assert found.scale_error == pytest.approx(0.15 + 0.05 + math.sqrt(1 / 0.81 - 1) / 4)
    assert found.source == "1.5 x the error of a@cpu, and a finetune's 0.9, x"
    assert found.coded_cosine == pytest.approx(found.cosine * 2 / 3)
    assert found.gain == (found.cosine, 1.18)
    assert found.relative_l2 == pytest.approx(math.sqrt(1 + 1.18**2 - 2.36 * found.cosine))
    assert witness_limits.Bounds(0.86, 1.0, "").gain == (0.85, 1.18)


def test_whose_bounds_a_layer_has() -> None:
    block = Scheme("o", "n", "e4m3", "block", "none", block=(3, 5))
    given = [
        sample("m", "a@cpu", 1.0, "witness e4m3 block 3x5"),
        sample("n", "b@cpu", 1.0, "witness e4m3 block 7x7"),
        sample("n", "c@cpu", 1.0, "witness e4m3 tensor"),
    ]
    head = "1.5 x the error of"
    tail = "and a finetune's 0.9"
    found = [
        witness_limits.find(given[at:], block, model)
        for at, model in ((0, "m"), (0, "n"), (1, "n"))
    ]
    assert [one.source for one in found if one] == [
        f"{head} a@cpu, {tail}",
        f"{head} a@cpu, {tail}, borrowed from witness e4m3 block 3x5 on m",
        f"{head} b@cpu, {tail}, borrowed from witness e4m3 block 7x7 on n",
    ]
    assert witness_limits.find(given[2:], block, "n") is None
    assert found[2] is not None
    assert found[2].scale_error == pytest.approx(0.2 + math.sqrt(1 / 0.81 - 1) / math.sqrt(15))


def test_the_worst_of_a_kind_is_its_sample() -> None:
    def layer(cosine: float, l2: float, scale: float, verdict: str = "agrees") -> dict[str, Any]:
        return {"limit": "witness k", "verdict": verdict, "cosine": cosine, "relative_l2": l2,
                "scale_error": scale}  # fmt: skip

    records: list[tuple[Mapping[str, Any], str, Mapping[str, Any]]] = [
        ({"id": "b@cpu", "model": "m"}, "2.13",
         {"t": {"kinds": [layer(0.9, 0.1, 0.3), layer(0.8, 0.2, 0.1, "not judged")]}}),
        ({"id": "a@cpu", "model": "m"}, "2.14",
         {"t": {"kinds": [layer(0.8, 0.05, 0.2), layer(0.1, 9.0, 9.0, "disagrees")]}, "u": {}}),
        ({"id": "a@cpu", "model": "l"}, "2.14", {"t": {"kinds": [layer(1.0, 0.0, 0.0)]}}),
    ]  # fmt: skip
    assert witness_limits.collect(records) == [
        Sample("witness k", "l", 180.0, 1.0, 0.0, 0.0, "a@cpu", 1, "2.14"),
        Sample("witness k", "m", 13.9794, 0.8, 0.2, 0.3, "a@cpu", 2, "2.14"),
    ]


# --- states, scopes, columns -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "rule", "verdicts", "shown"),
    [
        ("failing", "load", {"load": "fail", "trace": "pass"}, True),
        ("failing", "load", {"load": "fail", "trace": "fail"}, False),
        ("failing", "trace", {"load": "fail"}, False),
        ("failing", "load", {"load": "pass", "trace": "pass"}, False),
        ("expected", "load", {"load": "fail", "trace": "pass"}, False),
        ("zzz", "load", {"load": "fail"}, False),
        ("failing", "load", {"load": "fail", "other": "fail"}, True),
        ("failing", "load", {"load": "fail", "trace": "unjudged"}, True),
    ],
)
def test_a_failure_as_claimed(claim: str, rule: str, verdicts: dict[str, str], shown: bool) -> None:
    record: Any = SimpleNamespace(
        checks={name: SimpleNamespace(verdict=verdict) for name, verdict in verdicts.items()},
        cell={"claim": claim, "rule": rule, "checks": ["load", "trace"]},
    )
    assert states.fails_as_claimed(record) is shown


def make_scoped(checks: list[str], command: str = "quantmatrix generate", **checkpoint: str) -> Any:
    return SimpleNamespace(checks=dict.fromkeys(checks), command=command, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("record", "scope"),
    [
        (make_scoped(["load"]), "stand-in"),
        (make_scoped(["load"], repository="o/n", revision="r"), "published"),
        (make_scoped(["load"], repository="o/n"), "stand-in"),
        (make_scoped(["load"], revision="r"), "stand-in"),
        (make_scoped(["load"], "generate --tiny x", repository="o/n", revision="r"), "stand-in"),
        (make_scoped(["load"], "generate --tinyx", repository="o/n", revision="r"), "published"),
        (make_scoped(["true-size"], repository="o/n", revision="r"), "true size"),
        (make_scoped(["true-size", "compile"]), "compiled"),
        (make_scoped(["compile", "load"]), "compiled"),
    ],
)
def test_the_scope_of_a_record(record: Any, scope: str) -> None:
    assert scopes.read_scope(record) == scope


def test_checks_that_do_not_go_together() -> None:
    assert scopes.find_foreign(["load", "true-size", "compile"]) == ["compile", "true-size"]
    assert scopes.find_foreign(["load", "compile"]) == ["compile"]
    assert scopes.find_foreign(["compile"]) == scopes.find_foreign(["load", "trace"]) == []
    assert scopes.find_foreign(["compile", "true-size"]) == ["compile", "true-size"]


@pytest.mark.parametrize(
    ("given", "standing"),
    [
        ({"stand-in": "proven", "true size": "proven"}, ("proven", "true size")),
        ({"stand-in": "proven", "true size": "stale"}, ("proven", "stand-in")),
        ({"compiled": "proven", "stand-in": "failing", "published": "proven"}, ("failing", "stand-in")),
        ({"compiled": "failing", "stand-in": "failing"}, ("failing", "stand-in")),
        ({"stand-in": "unproven", "true size": "stale"}, ("stale", "true size")),
        ({"stand-in": "unjudged", "true size": "stale"}, ("unjudged", "stand-in")),
        ({"stand-in": "refused", "compiled": "unjudged"}, ("refused", "stand-in")),
    ],
)  # fmt: skip
def test_which_record_names_a_cell(given: dict[str, str], standing: tuple[str, str]) -> None:
    found: Any = dict(given)
    decided = scopes.decide(found, lambda state: (str(state), f"why {state}"))
    assert (decided.state, decided.scope) == standing
    assert decided.reason == f"why {decided.state}"
    assert decided.others == tuple((s, given[s]) for s in given if s != decided.scope)
    assert decided.label == " · ".join(standing)


@pytest.mark.parametrize(
    ("state", "says", "text"),
    [
        ("works", [], "undocumented"), ("works", ["works"], "documented"),
        ("works", ["refuses"], "documented to refuse"), ("works", ["refuses", "works"], "documented"),
        ("crashes", [], ""), ("crashes", ["works", "refuses"], "documented to work"),
        ("refuses", ["refuses"], "documented"), ("wrong numbers", ["works"], "documented to work"),
        ("not installed", ["works"], ""), ("not installed", [], ""),
        ("stale", [], ""), ("stale", ["works"], "documented: works"),
        ("unproven", ["works", "refuses", "works"], "documented: refuses and documented: works"),
    ],
)  # fmt: skip
def test_what_was_seen_beside_what_is_documented(state: str, says: list[str], text: str) -> None:
    said: Any = [SimpleNamespace(says=one) for one in says]
    assert columns.compare_said(state, iter(said)) == text


# --- small files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"gain": 0}, ["gain: 0 is not a whole number from 1 on"]),
        ({"gain": True}, ["gain: True is not a whole number from 1 on"]),
        ({"gain": 1.5}, ["gain: 1.5 is not a whole number from 1 on"]),
        ({"shown": ""}, ["shown: '' does not say what is drawn"]),
        ({"shown": 3}, ["shown: 3 does not say what is drawn"]),
        ({"quantized": 7}, ["quantized: 7 does not start with data:image/png;base64,"]),
        ({"baseline": "x" * 99},
         [f"baseline: '{'x' * 39} does not start with data:image/png;base64,"]),
        ({"difference": thumbnails.PNG + "AAAA"}, ["difference: is not a PNG"]),
    ],
)  # fmt: skip
def test_thumbnails_that_are_none(changes: dict[str, Any], said: list[str]) -> None:
    picture = thumbnails.PNG + thumbnails.START.decode()
    plain = {**dict.fromkeys(thumbnails.PICTURES, picture), "gain": 1, "shown": "the picture"}
    given = {**plain, **changes}
    assert thumbnails.list_problems(given) == said
    del given["gain"]
    assert thumbnails.list_problems(given) == [
        "expected an object with baseline, difference, gain, quantized, shown"
    ]


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (16382, None), (16384, "is not base64"),
        (16385, "takes 16385 bytes, at most 16384 are kept"),
    ],
)  # fmt: skip
def test_the_largest_thumbnail(size: int, why: str | None) -> None:
    start = thumbnails.PNG + thumbnails.START.decode()
    assert thumbnails.find_problem(start + "A" * (size - len(start))) == why


def test_a_table_of_classes(tmp_path: Any) -> None:
    line = transformer_classes.ClassLine("A", "0.37", "fp8", "FP8", 7, 5, 0.123456, "agrees", "")
    text = transformer_classes.write_lines([line, transformer_classes.ClassLine("B", "0.37")])
    assert text.splitlines() == [
        "class_name,diffusers,family,scheme,linear,quantized,error,witness,reason",
        "A,0.37,fp8,FP8,7,5,0.1235,agrees,",
        "B,0.37,,,0,0,0,,",
    ]
    path = tmp_path / "t.csv"
    assert transformer_classes.read_lines(path) == ()
    path.write_text(text)
    assert transformer_classes.read_lines(path)[0].error == 0.1235
    path.write_text("a,b\n")
    words = (
        f"{path}: columns are ['a', 'b'], expected ['class_name', 'diffusers', 'family', 'scheme', "
        "'linear', 'quantized', 'error', 'witness', 'reason']: write it again with python -m "
        "quantmatrix.measure.classes"
    )
    with pytest.raises(transformer_classes.CheckpointError, match=f"^{re.escape(words)}$"):
        transformer_classes.read_lines(path)
