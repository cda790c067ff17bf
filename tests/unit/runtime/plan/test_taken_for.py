"""The line of `inspect`: what a file is and what it was taken for, for every family and scheme."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weight_files import write_weights

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.cli.main import main
from quantmatrix.runtime.plan.inspect import describe
from quantmatrix.runtime.plan.taken_for import INPUTS, describe_codes
from quantmatrix.scheme import Scheme

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q")
FORMS = {
    "fp8 tensor-dynamic": "fp8: e4m3 codes, one scale, inputs by one scale, found while running",
    "fp8 tensor-static": "fp8: e4m3 codes, one scale, inputs by a stored scale",
    "fp8 channel-dynamic": "fp8-channel: e4m3 codes, a scale per channel, inputs by a scale per token",
    "fp8 block-dynamic": "fp8-block: e4m3 codes, a scale per block of 128 x 128, inputs by a scale per group",
    "modelopt-fp8 FP8": "FP8: e4m3 codes, one scale, inputs by a stored scale",
    "modelopt-nvfp4 NVFP4": "NVFP4: e2m1 codes, a scale per 16 columns, inputs by a scale per group",
    "modelopt-nvfp4 NVFP4_SVD": (
        "NVFP4_SVD: e2m1 codes, a scale per 16 columns, a branch of rank 32, inputs by a scale per group"
    ),
    "modelopt-nvfp4 W4A16_NVFP4": "W4A16_NVFP4: e2m1 codes, a scale per 16 columns, inputs left alone",
    "nunchaku-svdq int4_r32": (
        "svdq-int4: int4 codes, a scale per 64 columns, a branch of rank 32, inputs by a scale per group"
    ),
    "nunchaku-svdq nvfp4_r128": (
        "svdq-nvfp4: e2m1 codes, a scale per 16 columns, a branch of rank 128, inputs by a scale per group"
    ),
    "msmodelslim W8A8": "W8A8: int8 codes, a scale per channel, inputs by a stored scale",
    "msmodelslim W8A8_DYNAMIC": (
        "W8A8_DYNAMIC: int8 codes, a scale per channel, inputs by a scale per token"
    ),
    "msmodelslim W4A4_DYNAMIC": (
        "W4A4_DYNAMIC: int4 codes, a scale per channel, inputs by a scale per token"
    ),
    "msmodelslim W8A8_MXFP8": (
        "W8A8_MXFP8: e4m3 codes, a scale per block of 1 x 32, inputs by a power of two per group"
    ),
    "msmodelslim W4A4_MXFP4": (
        "W4A4_MXFP4: e2m1 codes, a scale per 32 columns, inputs by a power of two per group"
    ),
    "msmodelslim W4A4_MXFP4_DUALSCALE": (
        "W4A4_MXFP4_DUALSCALE: e2m1 codes, a scale per 32 columns, inputs by a power of two per group "
        "and a coarse scale"
    ),
    "comfyui-int8 int8": "int8_tensorwise: int8 codes, one scale, inputs by a scale per token",
    "comfyui-int8 convrot": (
        "int8_tensorwise-convrot: int8 codes, a scale per channel, 64 columns rotated together, inputs "
        "by a scale per token"
    ),
    "gguf Q8_0": "Q8_0: q8_0 codes, a scale per 32 columns, inputs left alone",
    "gguf Q4_K": "Q4_K: q4_k codes, a scale per 32 columns, inputs left alone",
}
"""What the line says of each form that the families write."""


def draw(family: str, scheme: Scheme) -> Checkpoint:
    """Headers of two layers, with what the family declares of them, as a reader has them."""
    module = families.load(family)
    tensors: dict[str, TensorHeader] = {}
    file = f"w{module.ENDING}"
    for layer in LAYERS:
        for suffix, spec in module.tensors(scheme, 256, 512).items():
            name, dtype = f"{layer}.{suffix}", spec.dtypes[0]
            shape = min(spec.shapes, key=math.prod) if scheme.scale == "tensor" else spec.shapes[0]
            if family == "gguf":
                dtype, shape = scheme.name, (256, 512)
            tensors[name] = TensorHeader(name, dtype, shape, file)
    said = module.declare(dict.fromkeys(LAYERS, scheme), [], sorted(tensors))
    listed = said.metadata.get("quantization_config") or said.metadata.get("_quantization_metadata")
    block = json.loads(listed) if listed else said.config
    name, description = said.description or (None, None)
    return Checkpoint(
        "here", (file,), tensors, said.metadata, {"_class_name": "FluxTransformer2DModel"},
        quantization=block, quantization_from="config.json" if block else None,
        description=description, description_file=name,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_family_says_what_a_file_is(form: str) -> None:
    family, name = form.split()
    found = describe(draw(family, families.load(family).SCHEMES[name]))
    kind = "GGUF" if family == "gguf" else "safetensors"
    assert found["family"] == family
    assert found["summary"] == (
        f"2 layers {FORMS[form]}; a {kind} file of a FluxTransformer2DModel in the names of diffusers"
    )


def test_every_family_is_among_them() -> None:
    """A new one is described, too: its schemes have no field without words."""
    assert {form.split()[0] for form in FORMS} == set(families.IDS)
    for family in families.IDS:
        for scheme in families.load(family).SCHEMES.values():
            assert INPUTS[scheme.activation] in describe_codes(scheme)
            assert describe_codes(scheme).startswith(f"{scheme.weight} codes, ")


def test_schemes_are_counted_one_by_one() -> None:
    checkpoint = draw("gguf", families.load("gguf").SCHEMES["Q8_0"])
    header = checkpoint.tensors[f"{LAYERS[1]}.weight"]
    mixed = {**checkpoint.tensors, header.name: replace(header, dtype="Q6_K")}
    said = describe(replace(checkpoint, tensors=mixed, files=("a.gguf", "b.gguf"), config=None))
    assert said["summary"] == (
        "1 layer Q8_0: q8_0 codes, a scale per 32 columns, inputs left alone; "
        "1 layer Q6_K: q6_k codes, a scale per 16 columns, inputs left alone; "
        "2 GGUF files in the names of diffusers"
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("dtype", "family", "more", "said"),
    [
        ("BF16", "full precision (nothing in it is quantized)", {}, "a safetensors file in the"),
        ("F8_E4M3", "fp8 (a plain cast to F8_E4M3", {}, "1 layer fp8-cast: e4m3 codes, one scale"),
        ("U8", "unknown quantization (", {"absmax": ("F32", (4,))}, "a safetensors file in the"),
    ],
)
def test_the_first_line_of_the_command(
    dtype: str, family: str, more: Any, said: str, prefix: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tensors = {"blocks.0.self_attn.q.weight": (dtype, (64, 64))}
    tensors |= {f"blocks.0.self_attn.q.weight.{name}": value for name, value in more.items()}
    path = write_weights(tmp_path / "w.safetensors", {prefix + n: v for n, v in tensors.items()})
    assert main(["inspect", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"transformer: {family}")
    assert f": {said}" in line or f"; {said}" in line
    after = f" after the prefix {prefix}" if prefix else ""
    assert line.endswith(f"in the names of wan-original (wan-2-2){after}")
