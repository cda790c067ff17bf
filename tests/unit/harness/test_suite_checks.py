"""What the suites' own checks accept and refuse, on made-up models and answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from quantmatrix import exit_codes
from quantmatrix.errors import UnusableError
from quantmatrix.measure import latents, true_size
from quantmatrix.proof import known_limits, limit_classes
from quantmatrix.runtime import quantized_linear
from quantmatrix.suites import test_generate as generate_suite
from quantmatrix.suites import test_load as load_suite
from quantmatrix.suites import test_true_size as true_suite
from quantmatrix.suites.command import Commanded

if TYPE_CHECKING:
    from pathlib import Path

SQUARE = 2 * 1024 * 1024
"""Bytes of 1024 x 1024 weights of 16 bits."""


class Layer(nn.Module):
    """As much of a quantized layer as the checks look at."""

    def __init__(self, codes: int, bytes_of_square: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = 6, 10, "a scheme"
        self.kernel = SimpleNamespace(footprint=lambda *_: bytes_of_square)
        self.register_buffer("codes", torch.zeros(codes, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(99, dtype=torch.bfloat16))


@pytest.mark.parametrize(("bytes_of_square", "decoded"), [(SQUARE, True), (SQUARE - 1, False)])
def test_sixteen_bits_a_weight_are_decoded_ones(bytes_of_square: int, decoded: bool) -> None:
    assert load_suite.holds_numbers(Layer(0, bytes_of_square)) is decoded


@pytest.mark.parametrize(
    ("codes", "bytes_of_square", "kept"),
    [(30, 0, True), (31, 0, True), (29, 0, False), (0, SQUARE, True), (0, SQUARE - 1, False)],
)
def test_a_layer_that_keeps_codes_has_half_a_byte_for_each_weight(
    codes: int, bytes_of_square: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear, "QuantizedLinear", Layer)
    job: Any = SimpleNamespace(request=SimpleNamespace(dtype="bfloat16"))
    model = nn.Sequential(Layer(codes, bytes_of_square), nn.LayerNorm(3).float())
    if kept:
        counted = load_suite.count_dtypes(job, None, model)
        assert counted == {"uint8": 1, "bfloat16": 1, "float32": 2}
        return
    with pytest.raises(AssertionError, match="0: no codes are kept"):
        load_suite.count_dtypes(job, None, model)


def test_parameters_of_another_dtype_are_named() -> None:
    job: Any = SimpleNamespace(request=SimpleNamespace(dtype="bfloat16"))
    with pytest.raises(AssertionError, match=r"another dtype than .*: \['1\.weight', '1\.bias'\]"):
        load_suite.count_dtypes(job, None, nn.Sequential(nn.ReLU(), nn.LayerNorm(3).half()))


@pytest.mark.parametrize("code", [1, 13, exit_codes.ENVIRONMENT_UNUSABLE, 15])
def test_a_machine_that_cannot_is_no_violated_claim(code: int, tmp_path: Path) -> None:
    done = Commanded(tmp_path, code, "", "why", 1.0, planned=True)
    proof: Any = SimpleNamespace(timings={}, folders={})
    nothing: Any = None
    error = UnusableError if code == exit_codes.ENVIRONMENT_UNUSABLE else AssertionError
    with pytest.raises(error, match="why"):
        generate_suite.test_generate(nothing, proof, lambda: done)


@pytest.mark.parametrize(
    ("verdict", "tiny", "good"),
    [(None, True, True), ("agrees", True, True), ("odd", True, False), ("odd", False, True)],
)
def test_the_witness_of_a_stand_in_must_agree(
    verdict: str | None, tiny: bool, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = verdict and SimpleNamespace(verdict=verdict, to_json=lambda: verdict)
    model = SimpleNamespace(witness=witness)
    for name, given in {
        "load_component": model, "count_layers": 1, "count_tensors": 2, "count_dtypes": 3,
        "assert_finite": None, "is_kept": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(load_suite, name, lambda *_, given=given: given)
    row = SimpleNamespace(components=["transformer"], kept="", base="a base")
    bench: Any = SimpleNamespace(tables=SimpleNamespace(checkpoints={"row": row}), tiny=tiny)
    base = SimpleNamespace(reference="a base")
    part = SimpleNamespace(family="fp8", layers=["a"], why="", base=base)
    job: Any = SimpleNamespace(
        quantized={"transformer": part}, plan=SimpleNamespace(encoders={}),
        request=SimpleNamespace(component_paths={}, weights_paths={"transformer": "w"}),
    )  # fmt: skip
    cell: Any = SimpleNamespace(checkpoint="row", family="fp8")
    proof: Any = SimpleNamespace(timings={}, metrics={}, witness={})
    if good:
        load_suite.test_load(cell, job, bench, proof)
    else:
        with pytest.raises(AssertionError, match="odd"):
            load_suite.test_load(cell, job, bench, proof)
    assert proof.witness == ({"transformer": verdict} if verdict and good else {})
    assert proof.metrics == {"transformer": {"layers": 1, "tensors": 2, "dtypes": 3}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"worst": 0.0501}, "relative error 0.0501 of a layer on its own input, the limit is 0.05"),
        ({"finite": False}, "NaN or infinite"),
        ({"repeats": False}, "other bits the second time"),
        ({"identical": True}, "nothing is quantized"),
    ],
)
def test_what_a_run_at_true_size_is_held_to(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer exactly at its limit is within it."""
    given = {"worst": 0.05, "finite": True, "repeats": True, "identical": False, **changes}
    part = SimpleNamespace(checkpoint=SimpleNamespace(files=["f"]), pieces=list)
    metrics = {
        "finite": given["finite"], "repeats": given["repeats"], "layers": "...",
        "worst": {"identical": given["identical"]},
    }  # fmt: skip
    found = SimpleNamespace(
        plan=SimpleNamespace(components={true_size.COMPONENT: part}, to_json=dict),
        tell_times=dict, quantized=SimpleNamespace(latents=[]), to_json=lambda: metrics,
        errors=SimpleNamespace(worst=given["worst"]),
    )  # fmt: skip
    monkeypatch.setattr(true_size, "measure", lambda *_: found)
    monkeypatch.setattr(latents, "digest_latents", lambda _: "sha256:1")
    monkeypatch.setattr(limit_classes, "name_run", lambda parts: "a class" * (parts == [part]))
    allowed = SimpleNamespace(layer_error=0.05)
    ledger = SimpleNamespace(find=lambda *asked: allowed if asked == ASKED else None)
    monkeypatch.setattr(known_limits, "read", lambda _: ledger)
    bench: Any = SimpleNamespace(
        release=lambda: None, request=lambda _: None, folders=lambda _: {},
        tables=SimpleNamespace(checkpoints={"row": None}),
    )  # fmt: skip
    cell: Any = SimpleNamespace(id="a cell", checkpoint="row", model="m", hardware="cpu")
    proof: Any = SimpleNamespace(timings={}, metrics={}, limits={})
    if not said:
        true_suite.test_true_size(cell, bench, proof, tmp_path, tmp_path)
        assert proof.command == "quantmatrix true-size a cell"
    else:
        with pytest.raises(AssertionError, match=said):
            true_suite.test_true_size(cell, bench, proof, tmp_path, tmp_path)
    assert proof.limits == {
        "layer_error": {"at_most": 0.05}, "repeats": True, "finite": True, "identical": False
    }  # fmt: skip


ASKED = "a class", "m", "cpu"
