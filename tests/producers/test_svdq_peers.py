"""SVDQuant layers against comfy-kitchen's eager operations, which take the same codes on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantmatrix import kernels
from quantmatrix.families import nunchaku_svdq
from quantmatrix.families.protocol import Calibration
from quantmatrix.runtime.quantized_linear import QuantizedLinear

pytest.importorskip("comfy_kitchen")

LIMIT = 3e-2
"""Relative L2: comfy-kitchen's scales and sums are 16-bit where `reference` is exact."""
KINDS = ["int4_r16", "int4_r32", "int4_r128", "unsigned", "awq"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(256, 384), (384, 128)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_comfy_kitchen_agrees_with_reference(kind: str, shape: tuple[int, int], bias: bool) -> None:
    rows, columns = shape
    schemes = nunchaku_svdq.SCHEMES
    scheme = schemes["int4_r32" if kind == "unsigned" else kind]
    if kind == "unsigned":
        scheme = replace(scheme, unsigned=True)
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()
    x = torch.randn(40, columns, generator=generator)
    x[:, 3] *= 12
    x = (torch.nn.functional.gelu(x, approximate="tanh") if kind == "unsigned" else x).bfloat16()
    added = torch.randn(rows, generator=generator).bfloat16() if bias else None
    calibration = Calibration(x.float().amin(dim=0), x.float().amax(dim=0))
    made = nunchaku_svdq.quantize(weight, scheme, bias=added, calibration=calibration)
    canonical = nunchaku_svdq.canonical(made, scheme)
    found = {kernel.backend: kernel for kernel in kernels.kernels_of(scheme.op)}
    with torch.no_grad():
        theirs, ours, plain = (
            QuantizedLinear(columns, rows, found[name], scheme, dict(canonical), torch.bfloat16)(
                x
            ).float()
            for name in ("comfy-kitchen", "reference", "decode")
        )
    assert (theirs - ours).norm() <= LIMIT * ours.norm()
    if kind != "awq" and scheme.rank < min(shape):  # else there is little or nothing to code
        assert (theirs - ours).norm() < 0.5 * (plain - ours).norm()
