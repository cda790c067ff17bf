"""NVFP4 against other people's code: diffusers' bfl decoder, comfy-kitchen and flashinfer.

comfy-kitchen's eager operations run on a CPU. flashinfer needs CUDA to import, and diffusers
imports it whenever it is installed; so its wheel is only read: the signatures that our calls must
bind to, the architectures it names, and its shuffle.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.quantizers.bfl import utils as bfl
from safetensors.torch import save_file

from quantmatrix.api import load_transformer
from quantmatrix.families.modelopt_nvfp4 import NVFP4
from quantmatrix.kernels import linear_nvfp4, nvfp4_arithmetic, nvfp4_flashinfer, scale_layouts
from quantmatrix.kernels.number_formats import swap_nibbles
from quantmatrix.models import flux_2
from quantmatrix.tiny.weights import fill
from quantmatrix.tools.packing import pack_tensors

SHAPES = [(128, 64), (256, 128), (130, 80), (5, 16), (200, 1008), (384, 96)]
EACH = pytest.mark.parametrize(("rows", "columns"), SHAPES)
ARCHES = {"sm100": 100, "sm103": 103, "sm120": 120, "sm121": 121}


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


@EACH
def test_bfl_decodes_alike(rows: int, columns: int) -> None:
    codes, scales, whole = bfl.quantize_nvfp4(make_weight(rows, columns))
    layer = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    theirs = bfl.dequantize_nvfp4(codes, scales, whole)
    assert same(linear_nvfp4.decode(layer, NVFP4), theirs)
    for dtype in (torch.bfloat16, torch.float16):
        assert same(nvfp4_arithmetic.decode_to(layer, NVFP4, dtype), theirs.to(dtype))


def test_bfl_decodes_every_byte_alike() -> None:
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


LAYERS = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
}


def test_a_ragged_raw_file_that_comfy_kitchen_coded(tmp_path: Path) -> None:
    """A FLUX.2 whose layers fill no tile: padded scales, packed q, k and v cut inside a tile."""
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends.eager import quantization as comfy
    from diffusers import Flux2Transformer2DModel

    config = {"num_attention_heads": 2, "attention_head_dim": 48, "axes_dims_rope": [12] * 4}
    config |= {"num_layers": 1, "num_single_layers": 1, "in_channels": 16}
    made = Flux2Transformer2DModel(**config, joint_attention_dim=80, timestep_guidance_channels=32)
    fill(made, "ragged")
    made.save_pretrained(tmp_path / "base")
    plain = {name: t.clone() for name, t in made.state_dict().items()}
    raw = pack_tensors(plain, flux_2.BFL)
    for layer, modules in LAYERS.items():
        weight = torch.cat([plain[f"{module}.weight"] for module in modules])
        assert weight.shape[0] % 128
        whole = weight.abs().amax() / (6 * 448)
        codes, tiled = comfy.quantize_nvfp4(weight, whole, hi_first=True)
        rows, columns = weight.shape
        decoded = comfy.dequantize_nvfp4(codes, whole, tiled, torch.float32, hi_first=True)
        parts = decoded[:rows, :columns].chunk(len(modules))
        for module, part in zip(modules, parts, strict=True):
            plain[f"{module}.weight"] = part
        raw |= {f"{layer}.weight": codes, f"{layer}.weight_scale_2": whole}
        raw[f"{layer}.weight_scale"] = tiled.view(torch.float8_e4m3fn)
    save_file({n: t.contiguous() for n, t in raw.items()}, tmp_path / "raw.safetensors")
    loaded = load_transformer(
        str(tmp_path / "base"),
        transformer_weights_path=str(tmp_path / "raw.safetensors"),
        backend="decode",
        dtype=torch.float32,
    )
    found = {m.removesuffix(".q_decoded"): t for m, t in loaded.state_dict().items()}
    modules = [module for group in LAYERS.values() for module in group]
    for module in modules:
        assert torch.equal(found.pop(module), plain.pop(f"{module}.weight")), module
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


WHEEL = "flashinfer_python-0.7.2.post1"


class Source:
    """flashinfer's Python files, parsed and never run."""

    def __init__(self, folder: Path) -> None:
        if not list(folder.glob(f"{WHEEL}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
            wanted = WHEEL.replace("_", "-", 1).replace("-0", "==0")
            if subprocess.run([*command, "-d", str(folder), wanted], check=False).returncode:
                pytest.skip(f"{wanted} cannot be downloaded")
        self.wheel = zipfile.ZipFile(next(folder.glob(f"{WHEEL}-*.whl")))

    def read(self, file: str) -> str:
        """The text of a file of the package."""
        return self.wheel.read(f"flashinfer/{file}").decode()

    def find(self, file: str, name: str) -> Any:
        """The definition of a function or class, or the assignment of a name."""
        for node in ast.parse(self.read(file)).body:
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


@pytest.fixture(scope="module")
def source(pytestconfig: pytest.Config) -> Source:
    return Source(Path(pytestconfig.cache.mkdir("wheels")))


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
def test_calls_bind_to_flashinfers_signatures(
    gemm: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_exported_names(source: Source) -> None:
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source.read("__init__.py")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"mm_fp4", "nvfp4_quantize", "SfLayout"} <= imported


@pytest.mark.parametrize("gemm", sorted(nvfp4_flashinfer.NEEDS))
def test_architectures_are_flashinfers(gemm: str, source: Source) -> None:
    supported = source.capabilities(f"_{gemm}_gemm_fp4_requirement")
    ours = {ARCHES[arch] for arch in nvfp4_flashinfer.NEEDS[gemm].arches}
    assert ours == supported & set(ARCHES.values())


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_shuffle_is_flashinfers(rows: int, source: Source) -> None:
    names = ("srcToDstBlk16RowMap", "srcToDstBlk32RowMap", "get_shuffle_block_size")
    nodes = [source.find("utils.py", n) for n in (*names, "get_shuffle_matrix_a_row_indices")]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(nodes, []), "flashinfer", "exec"), space)
    theirs = space["get_shuffle_matrix_a_row_indices"](torch.zeros(rows, 4), 128)
    assert torch.equal(scale_layouts.find_shuffle(rows), theirs)
