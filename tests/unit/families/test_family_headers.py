"""What families refuse among headers and declarations, each one step from what they take.

A checkpoint that is right is changed in one place at a time. `""` says that the change is harmless;
otherwise it is part of the error. The two kinds stand side by side, so that a refusal which grows to
meet good files is seen as well as one that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError
from quantmatrix.families.fp8.checks import check_plain

Headers = dict[str, tuple[str, tuple[int, ...]]]
A, B = "blocks.0.to_q", "blocks.0.to_k"


def join(layer: str, suffixes: Headers) -> Headers:
    return {f"{layer}.{suffix}": found for suffix, found in suffixes.items()}


def make(tensors: Headers, block: Any = None, description: Any = None) -> Checkpoint:
    headers = {
        name: TensorHeader(name, dtype, shape, "w.safetensors")
        for name, (dtype, shape) in tensors.items()
    }
    return Checkpoint(
        "here",
        ("w.safetensors",),
        headers,
        quantization=block,
        quantization_from="config.json: quantization_config" if block is not None else None,
        description=description,
        description_file="quant_model_description.json" if description is not None else None,
    )


def change(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with some entries replaced; None takes one out."""
    return {k: v for k, v in {**base, **changes}.items() if v is not None}


def judge(family: str, checkpoint: Checkpoint, text: str) -> None:
    if not text:
        assert families.load(family).schemes(checkpoint)
        return
    with pytest.raises(CheckpointError, match=text):
        families.load(family).schemes(checkpoint)


# --- fp8 -------------------------------------------------------------------------------------

FP8 = {
    **join(A, {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("F32", ())}),
    **join("blocks.1.to_q", {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("F32", ())}),
    **join("norm", {"weight": ("BF16", (384,)), "bias": ("BF16", (384,))}),
}
FP8_BLOCK: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("tensors", "block", "text"),
    [
        ({}, {}, ""),
        ({f"{A}.weight_scale": ("F32", (1,))}, {}, ""),
        ({f"{A}.weight_scale": ("F32", (2,))}, {}, "weight_scale is F32 \\[2\\], expected F32"),
        ({f"{A}.weight_scale": ("BF16", ())}, {}, ""),
        ({f"{A}.weight_scale": ("F16", (1, 1))}, {}, ""),
        ({f"{A}.weight_scale": ("F64", ())}, {}, "weight_scale is F64"),
        ({f"{A}.weight": ("F8_E5M2", (256, 384))}, {}, ""),
        ({f"{A}.weight": ("F8_E5M2", (256, 384))}, {"fmt": "e4m3"}, "in e4m3, but .* as F8_E5M2"),
        ({}, {"fmt": "e5m2"}, "in e5m2, but .* as F8_E4M3"),
        ({f"{A}.weight_scale": ("F32", (256,))}, {}, ""),
        ({f"{A}.weight_scale": ("BF16", (256, 1))}, {}, ""),
        ({f"{A}.weight_scale": ("F32", (1, 256))}, {}, "expected F32"),
        ({f"{A}.weight_scale": ("F32", (384,))}, {}, "expected F32"),
        ({f"{A}.weight_scale": None}, {}, "weight_scale is missing"),
        ({f"{A}.weight": ("F8_E4M3", (256, 384, 1))}, {}, "not 2-D"),
        ({f"{A}.weight": ("F8_E4M3", (256,))}, {}, f"tensor {A}.weight is \\[256\\], not 2-D"),
        ({f"{A}.weight": ("F8_E4M3", ())}, {}, f"tensor {A}.weight is \\[\\], not 2-D"),
        ({f"{A}.bias": ("BF16", (256,))}, {}, ""),
        ({f"{A}.comfy_quant": ("U8", (30,))}, {}, ""),
        ({f"{A}.lora_down": ("BF16", (4, 384))}, {}, "stands beside the codes"),
        ({f"{A}.inner.weight": ("BF16", (4, 384))}, {}, "stands beside the codes"),
        ({f"{A}.input_scale": ("F32", ())}, {}, "is a static activation scale"),
        ({f"{A}.input_scale": ("F32", ()), "blocks.1.to_q.input_scale": ("F32", ())},
         {"activation_scheme": "static"}, ""),
        ({f"{A}.input_scale": ("F32", ())}, {"activation_scheme": "static"},
         "blocks.1.to_q.input_scale is missing"),
        ({"norm.weight_scale": ("F32", ())}, {}, "is a scale, but norm.weight is BF16"),
        ({}, {"ignored_layers": ["norm"]}, ""),
        ({}, {"ignored_layers": [A]}, f"{A} is left alone, but"),
        ({}, {"ignored_layers": ["blocks.0.to"]}, ""),
        ({}, {"modules_to_not_convert": [A]}, "is left alone, but"),
        ({}, {"ignored_layers": "norm"}, "expected a list of layer names"),
        ({}, {"ignored_layers": [1]}, "expected a list of layer names"),
        ({}, {"activation_scheme": "sometimes"}, "activation_scheme is \"sometimes\""),
        ({}, {"weight_block_size": [128, 128]}, "weight_scale is F32 \\[\\], expected F32 or BF16"),
        ({f"{A}.weight_scale": None}, {"weight_block_size": [128, 128]}, "scale_inv is missing"),
    ],
)  # fmt: skip
def test_fp8(tensors: Any, block: Any, text: str) -> None:
    judge("fp8", make(change(FP8, tensors), change(FP8_BLOCK, block)), text)


BLOCKS = join(A, {"weight": ("F8_E4M3", (256, 384)), "weight_scale_inv": ("F32", (2, 3))})


@pytest.mark.parametrize(
    ("size", "shape", "text"),
    [
        ([128, 128], (2, 3), ""),
        ([128, 128], (3, 2), "weight_scale_inv is F32 \\[3, 2\\], expected"),
        ([64, 128], (4, 3), ""),
        ([128, 64], (2, 6), ""),
        ([128, 64], (2, 3), "expected F32 or BF16 or F16 \\[2, 6\\]"),
        ([200, 200], (2, 2), ""),
        ([1, 1], (256, 384), ""),
        ([0, 128], (2, 3), "weight_block_size is"),
        ([128], (2, 3), "weight_block_size is"),
        ([128, 128, 1], (2, 3), "weight_block_size is"),
        ([128.0, 128], (2, 3), "weight_block_size is"),
        ([True, 128], (256, 3), "weight_block_size is"),
        ("128x128", (2, 3), "weight_block_size is"),
    ],
)
def test_fp8_blocks(size: Any, shape: tuple[int, ...], text: str) -> None:
    tensors = {**BLOCKS, f"{A}.weight_scale_inv": ("F32", shape)}
    block = {**FP8_BLOCK, "weight_block_size": size}
    judge("fp8", make(tensors, block), text)
    if not text:
        assert families.load("fp8").schemes(make(tensors, block))[A].block == tuple(size)
        static = {**block, "activation_scheme": "static"}
        judge("fp8", make(tensors, static), "weight_block_size with static activations")


# --- ModelOpt --------------------------------------------------------------------------------

STATIC: Headers = {
    **join(A, {"weight": ("F8_E4M3", (32, 64)), "weight_scale": ("F32", ()),
               "input_scale": ("F32", ())}),
    **join("norm", {"weight": ("BF16", (64,))}),
}  # fmt: skip
NUMBER = {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("tensors", "block", "text"),
    [
        ({}, {}, ""),
        ({f"{A}.weight_scale": ("F32", (1,)), f"{A}.input_scale": ("F32", (1,))}, {}, ""),
        ({f"{A}.weight_scale": ("F32", (32,))}, {}, "is F32 \\[32\\], expected F32"),
        ({f"{A}.weight_scale": ("F16", ())}, {}, "is F16"),
        ({f"{A}.input_scale": None}, {}, "input_scale is missing"),
        ({f"{A}.weight_scale": None}, {}, "weight_scale is missing"),
        ({f"{A}.weight": None}, {}, "its weight is missing"),
        ({f"{A}.weight": ("F8_E4M3", (32,))}, {}, "its weight is \\[32\\]"),
        ({f"{A}.weight": ("BF16", (32, 64))}, {}, "is BF16 \\[32, 64\\], expected F8_E4M3"),
        ({f"{A}.bias": ("BF16", (32,))}, {}, ""),
        ({f"{A}.pre_quant_scale": ("BF16", (64,))}, {}, "has pre_quant_scale beside"),
        ({f"{A}.input_quantizer._amax": ("F32", ())}, {}, ""),
        ({}, {"ignore": ["norm", "proj*"]}, ""),
        ({}, {"ignore": [A]}, "`ignore` lists"),
        ({}, {"ignore": ["blocks.0.*"]}, "`ignore` lists"),
        ({}, {"ignore": ["blocks.0.to"]}, ""),
        ({}, {"ignore": ["locks.0.to_q"]}, ""),
        ({}, {"ignore": {"a": 1}}, "expected a list of layer names"),
        ({}, {"config_groups": {"g": {"weights": NUMBER, "input_activations": NUMBER}}}, ""),
        ({}, {"config_groups": {"g": {"weights": {**NUMBER, "num_bits": 4}}}}, "g.weights is"),
        ({}, {"config_groups": {"g": {"input_activations": {**NUMBER, "dynamic": True}}}},
         "g.input_activations is"),
        ({}, {"config_groups": {"g": {"weights": {}}}}, ""),
        ({}, {"config_groups": []}, ""),
        ({}, {"config_groups": ["g"]}, "expected an object of objects"),
    ],
)  # fmt: skip
def test_modelopt_fp8(tensors: Any, block: Any, text: str) -> None:
    whole = {"quant_method": "modelopt", "quant_algo": "FP8", **block}
    judge("modelopt-fp8", make(change(STATIC, tensors), whole), text)


FP4: Headers = {
    **join(A, {"weight": ("U8", (32, 32)), "weight_scale": ("F8_E4M3", (32, 4)),
               "weight_scale_2": ("F32", ()), "input_scale": ("F32", ())}),
    **join("norm", {"weight": ("BF16", (64,))}),
}  # fmt: skip
SMOOTHED = {f"{A}.pre_quant_scale": ("BF16", (64,))}
BRANCH = {
    **SMOOTHED,
    f"{A}.svdquant_lora_a": ("BF16", (8, 64)),
    f"{A}.svdquant_lora_b": ("BF16", (32, 8)),
}


@pytest.mark.parametrize(
    ("tensors", "algorithm", "text"),
    [
        ({}, "NVFP4", ""),
        ({f"{A}.weight_scale_2": ("F32", (1,))}, "NVFP4", ""),
        ({f"{A}.weight_scale_2": ("F32", (32,))}, "NVFP4", "has weight_scale_2 F32 \\[32\\]"),
        ({f"{A}.weight_scale_2": None}, "NVFP4", "has no weight_scale_2: the checkpoint is"),
        ({f"{A}.input_scale": None}, "NVFP4", "has no input_scale, which every layer"),
        ({f"{A}.input_scale": None}, "W4A16_NVFP4", ""),
        ({}, "W4A16_NVFP4", "has an input_scale, but its quant_algo is W4A16_NVFP4"),
        ({f"{A}.weight": ("U8", (32, 36))}, "NVFP4", "K a multiple of 16"),
        ({f"{A}.weight": ("U8", (32, 40)), f"{A}.weight_scale": ("F8_E4M3", (32, 5))}, "NVFP4", ""),
        ({f"{A}.weight": ("U8", (32,))}, "NVFP4", "expected U8 \\[N, K/2\\]"),
        ({f"{A}.weight_scale": ("F8_E4M3", (4, 32))}, "NVFP4", "has weight_scale F8_E4M3"),
        ({f"{A}.weight_scale": ("F8_E4M3", (128, 4))}, "NVFP4", "These scales are padded"),
        ({f"{A}.weight_scale": ("F8_E4M3", (32, 3))}, "NVFP4", "expected F8_E4M3 \\[32, 4\\]$"),
        ({f"{A}.weight_scale": ("F32", (32, 4))}, "NVFP4", "has weight_scale F32"),
        (SMOOTHED, "NVFP4_AWQ", ""),
        ({}, "NVFP4_AWQ", "has no pre_quant_scale"),
        ({f"{A}.pre_quant_scale": ("BF16", (32,))}, "NVFP4_AWQ", "pre_quant_scale BF16 \\[32\\]"),
        (BRANCH, "NVFP4_SVD", ""),
        ({**BRANCH, f"{A}.svdquant_lora_b": ("BF16", (8, 32))}, "NVFP4_SVD", "has svdquant_lora_b"),
        ({**BRANCH, f"{A}.svdquant_lora_b": None}, "NVFP4_SVD", "has no svdquant_lora_b"),
        (SMOOTHED, "NVFP4_SVD", "has no svdquant_lora_a"),
        ({"norm.weight_scale_2": ("F32", ())}, "NVFP4", "has weight_scale_2 but a BF16 weight"),
        ({"norm.input_scale": ("F32", ())}, "NVFP4", ""),
        ({f"{A}.extra": ("F32", ())}, "NVFP4", "has extra beside"),
    ],
)
def test_modelopt_nvfp4(tensors: Any, algorithm: str, text: str) -> None:
    block = {"quant_method": "modelopt", "quant_algo": algorithm}
    judge("modelopt-nvfp4", make(change(FP4, tensors), block), text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, ""), (False, ""), (None, ""), ("true", "swap_weight_nibbles is"), (1, "nibbles is 1")],
)
def test_order_of_nibbles(value: Any, text: str) -> None:
    block = {"quant_method": "modelopt", "quant_algo": "NVFP4", "swap_weight_nibbles": value}
    judge("modelopt-nvfp4", make(FP4, block), text)
    if not text:
        assert families.load("modelopt-nvfp4").schemes(make(FP4, block))[A].swap_nibbles is bool(
            value
        )


@pytest.mark.parametrize(
    ("method", "algorithm", "family"),
    [
        ("modelopt", "NVFP4", "modelopt-nvfp4"),
        ("modelopt", "FP8", "modelopt-fp8"),
        ("modelopt_fp4", "NVFP4", "modelopt-nvfp4"),
        ("modelopt_fp4", "", "modelopt-nvfp4"),
        ("modelopt_fp8", "FP8", "modelopt-fp8"),
        ("modelopt_fp8", "", "modelopt-fp8"),
        ("modelopt_fp4", "FP8", "contradict each other"),
        ("modelopt_fp8", "NVFP4", "contradict each other"),
    ],
)
def test_words_that_contradict_each_other(method: str, algorithm: str, family: str) -> None:
    tensors = STATIC if family == "modelopt-fp8" else FP4
    checkpoint = make(tensors, {"quant_method": method, "quant_algo": algorithm})
    both = {name: families.load(name) for name in ("modelopt-fp8", "modelopt-nvfp4")}
    if family in both:
        assert [name for name, module in both.items() if module.detect(checkpoint)] == [family]
        return
    with pytest.raises(CheckpointError, match=family):
        [module.detect(checkpoint) for module in reversed(both.values())]


# --- SVDQuant --------------------------------------------------------------------------------

SVDQ: Headers = join(
    A,
    {"qweight": ("I8", (256, 64)), "wscales": ("BF16", (2, 256)), "smooth_factor": ("BF16", (128,)),
     "proj_down": ("BF16", (128, 32)), "proj_up": ("BF16", (256, 32))},
)  # fmt: skip
AWQ: Headers = join(
    B, {"qweight": ("I32", (64, 64)), "wscales": ("BF16", (2, 256)), "wzeros": ("BF16", (2, 256))}
)


@pytest.mark.parametrize(
    ("tensors", "block", "text"),
    [
        ({}, {}, ""),
        ({f"{A}.bias": ("BF16", (256,))}, {}, ""),
        ({f"{A}.bias": ("BF16", (128,))}, {}, "bias is BF16 \\[128\\], expected"),
        ({f"{A}.smooth_factor_orig": ("BF16", (128,))}, {}, ""),
        ({f"{A}.smooth": ("BF16", (128,))}, {}, "two names of one thing"),
        ({f"{A}.smooth": ("BF16", (128,)), f"{A}.smooth_factor": None}, {}, ""),
        ({f"{A}.smooth_factor": None}, {}, "smooth_factor is missing"),
        ({f"{A}.smooth_factor": ("BF16", (256,))}, {}, "smooth_factor is BF16 \\[256\\]"),
        ({f"{A}.proj_up": ("BF16", (128, 32))}, {}, "proj_up is BF16 \\[128, 32\\]"),
        ({f"{A}.proj_up": ("BF16", (256, 16))}, {}, "proj_up is BF16 \\[256, 16\\]"),
        ({f"{A}.proj_down": ("BF16", (128, 24)), f"{A}.proj_up": ("BF16", (256, 24))}, {},
         "rank that is a multiple of 16"),
        ({f"{A}.proj_down": ("BF16", (128, 48)), f"{A}.proj_up": ("BF16", (256, 48))}, {}, ""),
        ({f"{A}.qweight": None}, {}, "qweight is missing beside"),
        ({f"{A}.qweight": ("I8", (192, 64))}, {}, "multiples of 128"),
        ({f"{A}.qweight": ("I8", (256,))}, {}, "multiples of 128"),
        ({f"{A}.wcscales": ("BF16", (256,))}, {}, "is not part of an SVDQuant layer"),
        ({f"{A}.lora.down": ("BF16", (4, 4))}, {}, "is not part of"),
        ({f"{A}.wscales": ("BF16", (256, 2))}, {}, "wscales is BF16"),
        ({f"{B}.wzeros": ("BF16", (16, 256)), f"{B}.wscales": ("BF16", (16, 256))}, {}, ""),
        ({f"{B}.wzeros": ("BF16", (8, 256))}, {}, "wzeros is BF16 \\[8, 256\\]"),
        ({f"{B}.qweight": ("I32", (64, 48))}, {}, "multiples of 64"),
        ({f"{B}.smooth_factor": ("BF16", (128,))}, {}, "is not part of an AWQ layer"),
        ({}, {"rank": 32}, ""),
        ({}, {"rank": 16}, "rank is 16, but the tensors of blocks.0.to_q say 32"),
        ({}, {"weight": {"dtype": "int4", "group_size": 64}}, ""),
        ({}, {"weight": {"dtype": "fp4_e2m1_all"}}, "weight.dtype is"),
        ({}, {"activation": {"group_size": 16}}, "activation.group_size is 16"),
        ({}, {"weight": "int4"}, "weight is \"int4\": expected a JSON object"),
        ({}, {"skip_refiners": True}, ""),
    ],
)  # fmt: skip
def test_svdquant(tensors: Any, block: Any, text: str) -> None:
    judge("nunchaku-svdq", make(change({**SVDQ, **AWQ}, tensors), block), text)


def test_refiners_of_a_file_that_skips_them() -> None:
    name = "noise_refiner.0.to_q"
    tensors = {**SVDQ, **{k.replace(A, name): v for k, v in SVDQ.items()}}
    judge("nunchaku-svdq", make(tensors, {"skip_refiners": False}), "")
    judge("nunchaku-svdq", make(tensors, {"skip_refiners": True}), f"true, but {name} is quantized")


@pytest.mark.parametrize(("rank", "text"), [(32, ""), (16, "is int4 of rank 32, layer")])
def test_a_file_of_two_ranks(rank: int, text: str) -> None:
    other = {k.replace(A, B): v for k, v in SVDQ.items()}
    other |= {f"{B}.proj_down": ("BF16", (128, rank)), f"{B}.proj_up": ("BF16", (256, rank))}
    judge("nunchaku-svdq", make({**SVDQ, **other}, {}), text)


# --- msmodelslim -----------------------------------------------------------------------------

INT8: Headers = {
    **join(A, {"weight": ("I8", (32, 64)), "weight_scale": ("F32", (32, 1)),
               "weight_offset": ("F32", (32, 1)), "bias": ("F32", (32,))}),
    "norm.weight": ("BF16", (64,)),
}  # fmt: skip
DESCRIBED = {
    **{f"{A}.{suffix}": "W8A8_DYNAMIC" for suffix in ("weight", "weight_scale", "weight_offset")},
    f"{A}.bias": "FLOAT",
    "norm.weight": "FLOAT",
}


@pytest.mark.parametrize(
    ("tensors", "described", "text"),
    [
        ({}, {}, ""),
        ({f"{A}.weight_offset": None}, {f"{A}.weight_offset": None}, ""),
        ({f"{A}.weight_offset": None}, {}, "describes blocks.0.to_q.weight_offset"),
        ({f"{A}.bias": None}, {}, ""),
        ({f"{A}.weight_scale": ("BF16", (32, 1))}, {}, ""),
        ({f"{A}.weight_scale": ("F32", (32,))}, {}, "weight_scale is F32 \\[32\\]: expected"),
        ({f"{A}.weight_scale": ("F32", (32, 4))}, {}, "per group of columns"),
        ({f"{A}.weight_scale": None}, {}, "weight_scale is missing"),
        ({f"{A}.weight": ("I8", (32, 8, 8))}, {}, "only linear layers"),
        ({f"{A}.weight": ("F8_E4M3", (32, 64))}, {}, "is F8_E4M3 \\[32, 64\\]"),
        ({}, {f"{A}.weight": "FLOAT"}, "holds I8 codes, but|an unknown attachment"),
        ({}, {f"{A}.weight": "W4A8"}, "is W4A8 \\(unknown\\)"),
        ({}, {f"{A}.weight": "W8A8_MIX"}, "a prefill/decode mix"),
        ({}, {f"{A}.weight_scale": "W8A8"}, "weight_scale is W8A8, but the weight of"),
        ({}, {f"{A}.weight_scale": "FLOAT"}, ""),
        ({f"{A}.mul_scale": ("F32", (64,))}, {}, ""),
        ({f"{A}.mul_scale": ("F32", (32,))}, {}, "mul_scale is F32 \\[32\\]"),
        ({"norm.mul_scale": ("F32", (64,))}, {}, "smoothing of a FLOAT layer"),
        ({f"{A}.left_trans": ("F32", (8, 8))}, {}, "belongs to FlatQuant"),
        ({f"{A}.other": ("F32", (8, 8))}, {}, "an unknown attachment"),
        ({}, {"blocks.0.attn.quant_type": "FAKQuant"}, "quantized attention"),
        ({}, {"blocks.0.attn.quant_type": "FLOAT"}, ""),
        ({"patch_embedding.weight": ("I8", (32, 64)),
          "patch_embedding.weight_scale": ("F32", (32, 1))},
         {"patch_embedding.weight": "W8A8_DYNAMIC"}, "quantized embeddings"),
        ({"patch_embedding.weight": ("BF16", (32, 64))}, {"patch_embedding.weight": "FLOAT"}, ""),
        ({}, {"gone.weight": "W8A8_DYNAMIC"}, "no such tensor is in"),
        ({}, {"gone.weight": "FLOAT"}, ""),
    ],
)  # fmt: skip
def test_msmodelslim(tensors: Any, described: Any, text: str) -> None:
    checkpoint = make(change(INT8, tensors), description=change(DESCRIBED, described))
    judge("msmodelslim", checkpoint, text)


def test_the_first_of_several_scales_is_named_with_its_own_file() -> None:
    headers = {
        f"norm.{name}": TensorHeader(f"norm.{name}", dtype, shape, file)
        for name, dtype, shape, file in (
            ("weight", "BF16", (384,), "1.safetensors"),
            ("weight_scale", "F32", (), "2.safetensors"),
            ("input_scale", "F32", (), "3.safetensors"),
        )
    }
    checkpoint = Checkpoint("here", ("1.safetensors",), headers)
    with pytest.raises(CheckpointError, match=r"^3.safetensors: tensor norm.input_scale is a"):
        check_plain(checkpoint, None, "norm", frozenset({"weight_scale", "input_scale"}))  # type: ignore[arg-type]
