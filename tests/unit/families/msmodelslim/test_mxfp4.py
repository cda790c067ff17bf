"""MXFP4 of msmodelslim: read, decoded and multiplied as its own writer and simulation compute it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawn_files import Made, compare, decode, draw, find_base, list_linears, plan_folder, write
from safetensors import safe_open
from torch.nn import functional
from weight_files import write_json

from quantmatrix.families import msmodelslim
from quantmatrix.kernels import kernels_of, linear_mxfp4
from quantmatrix.kernels.number_formats import decode_e2m1, unpack_nibbles
from quantmatrix.request import Request
from quantmatrix.tools.dequantize import plan_decode

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PLAIN, DUAL = "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"
N, K = 24, 1056  # two coarse groups and a ragged one


def simulate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers, exponents) by the writer's formulas, in float64 and by logarithms."""
    groups = x.double().unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True) / 0.875 + 9.6e-7)) - 2
    scaled = groups.abs() / torch.exp2(exponents)
    own = torch.floor(torch.log2(scaled + 9.6e-7)).clamp(0, 2)
    rounded = (torch.floor(scaled / torch.exp2(own) * 2 + 0.5) / 2 * torch.exp2(own)).clamp(max=6)
    return (rounded * groups.sign()).flatten(-2), exponents.squeeze(-1)


def round_input(x: torch.Tensor, dual: bool) -> torch.Tensor:
    """x [..., K] through codes and back, as the writer's layers do it to inputs."""
    coarse = torch.ones_like(x, dtype=torch.float64)
    for start in range(0, x.shape[-1], 512) if dual else ():
        part = slice(start, start + 512)
        coarse[..., part] = x[..., part].double().abs().amax(-1, keepdim=True) / 6
    numbers, exponents = simulate(x.double() / coarse)
    return numbers * torch.exp2(exponents).repeat_interleave(32, -1) * coarse


def make_weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)


def test_numbers_of_a_group() -> None:
    """Ties go away from zero; 7 / 8 of a power of two is the most that keeps the exponent below it."""
    row = torch.zeros(1, 64)
    row[0, :6] = torch.tensor([6.9, 0.25, -0.75, 2.5, 3.5, 5.0])
    row[0, 32] = 7.0
    numbers, exponents = linear_mxfp4.round_groups(row)
    assert numbers[0, :6].tolist() == [6.0, 0.5, -1.0, 3.0, 4.0, 6.0]
    assert exponents.tolist() == [[0, 1]]
    assert numbers[0, 32] == 4.0


@pytest.mark.parametrize("name", [PLAIN, DUAL])
def test_codes_and_scales_are_the_writers(name: str) -> None:
    weight, scheme = make_weight(), msmodelslim.SCHEMES[name]
    stored = msmodelslim.quantize(weight, scheme)
    expected = round_input(weight, dual=name == DUAL)
    assert stored["weight"].shape == (N, K // 2)
    assert {*decode_e2m1(unpack_nibbles(stored["weight"])).abs().flatten().tolist()} == {*NUMBERS}
    if name == DUAL:
        assert stored["weight_dual_scale"].shape == (N, 3, 1)
    found = msmodelslim.dequantize(stored, scheme)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("name", [PLAIN, DUAL])
@pytest.mark.parametrize("backend", ["reference", "decode"])
def test_every_kernel_gives_the_layer(name: str, backend: str, smoothed: bool) -> None:
    scheme = msmodelslim.SCHEMES[name]
    bias, x = torch.randn(N), torch.randn(5, 2, K) * torch.rand(5, 2, 1)
    stored = msmodelslim.quantize(make_weight(), scheme, bias=bias)
    smoothing = torch.ones(K)
    if smoothed:
        smoothing = torch.rand(K) + 0.5
        stored, scheme = stored | {"mul_scale": smoothing}, replace(scheme, smoothed=True)
    plain = msmodelslim.dequantize(
        msmodelslim.quantize(make_weight(), scheme), msmodelslim.SCHEMES[name]
    )
    inputs = x * smoothing
    expected = functional.linear(inputs.double(), plain.double(), bias.double())
    if backend == "reference":
        rounded = round_input(inputs, dual=name == DUAL)
        expected = functional.linear(rounded, plain.double(), bias.double())
    kernel = next(k for k in kernels_of(scheme.op) if k.backend == backend)
    canonical = msmodelslim.canonical(stored, scheme)
    own = canonical.pop("bias")
    kept = kernel.prepare(canonical, scheme, torch.float32)
    got = kernel.run(x, kept, own, scheme)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    size = sum(tensor.nbytes for tensor in kept.values())
    assert kernel.footprint(scheme, N, K, 4) - N * 4 == size


def test_inputs_of_zeros_give_the_bias() -> None:
    for name in (PLAIN, DUAL):
        bias = torch.randn(N)
        stored = msmodelslim.quantize(make_weight(), msmodelslim.SCHEMES[name], bias=bias)
        y = msmodelslim.reference(torch.zeros(3, K), stored, msmodelslim.SCHEMES[name])
        assert torch.equal(y, bias.expand(3, N))


@pytest.mark.parametrize("name", [PLAIN, DUAL])
def test_every_tensor_of_a_folder(tmp_path: Path, name: str) -> None:
    """Codes are written here by hand: the even column in the low nibble, exponents plus 127."""
    model = "wan-2-2"
    state = draw(model)
    made = Made(dict(state), {key: tensor.float() for key, tensor in state.items()})
    described = {"version": "1.0.0", "model_quant_type": name}
    for key in state:
        described[key] = name if key in list_linears(state) else "FLOAT"
    for key in list_linears(state):
        exact, layer = state[key].double(), key.removesuffix(".weight")
        coarse = torch.ones(len(exact), 1, dtype=torch.float64)
        if name == DUAL:
            coarse = torch.stack([p.abs().amax(1) for p in exact.split(512, 1)], 1) / 6
            coarse = coarse.float().double()
        wide = coarse.repeat_interleave(512, 1)[:, : exact.shape[1]] if name == DUAL else coarse
        numbers, exponents = simulate(exact / wide)
        codes = sum((numbers.abs() == number) * code for code, number in enumerate(NUMBERS))
        codes = (codes + 8 * (numbers < 0)).to(torch.uint8)
        made.tensors[key] = codes[:, ::2] | codes[:, 1::2] << 4
        made.tensors[f"{layer}.weight_scale"] = (exponents + 127).to(torch.uint8)
        described[f"{layer}.weight_scale"] = name
        if name == DUAL:
            made.tensors[f"{layer}.weight_dual_scale"] = coarse[..., None].float()
            described[f"{layer}.weight_dual_scale"] = name
        spread = torch.exp2(exponents).repeat_interleave(32, 1)
        made.expected[key] = numbers.float() * (spread.float() * wide.float())
    folder = write(tmp_path / "it", made, model)
    write_json(folder / "quant_model_description.json", described)
    planned = plan_folder(folder, model)
    assert (planned.family, planned.precision) == ("msmodelslim", name)
    compare(decode(planned), made.expected)


@pytest.mark.parametrize("model", ["wan-2-2", "z-image"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_layers_that_are_quantized_while_loading(name: str, model: str) -> None:
    """Any model's: what `--quantization` makes is what the file would hold."""
    base = find_base(model)
    planned = plan_decode(Request(str(base), quantization=name), "transformer")
    assert (planned.family, planned.online) == ("msmodelslim", True)
    scheme = msmodelslim.SCHEMES[{"mxfp4": PLAIN, "mxfp8": "W8A8_MXFP8"}[name]]
    assert {piece.scheme for piece in planned.pieces()} == {scheme}
    with safe_open(next((base / "transformer").glob("*.safetensors")), "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    got = decode(planned)
    layers = set(list_linears(state)) & {f"{layer}.weight" for layer in planned.layers}
    assert layers
    for key in sorted(layers)[:6]:
        if name == "mxfp4":
            expected = round_input(state[key], dual=False).float()
        else:
            expected = msmodelslim.dequantize(msmodelslim.quantize(state[key], scheme), scheme)
        assert torch.equal(got[key], expected)
