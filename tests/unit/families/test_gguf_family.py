"""The gguf family: what a file is taken for, and whole models of its files beside diffusers' loader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix import families
from quantmatrix.checkpoints import gguf_writer
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import gguf
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.scheme import BLOCKS

Headers = dict[str, tuple[str, tuple[int, ...]]]


def make(tensors: Headers, **metadata: str) -> Checkpoint:
    headers = {
        name: TensorHeader(name, dtype, shape, "x.gguf", start=64)
        for name, (dtype, shape) in tensors.items()
    }
    named = {f"general.{key}": value for key, value in metadata.items()}
    return Checkpoint("x.gguf", ("x.gguf",), headers, named)


MIXED: Headers = {
    "blocks.0.self_attn.q.weight": ("Q4_K", (256, 512)),
    "blocks.0.self_attn.v.weight": ("Q6_K", (256, 512)),
    "blocks.0.self_attn.v.bias": ("F32", (256,)),
    "blocks.0.modulation": ("Q8_0", (1, 6, 256)),
    "x_pad_token": ("Q8_0", (1, 256)),
    "head.head.weight": ("F16", (64, 256)),
    "odd.weight": ("Q8_0", (7, 96)),
    "reshaped.weight": ("Q4_K", (32, 8)),
}


def test_a_file_says_what_it_is_in_one_line() -> None:
    found = families.detect(make(MIXED, architecture="wan", file_type="15"))
    assert found == ("gguf", "a GGUF file (wan; file type Q4_K_M; 3 Q8_0, 2 Q4_K, 1 Q6_K)")
    assert families.detect(make(MIXED, file_type="x" * 9)) == (
        "gguf",
        "a GGUF file (3 Q8_0, 2 Q4_K, 1 Q6_K)",
    )
    assert explain_unknown(make(MIXED)) is None


def test_file_types_have_the_names_of_the_package() -> None:
    package = pytest.importorskip("gguf", reason="needs the package gguf: the extra `gguf`")
    prefix = re.compile("ALL_|MOSTLY_")
    types = {int(kind): prefix.sub("", kind.name) for kind in package.LlamaFileType}
    assert gguf.FILE_TYPES.items() <= types.items()
    assert {types[number] for number in set(types) - set(gguf.FILE_TYPES)} <= {
        *("MXFP4_MOE", "NVFP4", "Q1_0", "GUESSED"),
    }


def test_every_matrix_of_whole_blocks_is_a_layer_of_its_own_type() -> None:
    found = gguf.schemes(make(MIXED))
    assert {layer: scheme.name for layer, scheme in found.items()} == {
        "blocks.0.self_attn.q": "Q4_K",
        "blocks.0.self_attn.v": "Q6_K",
        "odd": "Q8_0",
    }
    assert found["odd"] == gguf.SCHEMES["Q8_0"]
    assert found["blocks.0.self_attn.v"].group_size == 16


def test_a_tensor_beside_blocks_that_nothing_would_use_is_refused() -> None:
    name = "blocks.0.self_attn.q.weight_scale"
    with pytest.raises(CheckpointError, match=f"x.gguf: tensor {name} .F32 .256.. stands beside"):
        gguf.schemes(make({**MIXED, name: ("F32", (256,))}))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_file_of_numbers_is_not_quantized(dtype: str) -> None:
    plain = make({"a.weight": (dtype, (8, 32))}, architecture="flux", file_type="1")
    assert families.detect(plain) is None
    families.check(plain)


@pytest.mark.parametrize("name", ["t5encoder", "sdxl", "hyvid", "llama"])
def test_a_file_of_another_model_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"general.architecture is {name}, "):
        families.check(make(MIXED, architecture=name))
    families.check(make(MIXED, architecture="pig"))
    safetensors = Checkpoint("x", ("x",), {}, {"general.architecture": name})
    families.check(safetensors)


def test_schemes_are_asked_for_by_name() -> None:
    assert gguf.name_scheme(None, None, None) == "Q8_0"
    assert gguf.name_scheme("q4_k", None, None) == "Q4_K"
    with pytest.raises(UsageError, match="Q6_K, which is read and not written"):
        gguf.name_scheme("Q6_K", None, None)
    with pytest.raises(UsageError, match="--scheme FP8: gguf has Q8_0"):
        gguf.name_scheme("FP8", None, None)
    with pytest.raises(UsageError, match="--precision and --rank"):
        gguf.name_scheme(None, "int4", None)


@pytest.mark.parametrize(
    ("scheme", "columns", "found"),
    [("Q4_K", 512, "Q4_K"), ("Q4_K", 384, "Q5_0"), ("Q4_K", 40, None), ("Q8_0", 33, None)],
)
def test_rows_that_are_no_whole_blocks_get_smaller_ones(
    scheme: str, columns: int, found: str | None
) -> None:
    flags = {"raw": True, "gelu": False, "interleaved": False}
    chosen = gguf.scheme_of("a", gguf.SCHEMES[scheme], **flags, columns=columns)
    assert (chosen and chosen.name) == found


@pytest.mark.parametrize("name", gguf.SCHEMES)
def test_what_is_written_is_what_is_announced(name: str) -> None:
    scheme = gguf.SCHEMES[name]
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    stored = gguf.quantize(weight.bfloat16(), scheme, bias=torch.ones(256).bfloat16())
    [spec] = gguf.tensors(scheme, 256, 512).values()
    assert tuple(stored["weight"].shape) in spec.shapes
    assert stored["bias"].dtype == torch.float32
    error = (gguf.dequantize(stored, scheme) - weight).norm() / weight.norm()
    assert error < {"Q8_0": 0.01, "Q5_0": 0.06, "Q4_K": 0.1}[name]
    cut = gguf.cut_rows(stored, scheme, 128, 256)
    assert torch.equal(gguf.dequantize(cut, scheme), gguf.dequantize(stored, scheme)[128:])
    assert gguf.find_fault(stored, scheme) is None
    stored["weight"][3, 1] = 0x7C
    assert "Q" in str(gguf.find_fault(stored, scheme))


def test_groups_are_those_that_share_a_scale() -> None:
    """Within a group a block's weights are multiples of one step, or differences of them are."""
    assert gguf.GROUPS.keys() == BLOCKS.keys()
    assert all(BLOCKS[kind][0] % size == 0 for kind, size in gguf.GROUPS.items())


# --- whole models, beside diffusers' loader --------------------------------------------------

ROWS = ("gguf-flux-2-q8-0", "gguf-wan-2-2-q8-0", "gguf-z-image-q8-0", "gguf-flux-1-q4-k")


def find_file(row: Any) -> tuple[Path, Path]:
    """(the stand-in's file, the base model's folder)."""
    from quantmatrix.checkpoints.opening import open_weights
    from quantmatrix.tiny import hub

    folder = hub.default_folder()
    for reference in (row.base, row.reference):
        hub.ensure(reference, folder)
    [file] = open_weights(row.reference, hub.hub(folder)).files
    return Path(file), hub.find_snapshot(row.base, folder)


def load_ours(row: Any, file: Path, base: Path, backend: str) -> Any:
    from quantmatrix.api import plan
    from quantmatrix.runtime.load import load_component

    planned = plan(
        model_path=str(base), weights_paths={"transformer": str(file)}, device="cpu",
        dtype="float32", backend=backend,
    )  # fmt: skip
    assert planned.ok, planned
    component = planned.components["transformer"]
    return load_component(component, planned.request), component


@pytest.mark.parametrize("name", ROWS)
def test_diffusers_loader_gives_the_same_weights(name: str) -> None:
    """Its arithmetic is float16: products of Q8_0 are exact there before they are rounded once."""
    import diffusers

    from quantmatrix.tables import read

    row = read.read().checkpoints[name]
    file, base = find_file(row)
    ours, component = load_ours(row, file, base, "decode")
    theirs = getattr(diffusers, component.class_name).from_single_file(
        str(file),
        config=str(base / "transformer"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    modules = dict(theirs.named_modules())
    compared = 0
    for module in component.layers:
        decoded = dequantize_gguf_tensor(modules[module].weight).float()
        own = ours.get_submodule(module)._buffers["q_decoded"]
        if row.scheme == "Q8_0":
            assert torch.equal(own.half().float(), decoded), module
        else:
            assert (own - decoded).norm() < 2e-3 * own.norm(), module
        compared += 1
    assert compared == len(component.layers) > 10
    parameters = dict(theirs.named_parameters())
    for plain in component.plain:
        stored = dequantize_gguf_tensor(parameters[plain.parameter]).float()
        found = dict(ours.named_parameters())[plain.parameter]
        assert torch.equal(found.float(), stored.reshape(found.shape)), plain.parameter


def test_faults_are_put_into_a_file_of_the_same_form(tmp_path: Path) -> None:
    from quantmatrix.checkpoints.opening import open_weights
    from quantmatrix.harness.mutation.judge import read_file, write_like
    from quantmatrix.request import Hub
    from quantmatrix.tables import read

    file, _ = find_file(read.read().checkpoints["gguf-wan-2-2-q8-0"])
    checkpoint = open_weights(str(file), Hub())
    stored = read_file(checkpoint, str(file))
    write_like(checkpoint, str(file), stored, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_plain_tensors_of_blocks_are_decoded(tmp_path: Path) -> None:
    """Quantizers that know no names code tables and tokens, too."""
    from quantmatrix.checkpoints import gguf as container
    from quantmatrix.checkpoints.reader import TensorReader
    from quantmatrix.runtime.load import decode_plain

    table = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    codes = gguf.quantize(table.view(6, 64), gguf.SCHEMES["Q8_0"])["weight"].view(1, 6, -1)
    path = tmp_path / "x.gguf"
    gguf_writer.write_file(path, {"a.modulation": codes}, {"a.modulation": "Q8_0"}, {})
    tensors, _ = container.read_header(path)
    header = tensors["a.modulation"]
    with TensorReader(Checkpoint("x", (str(path),), tensors), "cpu") as reader:
        found = decode_plain(header, reader.read("a.modulation"))
    assert found.shape == table.shape
    assert (found - table).abs().max() < 0.05
    whole = torch.ones(3).bfloat16()
    assert decode_plain(TensorHeader("b", "BF16", (3,), "x"), whole) is whole


@pytest.mark.parametrize(
    ("family", "name", "ending"),
    [("gguf", "x.safetensors", "gguf"), ("fp8", "x.gguf", "safetensors"), ("fp8", "x.bin", "safe")],
)
def test_a_single_file_has_its_familys_ending(family: str, name: str, ending: str) -> None:
    from quantmatrix.request import Request
    from quantmatrix.tiny.hub import use_tiny
    from quantmatrix.tools.quantize import quantize

    request = use_tiny(Request(model_path="Tongyi-MAI/Z-Image-Turbo", tiny=True))
    with pytest.raises(UsageError, match=rf"a single file of {family} ends in \.{ending}"):
        quantize(request, family=family, output=name)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    from quantmatrix.request import Request
    from quantmatrix.tiny.hub import use_tiny
    from quantmatrix.tools.quantize import quantize

    path = tmp_path_factory.mktemp("written") / "z-Q8_0.gguf"
    request = use_tiny(Request(model_path="Tongyi-MAI/Z-Image-Turbo", tiny=True))
    return path, quantize(request, family="gguf", output=path, scheme="Q8_0", prompts=("a fox",))


def test_quantize_writes_one_file_that_is_read_again(written: tuple[Path, dict[str, Any]]) -> None:
    path, said = written
    assert said["scheme"] == "Q8_0"
    assert said["components"]["transformer"]["quantized"] > 10
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    package = pytest.importorskip("gguf", reason="needs the package gguf: the extra `gguf`")
    theirs = package.GGUFReader(path)
    assert theirs.get_field("general.architecture").contents() == "lumina2"
    kinds = {tensor.tensor_type.name for tensor in theirs.tensors}
    assert kinds == {"Q8_0", "F32", "BF16"}
    assert json.dumps(said)
