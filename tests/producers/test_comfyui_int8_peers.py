"""INT8 and MXFP8 against comfy-kitchen's eager code: weights bit by bit, layers within a rounding."""

from __future__ import annotations

import pytest
import torch

from quantmatrix.families import comfyui_int8, fp8
from quantmatrix.families.fp8.layers import MXFP8
from quantmatrix.kernels import kernels_of

comfy = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
N, K = 96, 512
SCHEMES = ("int8", "convrot")


def make_weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, K, generator=generator) * torch.rand(1, K, generator=generator)


def quantize(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) by comfy-kitchen."""
    size = comfyui_int8.SCHEMES[name].group_size
    if size:
        return comfy.quantize_int8_convrot_weight(weight, size)
    return comfy.quantize_int8_tensorwise(weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_decode_bit_by_bit(name: str) -> None:
    scheme = comfyui_int8.SCHEMES[name]
    codes, scale = quantize(name, make_weight())
    expected = comfy.dequantize_int8_simple(codes, scale)
    if scheme.group_size:
        expected = comfy.dequantize_int8_convrot_weight(codes, scale, scheme.group_size)
    got = comfyui_int8.dequantize({"weight": codes, "weight_scale": scale}, scheme)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_writer_gives_the_same_codes(name: str) -> None:
    codes, scale = quantize(name, make_weight())
    stored = comfyui_int8.quantize(make_weight(), comfyui_int8.SCHEMES[name])
    assert torch.equal(stored["weight_scale"].reshape(scale.shape), scale)
    assert torch.equal(stored["weight"], codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "int8"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_is_theirs(name: str, backend: str, dtype: torch.dtype) -> None:
    scheme = comfyui_int8.SCHEMES[name]
    codes, scale = quantize(name, make_weight())
    x = torch.randn(40, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(5))
    rotated = {"convrot": bool(scheme.group_size), "convrot_groupsize": scheme.group_size or 256}
    expected = comfy.int8_linear(x, codes, scale, bias, torch.float32, **rotated)
    kernel = next(k for k in kernels_of(scheme.op) if k.backend == backend)
    canonical = comfyui_int8.canonical({"weight": codes, "weight_scale": scale}, scheme)
    got = kernel.run(x, kernel.prepare(canonical, scheme, dtype), bias, scheme).float()
    # theirs divides BF16 inputs by a BF16 scale
    most = 1e-6 if dtype == torch.float32 else 1e-2
    assert ((got - expected).norm() / expected.norm()).item() < most


@pytest.mark.parametrize("as_bytes", [False, True])
def test_mxfp8_decodes_bit_by_bit(as_bytes: bool) -> None:
    codes, scales = comfy.quantize_mxfp8(make_weight())
    expected = comfy.dequantize_mxfp8(codes, scales, torch.float32)
    stored = {"weight": codes, "weight_scale": scales.view(torch.uint8) if as_bytes else scales}
    assert torch.equal(fp8.dequantize(stored, MXFP8), expected)
