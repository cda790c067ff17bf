"""The fused FP8 quantizers on CUDA: codes and scales bit-exact with plain arithmetic on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantmatrix.families import fp8
from quantmatrix.kernels import linear_fp8
from quantmatrix.kernels.number_formats import round_e4m3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["tensor-static", "tensor-dynamic", "channel-dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_equal_those_of_a_cpu(name: str, dtype: torch.dtype) -> None:
    scheme = fp8.SCHEMES[name]
    x = torch.randn(77, 640, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] = 0
    tensors = {"input_scale": torch.tensor(0.0173)}
    expected_scale = linear_fp8.find_input_scale(x, tensors, scheme)
    codes, scale = linear_fp8.encode_torch(
        x.cuda(), {"input_scale": tensors["input_scale"].cuda()}, scheme
    )
    assert torch.equal(scale.cpu(), expected_scale)
    expected = round_e4m3(x.float() / expected_scale)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_codes_of_groups_equal_those_of_a_cpu() -> None:
    from quantmatrix.kernels import fp8_triton

    scheme = replace(fp8.SCHEMES["block-dynamic"])
    x = torch.randn(36, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = fp8_triton.launch_groups(x.cuda(), 128)
    expected_scale = linear_fp8.find_input_scale(x, {}, scheme)
    assert scale.stride() == (1, 36)
    assert torch.equal(scale.cpu(), expected_scale)
    expected = round_e4m3(x.float() / expected_scale.repeat_interleave(128, dim=1))
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))
