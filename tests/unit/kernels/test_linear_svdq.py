"""linear.svdq: each backend against the format's formulas, each mistake of the format shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import svdq_oracle as oracle
import torch
from torch.nn import functional

from quantmatrix import kernels
from quantmatrix.families import nunchaku_svdq
from quantmatrix.families.protocol import Calibration
from quantmatrix.hardware import packages as hardware
from quantmatrix.hardware.machine import Machine
from quantmatrix.kernels import Kernel, linear_svdq, svdq_arithmetic, svdq_engines, svdq_packing
from quantmatrix.scheme import Scheme
from quantmatrix.tiny import weights

INT4, NVFP4 = nunchaku_svdq.SCHEMES["int4_r32"], nunchaku_svdq.SCHEMES["nvfp4_r32"]
UNSIGNED = replace(INT4, unsigned=True)
KINDS = {"int4": INT4, "unsigned": UNSIGNED, "nvfp4": NVFP4}
EACH = pytest.mark.parametrize("kind", KINDS)
EXACT = 2e-6
"""Relative distance of float32 sums from float64 ones."""


def make_input(scheme: Scheme, columns: int = 384, rows: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, columns, generator=generator)
    x[:, 3] *= 20
    x[1] = 0
    return functional.gelu(x, approximate="tanh") if scheme.unsigned else x


def make_layer(
    scheme: Scheme, rows: int = 256, columns: int = 384, parts: int = 2
) -> dict[str, torch.Tensor]:
    """A layer on disk that uses everything that its kind may have."""
    weight = weights.draw_weight("svdq", (rows, columns), structured=True).bfloat16()
    weight[: rows // 2] *= 3
    x = make_input(scheme, columns)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(6))
    stored = nunchaku_svdq.quantize(
        weight, scheme, bias=bias, calibration=Calibration(x.amin(0), x.amax(0)), parts=parts
    )
    if scheme.weight == "e2m1":
        stored["wtscale"] = torch.tensor([0.75]).bfloat16()
        # What is written is one number per part of 128 rows or more, which has no order to lose.
        channel = torch.linspace(0.5, 1.5, rows) * svdq_packing.unpack_channels(stored["wcscales"])
        stored["wcscales"] = svdq_packing.pack_channels(channel.bfloat16())
    return stored


def find_kernel(backend: str) -> Kernel:
    return next(kernel for kernel in linear_svdq.KERNELS if kernel.backend == backend)


def run(
    backend: str,
    x: torch.Tensor,
    stored: dict[str, torch.Tensor],
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The layer as the loader would run it."""
    canonical = nunchaku_svdq.canonical(stored, scheme)
    bias = canonical.pop("bias", None)
    kernel = find_kernel(backend)
    buffers = kernel.prepare(canonical, scheme, dtype)
    return kernel.run(x.to(dtype), buffers, None if bias is None else bias.to(dtype), scheme)


@EACH
def test_reference_is_the_formula(kind: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    layer = oracle.read_layer(stored, unsigned=scheme.unsigned)
    expected = oracle.compute(x, layer)
    assert oracle.relative_error(run("reference", x, stored, scheme), expected) < EXACT
    dense = functional.linear(x.double(), layer.weight, layer.plain_bias)
    assert 1e-3 < oracle.relative_error(expected, dense) < 0.1  # inputs are coded


MISTAKES = [
    ("multiply", "int4"),  # 2
    ("multiply", "nvfp4"),
    ("smooth the branch", "int4"),  # 3
    ("smooth the branch", "unsigned"),
    ("no shift", "unsigned"),  # 4
    ("shift the branch", "unsigned"),  # 4
    ("shift everywhere", "nvfp4"),  # 5
    ("shift everywhere", "int4"),  # 5
    ("rounded scale", "int4"),  # 10
    ("rounded scale", "nvfp4"),
    ("no channel scale", "nvfp4"),  # 11
]


@pytest.mark.parametrize(("mistake", "kind"), MISTAKES)
def test_mistakes_would_be_seen(mistake: str, kind: str) -> None:
    """The comparison above tells each wrong reading of the format from the right one."""
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    layer = oracle.read_layer(stored, unsigned=scheme.unsigned)
    wrong = oracle.compute(x, layer, mistake)
    assert oracle.relative_error(run("reference", x, stored, scheme), wrong) > 100 * EXACT


@EACH
@pytest.mark.parametrize("name", ["bias", "smooth_factor"])
def test_vectors_are_permuted(kind: str, name: str) -> None:
    """Mistake 1: a bias or smoothing vector taken as it lies on disk gives another layer."""
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    right = run("reference", x, stored, scheme)
    # A vector that is stored in plain order is one that a plain reading would have been right for.
    plainly = {**stored, name: svdq_packing.pack_channels(stored[name])}
    assert oracle.relative_error(run("reference", x, plainly, scheme), right) > 1e-3


@EACH
@pytest.mark.parametrize("backend", ["decode", "merged"])
def test_decoded_backends_are_the_dense_layer(kind: str, backend: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    layer = oracle.read_layer(stored, unsigned=scheme.unsigned)
    dense = functional.linear(x.double(), layer.weight, layer.plain_bias)
    assert oracle.relative_error(run(backend, x, stored, scheme), dense) < 1e-5
    for dtype, limit in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        found = run(backend, x, stored, scheme, dtype)
        assert found.dtype == dtype
        assert oracle.relative_error(found, dense) < limit


@EACH
def test_merged_equals_decode_to_rounding(kind: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    for dtype, limit in ((torch.bfloat16, 8e-3), (torch.float32, 1e-6)):
        merged, decoded = (run(b, x, stored, scheme, dtype) for b in ("merged", "decode"))
        assert oracle.relative_error(merged, decoded) < limit


@EACH
def test_decode_gives_weight_and_plain_bias(kind: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    layer = oracle.read_layer(stored, unsigned=scheme.unsigned)
    weight, bias = kernels.decode(scheme, nunchaku_svdq.canonical(stored, scheme))
    assert oracle.relative_error(weight, layer.weight) < EXACT
    assert bias is not None
    assert oracle.relative_error(bias, layer.plain_bias) < EXACT
    assert oracle.relative_error(nunchaku_svdq.dequantize(stored, scheme), layer.weight) < EXACT


def test_an_unsigned_bias_is_unfolded_where_inputs_are_left_alone() -> None:
    stored = make_layer(UNSIGNED)
    x = make_input(UNSIGNED)
    dense = run("merged", x, stored, UNSIGNED)
    folded = run("merged", x, stored, INT4)
    assert oracle.relative_error(folded, dense) > 0.01
    without = {name: tensor for name, tensor in stored.items() if name != "bias"}
    layer = oracle.read_layer(without, unsigned=True)
    expected = functional.linear(x.double(), layer.weight, layer.plain_bias)
    for backend in ("merged", "decode"):
        assert oracle.relative_error(run(backend, x, without, UNSIGNED), expected) < 1e-5


@EACH
def test_rows_of_a_fused_layer(kind: str) -> None:
    """q, k and v of one layer: only N above 128 shows scales read in their nominal shape (9)."""
    scheme, stored = KINDS[kind], make_layer(KINDS[kind], rows=768, parts=3)
    x = make_input(scheme)
    canonical = nunchaku_svdq.canonical(stored, scheme)
    whole = linear_svdq.reference(x, canonical, scheme)
    for rows in (slice(0, 256), slice(256, 512), slice(512, 768), torch.arange(767, -1, -3)):
        part = linear_svdq.take_rows(canonical, rows)
        assert torch.equal(part["smooth"], canonical["smooth"])
        found = linear_svdq.reference(x, part, scheme)
        assert oracle.relative_error(found, whole[:, rows]) < EXACT


@EACH
def test_shapes_and_dtypes(kind: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)[:6]
    flat = run("reference", x, stored, scheme)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for backend in ("reference", "decode", "merged"):
            found = run(backend, x.view(2, 3, -1), stored, scheme, dtype)
            assert (found.shape, found.dtype) == ((2, 3, 256), dtype)
    assert torch.equal(run("reference", x.view(2, 3, -1), stored, scheme).view(6, -1), flat)
    assert run("reference", x[:0], stored, scheme).shape == (0, 256)
    zeros = run("reference", torch.zeros(2, 384), stored, scheme)
    assert zeros.isfinite().all()


@EACH
def test_long_inputs_are_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    whole = run("reference", x, stored, scheme)
    monkeypatch.setattr(svdq_arithmetic, "CHUNK_ROWS", 32)
    assert oracle.relative_error(run("reference", x, stored, scheme), whole) < EXACT


@EACH
@pytest.mark.parametrize("backend", ["reference", "decode", "merged"])
def test_threads_do_not_change_bits(kind: str, backend: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(run(backend, x, stored, scheme, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@EACH
@pytest.mark.parametrize("backend", ["reference", "decode", "merged"])
def test_footprints(kind: str, backend: str) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    canonical = nunchaku_svdq.canonical(stored, scheme)
    bias = canonical.pop("bias")
    kernel = find_kernel(backend)
    kept = kernel.prepare(canonical, scheme, torch.bfloat16)
    size = sum(t.numel() * t.element_size() for t in (*kept.values(), bias))
    assert kernel.footprint(scheme, 256, 384, 2) == size


@pytest.mark.parametrize(("scheme", "sums"), [(INT4, 0), (UNSIGNED, 3 * 4)])
def test_dense_footprints_by_the_formula(scheme: Scheme, sums: int) -> None:
    dense = 3 * 5 * 2 + 3 * 2 + sums
    assert linear_svdq.measure_merged(scheme, 3, 5, 2) == dense
    assert linear_svdq.measure_decoded(scheme, 3, 5, 2) == dense + 2 * scheme.rank * (3 + 5)


def test_reference_keeps_what_it_is_given() -> None:
    canonical = nunchaku_svdq.canonical(make_layer(INT4), INT4)
    kept = find_kernel("reference").prepare(canonical, INT4, torch.bfloat16)
    assert all(kept[name].data_ptr() == canonical[name].data_ptr() for name in canonical)


# --- which machine runs what -----------------------------------------------------------------


def make_machine(arch: str, *packages: str) -> Machine:
    vendor = {"cpu": "cpu", "910b": "ascend", "gfx942": "amd"}.get(arch, "nvidia")
    return Machine(f"a {arch}", vendor, arch, 2**36, frozenset(packages))


@pytest.mark.parametrize("arch", ["cpu", "sm75", "sm90", "sm100", "gfx942", "910b"])
@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_engine_is_refused_and_portable_backends_are_offered(arch: str, kind: str) -> None:
    machine = make_machine(arch, "nunchaku")
    with pytest.raises(kernels.NoKernel, match="merged") as caught:
        kernels.choose("linear.svdq", machine, KINDS[kind], (256, 256), "nunchaku")
    assert caught.value.rule == "svdq-engine-arch"
    assert f"a {arch}" in caught.value.message
    chosen = kernels.choose("linear.svdq", machine, KINDS[kind], (256, 256))
    assert chosen.backend == "merged"


@pytest.mark.parametrize(
    ("arch", "kind", "rule"),
    [
        ("sm80", "int4", ""),
        ("sm86", "int4", ""),
        ("sm89", "int4", ""),
        ("sm120", "nvfp4", ""),
        ("sm121", "nvfp4", ""),
        ("sm80", "nvfp4", "svdq-nvfp4-ada"),
        ("sm89", "nvfp4", "svdq-nvfp4-ada"),
        ("sm120", "int4", "svdq-int4-blackwell"),
    ],
)
def test_engine_by_number_format(arch: str, kind: str, rule: str) -> None:
    machine, scheme = make_machine(arch, "nunchaku"), KINDS[kind]
    chosen = kernels.choose("linear.svdq", machine, scheme, (256, 256))
    assert chosen.backend == ("merged" if rule else "nunchaku")
    awq = nunchaku_svdq.SCHEMES["awq"]
    assert kernels.choose("linear.w4a16", machine, awq, (256, 256), "nunchaku").op == awq.op
    if rule:
        with pytest.raises(kernels.NoKernel, match="file of the model") as caught:
            kernels.choose("linear.svdq", machine, scheme, (256, 256), "nunchaku")
        assert caught.value.rule == rule


def test_engine_needs_its_package_and_tiles() -> None:
    with pytest.raises(kernels.NoKernel, match=r"it is not installed.*engine's releases") as caught:
        kernels.choose("linear.svdq", make_machine("sm89"), INT4, (256, 256), "nunchaku")
    assert caught.value.rule == "svdq-engine-package"
    with pytest.raises(kernels.NoKernel, match="multiple of 128") as caught:
        kernels.choose("linear.svdq", make_machine("sm89", "nunchaku"), INT4, (64, 256), "nunchaku")
    assert caught.value.rule == "svdq-engine-shape"


def test_the_look_alike_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake 12: the package of this name on the public index is not the engine."""
    note = ("look-alike", "nunchaku 0.16.1 is an unrelated statistics package")
    monkeypatch.setattr(kernels, "inspect_nunchaku", lambda: note)
    monkeypatch.setattr(hardware, "inspect_nunchaku", lambda: note)
    assert "nunchaku" not in hardware.installed_packages()
    with pytest.raises(kernels.NoKernel, match=r"0\.16\.1 is an unrelated statistics package"):
        kernels.choose("linear.svdq", make_machine("sm89"), INT4, (256, 256), "nunchaku")


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_comfy_kitchen_is_never_taken_unasked_and_has_no_nvfp4(kind: str) -> None:
    machine = make_machine("cpu", "comfy_kitchen")
    assert kernels.choose("linear.svdq", machine, KINDS[kind], (256, 256)).backend == "merged"
    if kind == "int4":
        kernels.choose("linear.svdq", machine, INT4, (256, 256), "comfy-kitchen")
        return
    with pytest.raises(kernels.NoKernel, match="takes weights int4") as caught:
        kernels.choose("linear.svdq", machine, NVFP4, (256, 256), "comfy-kitchen")
    assert caught.value.rule == "svdq-comfy-kitchen"


# --- the engine, played by the formulas ------------------------------------------------------


class Engine:
    """What the engine's two functions take and give, computed from its own tile order."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def quantize(
        self, rows: torch.Tensor, *, lora_down: torch.Tensor, smooth: torch.Tensor, fp4: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.calls["quantize"] = {"lora_down": lora_down, "smooth": smooth, "fp4": fp4}
        low = rows.double() @ oracle.take_factor(lora_down, down=True).T
        return rows, smooth, low

    def multiply(
        self,
        *,
        act: torch.Tensor,
        wgt: torch.Tensor,
        out: torch.Tensor,
        ascales: torch.Tensor,
        wscales: torch.Tensor,
        lora_act_in: torch.Tensor,
        lora_up: torch.Tensor,
        bias: torch.Tensor | None,
        act_unsigned: bool,
        fp4: bool,
        alpha: float,
        wcscales: torch.Tensor | None,
    ) -> None:
        assert not act_unsigned
        assert alpha == 1.0
        stored = {
            "qweight": wgt,
            "wscales": wscales,
            "smooth_factor": ascales,
            "proj_down": torch.zeros(act.shape[1], 16),
            "proj_up": torch.zeros(wgt.shape[0], 16),
        }
        stored |= {} if bias is None else {"bias": bias}
        stored |= {} if wcscales is None else {"wcscales": wcscales}
        self.calls["multiply"] = {**stored, "proj_up": lora_up, "fp4": fp4}
        main = oracle.compute(act, oracle.read_layer(stored))
        low = lora_act_in @ oracle.take_factor(lora_up, down=False).T
        out.copy_((main + low).to(out.dtype))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    played = Engine()
    gemm = SimpleNamespace(svdq_gemm_w4a4_cuda=played.multiply)
    quantize = SimpleNamespace(svdq_quantize_w4a4_act_fuse_lora_cuda=played.quantize)
    for name, module in (
        ("nunchaku", SimpleNamespace()),
        ("nunchaku.ops", SimpleNamespace()),
        ("nunchaku.ops.gemm", gemm),
        ("nunchaku.ops.quantize", quantize),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return played


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_engine_gets_back_what_was_on_disk(kind: str, engine: Engine) -> None:
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    x = make_input(scheme).bfloat16()
    y = run("nunchaku", x.view(2, 35, -1), stored, scheme, torch.bfloat16)
    expected = oracle.compute(x, oracle.read_layer(stored))
    assert y.shape == (2, 35, 256)
    assert oracle.relative_error(y.view(70, -1), expected) < 4e-3
    multiply, quantize = engine.calls["multiply"], engine.calls["quantize"]
    assert quantize["fp4"] == multiply["fp4"] == (kind == "nvfp4")
    for name, found in (
        ("qweight", multiply["qweight"]),
        ("wscales", multiply["wscales"]),
        ("proj_up", multiply["proj_up"]),
        ("bias", multiply["bias"]),
        ("proj_down", quantize["lora_down"]),
        ("smooth_factor", quantize["smooth"]),
    ):
        assert found.dtype == stored[name].dtype, name
        assert torch.equal(found.view(torch.uint8), stored[name].view(torch.uint8)), name


def test_engine_runs_unsigned_layers_as_signed_ones(engine: Engine) -> None:
    """Its standalone coder knows no shift, so the bias must not have one folded in either."""
    stored = make_layer(UNSIGNED)
    x = make_input(UNSIGNED).bfloat16()
    layer = oracle.read_layer(stored, unsigned=True)
    signed = replace(layer, unsigned=False, bias=layer.plain_bias)
    y = run("nunchaku", x, stored, UNSIGNED, torch.bfloat16)
    assert oracle.relative_error(y, oracle.compute(x, signed)) < 4e-3
    assert oracle.relative_error(y, oracle.compute(x, replace(signed, bias=layer.bias))) > 0.05
    without = {name: tensor for name, tensor in stored.items() if name != "bias"}
    y = run("nunchaku", x, without, UNSIGNED, torch.bfloat16)
    bare = replace(signed, bias=layer.plain_bias - layer.bias)
    assert oracle.relative_error(y, oracle.compute(x, bare)) < 4e-3


# --- comfy-kitchen, played by the formulas ---------------------------------------------------


def quantize_as_comfy(
    x: torch.Tensor,
    smooth: torch.Tensor,
    down: torch.Tensor,
    *,
    act_unsigned: bool,
    lora_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [M, K], scales [K/64, M], low-rank sums [M, R]), M filled up to whole tiles."""
    filled = functional.pad(x.double() / smooth.double(), (0, 0, 0, -len(x) % 32))
    groups = filled.unflatten(1, (-1, 64))
    low, high = (0, 15) if act_unsigned else (-8, 7)
    scales = groups.abs().amax(dim=2) / high
    codes = (groups / scales.clamp(min=1e-30).unsqueeze(2)).round().clamp(low, high)
    sums = functional.pad(lora_x.double() @ down.double(), (0, 0, 0, -len(x) % 32))
    return codes.flatten(1), scales.T, sums


def multiply_as_comfy(
    codes: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    sums: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
) -> torch.Tensor:
    assert weight.dtype == torch.int8
    nibbles = weight.view(torch.uint8).long()
    numbers = torch.stack([nibbles % 16, nibbles // 16], dim=2).flatten(1)
    numbers = torch.where(numbers > 7, numbers - 16, numbers).double()
    dense = numbers * weight_scales.double().T.repeat_interleave(64, dim=1)
    inputs = codes * scales.T.repeat_interleave(64, dim=1)
    plain = torch.zeros(len(weight)) if bias is None else bias
    return inputs @ dense.T + sums @ up.double().T + plain.double()


@pytest.mark.parametrize("kind", ["int4", "unsigned"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_comfy_kitchen_gets_what_it_multiplies(
    kind: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles of rows come back, of which those of the input are kept."""
    played = SimpleNamespace(
        quantize_svdquant_w4a4=quantize_as_comfy, scaled_mm_svdquant_w4a4=multiply_as_comfy
    )
    monkeypatch.setitem(sys.modules, "comfy_kitchen", played)
    scheme, stored = KINDS[kind], make_layer(KINDS[kind])
    if not biased:
        del stored["bias"]
    x = make_input(scheme).half()
    y = run("comfy-kitchen", x.view(2, 35, -1), stored, scheme, torch.float16)
    assert (y.shape, y.dtype) == ((2, 35, 256), torch.float16)
    layer = oracle.read_layer(stored, unsigned=scheme.unsigned)
    assert oracle.relative_error(y.view(70, -1), oracle.compute(x, layer)) < 5e-3


def test_engines_compute_in_sixteen_bits() -> None:
    assert svdq_engines.find_narrow(torch.float32) == torch.bfloat16
    assert svdq_engines.find_narrow(torch.float16) == torch.float16


@pytest.mark.parametrize(("unsigned", "more"), [(False, 6144), (True, 6144 + 12288)])
def test_bytes_of_what_packed_keeps_besides(unsigned: bool, more: int) -> None:
    """float32 smoothing of 3072 inputs beside their 16 bits, and a float32 sum of each output."""
    scheme = replace(nunchaku_svdq.SCHEMES["int4_r16"], unsigned=unsigned)
    size = (scheme, 3072, 3072, 2)
    assert linear_svdq.measure_packed(*size) - linear_svdq.measure_stored(*size) == more


@pytest.mark.parametrize(("name", "int4"), [("int4_r16", True), ("nvfp4_r32", False)])
def test_packed_says_which_codes_are_to_be_decoded(
    name: str, int4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decodes runs on a GPU; here a weight that is known stands for its result."""
    from quantmatrix.kernels import packed_triton

    scheme = nunchaku_svdq.SCHEMES[name]
    asked: list[Any] = []

    def decode(*given: Any, int4: bool) -> torch.Tensor:
        asked.append((*given, int4))
        return torch.zeros(6, 4)

    monkeypatch.setattr(packed_triton, "decode_smoothed", decode)
    buffers: dict[str, torch.Tensor] = {
        name: torch.full((1,), float(number))
        for number, name in enumerate(("weight", "weight_scale", "channel_scale", "unsmooth"))
    }
    buffers |= {"proj_up": torch.arange(12.0).view(6, 2), "proj_down": torch.ones(2, 4)}
    buffers["proj_down"][1] = 3.0
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    y = linear_svdq.run_packed(x, buffers, None, replace(scheme, unsigned=False))
    assert [*(float(one) for one in asked[0][:4]), *asked[0][4:]] == [
        0.0, 1.0, 2.0, 3.0, torch.float32, int4,
    ]  # fmt: skip
    assert y.tolist() == [[15.0 * (a + 3 * b) for a, b in buffers["proj_up"].tolist()]]
