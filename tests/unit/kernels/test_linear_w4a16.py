"""linear.w4a16: the AWQ layers of SVDQuant against the format's formula."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import svdq_oracle as oracle
import torch
from torch.nn import functional

from quantmatrix import kernels
from quantmatrix.families import nunchaku_svdq
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import Kernel, linear_w4a16

AWQ = nunchaku_svdq.SCHEMES["awq"]
ROWS, COLUMNS = 96, 192


def make_layer() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
    bias = torch.randn(ROWS, generator=generator)
    return nunchaku_svdq.quantize(weight, AWQ, bias=bias)


def make_input(rows: int = 19) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(3))


def find_kernel(backend: str) -> Kernel:
    return next(kernel for kernel in linear_w4a16.KERNELS if kernel.backend == backend)


def run(
    backend: str, x: torch.Tensor, stored: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    canonical = nunchaku_svdq.canonical(stored, AWQ)
    bias = canonical.pop("bias").to(dtype)
    kernel = find_kernel(backend)
    return kernel.run(x.to(dtype), kernel.prepare(canonical, AWQ, dtype), bias, AWQ)


@pytest.mark.parametrize("backend", ["reference", "decode", "merged"])
def test_backends_are_the_formula(backend: str) -> None:
    stored, x = make_layer(), make_input()
    expected = functional.linear(x.double(), oracle.take_awq(stored), stored["bias"].double())
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        found = run(backend, x.view(1, 19, -1), stored, dtype)
        assert (found.shape, found.dtype) == ((1, 19, ROWS), dtype)
        assert oracle.relative_error(found[0], expected) < limit
    weight, bias = kernels.decode(AWQ, nunchaku_svdq.canonical(stored, AWQ))
    assert oracle.relative_error(weight, oracle.take_awq(stored)) < 1e-6
    assert bias is not None
    assert torch.equal(bias, stored["bias"].float())


def test_rows_and_padding_of_scales() -> None:
    """Converted files may hold more rows of scales than the layer has groups."""
    stored = make_layer()
    canonical = nunchaku_svdq.canonical(stored, AWQ)
    padded = {
        name: functional.pad(tensor, (0, 0, 0, 13)) if name in ("wscales", "wzeros") else tensor
        for name, tensor in stored.items()
    }
    for name, tensor in nunchaku_svdq.canonical(padded, AWQ).items():
        assert torch.equal(tensor, canonical[name])
    rows = torch.arange(ROWS - 1, -1, -1)
    taken = linear_w4a16.take_rows(canonical, rows)
    assert torch.equal(linear_w4a16.decode(taken, AWQ), linear_w4a16.decode(canonical, AWQ)[rows])
    assert torch.equal(taken["bias"], stored["bias"][rows])


@pytest.mark.parametrize("backend", ["reference", "decode", "merged"])
def test_footprints(backend: str) -> None:
    canonical = nunchaku_svdq.canonical(make_layer(), AWQ)
    bias = canonical.pop("bias")
    kept = find_kernel(backend).prepare(canonical, AWQ, torch.bfloat16)
    size = sum(t.numel() * t.element_size() for t in (*kept.values(), bias))
    assert find_kernel(backend).footprint(AWQ, ROWS, COLUMNS, 2) == size


def test_a_decoded_weight_and_its_bias_by_the_formula() -> None:
    assert linear_w4a16.measure_decoded(AWQ, 3, 5, 2) == 3 * 5 * 2 + 3 * 2


def test_codes_of_the_writer() -> None:
    """Zeros are -(7 x scale), and errors stay within half a step where nothing is cut off."""
    weight = torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS).bfloat16()
    stored = nunchaku_svdq.quantize(weight, AWQ)
    assert torch.equal(stored["wzeros"], (-7 * stored["wscales"].float()).bfloat16())
    step = stored["wscales"].double().T.repeat_interleave(64, dim=1)
    error = (oracle.take_awq(stored) - weight.double()).abs()
    assert (error <= 1.1 * step).all()
    assert oracle.relative_error(oracle.take_awq(stored), weight) < 0.1
    assert nunchaku_svdq.dequantize(stored, AWQ).shape == weight.shape
    assert set(stored) == {"qweight", "wscales", "wzeros"}


def test_calibrated_bias_takes_up_what_codes_lose() -> None:
    """A modulation's input hardly moves, so the mean error is known and goes into the bias."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
    bias = torch.zeros(ROWS).bfloat16()
    x = torch.rand(5, COLUMNS, generator=generator) * 0.1 + torch.rand(COLUMNS)
    expected = functional.linear(x, weight.float())
    found = {}
    for name, ranges in (("blind", None), ("known", Calibration(x.amin(0), x.amax(0)))):
        stored = nunchaku_svdq.quantize(weight, AWQ, bias=bias, calibration=ranges)
        found[name] = oracle.relative_error(run("merged", x, stored, torch.float32), expected)
    assert found["known"] < 0.3 * found["blind"]


def test_engine_takes_eight_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, calls = make_layer(), []

    def play(**named: Any) -> torch.Tensor:
        calls.append(named["m"])
        assert named["m"] == named["in_feats"].shape[0] <= 8
        assert (named["n"], named["k"], named["group_size"]) == (ROWS, COLUMNS, 64)
        layer = {
            "qweight": named["kernel"],
            "wscales": named["scaling_factors"],
            "wzeros": named["zeros"],
        }
        assert all(torch.equal(layer[name], stored[name]) for name in layer)
        y = named["in_feats"].double() @ oracle.take_awq(layer).T
        return y.to(named["in_feats"].dtype)

    gemv = SimpleNamespace(awq_gemv_w4a16_cuda=play)
    monkeypatch.setitem(sys.modules, "nunchaku", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "nunchaku.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "nunchaku.ops.gemv", gemv)
    x = make_input(19)
    y = run("nunchaku", x, stored, torch.bfloat16)
    assert calls == [8, 8, 3]
    assert oracle.relative_error(y, run("reference", x, stored, torch.float32)) < 8e-3


def test_comfy_kitchen_gets_zeros_of_code_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = make_layer()

    def play(
        rows: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor,
        group: int,
    ) -> torch.Tensor:
        assert (weight.dtype, group) == (torch.int8, 64)
        nibbles = weight.view(torch.uint8).long()
        codes = torch.stack([nibbles % 16, nibbles // 16], dim=2).flatten(1)
        spread = [t.double().T.repeat_interleave(group, dim=1) for t in (scales, zeros)]
        return rows.double() @ ((codes - 8) * spread[0] + spread[1]).T + bias.double()

    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(gemv_awq_w4a16=play))
    x = make_input(18)
    y = run("comfy-kitchen", x.view(2, 9, -1), stored, torch.bfloat16)
    assert (y.shape, y.dtype) == ((2, 9, ROWS), torch.bfloat16)
    assert oracle.relative_error(y.view(18, -1), run("reference", x, stored, torch.float32)) < 8e-3
