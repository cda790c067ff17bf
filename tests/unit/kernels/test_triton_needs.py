"""What kernels of ours say that they need, held against the compiler and against torch's own rules.

For every kernel that starts a program of ours, every scheme that it takes and every architecture of
the tables: the plan takes it exactly where all its programs can be built and torch has the matmuls
that it calls. Either way round is a failure: a run that would have ended on the device, or hardware
that is refused for nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix import families, kernels
from quantmatrix.checkpoints.dtypes import to_torch
from quantmatrix.families import gguf
from quantmatrix.hardware.probe import name_arch
from quantmatrix.kernels import compiling, gguf_triton, linear_fp8, linear_int8, linear_nvfp4
from quantmatrix.kernels.launching import TRITON, watch
from quantmatrix.measure import compiled, true_launches
from quantmatrix.runtime.quantized_linear import QuantizedLinear
from quantmatrix.scheme import Scheme
from quantmatrix.tables import identify, read

pytest.importorskip("triton", reason="needs triton: the extra `compile`")

SHAPE, ROWS = (3072, 3072), (1, 512)
MACHINES = {row.arch: identify.from_row(row) for row in read.read().hardware.values()}
GPUS = {arch: machine for arch, machine in MACHINES.items() if machine.vendor in TRITON}


BLOCK_SCALES = ("sm90",)
"""Where torch's matmul takes scales per 128 columns and 128 x 128 block (its CUDA 12.9 kernels)."""


def list_schemes(family: str) -> Mapping[str, Scheme]:
    """Schemes of a family; of gguf, which reads more than it writes, those that have a program."""
    if family == gguf.ID:
        return {kind: gguf.find_scheme(kind) for kind in gguf_triton.TYPES}
    return families.load(family).SCHEMES


def list_pairs() -> Iterator[tuple[str, str, kernels.Kernel, Scheme]]:
    """(family, word, kernel, scheme) of everything that starts a program of ours on a Hopper."""
    for family in families.IDS:
        for word, scheme in list_schemes(family).items():
            if scheme.op not in kernels.OPS:
                continue
            for kernel in kernels.kernels_of(scheme.op):
                takes = kernel.needs.why_not(MACHINES["sm90"], scheme, SHAPE) is None
                if takes and true_launches.is_ours(kernel):
                    yield family, word, kernel, scheme


PAIRS = {f"{family} {word} {kernel.backend}": (family, kernel, scheme)
         for family, word, kernel, scheme in list_pairs()
         if kernel.backend not in ("reference", "decode", "merged")}  # fmt: skip


def see_launches(family: str, kernel: kernels.Kernel, scheme: Scheme, arch: str) -> list[Any]:
    """What a layer starts on an architecture, whether or not its needs are met there."""
    module = families.load(family)
    with watch(arch) as seen, torch.no_grad():
        stored = {
            suffix: torch.empty(spec.shapes[0], dtype=to_torch(spec.dtypes[0]), device="meta")
            for suffix, spec in module.tensors(scheme, *SHAPE).items()
        }
        canonical = dict(module.canonical(stored, scheme))
        canonical["bias"] = torch.empty(SHAPE[0], dtype=torch.bfloat16, device="meta")
        layer = QuantizedLinear(SHAPE[1], SHAPE[0], kernel, scheme, canonical, torch.bfloat16)
        for rows in ROWS:
            layer(torch.empty(rows, SHAPE[1], dtype=torch.bfloat16, device="meta"))
    return seen


def has_matmuls(kernel: kernels.Kernel, arch: str) -> bool:
    """Whether torch has the matmuls that a kernel calls. `_int_mm` has no rule on architectures."""
    if arch not in BLOCK_SCALES and kernel.backend == "torch-block":
        return False
    return "aten::_scaled_mm" not in kernel.matmul or supports_fp8(arch)


def supports_fp8(arch: str) -> bool:
    """Torch's own rule for `_scaled_mm` of e4m3, executed for an architecture.

    Its module cannot be imported without torch's test tools, so the one function is taken out of it.
    On AMD torch's e4m3 is another type there (`fnuz`), which our codes are not.
    """
    if not arch.startswith("sm"):
        return False
    capability = divmod(int(arch.removeprefix("sm")), 10)
    source = Path(torch.testing.__file__).parent / "_internal" / "common_cuda.py"
    tree = ast.parse(source.read_text())
    name = "evaluate_platform_supports_fp8"
    rule = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    device = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda *_: capability)
    stand_in = SimpleNamespace(cuda=device, version=SimpleNamespace(hip=None))
    names: dict[str, Any] = {"torch": stand_in, "SM90OrLater": capability >= (9, 0)}
    exec(compile(ast.Module([rule], []), source, "exec"), names)
    return bool(names[name]())


@pytest.fixture(scope="module")
def builder() -> compiled.Builder:
    return compiled.Builder(compiled.default_folder())


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_plan_and_compiler_agree_on_every_architecture(
    name: str, builder: compiled.Builder
) -> None:
    family, kernel, scheme = PAIRS[name]
    for arch, machine in GPUS.items():
        programs = builder.build_all(see_launches(family, kernel, scheme, arch), arch)
        assert programs, "starts no program of ours"
        faults = [fault for program in programs for fault in program.faults]
        works = not faults and has_matmuls(kernel, arch)
        why = kernel.needs.why_not(machine, scheme, SHAPE)
        assert (why is None) == works, f"{arch}: the plan says {why}, the compiler {faults}"


def test_the_kernels_are_those_that_the_ops_declare() -> None:
    backends = {(kernel.op, kernel.backend) for _, kernel, _ in PAIRS.values()}
    assert backends == {
        ("linear.fp8", "torch"),
        ("linear.fp8", "torch-block"),
        ("linear.nvfp4", "fp8-recode"),
        ("linear.nvfp4", "packed"),
        ("linear.nvfp4", "packed-fp8"),
        ("linear.svdq", "packed"),
        ("linear.w4a16", "packed"),
        ("linear.int8", "int8"),
        ("linear.convrot", "int8"),
        ("linear.gguf", "packed"),
    }


def test_ampere_and_amd_keep_four_bits() -> None:
    """Rows that were refused, or would have ended on the device, before kernels were built."""
    scheme = families.load("modelopt-nvfp4").SCHEMES["NVFP4"]
    for arch in ("sm80", "sm86", "gfx942"):
        found = kernels.choose("linear.nvfp4", MACHINES[arch], scheme, SHAPE, "packed")
        assert found.backend == "packed"


def test_a_need_that_is_too_narrow_or_too_wide_is_seen(
    builder: compiled.Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, kernel, scheme = PAIRS["modelopt-nvfp4 NVFP4 packed"]
    narrow = replace(kernel, needs=replace(kernel.needs, vendors=("nvidia",)))
    monkeypatch.setitem(PAIRS, "narrow", (family, narrow, scheme))
    with pytest.raises(AssertionError, match="gfx942: the plan says needs nvidia hardware"):
        test_plan_and_compiler_agree_on_every_architecture("narrow", builder)
    family, kernel, scheme = PAIRS["modelopt-nvfp4 NVFP4 packed-fp8"]
    wide = replace(kernel, needs=replace(kernel.needs, arches=()))
    monkeypatch.setitem(PAIRS, "wide", (family, wide, scheme))
    with pytest.raises(AssertionError, match=r"sm80: the plan says None, the compiler .*fp8e4nv"):
        test_plan_and_compiler_agree_on_every_architecture("wide", builder)


@pytest.mark.parametrize("arch", ["sm80", "sm86", *linear_fp8.TORCH_ARCHES])
def test_fp8_matmuls_are_planned_where_torch_has_them(arch: str) -> None:
    assert supports_fp8(arch) == (arch in linear_fp8.TORCH_ARCHES)
    assert set(linear_nvfp4.FP8_ARCHES) <= set(linear_fp8.TORCH_ARCHES)


def test_matmuls_are_called_in_the_shapes_that_torch_documents() -> None:
    """Torch's shape functions carry its rules for CUDA: multiples of 16, one column-major operand."""
    codes = torch.empty(32, 40, dtype=torch.float8_e4m3fn, device="meta")
    one = torch.empty((), device="meta")
    with pytest.raises(RuntimeError, match="divisible by 16"):
        torch._scaled_mm(codes, codes.t(), scale_a=one, scale_b=one)
    needs = {k.backend: k.needs for k in kernels.kernels_of("linear.fp8")}
    assert (needs["torch"].out_multiple % 16, needs["torch"].in_multiple % 16) == (0, 0)
    # cuBLAS: more than 16 rows, columns in multiples of 8
    assert linear_int8.CUDA_ROWS > 16
    assert linear_int8.CUDA_MULTIPLE % 8 == 0


def test_a_target_is_never_asked_for_more_than_it_has() -> None:
    probe = SimpleNamespace(major=8, minor=6, gcnArchName="gfx942:sramecc+")
    assert name_arch(probe) in compiling.TARGETS
