"""linear.nvfp4: golden decode, input rounding, each backend against plain arithmetic."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processors import skip_without_scaled_product

from quantmatrix import kernels
from quantmatrix.families.modelopt_nvfp4 import SCHEMES
from quantmatrix.hardware.machine import Machine
from quantmatrix.kernels import linear_nvfp4, nvfp4_arithmetic, scale_layouts
from quantmatrix.scheme import Scheme

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4 = SCHEMES["NVFP4"]
SVD = replace(SCHEMES["NVFP4_SVD"], rank=4)
GEMMS = ("cutlass", "cudnn", "trtllm")


def make_layer(rows: int = 128, columns: int = 64, *, svd: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    codes, scales, whole = nvfp4_arithmetic.encode(weight)
    layer = {
        "weight": codes,
        "weight_scale": scales,
        "weight_scale_2": whole,
        "input_scale": torch.tensor(4.0 / 2688),
        "bias": torch.randn(rows, generator=generator),
    }
    if svd:
        layer["pre_quant_scale"] = torch.rand(columns, generator=generator) + 0.5
        layer["lora_a"] = torch.randn(4, columns, generator=generator) * 0.1
        layer["lora_b"] = torch.randn(rows, 4, generator=generator) * 0.1
    return layer


def make_input(columns: int = 64, rows: int = 9) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


def decode_plainly(layer: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weights by one Python loop over bytes."""
    rows = []
    whole = layer["weight_scale_2"]
    for line, scales in zip(layer["weight"].tolist(), layer["weight_scale"].float(), strict=True):
        row = []
        for j, byte in enumerate(line):
            for code in (byte & 15, byte >> 4):
                number = E2M1[code & 7] * (-1 if code & 8 else 1)
                row.append(number * (scales[j // 8] * whole))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("rows", "columns"), [(3, 16), (5, 48), (32, 96)])
def test_decode_is_bit_exact(rows: int, columns: int) -> None:
    layer = make_layer(rows, columns)
    expected = decode_plainly(layer)
    assert torch.equal(linear_nvfp4.decode(layer, NVFP4), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(nvfp4_arithmetic.decode_to(layer, NVFP4, dtype), expected.to(dtype))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("smoothed", [False, True])
def test_decoding_to_a_dtype_leaves_nothing_out(rank: int, smoothed: bool) -> None:
    """A layer may be smoothed, or have a low-rank branch, or both."""
    layer, scheme = make_layer(6, 48, svd=True), replace(NVFP4, rank=rank, smoothed=smoothed)
    expected = decode_plainly(layer).double()
    if rank:
        expected = expected + layer["lora_b"].double() @ layer["lora_a"].double()
    if smoothed:
        expected = expected * layer["pre_quant_scale"].double()
    found = nvfp4_arithmetic.decode_to(layer, scheme, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_decode_crosses_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(50, 48, svd=True)
    whole = nvfp4_arithmetic.decode_to(layer, SVD, torch.bfloat16)
    monkeypatch.setattr(nvfp4_arithmetic, "CHUNK", 48 * 7)
    assert torch.equal(linear_nvfp4.decode(layer, NVFP4), decode_plainly(layer))
    assert torch.allclose(
        nvfp4_arithmetic.decode_to(layer, SVD, torch.bfloat16).float(), whole.float(), atol=1e-3
    )


def test_golden_bytes() -> None:
    """0x2B is -1.5 in the even column and 1.0 in the odd one."""
    layer = {
        "weight": torch.tensor([[0x2B] * 8]).to(torch.uint8),
        "weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
    }
    assert linear_nvfp4.decode(layer, NVFP4).tolist() == [[-1.5, 1.0] * 8]


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, -0.75, -5.0])
    rounded = nvfp4_arithmetic.round_to_e2m1(ties).tolist()
    assert rounded == [0, 1, 1, 2, 2, 4, 4, 6, 6, -1, -4]


def test_rounding_picks_the_nearest_number() -> None:
    x = torch.linspace(-6.5, 6.5, 2001)
    grid = torch.tensor([*E2M1, *(-v for v in E2M1)])
    nearest = (x[:, None] - grid).abs().amin(dim=1)
    error = (nvfp4_arithmetic.round_to_e2m1(x) - x).abs()
    assert torch.allclose(error, nearest, atol=1e-6)


def test_inputs_saturate_at_the_calibrated_range_and_zeros_stay() -> None:
    scale = torch.tensor(1 / 2688)
    x = torch.zeros(2, 16)
    x[0] = 50.0
    rounded = nvfp4_arithmetic.round_inputs(x, scale)
    assert torch.allclose(rounded[0], torch.ones(16), atol=1e-6)
    assert torch.equal(rounded[1], torch.zeros(16))


def test_inputs_follow_the_format_page() -> None:
    x, input_scale = make_input(32), torch.tensor(3.0 / 2688)
    expected = []
    for row in x:
        for group in row.view(-1, 16):
            s = (group.abs().max() / (6 * input_scale)).clamp(2**-9, 448)
            s = s.to(torch.float8_e4m3fn).float() * input_scale
            expected.append(nvfp4_arithmetic.round_to_e2m1(group / s) * s)
    assert torch.equal(
        nvfp4_arithmetic.round_inputs(x, input_scale), torch.cat(expected).view(x.shape)
    )


def test_missing_input_scale_is_found_per_call() -> None:
    layer = make_layer()
    x = make_input() * 100
    del layer["input_scale"]
    dynamic = linear_nvfp4.reference(x, layer, NVFP4)
    given = {**layer, "input_scale": x.abs().amax() / 2688}
    assert torch.equal(dynamic, linear_nvfp4.reference(x, given, NVFP4))
    exact = torch.nn.functional.linear(x, linear_nvfp4.decode(layer, NVFP4), layer["bias"])
    assert relative_error(dynamic, exact) < 0.15
    assert linear_nvfp4.reference(torch.zeros(2, 64), layer, NVFP4).isfinite().all()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("svd", [False, True])
def test_reference_without_input_rounding_is_decode(svd: bool) -> None:
    layer, scheme = make_layer(svd=svd), replace(SVD if svd else NVFP4, activation="none")
    x = make_input()
    expected = torch.nn.functional.linear(x, linear_nvfp4.decode(layer, scheme), layer["bias"])
    assert torch.allclose(linear_nvfp4.reference(x, layer, scheme), expected, atol=1e-5)


def test_low_rank_branch_reads_the_smoothed_input_unrounded() -> None:
    layer, x = make_layer(svd=True), make_input()
    smoothed = x * layer["pre_quant_scale"]
    coded = nvfp4_arithmetic.round_inputs(smoothed, layer["input_scale"])
    plain = {k: v for k, v in layer.items() if k in ("weight", "weight_scale", "weight_scale_2")}
    expected = coded @ linear_nvfp4.decode(plain, NVFP4).T + layer["bias"]
    expected += (smoothed @ layer["lora_a"].T) @ layer["lora_b"].T
    assert torch.allclose(linear_nvfp4.reference(x, layer, SVD), expected, atol=1e-5)


@pytest.mark.parametrize("svd", [False, True])
def test_rows_are_the_layer_with_fewer_outputs(svd: bool) -> None:
    layer, scheme, x = make_layer(svd=svd), SVD if svd else NVFP4, make_input()
    whole = linear_nvfp4.reference(x, layer, scheme)
    for rows in (slice(10, 50), torch.tensor([5, 3, 127])):
        part = kernels.take_rows(scheme, layer, rows)
        assert torch.allclose(linear_nvfp4.reference(x, part, scheme), whole[:, rows], atol=1e-6)


def run_kernel(
    backend: str, layer: dict[str, torch.Tensor], scheme: Scheme, x: torch.Tensor
) -> torch.Tensor:
    kernel = next(k for k in linear_nvfp4.KERNELS if k.backend == backend)
    weights = {name: t for name, t in layer.items() if name != "bias"}
    buffers = kernel.prepare(weights, scheme, x.dtype)
    assert "bias" not in buffers
    return kernel.run(x, buffers, layer["bias"].to(x.dtype), scheme)


@pytest.mark.parametrize("svd", [False, True])
def test_reference_and_decode_backends(svd: bool) -> None:
    layer, scheme, x = make_layer(svd=svd), SVD if svd else NVFP4, make_input().view(3, 3, 64)
    exact = linear_nvfp4.reference(x, layer, scheme)
    assert torch.equal(run_kernel("reference", layer, scheme, x), exact)
    decoded = torch.nn.functional.linear(x, linear_nvfp4.decode(layer, scheme), layer["bias"])
    assert torch.allclose(run_kernel("decode", layer, scheme, x), decoded, atol=1e-6)


def test_reference_keeps_the_stored_tensors() -> None:
    layer = make_layer()
    kernel = next(k for k in linear_nvfp4.KERNELS if k.backend == "reference")
    kept = kernel.prepare(layer, NVFP4, torch.bfloat16)
    assert all(kept[name] is tensor for name, tensor in layer.items())


def test_recoding_keeps_threes_and_the_checkpoint_scale() -> None:
    layer = make_layer()
    recoded = linear_nvfp4.recode(layer, NVFP4)
    assert recoded["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(recoded["weight_scale"], layer["weight_scale_2"] * 6)
    assert torch.equal(recoded["input_scale"], layer["input_scale"] * 6)
    exact = linear_nvfp4.decode(layer, NVFP4)
    found = recoded["weight"].float() * recoded["weight_scale"]
    codes = exact / (layer["weight_scale"].float() * layer["weight_scale_2"]).repeat_interleave(
        16, dim=1
    )
    threes = torch.isin(codes.round(decimals=3).abs(), torch.tensor([0.0, 1.5, 3.0, 6.0]))
    assert torch.allclose(found[threes], exact[threes], rtol=1e-6, atol=0)
    assert relative_error(found, exact) < 0.02


@pytest.mark.parametrize("svd", [False, True])
def test_recoded_layer_is_close_to_the_decoded_one(svd: bool) -> None:
    skip_without_scaled_product()
    layer, scheme, x = make_layer(svd=svd), SVD if svd else NVFP4, make_input(rows=16)
    exact = torch.nn.functional.linear(x, linear_nvfp4.decode(layer, scheme), layer["bias"])
    assert relative_error(run_kernel("fp8-recode", layer, scheme, x.bfloat16()), exact) < 0.06


class FakeFlashinfer(SimpleNamespace):
    """mm_fp4 on a CPU: reads each backend's layout by the position formulas, and records calls."""

    def __init__(self) -> None:
        super().__init__(SfLayout=SimpleNamespace(layout_128x4="128x4"), calls=[])

    def nvfp4_quantize(
        self, a: torch.Tensor, a_global_sf: torch.Tensor, sfLayout: str, do_shuffle: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(("nvfp4_quantize", a.dtype, a_global_sf.shape))
        assert sfLayout == "128x4"
        assert not do_shuffle
        groups = a.float().unflatten(-1, (-1, 16))
        scale = (groups.abs().amax(-1) / 6 * a_global_sf).clamp(2**-9, 448)
        scale = scale.to(torch.float8_e4m3fn)
        numbers = groups / (scale.float() / a_global_sf)[..., None]
        codes = nvfp4_arithmetic.encode_e2m1(numbers.flatten(-2))
        return nvfp4_arithmetic.pack_nibbles(codes), scale_layouts.tile_scales(scale)

    def mm_fp4(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        a_descale: torch.Tensor,
        b_descale: torch.Tensor,
        alpha: torch.Tensor,
        out_dtype: torch.dtype,
        block_size: int,
        use_8x4_sf_layout: bool,
        backend: str,
    ) -> torch.Tensor:
        self.calls.append(("mm_fp4", backend, alpha.shape))
        one = torch.tensor(1.0)
        weight, scales = b.T, b_descale.T
        groups = weight.shape[1] // 8
        scales = scale_layouts.untile_scales(scales.contiguous(), weight.shape[0], groups)
        if backend == "trtllm":
            back = torch.argsort(scale_layouts.find_shuffle(weight.shape[0]))
            weight, scales = weight[back], scales.view(torch.uint8)[back].view(scales.dtype)
        inputs = scale_layouts.untile_scales(a_descale, a.shape[0], groups)
        left, right = (
            linear_nvfp4.decode(
                {"weight": codes, "weight_scale": table, "weight_scale_2": one}, NVFP4
            )
            for codes, table in ((a, inputs), (weight, scales))
        )
        return (left @ right.T * alpha).to(out_dtype)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("svd", [False, True])
def test_flashinfer_preparation_gives_the_reference(
    gemm: str, svd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeFlashinfer()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    layer, scheme = make_layer(256, 96, svd=svd), SVD if svd else NVFP4
    x = make_input(96).bfloat16().view(3, 3, 96)
    found = run_kernel(f"flashinfer-{gemm}", layer, scheme, x)
    assert found.shape == (3, 3, 256)
    assert found.dtype == x.dtype
    assert relative_error(found, linear_nvfp4.reference(x.float(), layer, scheme)) < 0.02
    assert [call[1] for call in fake.calls] == [torch.bfloat16, gemm]


@pytest.mark.parametrize("gemm", GEMMS)
def test_flashinfer_without_a_calibrated_input_scale(
    gemm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashinfer())
    layer = make_layer(128, 64)
    del layer["input_scale"]
    x = make_input().bfloat16() * 30
    found = run_kernel(f"flashinfer-{gemm}", layer, NVFP4, x)
    assert relative_error(found, linear_nvfp4.reference(x.float(), layer, NVFP4)) < 0.02


@pytest.mark.parametrize("wrong", ["plain", "tiled-for-trtllm"])
def test_scales_of_another_layout_would_be_caught(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong layout never raises, so the tests above must see it in the numbers."""
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashinfer())
    layer, x = make_layer(256, 64), make_input().bfloat16()
    name = "trtllm" if wrong == "tiled-for-trtllm" else "cutlass"
    kernel = next(k for k in linear_nvfp4.KERNELS if k.backend == f"flashinfer-{name}")
    buffers: dict[str, Any] = kernel.prepare(layer, NVFP4, x.dtype)
    scales = layer["weight_scale"]
    buffers["weight_scale"] = scales if wrong == "plain" else scale_layouts.tile_scales(scales)
    found = kernel.run(x, buffers, layer["bias"].bfloat16(), NVFP4)
    assert relative_error(found, linear_nvfp4.reference(x.float(), layer, NVFP4)) > 0.1


def make_machine(arch: str, vendor: str = "nvidia", *packages: str) -> Machine:
    return Machine(arch, vendor, arch, 0, frozenset(packages))


@pytest.mark.parametrize(
    ("arch", "vendor", "packages", "backend"),
    [
        ("cpu", "cpu", (), "decode"),
        ("sm80", "nvidia", (), "decode"),
        ("sm90", "nvidia", ("flashinfer",), "fp8-recode"),
        ("sm100", "nvidia", ("flashinfer",), "flashinfer-trtllm"),
        ("sm100", "nvidia", (), "fp8-recode"),
        ("sm120", "nvidia", ("flashinfer",), "flashinfer-cutlass"),
        ("910b", "ascend", (), "decode"),
        ("gfx942", "amd", (), "decode"),
    ],
)
def test_order(arch: str, vendor: str, packages: tuple[str, ...], backend: str) -> None:
    machine = make_machine(arch, vendor, *packages)
    assert kernels.choose("linear.nvfp4", machine, NVFP4, (256, 128)).backend == backend


def test_trtllm_is_refused_on_sm120() -> None:
    machine = make_machine("sm120", "nvidia", "flashinfer")
    with pytest.raises(kernels.NoKernel, match="needs sm100") as caught:
        kernels.choose("linear.nvfp4", machine, NVFP4, (256, 128), "flashinfer-trtllm")
    assert caught.value.rule == "nvfp4-flashinfer-sm100"


def test_the_declared_row_limit_chooses_another_backend() -> None:
    machine = make_machine("sm120", "nvidia", "flashinfer")
    chosen = [
        kernels.choose("linear.nvfp4", machine, NVFP4, (5120, 5120), rows=rows).backend
        for rows in (4608, 75600)
    ]
    assert chosen == ["flashinfer-cutlass", "flashinfer-cudnn"]
    with pytest.raises(kernels.NoKernel, match="at most 65536 rows, this run has 75600"):
        kernels.choose("linear.nvfp4", machine, NVFP4, (256, 128), "flashinfer-cutlass", 75600)


def test_weight_only_layers_are_decoded_where_inputs_would_be_coded() -> None:
    machine = make_machine("sm100", "nvidia", "flashinfer")
    scheme = SCHEMES["W4A16_NVFP4"]
    assert kernels.choose("linear.nvfp4", machine, scheme, (256, 128)).backend == "decode"


@pytest.mark.parametrize(
    ("value", "backend"),
    [
        ("cudnn", "flashinfer-cudnn"),
        ("flashinfer_cudnn", "flashinfer-cudnn"),
        ("FLASHINFER_CUTLASS", "flashinfer-cutlass"),
        ("flashinfer_trtllm", "flashinfer-trtllm"),
        ("auto", None),
    ],
)
def test_values_of_the_environment_variable(value: str, backend: str | None) -> None:
    assert linear_nvfp4.backend_alias(value) == backend


def test_unknown_value_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="flashinfer_trtllm"):
        linear_nvfp4.backend_alias("cublas")


def test_a_decoded_weight_and_its_bias_by_the_formula() -> None:
    assert linear_nvfp4.measure_decoded(NVFP4, 3, 5, 2) == 3 * 5 * 2 + 3 * 2


def test_footprints_are_the_bytes_kept() -> None:
    for svd in (False, True):
        layer, scheme = make_layer(256, 128, svd=svd), SVD if svd else NVFP4
        weights = {
            name: t.bfloat16() if name in ("pre_quant_scale", "lora_a", "lora_b") else t
            for name, t in layer.items()
            if name != "bias"
        }
        for kernel in linear_nvfp4.KERNELS:
            kept = kernel.prepare(weights, scheme, torch.bfloat16)
            total = 256 * 2 + sum(t.numel() * t.element_size() for t in kept.values())
            assert kernel.footprint(scheme, 256, 128, 2) == total, (kernel.backend, svd)
