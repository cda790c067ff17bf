"""Limits come from measurements, and their loosening is named."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
from observed import WITNESSED

from quantmatrix.errors import UnjudgedError
from quantmatrix.proof import limits, store, witness_limits
from quantmatrix.proof import record as records
from quantmatrix.proof.limit_classes import name_class, read_class
from quantmatrix.proof.limit_samples import LimitsError, Sample, Spread, read_samples
from quantmatrix.proof.limits import Ledger
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.scheme import Scheme
from quantmatrix.tables import read

FLUX = Sample("e4m3 W8A8", "flux-1", 47.5, 0.9996, 0.03, 0.04, "a@cpu", 3, "2.13.0")
WAN = replace(FLUX, model="wan-2-2", psnr_db=40.0, cell="b@cpu")
MADE = {"processor": "some", "commit": "0" * 40, "made": "2026-11-26T20:00:00Z"}
SPREAD = Spread("flux-1", 60.0, 0.9999, 0.01, 0.002, "a.b", 50, 4, "1x64x64", "2.13.0", **MADE)
SPREADS = {"flux-1": SPREAD, "wan-2-2": replace(SPREAD, model="wan-2-2")}
REPORTS = Path(__file__).parents[3] / "reports"


def test_one_and_a_half_times_the_error_is_allowed() -> None:
    found = Ledger([FLUX, WAN]).find("e4m3 W8A8", "flux-1")
    assert found.psnr_db == pytest.approx(47.5 - 20 * math.log10(1.5))
    assert found.cosine == pytest.approx(1 - 2.25 * 0.0004)
    assert found.relative_l2 == pytest.approx(0.045)
    assert found.layer_error == pytest.approx(0.06)
    assert found.source == "measured: 1.5 x the error of a@cpu (torch 2.13.0)"
    assert found.decided == "measured"
    assert found.to_json()["psnr_db"] == {"at_least": round(found.psnr_db, 4)}


def test_another_model_lends_its_worst_sample_and_is_named() -> None:
    found = Ledger([FLUX, WAN]).find("e4m3 W8A8", "z-image")
    assert found.psnr_db == limits.join_sources(WAN, None).psnr_db
    assert found.source.endswith("borrowed from wan-2-2")


def test_accelerators_and_cpus_have_samples_of_their_own() -> None:
    near = replace(FLUX, psnr_db=45.0, cell="a@h200+torch")
    ledger = Ledger([FLUX, near])
    kind, model = FLUX.kind, FLUX.model
    assert ledger.find(kind, model, "h100").psnr_db == limits.join_sources(near, None).psnr_db
    assert ledger.find(kind, model, "cpu").psnr_db == limits.join_sources(FLUX, None).psnr_db
    assert "borrowed" not in ledger.find(kind, model, "h100").source
    lent = Ledger([FLUX]).find(kind, model, "h200")
    assert lent.psnr_db == limits.join_sources(FLUX, None).psnr_db
    assert lent.source.endswith("borrowed from cpu")
    assert (
        Ledger([near])
        .find(kind, "wan-2-2", "cpu")
        .source.endswith("borrowed from flux-1 on accelerator")
    )


def test_a_sample_of_a_new_side_is_compared_with_what_it_had_borrowed() -> None:
    worse = replace(FLUX, psnr_db=45.0, cell="a@h200+torch")
    before = Ledger([FLUX], SPREADS)
    [line] = limits.list_loosened(before, Ledger([FLUX, worse], SPREADS))
    assert line.startswith("e4m3 W8A8 on flux-1 (accelerator): psnr_db")


def test_a_class_that_was_never_measured_has_no_limit() -> None:
    with pytest.raises(limits.UnmeasuredError, match="measure first"):
        Ledger([FLUX, WAN]).find("e2m1 W4A4", "flux-1")


def test_a_run_without_quantized_layers_is_wrong_and_not_only_unmeasured() -> None:
    with pytest.raises(LimitsError, match="without quantized layers") as caught:
        Ledger([FLUX, WAN], fallback=Ledger([FLUX])).find("", "flux-1")
    assert not isinstance(caught.value, UnjudgedError)


def test_a_class_that_a_project_lacks_is_judged_by_the_fallback_and_says_so() -> None:
    ours = Ledger([replace(FLUX, kind="e2m1 W4A4")])
    own = Ledger([FLUX], fallback=ours)
    assert own.find("e2m1 W4A4", "flux-1").source.endswith(limits.BORROWED)
    assert limits.BORROWED not in own.find(FLUX.kind, "flux-1").source
    with pytest.raises(limits.UnmeasuredError):
        own.find("int3 W3A3", "flux-1")


def test_classes_are_named_by_their_layers() -> None:
    fp8 = Scheme("linear.fp8", "", "e4m3", "tensor", "tensor-dynamic")
    nvfp4 = Scheme("linear.nvfp4", "", "e2m1", "group", "group-dynamic")
    layers = [(fp8, "W8A8"), (nvfp4, "W4A4"), (replace(fp8, scale="block"), "W8A8")]
    assert name_class(layers) == "e2m1 W4A4 + e4m3 W8A8"
    assert name_class(layers, []) == "e2m1 W4A4 + e4m3 W8A8"
    assert name_class(layers[:1], layers[:1]) == "e4m3 W8A8 both"
    assert name_class(layers[:1], layers[1:2]) == "e2m1 W4A4 + e4m3 W8A8 both"
    assert name_class([], []) == ""


BOTH = replace(FLUX, kind="e4m3 W8A8 both", psnr_db=41.0)


@pytest.mark.parametrize(
    ("samples", "kind", "psnr_db", "told"),
    [
        ([FLUX, BOTH], BOTH.kind, BOTH.psnr_db, ""),
        ([FLUX, BOTH], FLUX.kind, FLUX.psnr_db, ""),
        ([FLUX], BOTH.kind, FLUX.psnr_db, FLUX.kind),
        ([BOTH], FLUX.kind, BOTH.psnr_db, BOTH.kind),
    ],
)
def test_a_number_of_components_without_a_sample_is_judged_by_the_other_and_says_so(
    samples: list[Sample], kind: str, psnr_db: float, told: str
) -> None:
    found = Ledger(samples).find(kind, "flux-1")
    assert found.psnr_db == pytest.approx(psnr_db - 20 * math.log10(limits.MARGIN))
    assert found.kind == told
    assert found.to_json().get("class", "") == told
    assert (f"of {told}: {kind} has no sample" in found.source) == bool(told)


def test_the_fallbacks_own_class_comes_before_the_other_number_of_components() -> None:
    own = Ledger([FLUX], fallback=Ledger([BOTH]))
    assert own.find(BOTH.kind, "flux-1").psnr_db < own.find(FLUX.kind, "flux-1").psnr_db
    assert own.find(BOTH.kind, "flux-1").kind == ""


@pytest.mark.parametrize(
    ("weight", "scale", "activation", "expected"),
    [
        ("e4m3", "block", "group-power", "mx-e4m3"),
        ("e2m1", "group", "group-power", "mx-e2m1"),
        ("e2m1", "group", "group-dual", "mx-e2m1"),
        ("e2m1", "group", "group-dynamic", "e2m1"),
        ("int8", "tensor", "none", "int8-tensor"),
        ("int8", "channel", "none", "int8"),
        ("e4m3", "tensor", "none", "e4m3"),
    ],
)
def test_a_class_says_how_weights_are_rounded(
    weight: str, scale: str, activation: str, expected: str
) -> None:
    """Powers of two cut numbers off, and one scale for all integers of a layer rounds the small ones
    away: neither is judged by the limits of other scales."""
    scheme = Scheme("linear.x", "", weight, scale, activation)
    assert name_class([(scheme, "W8A16")]) == f"{expected} W8A16"


def make(name: str, psnr: float, *, verdict: str = "pass", limited: bool = True) -> Evidence:
    row, _, hardware = name.partition("@")
    cell = {**dict.fromkeys(records.CELL_KEYS, ""), "id": name, "row": row, "hardware": hardware}
    worst = {"psnr_db": psnr, "cosine": 1 - 1 / psnr, "relative_l2": 1 / psnr}
    bounds = {"psnr_db": {"at_least": 10.0}} if limited else {}
    layers = {"transformer": {"worst": 2 / psnr}}
    metrics = {"worst": worst, "layers": layers, "class": "e4m3 W8A8"}
    check = CheckResult(verdict, metrics, bounds, "far")
    found = {**cell, "model": "flux-1", "flags": [], "checks": []}
    return Evidence(cell=found, checks={"latents": check}, versions={"torch": "2.13.0"})


def test_what_witnesses_measured_is_kept_where_no_record_tells_of_it(tmp_path: Path) -> None:
    """The worst of the layers that agreed; older lines of other kinds stay, this one's do not."""
    near, far, wrong = (copy.deepcopy(WITNESSED) for _ in range(3))
    far["transformer"]["kinds"][0] |= {"cosine": 0.9, "relative_l2": 0.4, "scale_error": 0.02}
    wrong["transformer"]["kinds"][0] |= {"cosine": 0.1, "verdict": "disagrees"}
    records_of = {
        name: replace(make(name, 45.0), witness=witness)
        for name, witness in (("a@cpu", near), ("b@cpu", far), ("c@cpu", wrong))
    }
    older = [
        replace(FLUX, kind="witness e4m3 tensor", cosine=0.5),
        replace(FLUX, kind="witness int8 channel", cosine=0.99),
    ]
    path = tmp_path / "limits.csv"
    path.write_text(limits.write_rows(Sample, older))
    found = {sample.kind: sample for sample in limits.collect_witness(records_of, path)}
    assert set(found) == {"witness e4m3 tensor", "witness int8 channel"}
    measured = found["witness e4m3 tensor"]
    assert (measured.cosine, measured.relative_l2, measured.layer_error) == (0.9, 0.4, 0.02)
    assert (measured.cell, measured.cells, measured.model) == ("b@cpu", 2, "flux-1")
    assert found["witness int8 channel"].cosine == 0.99


def test_samples_are_the_worst_of_what_passed_or_had_no_limit() -> None:
    evidence = {
        record.cell["id"]: record
        for record in (
            make("a@cpu", 50.0),
            make("b@cpu", 40.0),
            make("c@cpu", 5.0, verdict="fail"),
            make("d@cpu", 30.0, verdict="fail", limited=False),
        )
    }
    [found] = limits.collect_samples(evidence)
    expected = (30.0, 1 - 1 / 30, 1 / 30, 2 / 30)
    assert found == Sample("e4m3 W8A8", "flux-1", *expected, "d@cpu", 3, "2.13.0")
    evidence["e@h200"] = make("e@h200", 20.0)
    found, other = limits.collect_samples(evidence)
    assert (found.cell, found.psnr_db) == ("d@cpu", 30.0)
    assert (other.cell, other.psnr_db, other.side) == ("e@h200", 20.0, "accelerator")


def test_what_failed_by_the_limits_of_another_number_of_components_is_a_sample() -> None:
    """Its own class has none yet: left out, both experts would never have limits."""
    one, both = make("a@cpu", 45.0), make("b@cpu", 38.0, verdict="fail")
    both.checks["latents"].metrics["class"] = BOTH.kind
    for record in (one, both):
        record.cell["model"] = "wan-2-2"
    alone = limits.collect_samples({"a@cpu": one})
    both.checks["latents"].limits.update(Ledger(alone).find(BOTH.kind, "wan-2-2").to_json())
    found = {s.kind: s for s in limits.collect_samples({"a@cpu": one, "b@cpu": both})}
    assert {kind: s.cell for kind, s in found.items()} == {FLUX.kind: "a@cpu", BOTH.kind: "b@cpu"}
    both.checks["latents"].limits.pop("class")
    assert set(limits.collect_samples({"a@cpu": one, "b@cpu": both})) == set(alone)


def test_a_record_of_two_components_is_of_both_though_its_class_does_not_say_so() -> None:
    older = make("a@cpu", 38.0)
    layers = older.checks["latents"].metrics["layers"]
    layers["transformer_2"] = layers["transformer"]
    [sample] = limits.collect_samples({"a@cpu": older})
    assert sample.kind == BOTH.kind
    assert limits.list_exceeded(older, Ledger([sample])) == []
    near = replace(sample, kind=FLUX.kind, psnr_db=60.0)
    assert limits.list_exceeded(older, Ledger([sample, near])) == []


def test_a_record_is_held_to_the_limits_as_they_are_now() -> None:
    record = make("a@cpu", 38.0)
    [sample] = limits.collect_samples({"a@cpu": record})
    assert limits.list_exceeded(record, Ledger([sample])) == []
    tighter = replace(sample, psnr_db=60.0, layer_error=0.01)
    assert limits.list_exceeded(record, Ledger([tighter])) == [
        "psnr_db is 38, the limit is 56.4782 now",
        "layer_error is 0.0526316, the limit is 0.015 now",
    ]
    assert "measure first" in limits.list_exceeded(record, Ledger([]))[0]
    assert limits.list_exceeded(make("a@cpu", 38.0, verdict="fail"), Ledger([tighter])) == []


def test_a_record_without_measured_layers_is_no_sample() -> None:
    record = make("a@cpu", 50.0)
    del record.checks["latents"].metrics["layers"]
    assert limits.collect_samples({"a@cpu": record}) == []


@pytest.mark.parametrize(
    ("metric", "wide"),
    [("psnr_db", 30.0), ("cosine", 0.9), ("relative_l2", 0.2), ("layer_error", 0.3)],
)
def test_a_wider_spread_decides(metric: str, wide: float) -> None:
    """No run is asked to be nearer to BF16 than BF16 is to FP32; the spread has no margin."""
    alone = Ledger([FLUX]).find("e4m3 W8A8", "flux-1")
    tight = Ledger([FLUX], SPREADS).find("e4m3 W8A8", "flux-1")
    found = Ledger([FLUX], {"flux-1": replace(SPREAD, **{metric: wide})}).find(
        "e4m3 W8A8", "flux-1"
    )
    for name in limits.SIGNS:
        assert getattr(tight, name) == getattr(alone, name)
        assert getattr(found, name) == (wide if name == metric else getattr(alone, name))
    assert tight.decided == "measured"
    assert found.decided == f"measured, {metric} by spread"
    assert "spread: BF16 is" in found.source
    assert "(torch 2.13.0, 2026-11-26)" in found.source


def test_rounding_decides_where_the_sample_is_nearer() -> None:
    near = replace(FLUX, layer_error=0.03, rounding=0.051)
    found = Ledger([near], SPREADS).find("e4m3 W8A8", "flux-1")
    assert found.layer_error == 0.051
    assert found.decided == "measured, layer_error by rounding"
    assert found.source.endswith("rounding: 0.051 in a layer")
    far = replace(near, layer_error=0.04)
    assert Ledger([far], SPREADS).find("e4m3 W8A8", "flux-1").layer_error == pytest.approx(0.06)


def test_a_borrowed_limit_has_the_spread_of_its_own_model() -> None:
    spreads = {**SPREADS, "z-image": replace(SPREAD, model="z-image", psnr_db=20.0)}
    assert Ledger([FLUX, WAN], spreads).find("e4m3 W8A8", "z-image").psnr_db == 20.0


def test_samples_read_back(tmp_path: Path) -> None:
    path = tmp_path / "limits.csv"
    assert limits.write(Ledger([WAN, FLUX], SPREADS), path) == []
    found = limits.read(path)
    assert [sample.model for sample in found.samples] == ["flux-1", "wan-2-2"]
    assert {sample.decided for sample in found.samples} == {"measured"}
    assert {sample.rounding for sample in found.samples} == {0.051031}
    assert found.spreads == SPREADS
    path.write_text(path.read_text().replace("47.5", "many"))
    with pytest.raises(LimitsError, match=r"limits\.csv:2: .*many"):
        limits.read(path)
    path.write_text("kind,model\n")
    with pytest.raises(LimitsError, match=r"limits\.csv:1: expected the columns"):
        limits.read(path)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (",a@cpu,3,", ",,3,", "a limit without its sample: cell"),
        (",a@cpu,3,", ",a@cpu,0,", "a limit without its sample: cells"),
        (",2.13.0,1.5", ",,1.5", "a limit without its sample: torch"),
        ("47.5,", "-inf,", "psnr_db: not a finite number"),
        (",1.5,", ",3.0,", "margin is 3.0, not 1.5"),
        (",0.051031,", ",0.5,", "rounding is 0.5, not 0.051031"),
        (",measured", ",spread", "decided is 'spread', not 'measured'"),
    ],
)
def test_a_bare_number_is_no_limit(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = tmp_path / "limits.csv"
    limits.write(Ledger([FLUX], SPREADS), path)
    limits.read(path)
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(LimitsError, match=why):
        limits.read(path)


def test_a_model_without_spread_is_named(tmp_path: Path) -> None:
    path = tmp_path / "limits.csv"
    limits.write(Ledger([FLUX, WAN], {"flux-1": SPREAD}), path)
    with pytest.raises(LimitsError, match=r"no spread of wan-2-2 in spread\.csv"):
        limits.read(path)
    spreads = tmp_path / "spread.csv"
    spreads.write_text(spreads.read_text().replace("2026-11-26T20:00:00Z", ""))
    with pytest.raises(LimitsError, match=r"spread\.csv:2: a limit without its sample: made"):
        limits.read(path)


def test_files_of_earlier_revisions_are_read(tmp_path: Path) -> None:
    """Nine columns: measured alone, times 1.5."""
    limits.write(Ledger([FLUX], SPREADS), tmp_path / "limits.csv")
    lines = (tmp_path / "limits.csv").read_text().splitlines()
    older = tmp_path / "older.csv"
    older.write_text("".join(f"{line.rsplit(',', 3)[0]}\n" for line in lines))
    assert older.read_text().startswith("kind,model,psnr_db,cosine,relative_l2,layer_error,cell,")
    assert read_samples(older) == [FLUX]


def test_loosening_is_named() -> None:
    tighter, looser = replace(FLUX, psnr_db=48.0), replace(WAN, psnr_db=39.0)
    before = Ledger([FLUX, WAN], SPREADS)
    assert limits.list_loosened(before, Ledger([tighter, WAN], SPREADS)) == []
    [first, second] = limits.list_loosened(before, Ledger([looser], SPREADS))
    assert "flux-1 (cpu): no longer measured" in first
    assert (
        "on wan-2-2 (cpu): psnr_db 36.4782 -> 35.4782 (was measured: 1.5 x the error of b@"
        in second
    )


@pytest.mark.parametrize(
    ("sample", "spread", "metric"),
    [
        (replace(FLUX, margin=2.0), SPREAD, "layer_error 0.06 -> 0.08"),
        (replace(FLUX, rounding=0.07), SPREAD, "layer_error 0.06 -> 0.07"),
        (FLUX, replace(SPREAD, relative_l2=0.5), "relative_l2 0.045 -> 0.5"),
    ],
)
def test_every_source_can_loosen(sample: Sample, spread: Spread, metric: str) -> None:
    [line] = limits.list_loosened(Ledger([FLUX], SPREADS), Ledger([sample], {"flux-1": spread}))
    assert metric in line
    assert limits.list_loosened(Ledger([sample], {"flux-1": spread}), Ledger([FLUX], SPREADS)) == []


def test_measuring_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "limits.csv"
    (tmp_path / "spread.csv").write_text(limits.write_rows(Spread, [SPREAD]))
    store.write(make("a@cpu", 50.0), tmp_path / "evidence")
    assert limits.main([str(tmp_path / "evidence"), str(path)]) == 0
    store.write(make("b@cpu", 40.0), tmp_path / "evidence")
    assert limits.main([str(tmp_path / "evidence"), str(path)]) == 0
    assert "loosened: e4m3 W8A8 on flux-1 (cpu): psnr_db 46.4782" in capsys.readouterr().out
    assert [sample.cell for sample in limits.read(path).samples] == ["b@cpu"]
    store.write(make("c@cpu", 5.0, verdict="fail"), tmp_path / "evidence")
    assert limits.main(["--anew", str(tmp_path / "evidence"), str(path)]) == 0
    assert [sample.cell for sample in limits.read(path).samples] == ["c@cpu"]
    assert list(limits.read(path).spreads) == ["flux-1"]


def test_the_samples_of_this_project_are_sound() -> None:
    path = REPORTS / "limits.csv"
    ledger = limits.read(path)
    samples = ledger.samples
    assert path.read_text() == limits.write_rows(Sample, samples)
    assert len({(s.kind, s.model, s.side) for s in samples}) == len(samples)
    evidence = store.read_folder(REPORTS / "evidence")
    for sample, allowed in ledger.list_limits():
        assert 0 < sample.psnr_db < 100
        assert allowed.cosine > 0.7, sample  # else the limit proves nothing
        assert 0 < allowed.layer_error < 0.7, sample
        record = evidence[sample.cell]  # what was measured can be looked up
        assert record.cell["model"] == sample.model
        if not witness_limits.is_witness(sample.kind):
            kind = read_class(record.checks["latents"])
            assert sample.kind in (
                kind,
                limits.swap_count(kind),
            )  # measured before `both` was a class
        elif record.witness:
            kinds = [k["limit"] for part in record.witness.values() for k in part["kinds"]]
            assert sample.kind in kinds


def test_one_class_is_measured_and_all_other_lines_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "limits.csv"
    limits.write(Ledger([FLUX, replace(BOTH, psnr_db=20.0)], SPREADS), path)
    one, both = make("a@cpu", 30.0), make("b@cpu", 38.0)
    both.checks["latents"].metrics["class"] = BOTH.kind
    for record in (one, both):
        store.write(record, tmp_path / "evidence")
    words = [str(tmp_path / "evidence"), str(path), "--only"]
    assert limits.main([*words, BOTH.kind]) == 0
    found = {sample.kind: sample.psnr_db for sample in limits.read(path).samples}
    assert found == {FLUX.kind: FLUX.psnr_db, BOTH.kind: 38.0}
    assert limits.main([*words, "int3 W3A3"]) == 1
    assert "--only 'int3 W3A3': no record has a sample of it" in capsys.readouterr().err


def test_every_model_of_this_project_has_a_spread() -> None:
    spreads = limits.read(REPORTS / "limits.csv").spreads
    assert set(spreads) == set(read.read().models)
    for spread in spreads.values():
        assert 30 < spread.psnr_db < 90, spread
        assert 0 < spread.layer_error < 0.01, spread  # half a unit of BF16 is 2^-9


@pytest.mark.parametrize("folder", ["none", "empty", "damaged"])
def test_measuring_nothing_leaves_the_limits_as_they_were(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "cpu").mkdir(parents=True)
    (tmp_path / "damaged" / "cpu" / "a.json").write_text("{")
    path = tmp_path / "limits.csv"
    limits.write(Ledger([FLUX], SPREADS), path)
    before = path.read_bytes()
    capsys.readouterr()
    assert limits.main([str(tmp_path / folder), str(path)]) == 1
    said = "not JSON" if folder == "damaged" else "stays as it is"
    assert said in capsys.readouterr().err
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("damaged", "empty", "limits.csv", "spread.csv"),
    ]
