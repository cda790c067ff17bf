"""QuantizedLinear: what the models around it may ask, and codes shared by layers of one input."""

from __future__ import annotations

import pytest
import torch
from processors import skip_without_scaled_product
from torch import nn

from quantmatrix.families import fp8, modelopt_fp8, msmodelslim
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import kernels_of, linear_int8
from quantmatrix.runtime.quantized_linear import (
    QuantizedLinear,
    SharedInput,
    SplitInputLinear,
    share_inputs,
)
from quantmatrix.scheme import Scheme

KERNELS = {kernel.backend: kernel for kernel in kernels_of("linear.fp8")}


def make(
    seed: int, backend: str = "torch", scheme: Scheme = fp8.TENSOR, amax: float = 1.0
) -> QuantizedLinear:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
    ones = torch.full((32,), amax)
    family = modelopt_fp8 if scheme is modelopt_fp8.FP8 else fp8
    made = family.quantize(weight, scheme, bias=weight[:, 0], calibration=Calibration(-ones, ones))
    tensors = family.canonical(made, scheme)
    return QuantizedLinear(32, 64, KERNELS[backend], scheme, tensors, torch.float32)


class Block(nn.Module):
    def __init__(self, *layers: QuantizedLinear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList(layers)])


def count_encodings(monkeypatch: pytest.MonkeyPatch, layers: list[QuantizedLinear]) -> list[int]:
    calls = [0]
    for layer in layers:
        kernel = layer.kernel
        encode = kernel.encode
        assert encode is not None

        def counted(x, tensors, scheme, encode=encode):
            calls[0] += 1
            return encode(x, tensors, scheme)

        layer.kernel = type(kernel)(**{**vars(kernel), "encode": counted})
    return calls


def test_one_input_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_scaled_product()
    layers = [make(seed) for seed in range(3)]
    x, other = torch.randn(5, 32), torch.randn(5, 32)
    alone = [layer(x) for layer in layers]
    assert share_inputs(Block(*layers)) == 3
    calls = count_encodings(monkeypatch, layers)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, alone, strict=True))
    assert calls == [1]
    layers[0](other)
    assert calls == [2]


def test_a_changed_input_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_scaled_product()
    layers = [make(seed) for seed in range(2)]
    share_inputs(Block(*layers))
    x = torch.randn(5, 32)
    layers[0](x)
    x.mul_(3)
    fresh = make(1)
    assert torch.equal(layers[1](x), fresh(x))


def test_codes_go_with_their_input() -> None:
    shared = SharedInput()
    x = torch.randn(4, 4)
    shared.keep(x, (torch.zeros(1),))
    assert shared.find(x) is not None
    del x
    assert shared._encoded is None


def test_inference_tensors_are_never_kept() -> None:
    shared = SharedInput()
    with torch.inference_mode():
        x = torch.randn(4, 4)
        shared.keep(x, (torch.zeros(1),))
        assert shared.find(x) is None


def test_other_static_scales_are_not_shared() -> None:
    layers = [
        make(seed, scheme=modelopt_fp8.FP8, amax=amax) for seed, amax in ((0, 1), (1, 1), (2, 2))
    ]
    assert share_inputs(Block(*layers)) == 2
    assert layers[0].shared is layers[1].shared is not None
    assert layers[2].shared is None


def test_decoded_layers_share_nothing() -> None:
    assert share_inputs(Block(make(0, "decode"), make(1, "decode"))) == 0


def test_what_models_ask_of_a_linear_layer() -> None:
    layer = make(0, "reference")
    assert layer.weight.dtype == torch.float32
    assert layer.weight.shape == (64, 32)
    assert layer.weight.is_meta
    assert next(layer.parameters()).dtype == torch.float32
    layer.half()
    assert layer.q_weight.dtype == torch.float8_e4m3fn
    assert layer.q_weight_scale.dtype == torch.float32


def test_split_input_adds_its_parts() -> None:
    parts = [make(0, "decode"), make(1, "decode")]
    x = torch.randn(3, 64)
    got = SplitInputLinear(parts)(x)
    assert torch.allclose(got, parts[0](x[:, :32]) + parts[1](x[:, 32:]))


def make_int8(low: float, high: float, seed: int = 0) -> QuantizedLinear:
    scheme = msmodelslim.SCHEMES["W8A8"]
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
    ranges = Calibration(torch.full((32,), low), torch.full((32,), high))
    tensors = msmodelslim.canonical(
        msmodelslim.quantize(weight, scheme, bias=torch.zeros(64), calibration=ranges), scheme
    )
    kernel = next(k for k in linear_int8.KERNELS if k.backend == "int8")
    return QuantizedLinear(32, 64, kernel, scheme, tensors, torch.float32)


def test_integer_layers_share_where_scale_and_zero_point_agree() -> None:
    layers = [make_int8(-3, 3), make_int8(-3, 3, seed=1), make_int8(-2, 4)]
    assert float(layers[0].q_input_scale) == float(layers[2].q_input_scale)
    assert float(layers[0].q_input_offset) != float(layers[2].q_input_offset)
    assert share_inputs(Block(*layers)) == 2
    assert layers[2].shared is None


def test_a_cpu_has_no_integer_codes_to_share() -> None:
    """It quantizes while it multiplies: layers that could share give what they give alone."""
    layers = [make_int8(-3, 3), make_int8(-3, 3, seed=1)]
    share_inputs(Block(*layers))
    x = torch.randn(5, 32)
    for layer, seed in zip(layers, (0, 1), strict=True):
        assert torch.equal(layer(x), make_int8(-3, 3, seed=seed)(x))
    assert layers[0].shared is not None
    assert layers[0].shared.find(x) is None
