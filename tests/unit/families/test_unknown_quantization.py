"""Files that no family takes: recognised by what their writers leave, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weight_files import write_json, write_weights

from quantmatrix import families
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.cli.main import main
from quantmatrix.errors import CheckpointError
from quantmatrix.families.unknown_quantization import FORMATS, LISTED, explain_unknown, list_formats
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan.inspect import inspect
from quantmatrix.runtime.plan.schemes import find_schemes
from quantmatrix.runtime.plan.sources import Source

LAYER = "transformer_blocks.0.attn.to_q"
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
CODES = ("I8", (32, 64))
SCALE = ("F32", (32, 1))
PACKED = {"qweight": ("I32", (8, 32)), "qzeros": ("I32", (1, 4)), "scales": ("F16", (1, 32))}

# name: (what must be said, tensors of a layer by the end of their names, header)
FILES: dict[str, tuple[str, Tensors, Mapping[str, str]]] = {
    "torchao": ("torchao", {"_weight_qdata": ("F8_E4M3", (32, 64)), "_weight_scale": SCALE}, {}),
    "torchao int4": (
        "torchao",
        {"_weight_qdata": ("I32", (1, 2)), "_weight_scale_and_zero": ("BF16", (4, 32, 2))},
        {},
    ),
    "torchao, told by the header": (
        "torchao",
        {"anything": CODES},
        {f"{LAYER}.weight": json.dumps({"_type": "Int8Tensor", "_tensor_data_names": ["qdata"]})},
    ),
    "quanto qint8": ("quanto", {"weight._data": CODES, "weight._scale": SCALE}, {}),
    "quanto qfloat8": (
        "quanto",
        {"weight._data": ("F8_E4M3", (32, 64)), "weight._scale": SCALE},
        {},
    ),
    "quanto qint4": (
        "quanto",
        {"weight._data._data": ("U8", (16, 64)), "weight._scale": SCALE, "weight._shift": SCALE},
        {},
    ),
    "quanto, told by the header": ("quanto", {"weight": CODES}, {"quantization_format": "quanto"}),
    "bitsandbytes nf4": (
        "bitsandbytes",
        {
            "weight": ("U8", (1024, 1)),
            "weight.absmax": ("F32", (32,)),
            "weight.quant_map": ("F32", (16,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
        },
        {},
    ),
    "bitsandbytes int8": ("bitsandbytes", {"weight": CODES, "SCB": ("F32", (32,))}, {}),
    "sdnq": ("SDNQ", {"weight": ("U8", (1024,)), "scale": SCALE, "zero_point": SCALE}, {}),
    "sdnq symmetric": ("SDNQ", {"weight": CODES, "scale": SCALE}, {}),
    "sdnq svd": (
        "SDNQ",
        {"weight": CODES, "svd_up": ("BF16", (32, 8)), "svd_down": ("BF16", (8, 64))},
        {},
    ),
    "gptq": ("GPTQ", {**PACKED, "g_idx": ("I32", (64,))}, {}),
    "awq": ("AWQ", PACKED, {}),
    "hqq": ("HQQ", {"W_q": ("U8", (16, 64)), "scale": SCALE, "zero": SCALE}, {}),
    "mlx": (
        "MLX",
        {"weight": ("U32", (32, 8)), "scales": ("BF16", (32, 1)), "biases": ("BF16", (32, 1))},
        {},
    ),
    "mflux, told by the header": ("MLX", {"weight": ("U32", (32, 8))}, {"mflux_version": "0.9"}),
    "exl2": ("EXL2", {"q_weight": ("I32", (8, 32)), "q_scale": ("I32", (1, 4))}, {}),
    "exl3": ("EXL3", dict.fromkeys(("trellis", "suh", "svh"), ("I16", (4, 4))), {}),
    "nvfp4-pack": (
        "compressed-tensors",
        {
            "weight_packed": ("U8", (32, 32)),
            "weight_scale": ("F8_E4M3", (32, 4)),
            "weight_global_scale": ("F32", (1,)),
        },
        {},
    ),
    "pack-quantized": (
        "compressed-tensors",
        {"weight_packed": ("I32", (32, 8)), "weight_scale": SCALE, "weight_shape": ("I64", (2,))},
        {},
    ),
    "mx": ("MXFP8", {"weight": ("F8_E4M3", (32, 64)), "weight_scale": ("F8_E8M0", (32, 2))}, {}),
    "e4m3fnuz": ("FNUZ", {"weight": ("F8_E4M3FNUZ", (32, 64)), "weight_scale": ("F32", ())}, {}),
    "e5m2fnuz": ("FNUZ", {"weight": ("F8_E5M2FNUZ", (32, 64)), "bias": ("F8_E5M2FNUZ", (32,))}, {}),
    "simulation": (
        "ModelOpt's simulation",
        {"weight": ("BF16", (32, 64)), "weight_quantizer._amax": ("F32", ())},
        {},
    ),
}

# quant_method and the like of a config.json: what must be said
DECLARED: dict[str, tuple[dict[str, Any], str]] = {
    "torchao": ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
    "quanto": ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, "AutoRound"),
    "intel": ({"quant_method": "intel/auto-round", "bits": 4}, "AutoRound"),
    "sdnq": ({"quant_method": "sdnq", "weights_dtype": "uint4"}, "SDNQ"),
    "awq": ({"quant_method": "awq", "bits": 4}, "AWQ"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "gguf": ({"quant_method": "gguf"}, "GGUF"),
    "quark": ({"quant_method": "quark"}, "Quark"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "FBGEMM"),
    "compressed int8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "int-quantized",
    ),
    "compressed nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "nvfp4-pack-quantized",
    ),
    "mxfp8": ({"quant_method": "mxfp8"}, "mxfp8"),
    "mxfp4": ({"quant_method": "modelopt", "quant_algo": "MXFP4"}, "MXFP4"),
    "convrot": ({"quant_method": "convrot_int8"}, "ConvRot INT8"),
    "another": ({"quant_method": "aqlm"}, "aqlm"),
}

# formats of a layer in ComfyUI's lists: what must be said
LAYER_FORMATS = {
    "int8_blockwise": "INT8 in blocks",
    "convrot_w4a4": "ConvRot W4A4",
    "asym_w4a8_int8": "ConvRot W4A8",
    "svdquant_w4a4": "SVDQuant",
    "mxfp4": "MXFP4",
}
UNTRUE = ("nothing in it is quantized", "another model", "ownload")


def write_file(folder: Path, tensors: Tensors, header: Mapping[str, str]) -> Path:
    """A component of one layer in this form, and one in full precision."""
    stored = {f"{LAYER}.{end}": spec for end, spec in tensors.items()}
    path = folder / "diffusion_pytorch_model.safetensors"
    return write_weights(path, {**stored, "proj_out.weight": ("BF16", (4, 32))}, header)


def check_refused(folder: Path, word: str) -> str:
    """The text with which plan and inspect refuse a component folder; both say the same."""
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", {"_class_name": "FluxTransformer2DModel"})
    checkpoint = open_component(str(folder), Hub())
    said = inspect(str(folder))["components"]["transformer"]
    source = Source(checkpoint, "FluxTransformer2DModel", {}, "config.json", primary=True)
    for request in (Request(model_path="x"), Request(model_path="x", quantization="fp8")):
        with pytest.raises(CheckpointError) as caught:
            find_schemes(source, "flux-1", request)
        assert str(caught.value) == said["why"]
    text = str(said["why"])
    assert said["unknown"]
    assert said["family"] is None
    assert str(folder) in text
    assert word in text
    assert "no quant family takes" in text
    assert not [what for what in UNTRUE if what in text]
    return text


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_declares_nothing(tmp_path: Path, name: str) -> None:
    word, tensors, header = FILES[name]
    write_file(tmp_path, tensors, header)
    text = check_refused(tmp_path, word)
    assert LAYER in text or "header" in text
    assert len(text.rpartition("takes")[2]) > 20, "nothing is said of what can be done"


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize("name", DECLARED)
def test_a_file_that_declares_its_method(tmp_path: Path, name: str, in_header: bool) -> None:
    """Even where every tensor is plain: whoever names it expects a quantized model."""
    block, word = DECLARED[name]
    config: dict[str, Any] = {"_class_name": "FluxTransformer2DModel"}
    header = {"quantization_config": json.dumps(block)} if in_header else {}
    write_json(
        tmp_path / "config.json", config | ({} if in_header else {"quantization_config": block})
    )
    write_file(tmp_path, {"weight": ("BF16", (32, 64))}, header)
    assert f"quant_method {block['quant_method']}" in check_refused(tmp_path, word)


@pytest.mark.parametrize("beside", [None, "nvfp4", "float8_e4m3fn"])
@pytest.mark.parametrize("word", LAYER_FORMATS)
def test_a_list_with_a_format_that_no_family_takes(
    tmp_path: Path, word: str, beside: str | None
) -> None:
    """Also beside layers of a format that one takes."""
    layers = {"proj_out": {"format": beside}} if beside else {}
    text = json.dumps({"format_version": "1.0", "layers": {**layers, LAYER: {"format": word}}})
    tensors = {"weight": CODES, "weight_scale": SCALE}
    write_file(tmp_path, tensors, {"_quantization_metadata": text})
    check_refused(tmp_path, LAYER_FORMATS[word])


def test_a_list_with_a_format_that_nobody_knows(tmp_path: Path) -> None:
    text = json.dumps({"format_version": "1.0", "layers": {LAYER: {"format": "int7"}}})
    write_file(tmp_path, {"weight": CODES}, {"_quantization_metadata": text})
    assert "known are float8_e4m3fn" in check_refused(tmp_path, f"{LAYER} has the format int7")


@pytest.mark.parametrize("method", ["fp8", "modelopt"])
@pytest.mark.parametrize("dtype", ["F8_E5M2FNUZ", "F8_E4M3FNUZ"])
def test_another_eight_bit_format_under_a_known_method(
    tmp_path: Path, method: str, dtype: str
) -> None:
    """The file is whole: neither a new download nor another scale changes anything."""
    block = {"quant_method": method, "quant_algo": "FP8"} if method == "modelopt" else {}
    config = {"_class_name": "FluxTransformer2DModel"}
    write_json(
        tmp_path / "config.json",
        {**config, "quantization_config": {"quant_method": method, **block}},
    )
    write_file(tmp_path, {"weight": (dtype, (32, 64)), "weight_scale": ("F32", ())}, {})
    assert "The file is whole" in check_refused(tmp_path, "FNUZ")


def test_the_command_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word, tensors, header = FILES["torchao"]
    path = write_file(tmp_path, tensors, header)
    assert main(["inspect", str(path)]) == 0
    assert f"unknown quantization ({path}: layer {LAYER} with" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"]["transformer"]["unknown"]
    assert word == "torchao"


TAKEN = {
    "nothing": ("black-forest-labs/FLUX.1-dev", None),
    "fp8": ("quantmatrix/flux-1-fp8-block-dynamic", "fp8"),
    "modelopt-fp8": ("BBuf/flux1-dev-modelopt-fp8-sglang-transformer", "modelopt-fp8"),
    "modelopt-nvfp4": ("black-forest-labs/FLUX.2-dev-NVFP4", "modelopt-nvfp4"),
    "nunchaku-svdq": (
        "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors",
        "nunchaku-svdq",
    ),
    "msmodelslim": ("Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "msmodelslim"),
    "comfyui-int8": (
        "quantmatrix/flux-1-int8-convrot/flux-1-int8-convrot.safetensors",
        "comfyui-int8",
    ),
}
"""Stand-ins, and the family that takes each."""


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_family_takes_is_in_no_such_format(name: str) -> None:
    from quantmatrix.runtime.plan.inspect import open_any
    from quantmatrix.tiny import hub

    reference, family = TAKEN[name]
    hub.ensure(reference, hub.default_folder())
    for checkpoint in open_any(reference, hub.hub(hub.default_folder())).values():
        assert explain_unknown(checkpoint) is None
        assert (families.detect(checkpoint) or (None,))[0] == family


def test_the_table_is_in_order() -> None:
    names = [known.name for known in FORMATS]
    assert len(names) == len(set(names))
    words = [word for known in FORMATS for word in known.names]
    assert len(words) == len(set(words))
    assert not {"fp8", "modelopt", "svdquant", "nunchaku", *LISTED} & set(words)
    assert all(known.advice and (known.names or known.layers or known.dtypes) for known in FORMATS)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"format": "nvfp4"}, [("a", "nvfp4")]),
        ("nvfp4", [("a", "nvfp4")]),
        ({"format": 4}, []),
        ({"format": ""}, []),
        ("", []),
        ({}, []),
        (None, []),
    ],
)
def test_a_list_gives_formats_by_name_alone(entry: object, found: list[tuple[str, str]]) -> None:
    checkpoint = SimpleNamespace(quantization={"layers": {"a": entry}})
    assert list(list_formats(checkpoint)) == found  # type: ignore[arg-type]
