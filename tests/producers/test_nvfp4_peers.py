"""NVFP4 against other people's code: diffusers' bfl decoder, comfy-kitchen and flashinfer.

comfy-kitchen's eager operations run on a CPU. flashinfer needs CUDA to import, so its source is
read: the signatures that our calls must bind to, the architectures it names, and its shuffle.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.families.modelopt_nvfp4 import NVFP4
from quantmatrix.formats import swap_nibbles
from quantmatrix.kernels import linear_nvfp4, nvfp4_arithmetic, nvfp4_flashinfer, scale_layouts

SHAPES = [(128, 64), (256, 128), (130, 80), (5, 16), (200, 1008), (384, 96)]
EACH = pytest.mark.parametrize(("rows", "columns"), SHAPES)
ARCHES = {"sm100": 100, "sm103": 103, "sm120": 120}


def make_weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, :16] *= 1e-3
    return weight


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit."""
    assert left.dtype == right.dtype
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
    return left.shape == right.shape and torch.equal(a, b)


@pytest.fixture(scope="module")
def bfl() -> Any:
    """diffusers' decoder, which imports flashinfer whenever its files are there."""
    stand_in = module_from_spec(ModuleSpec("flashinfer", None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", stand_in)
        return importlib.import_module("diffusers.quantizers.bfl.utils")


@EACH
def test_bfl_decodes_alike(rows: int, columns: int, bfl: Any) -> None:
    codes, scales, whole = bfl.quantize_nvfp4(make_weight(rows, columns))
    layer = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    theirs = bfl.dequantize_nvfp4(codes, scales, whole)
    assert same(linear_nvfp4.decode(layer, NVFP4), theirs)
    for dtype in (torch.bfloat16, torch.float16):
        assert same(nvfp4_arithmetic.decode_to(layer, NVFP4, dtype), theirs.to(dtype))


def test_bfl_decodes_every_byte_alike(bfl: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    scales = torch.linspace(0.01, 448, 32).view(8, 4).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.0123)
    layer = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    theirs = bfl.dequantize_nvfp4(codes, scales, whole)
    assert same(linear_nvfp4.decode(layer, NVFP4), theirs)


@EACH
def test_comfy_kitchen_tiles_alike(rows: int, columns: int) -> None:
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.float_utils import from_blocked, to_blocked

    scales = nvfp4_arithmetic.encode(make_weight(rows, columns))[1]
    theirs = to_blocked(scales.view(torch.uint8), flatten=False).view(scales.dtype)
    assert same(scale_layouts.tile_scales(scales), theirs)
    back = scale_layouts.untile_scales(theirs, *scales.shape)
    assert same(back, from_blocked(theirs.view(torch.uint8), *scales.shape).view(scales.dtype))
    assert same(back, scales)


@EACH
@pytest.mark.parametrize("high_first", [False, True])
def test_comfy_kitchen_codes_and_decodes_alike(rows: int, columns: int, high_first: bool) -> None:
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends.eager import quantization as comfy

    weight = make_weight(rows, columns)
    codes, scales, whole = nvfp4_arithmetic.encode(weight)
    packed, tiled = comfy.quantize_nvfp4(weight, whole, hi_first=high_first)
    ordered = swap_nibbles(packed) if high_first else packed
    assert same(ordered, codes)
    assert same(scale_layouts.untile_scales(tiled, *scales.shape), scales)
    theirs = comfy.dequantize_nvfp4(packed, whole, tiled, torch.float32, hi_first=high_first)
    layer = {"weight": ordered, "weight_scale": scales, "weight_scale_2": whole}
    assert same(linear_nvfp4.decode(layer, NVFP4), theirs)
    other = comfy.dequantize_nvfp4(packed, whole, tiled, torch.float32, hi_first=not high_first)
    assert not torch.equal(other, theirs)


class Source:
    """flashinfer's Python files, parsed and never run."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("flashinfer")
        if spec is None or spec.origin is None:
            pytest.skip("flashinfer is not installed")
        self.root = Path(spec.origin).parent

    def find(self, file: str, name: str) -> Any:
        """The definition of a function or class, or the assignment of a name."""
        for node in ast.parse((self.root / file).read_text()).body:
            if getattr(node, "name", None) == name:
                return node
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return node
        raise AssertionError(f"{file} has no {name}")

    def signature(self, file: str, name: str) -> inspect.Signature:
        """What a function takes."""
        arguments = self.find(file, name).args
        found = []
        defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        for argument, default in zip(arguments.args, defaults, strict=True):
            value = inspect.Parameter.empty if default is None else ast.unparse(default)
            found.append(inspect.Parameter(argument.arg, kind, default=value))
        assert not arguments.kwonlyargs
        return inspect.Signature(found)

    def capabilities(self, function: str) -> set[int]:
        """Compute capabilities that a requirement of mm_fp4 is decorated with."""
        decorators = self.find("gemm/gemm_base.py", function).decorator_list
        return set(ast.literal_eval(decorators[0].args[0]))


GEMM, QUANTIZE = "gemm/gemm_base.py", "quantization/fp4_quantization.py"


def record_calls(gemm: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Positional and keyword arguments of each call that a backend makes."""
    calls: dict[str, Any] = {}

    def quantize(*words: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls["nvfp4_quantize"] = (words, named)
        return torch.zeros(9, 64, dtype=torch.uint8), torch.zeros(128, 8, dtype=torch.uint8)

    def multiply(*words: Any, **named: Any) -> torch.Tensor:
        calls["mm_fp4"] = (words, named)
        return torch.zeros(9, 256, dtype=torch.bfloat16)

    fake = SimpleNamespace(
        SfLayout=SimpleNamespace(layout_128x4="layout_128x4"),
        nvfp4_quantize=quantize,
        mm_fp4=multiply,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    codes, scales, whole = nvfp4_arithmetic.encode(make_weight(256, 128))
    layer = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    layer["input_scale"] = torch.tensor(0.001)
    buffers = nvfp4_flashinfer.PREPARE[gemm](layer, NVFP4, torch.bfloat16)
    nvfp4_flashinfer.RUN[gemm](torch.randn(9, 128).bfloat16(), buffers, None, NVFP4)
    return calls


@pytest.mark.parametrize("gemm", sorted(nvfp4_flashinfer.NEEDS))
def test_calls_bind_to_flashinfers_signatures(gemm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    calls = record_calls(gemm, monkeypatch)
    for file, name in ((GEMM, "mm_fp4"), (QUANTIZE, "nvfp4_quantize")):
        words, named = calls[name]
        source.signature(file, name).bind(*words, **named)
    _, named = calls["mm_fp4"]
    (codes, weight, inputs, scales), k = calls["mm_fp4"][0], 64
    assert codes.shape == (9, k)
    assert weight.shape == (k, 256)
    assert weight.stride() == (1, k)
    assert scales.T.is_contiguous()
    assert {inputs.dtype, scales.dtype} <= {torch.uint8, torch.float8_e4m3fn}
    assert named["alpha"].dtype == torch.float32
    assert named["alpha"].numel() == 1
    backend = next(a for a in source.find(GEMM, "mm_fp4").args.args if a.arg == "backend")
    assert f"'{named['backend']}'" in ast.unparse(backend.annotation)


def test_exported_names() -> None:
    source = Source()
    text = (source.root / "__init__.py").read_text()
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"mm_fp4", "nvfp4_quantize", "SfLayout"} <= imported


@pytest.mark.parametrize("gemm", sorted(nvfp4_flashinfer.NEEDS))
def test_architectures_are_flashinfers(gemm: str) -> None:
    supported = Source().capabilities(f"_{gemm}_gemm_fp4_requirement")
    ours = {ARCHES[arch] for arch in nvfp4_flashinfer.NEEDS[gemm].arches}
    assert ours == supported & set(ARCHES.values())


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_shuffle_is_flashinfers(rows: int) -> None:
    source = Source()
    names = ("srcToDstBlk16RowMap", "srcToDstBlk32RowMap", "get_shuffle_block_size")
    nodes = [source.find("utils.py", n) for n in (*names, "get_shuffle_matrix_a_row_indices")]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(nodes, []), "flashinfer", "exec"), space)
    theirs = space["get_shuffle_matrix_a_row_indices"](torch.zeros(rows, 4), 128)
    assert torch.equal(scale_layouts.find_shuffle(rows), theirs)
