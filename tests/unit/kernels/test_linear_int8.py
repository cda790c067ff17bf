"""linear.int8: exact accumulators, agreement of backends, edges, and the NPU calls' schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import npu_simulator
import pytest
import torch
from processors import skip_without_exact_int8

from quantmatrix import kernels
from quantmatrix.errors import RefusedError
from quantmatrix.exit_codes import NOT_EXECUTED
from quantmatrix.hardware import probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.kernels import int8_arithmetic, int8_npu, linear_int8, portable
from quantmatrix.kernels.choosing import choose
from quantmatrix.scheme import Scheme

STATIC = Scheme("linear.int8", "W8A8", "int8", "channel", "tensor-static")
DYNAMIC = Scheme("linear.int8", "W8A8_DYNAMIC", "int8", "channel", "token-dynamic")
SMOOTHED = Scheme("linear.int8", "W8A8_DYNAMIC", "int8", "channel", "token-dynamic", smoothed=True)
INT4 = Scheme("linear.int8", "W4A4_DYNAMIC", "int4", "channel", "token-dynamic")


def name_scheme(scheme: Scheme) -> str:
    return f"{scheme.name}-smoothed" if scheme.smoothed else scheme.name


ALL = pytest.mark.parametrize("scheme", [STATIC, DYNAMIC, SMOOTHED, INT4], ids=name_scheme)
CPU = Machine("this CPU", "cpu", "cpu", 2**34)
NPU = Machine("910b", "ascend", "910b", 2**36, frozenset({"torch_npu"}))


def make_layer(scheme: Scheme, n: int, k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    largest = int8_arithmetic.LARGEST[scheme.weight]
    weight = torch.randint(-largest, largest + 1, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, generator=generator) * 0.01 + 0.001
    tensors = {"weight": weight, "weight_scale": scale}
    tensors["bias"] = torch.randn(n, generator=generator)
    if scheme.activation == "tensor-static":
        step, offset = torch.tensor(0.025), torch.tensor(-7.0)
        deq = step * scale
        folded = tensors["bias"] / deq - offset * weight.sum(dim=1)
        tensors |= {"input_scale": step, "input_offset": offset, "deq_scale": deq}
        tensors["quant_bias"] = folded.round().to(torch.int32)
    if scheme.smoothed:
        tensors["mul_scale"] = torch.rand(k, generator=generator) + 0.5
    return tensors


def make_input(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def run(backend: str, x: torch.Tensor, tensors: dict[str, torch.Tensor], scheme: Scheme):
    if backend == "int8":
        skip_without_exact_int8()
    kernel = next(k for k in linear_int8.KERNELS if k.backend == backend)
    weights = {name: t for name, t in tensors.items() if name != "bias"}
    bias = tensors.get("bias")
    bias = None if bias is None else bias.to(x.dtype)
    return kernel.run(x, kernel.prepare(weights, scheme, x.dtype), bias, scheme)


def test_accumulators_are_exact_where_float32_is_not():
    weight = torch.full((2, 13824), 127, dtype=torch.int8)
    codes = torch.full((1, 13824), -128, dtype=torch.int8)
    codes[0, 0] = -127
    exact = -128 * 127 * 13824 + 127
    assert int8_arithmetic.accumulate(codes, weight).tolist() == [[exact, exact]]
    inexact = torch.nn.functional.linear(codes.float(), weight.float())
    assert inexact[0, 0].item() != exact


@pytest.mark.parametrize("k", [2, 1024, 1025, 4096])
def test_accumulators_match_the_integer_matmul(k):
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-128, 128, (5, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (7, k), dtype=torch.int8, generator=generator)
    exact = codes.long() @ weight.long().t()
    assert torch.equal(int8_arithmetic.accumulate(codes, weight).long(), exact)
    skip_without_exact_int8()
    assert torch.equal(torch._int_mm(codes, weight.t()).long(), exact)


@ALL
@pytest.mark.parametrize("rows", [1, 3, 512, 1100])
def test_int8_equals_reference(scheme, rows):
    tensors, x = make_layer(scheme, 24, 40), make_input(rows, 40)
    torch.testing.assert_close(
        run("int8", x, tensors, scheme), run("reference", x, tensors, scheme), rtol=1e-6, atol=1e-6
    )


@ALL
@pytest.mark.parametrize("backend", ["reference", "int8", "decode"])
def test_backends_approximate_the_plain_layer(backend, scheme):
    tensors, x = make_layer(scheme, 96, 256), make_input(2, 33, 256)
    plain = torch.nn.functional.linear(x, int8_arithmetic.decode(tensors, scheme), tensors["bias"])
    y = run(backend, x, tensors, scheme)
    assert y.shape == (2, 33, 96)
    limit = {"decode": 1e-6, "reference": 0.02, "int8": 0.02}[backend]
    limit = 0.2 if scheme.weight == "int4" and backend != "decode" else limit
    assert (y - plain).norm() / plain.norm() < limit


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "int8", "decode"])
def test_output_has_the_input_dtype(backend, dtype, scheme):
    tensors = make_layer(scheme, 16, 32)
    x = make_input(4, 32, dtype=dtype)
    y = run(backend, x, tensors, scheme)
    assert y.dtype == dtype
    exact = run(backend, x.float(), tensors, scheme)
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_static_bias_is_added_once(backend):
    tensors = make_layer(STATIC, 16, 32)
    zeros = torch.zeros(1, 32)
    y = run(backend, zeros, tensors, STATIC)[0]
    torch.testing.assert_close(y, tensors["bias"], rtol=0, atol=3e-4)
    without = {name: t for name, t in tensors.items() if name != "bias"}
    assert torch.equal(run(backend, zeros, without, STATIC)[0], y)


@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_static_codes_saturate(backend):
    tensors = make_layer(STATIC, 4, 8)
    far, edge = torch.full((1, 8), 1e4), torch.full((1, 8), (127 + 7) * 0.025)
    assert torch.equal(run(backend, far, tensors, STATIC), run(backend, edge, tensors, STATIC))


@pytest.mark.parametrize("scheme", [DYNAMIC, SMOOTHED, INT4], ids=name_scheme)
@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_zero_token_gives_the_bias(backend, scheme):
    tensors, x = make_layer(scheme, 16, 32), make_input(3, 32)
    x[1] = 0
    assert torch.equal(run(backend, x, tensors, scheme)[1], tensors["bias"])


@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_scales_are_per_token(backend):
    tensors, x = make_layer(DYNAMIC, 16, 64), make_input(4, 64)
    loud = x.clone()
    loud[2] *= 800
    y, louder = run(backend, x, tensors, DYNAMIC), run(backend, loud, tensors, DYNAMIC)
    assert torch.equal(y[[0, 1, 3]], louder[[0, 1, 3]])


def test_int4_activations_take_15_codes():
    codes, _ = int8_arithmetic.quantize_tokens(make_input(50, 64), 7)
    assert set(codes.unique().tolist()) == set(range(-7, 8))


def test_smoothing_multiplies_inputs():
    tensors, x = make_layer(SMOOTHED, 16, 32), make_input(5, 32)
    plain = {name: t for name, t in tensors.items() if name != "mul_scale"}
    for backend in ("reference", "int8"):
        expected = run(backend, x * tensors["mul_scale"], plain, DYNAMIC)
        assert torch.equal(run(backend, x, tensors, SMOOTHED), expected)


@pytest.mark.parametrize("backend", ["reference", "int8", "decode"])
def test_layer_without_bias(backend):
    tensors, x = make_layer(DYNAMIC, 16, 32), make_input(5, 32)
    bias = tensors.pop("bias")
    y = run(backend, x, tensors, DYNAMIC)
    torch.testing.assert_close(y + bias, run(backend, x, tensors | {"bias": bias}, DYNAMIC))


@pytest.mark.parametrize("backend", ["reference", "int8", "decode"])
def test_empty_input(backend):
    tensors = make_layer(DYNAMIC, 16, 32)
    assert run(backend, torch.empty(0, 32), tensors, DYNAMIC).shape == (0, 16)


@ALL
def test_taking_rows_commutes_with_running(scheme):
    tensors, x = make_layer(scheme, 24, 40), make_input(5, 40)
    for rows in (slice(8, 16), torch.tensor([3, 1, 20])):
        part = linear_int8.take_rows(tensors, rows)
        for backend in ("reference", "int8", "decode"):
            torch.testing.assert_close(
                run(backend, x, part, scheme), run(backend, x, tensors, scheme)[:, rows]
            )


@ALL
@pytest.mark.parametrize("backend", ["reference", "int8", "decode"])
def test_footprint_is_what_is_kept(backend, scheme):
    kernel = next(k for k in linear_int8.KERNELS if k.backend == backend)
    tensors = make_layer(scheme, 24, 40)
    if scheme.smoothed:
        tensors["mul_scale"] = tensors["mul_scale"].bfloat16()
    del tensors["bias"]
    kept = kernel.prepare(tensors, scheme, torch.bfloat16)
    assert kernel.footprint(scheme, 24, 40, 2) == sum(
        t.numel() * t.element_size() for t in kept.values()
    )


@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_codes_are_not_copied(backend):
    tensors = make_layer(DYNAMIC, 16, 32)
    kernel = next(k for k in linear_int8.KERNELS if k.backend == backend)
    kept = kernel.prepare(tensors, DYNAMIC, torch.bfloat16)
    assert kept["weight"].data_ptr() == tensors["weight"].data_ptr()


def test_padding():
    matrix = torch.ones(3, 10, dtype=torch.int8)
    padded = linear_int8.pad_to(matrix, 32, 8)
    assert padded.shape == (32, 16)
    assert padded.sum() == 30
    assert linear_int8.pad_to(padded, 32, 8) is padded


@ALL
def test_cuda_path_equals_reference(scheme, monkeypatch):
    """The CUDA path without Triton, on a CPU, with cuBLAS's shape rules checked at the call."""
    skip_without_exact_int8()
    monkeypatch.setattr(linear_int8, "has_compiler", lambda: False)
    plain = torch._int_mm

    def strict(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[1] % 8 == 0
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    tensors, x = make_layer(scheme, 21, 43), make_input(5, 43)
    buffers = portable.keep_used(tensors, scheme, torch.float32)
    buffers["weight"] = linear_int8.pad_to(buffers["weight"], 8, 8)
    smoothed = int8_arithmetic.smooth(x, tensors, scheme)
    y = linear_int8.multiply_on_cuda(smoothed, buffers, tensors["bias"], scheme)
    torch.testing.assert_close(y, run("reference", x, tensors, scheme), rtol=0, atol=1e-6)


def test_choice_of_backends():
    shape = (64, 64)
    assert kernels.choose("linear.int8", CPU, DYNAMIC, shape).backend == "int8"
    assert kernels.choose("linear.int8", NPU, DYNAMIC, shape).backend == "npu"
    bare = Machine("910b", "ascend", "910b", 2**36)
    assert kernels.choose("linear.int8", bare, DYNAMIC, shape).backend == "decode"
    with pytest.raises(kernels.NoKernel, match=r"needs ascend hardware.*--backend") as caught:
        kernels.choose("linear.int8", CPU, DYNAMIC, shape, "npu")
    assert caught.value.rule == "msmodelslim-npu-ascend"


def test_a_processor_that_saturates_gets_another_backend():
    saturating, warnings = replace(CPU, flaws=(probe.SATURATING,)), []
    ask = partial(choose, "linear.int8", saturating, DYNAMIC, (64, 64))
    assert ask(warnings=warnings).backend == "decode"
    assert ask(warnings=warnings).backend == "decode"
    [warning] = warnings
    assert "int8 is not used: torch's integer product is not exact" in warning
    assert warning.endswith("; decode is")
    assert ask("reference").backend == "reference"
    with pytest.raises(
        kernels.NoKernel, match=r"not exact.*--backend decode \| reference"
    ) as caught:
        ask("int8")
    assert caught.value.rule == "int8-exact-cpu"
    assert choose("linear.int8", CPU, DYNAMIC, (64, 64)).backend == "int8"


def test_a_probed_processor_tells_its_flaw(monkeypatch):
    for exact, flaws in ((True, ()), (False, (probe.SATURATING, probe.ROTATED_SATURATING))):
        monkeypatch.setattr(probe, "multiplies_int8_exactly", lambda exact=exact: exact)
        assert probe.probe("cpu").flaws == flaws


PROGRAM = """
import torch
from quantmatrix.hardware.probe import multiplies_int8_exactly

generator = torch.Generator().manual_seed(0)
exact = True
for m, k, n in ((1, 64, 32), (40, 256, 48), (512, 1024, 256)):
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    found = torch._int_mm(codes, weight.t()).long()
    exact = exact and torch.equal(found, codes.long() @ weight.long().t())
print(exact, multiplies_int8_exactly())
"""


def test_what_the_probe_says_is_so(capsys):
    exec(PROGRAM, {})
    exact, said = capsys.readouterr().out.split()
    assert exact == said


@pytest.mark.parametrize("instructions", ["AVX2", "AVX2_VNNI", "AVX512_CORE"])
def test_what_the_probe_says_of_an_older_processor_is_so(instructions):
    """With fewer instructions than the processor has, torch's product is that of an older one."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    exact, said = done.stdout.split()
    assert exact == said


def test_the_suites_skip_what_the_processor_computes_wrongly(monkeypatch, capsys):
    root = Path(__file__).parents[3]
    cells = [f"msmodelslim-w8a8@cpu+{backend}" for backend in ("int8", "decode")]
    tests = [f"src/quantmatrix/suites/test_load.py::test_load[{cell}]" for cell in cells]
    monkeypatch.setattr(probe, "multiplies_int8_exactly", lambda: False)
    monkeypatch.chdir(root)
    code = pytest.main([*tests, "-q", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider"])
    out = capsys.readouterr().out
    assert code == NOT_EXECUTED, out
    assert "1 passed, 1 skipped" in out
    assert "row not executed (exit code 12): msmodelslim-w8a8@cpu+int8" in out
    assert "not exact on this processor" in out


def test_one_column_never_reaches_the_integer_matmul():
    assert kernels.choose("linear.int8", CPU, DYNAMIC, (8, 1)).backend == "decode"


def test_npu_without_cann_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(RefusedError, match="CANN") as caught:
        run("npu", make_input(2, 8, dtype=torch.bfloat16), make_layer(DYNAMIC, 8, 8), DYNAMIC)
    assert caught.value.rule == "msmodelslim-npu-ascend"


def test_npu_refuses_float32(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    with pytest.raises(RefusedError, match="--dtype bfloat16"):
        run("npu", make_input(2, 8), make_layer(DYNAMIC, 8, 8), DYNAMIC)


@pytest.fixture
def npu(monkeypatch):
    module, library = npu_simulator.make_module(npu_simulator.SCHEMAS)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    yield module
    library._destroy()


@ALL
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_npu_calls_bind_and_equal_reference(npu, dtype, biased, scheme):
    tensors, x = make_layer(scheme, 24, 40), make_input(2, 5, 40, dtype=dtype)
    if not biased:
        del tensors["bias"]
    if scheme == STATIC:  # numbers that survive the run dtype, as the NPU gets them
        tensors |= {"input_scale": torch.tensor(0.03125), "deq_scale": tensors["deq_scale"] * 1.25}
    y = run("npu", x, tensors, scheme)
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps
    expected = run("reference", x, tensors, scheme)
    torch.testing.assert_close(y, expected, rtol=2 * step, atol=8 * step)


def test_npu_packs_int4_weights(npu):
    tensors = make_layer(INT4, 24, 40)
    kept = int8_npu.prepare_npu(tensors, INT4, torch.bfloat16)
    assert kept["weight"].shape == (40, 3)
    assert torch.equal(npu_simulator.unpack(kept["weight"]), tensors["weight"].t().long())


@ALL
def test_npu_footprint_is_what_is_kept(npu, scheme):
    tensors = make_layer(scheme, 24, 40)
    if scheme.smoothed:
        tensors["mul_scale"] = tensors["mul_scale"].bfloat16()
    kept = int8_npu.prepare_npu(tensors, scheme, torch.bfloat16)
    size = sum(t.numel() * t.element_size() for t in kept.values())
    assert int8_npu.count_npu(scheme, 24, 40, 2) == pytest.approx(size, abs=8)
