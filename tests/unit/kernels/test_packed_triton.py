"""Weights decoded on every call, on CUDA: the numbers of the backends that decode at load."""

from __future__ import annotations

import pytest
import torch

from quantmatrix import families, kernels
from quantmatrix.families.protocol import Calibration
from quantmatrix.runtime.quantized_linear import QuantizedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PAIRS = [
    ("modelopt-nvfp4", "NVFP4", "packed", "decode"),
    ("modelopt-nvfp4", "NVFP4", "packed-fp8", "fp8-recode"),
    ("nunchaku-svdq", "int4_r32", "packed", "merged"),
    ("nunchaku-svdq", "nvfp4_r32", "packed", "merged"),
    ("nunchaku-svdq", "awq", "packed", "decode"),
]


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_packed_layers_equal_decoded_ones(pair: tuple[str, str, str, str], rows: int) -> None:
    family, name, packed, decoded = pair
    module = families.load(family)
    scheme = module.SCHEMES[name]
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(256, 384, generator=generator) / 20
    x = torch.randn(rows, 384, generator=generator).bfloat16().cuda()
    limit = torch.full((384,), 4.0)
    made = module.quantize(weight.bfloat16(), scheme, calibration=Calibration(-limit, limit))
    canonical = module.canonical({key: tensor.cuda() for key, tensor in made.items()}, scheme)
    found = {kernel.backend: kernel for kernel in kernels.kernels_of(scheme.op)}
    with torch.no_grad():
        one, other = (
            QuantizedLinear(384, 256, found[backend], scheme, dict(canonical), torch.bfloat16)(x)
            for backend in (packed, decoded)
        )
    assert torch.linalg.vector_norm(one.float() - other.float()) <= 4e-3 * other.float().norm()
    if family == "modelopt-nvfp4":
        assert torch.equal(one, other)
