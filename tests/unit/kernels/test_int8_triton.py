"""The Triton kernels of linear.int8 on CUDA: codes bit-exact, outputs equal to `reference`."""

from __future__ import annotations

import pytest
import torch

from quantmatrix.families import msmodelslim
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import int8_arithmetic, linear_int8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(1, 64, 64), (5, 43, 21), (17, 128, 72), (33, 3072, 96), (2000, 13824, 640), (0, 64, 64)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_layer(word: str, shape: tuple[int, int, int], dtype: torch.dtype):
    rows, columns, out = shape
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    options = {"device": "cuda", "generator": generator}
    weight = torch.randn(out, columns, **options).to(dtype)
    bias = torch.randn(out, **options).to(dtype)
    x = torch.randn(rows, columns, **options).to(dtype)
    x[1:2] = 0
    ranges = Calibration(torch.full((columns,), -3.5).cuda(), torch.full((columns,), 3.0).cuda())
    scheme = msmodelslim.SCHEMES[word]
    stored = msmodelslim.quantize(weight, scheme, bias=bias, calibration=ranges)
    return x, bias, scheme, msmodelslim.canonical(stored, scheme)


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("word", ["W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC"])
def test_outputs_equal_the_reference(word, shape, dtype, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(linear_int8, "has_compiler", lambda: False)
    x, bias, scheme, tensors = make_layer(word, shape, dtype)
    buffers = linear_int8.prepare_int8(tensors, scheme, dtype)
    y = linear_int8.run_int8(x, buffers, bias, scheme)
    expected = int8_arithmetic.reference(
        x, tensors if bias is None else {**tensors, "bias": bias}, scheme
    )
    assert y.dtype == dtype
    assert y.shape == expected.shape
    limit = 1e-6 if dtype == torch.float32 else 1e-4
    assert (y.float() - expected.float()).norm() <= limit * expected.float().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [127, 7])
def test_codes_equal_those_of_a_cpu(largest, dtype):
    from quantmatrix.kernels import int8_triton

    x = torch.randn(500, 5120, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = int8_triton.quantize_tokens(x.cuda(), largest)
    expected, expected_scale = int8_arithmetic.quantize_tokens(x, largest)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(codes.cpu(), expected)
    step, offset = torch.tensor(0.0273), torch.tensor(-9.0)
    codes = int8_triton.quantize_static(x.cuda(), step.cuda(), offset.cuda())
    assert torch.equal(codes.cpu(), int8_arithmetic.quantize_static(x, step, offset))
