"""nunchaku-svdq: what is recognised, what contradicts itself, what the writer writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import svdq_oracle as oracle
import torch
from safetensors.torch import save_file
from torch.nn import functional
from weight_files import write_json, write_weights

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import parse_block
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import nunchaku_svdq as svdq
from quantmatrix.families.nunchaku_svdq import flags as names
from quantmatrix.families.nunchaku_svdq import writer
from quantmatrix.families.protocol import Calibration
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.request import Hub, Request
from quantmatrix.tiny import weights

INT4, NVFP4 = svdq.SCHEMES["int4_r32"], svdq.SCHEMES["nvfp4_r32"]
Headers = dict[str, tuple[str, tuple[int, ...]]]
NEW: Headers = {
    "qweight": ("I8", (256, 128)),
    "wscales": ("BF16", (4, 256)),
    "bias": ("BF16", (256,)),
    "smooth_factor": ("BF16", (256,)),
    "smooth_factor_orig": ("BF16", (256,)),
    "proj_down": ("BF16", (256, 32)),
    "proj_up": ("BF16", (256, 32)),
}
FP4: Headers = {**NEW, "wscales": ("F8_E4M3", (16, 256)), "wtscale": ("BF16", (1,))}
AWQ: Headers = {
    "qweight": ("I32", (64, 128)),
    "wscales": ("BF16", (4, 256)),
    "wzeros": ("BF16", (4, 256)),
    "bias": ("BF16", (256,)),
}
OLD: Headers = {
    {
        "smooth_factor": "smooth",
        "smooth_factor_orig": "smooth_orig",
        "proj_down": "lora_down",
        "proj_up": "lora_up",
    }.get(name, name): header
    for name, header in NEW.items()
}
PLAIN: Headers = {"weight": ("BF16", (256, 256))}


def make_block(scheme: Any = INT4) -> dict[str, Any]:
    [text] = svdq.declare({"a": scheme}, []).metadata.values()
    return parse_block(text)


def make_checkpoint(
    layers: Mapping[str, Headers],
    reference: str = "model.safetensors",
    block: dict[str, Any] | None = None,
) -> Checkpoint:
    tensors = {
        f"{layer}.{name}": TensorHeader(f"{layer}.{name}", dtype, shape, reference)
        for layer, headers in layers.items()
        for name, (dtype, shape) in headers.items()
    }
    place = f"{reference}: quantization_config" if block else None
    return Checkpoint(reference, (reference,), tensors, quantization=block, quantization_from=place)


# --- names -----------------------------------------------------------------------------------

NAMES = {
    "svdq-int4_r32-qwen-image.safetensors": ("int4", 32),
    "svdq-int4_r128-qwen-image.safetensors": ("int4", 128),
    "svdq-fp4_r32-qwen-image.safetensors": ("nvfp4", 32),
    "svdq-fp4_r128-qwen-image.safetensors": ("nvfp4", 128),
    "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors": ("int4", 32),
    "/m/svdq-int4_r32-qwen": ("int4", 32),
    "/m/svdq-int4_r32-qwen/": ("int4", 32),
    "/m/old-svdq-fp4_r256-q.safetensors": ("nvfp4", 256),
    "svdq-int4_r32-x/model.safetensors": None,
    "mit-han-lab/svdq-int4-flux.1-dev": None,
    "SVDQ-INT4_R32-x": None,
    "svdq-nvfp4_r32-x": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert names.infer_from_name(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors", 4),
        ("svdq-int4_r128-qwen-image-lightningv1.1-8steps.safetensors", 8),
        ("svdq-fp4_r32-qwen-image-Lightning-8step/", 8),
        ("svdq-int4_r32-qwen-image.safetensors", None),
        ("lightning/svdq-int4_r32-4steps", None),
    ],
)
def test_lightning_steps(name: str, steps: int | None) -> None:
    assert names.lightning_steps(name) == steps


# --- detection -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [NEW, OLD, FP4], ids=["new", "old", "nvfp4"])
def test_header_first_then_tensors(layer: Headers) -> None:
    scheme = NVFP4 if layer is FP4 else INT4
    declared = make_checkpoint({"a": layer, "b": PLAIN}, block=make_block(scheme))
    assert svdq.detect(declared) == "method svdquant in model.safetensors: quantization_config"
    bare = make_checkpoint({"b": PLAIN, "a": layer, "c": AWQ})
    assert svdq.detect(bare) == "a holds qweight and wscales"
    for checkpoint in (declared, bare):
        assert families.detect(checkpoint) == ("nunchaku-svdq", svdq.detect(checkpoint))
        assert svdq.schemes(checkpoint)["a"] == scheme
    assert svdq.schemes(bare)["c"] == svdq.SCHEMES["awq"]
    assert svdq.detect(make_checkpoint({"b": PLAIN}, "svdq-int4_r32-x.safetensors")) is None


@pytest.mark.parametrize("rank", [16, 128, 256])
def test_rank_is_read_from_the_tensors(rank: int) -> None:
    factors = dict.fromkeys(("proj_down", "proj_up"), ("BF16", (256, rank)))
    for layer, scheme in ((NEW, INT4), (FP4, NVFP4)):
        found = svdq.schemes(make_checkpoint({"a": {**layer, **factors}}))
        assert found == {"a": replace(scheme, rank=rank)}
        assert found["a"] == svdq.SCHEMES[f"{'int4' if layer is NEW else 'nvfp4'}_r{rank}"]


def test_half_precision_layers() -> None:
    half: Headers = {n: ("F16" if d == "BF16" else d, s) for n, (d, s) in NEW.items()}
    assert svdq.schemes(make_checkpoint({"a": half}))["a"] == INT4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 64}, "rank is 64, but the tensors of a say 32"),
        (
            {"weight": {"dtype": "fp4_e2m1_all"}},
            'weight.dtype is "fp4_e2m1_all", but .* say "int4"',
        ),
        ({"weight": {"dtype": "int8"}}, 'weight.dtype is "int8", but .* say "int4"'),
        ({"activation": {"dtype": "int8"}}, 'activation.dtype is "int8", but .* say "int4"'),
        ({"weight": {"group_size": 16}}, "weight.group_size is 16, but .* say 64"),
        ({"activation": {"group_size": 16}}, "activation.group_size is 16, but .* say 64"),
        ({"method": None, "rank": 64}, "rank is 64, but the tensors of a say 32"),
    ],
)
def test_header_against_tensors(change: dict[str, Any], message: str) -> None:
    checkpoint = make_checkpoint({"a": NEW}, block={**make_block(), **change})
    with pytest.raises(CheckpointError, match=f"{message}.*another file"):
        svdq.schemes(checkpoint)


def test_a_header_that_is_no_table_of_words() -> None:
    checkpoint = make_checkpoint({"a": NEW}, block={**make_block(), "weight": "int4"})
    with pytest.raises(CheckpointError, match='weight is "int4": expected a JSON object'):
        svdq.schemes(checkpoint)


def test_refiners_are_skipped_or_not() -> None:
    block = {**make_block(), "skip_refiners": True}
    good = make_checkpoint({"layers.0.a": NEW, "noise_refiner.0.a": PLAIN}, block=block)
    assert svdq.schemes(good) == {"layers.0.a": INT4}
    with pytest.raises(CheckpointError, match=r"skip_refiners is true, but noise_refiner\.0\.a is"):
        svdq.schemes(make_checkpoint({"layers.0.a": NEW, "noise_refiner.0.a": NEW}, block=block))


@pytest.mark.parametrize(
    "block",
    [{"quant_method": "nunchaku_lite"}, {"method": "awq"}, {"quant_method": "fp8"}],
    ids=str,
)
def test_another_declaration_is_refused(block: dict[str, Any]) -> None:
    """`nunchaku_lite` has the same tensors, its modulation in another order."""
    [(key, word)] = block.items()
    with pytest.raises(CheckpointError, match=f"declares {key} {word}, but a holds .*svdquant"):
        svdq.detect(make_checkpoint({"a": NEW}, block=block))
    assert svdq.detect(make_checkpoint({"a": PLAIN}, block=block)) is None


def test_a_header_without_quantized_layers() -> None:
    checkpoint = make_checkpoint({"a": PLAIN}, block=make_block())
    with pytest.raises(CheckpointError, match="says svdquant, but no layer"):
        svdq.detect(checkpoint)


DAMAGE: dict[str, tuple[Headers, Headers, str]] = {
    "missing": (NEW, {"proj_up": ("", ())}, r"a\.proj_up is missing beside a\.qweight"),
    "no scales": (NEW, {"wscales": ("", ())}, r"a\.wscales is missing"),
    "shape": (NEW, {"wscales": ("BF16", (256, 4))}, r"a\.wscales is BF16 \[256, 4\], expected"),
    "dtype": (NEW, {"qweight": ("U8", (256, 128))}, r"a\.qweight is U8 .*expected I8"),
    "sizes": (NEW, {"qweight": ("I8", (64, 128))}, "multiples of 128"),
    "rank": (NEW, {"proj_up": ("BF16", (256, 16))}, r"expected BF16 or F16 \[256, 32\]"),
    "awq": (AWQ, {"wzeros": ("BF16", (5, 256))}, r"\[4, 256\] or \[16, 256\]"),
    "no zeros": (AWQ, {"wzeros": ("", ())}, r"a\.wzeros is missing .*an AWQ layer"),
    "no codes": (NEW, {"qweight": ("", ())}, r"a\.qweight is missing beside a\."),
    "no awq codes": (AWQ, {"qweight": ("", ())}, r"a\.qweight is missing beside a\."),
    "rank 24": (NEW, {"proj_down": ("BF16", (256, 24))}, r"a\.proj_down .*multiple of 16"),
    "rank 0": (NEW, {"proj_down": ("BF16", (256, 0))}, r"a\.proj_down .*multiple of 16"),
    "long bias": (NEW, {"bias": ("BF16", (512,))}, r"a\.bias is BF16 \[512\], expected"),
    "odd bias": (NEW, {"bias": ("BF16", (13,))}, r"a\.bias is BF16 \[13\], expected"),
    "bias of codes": (NEW, {"bias": ("I8", (256,))}, r"a\.bias is I8 .*BF16 or F16 or F32"),
    "awq bias": (AWQ, {"bias": ("BF16", (13,))}, r"a\.bias is BF16 \[13\], expected"),
    "two names": (NEW, {"smooth": ("BF16", (256,))}, r"a\.smooth.* and a\.smooth.* are two names"),
    "more": (NEW, {"pre_quant_scale": ("BF16", (256,))}, r"a\.pre_quant_scale is not part of"),
    "dense": (NEW, {"weight": ("BF16", (256, 256))}, r"a\.weight is not part of"),
    "adapter": (NEW, {"lora_A.weight": ("BF16", (8, 256))}, r"a\.lora_A\.weight is not part of"),
    "int4 scale": (NEW, {"wtscale": ("BF16", (1,))}, r"a\.wtscale is not part of .*\(int4\)"),
    "awq smooth": (
        AWQ,
        {"smooth_factor": ("BF16", (256,))},
        r"a\.smooth_factor is not part of an AWQ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_layers_are_named(kind: str) -> None:
    layer, change, message = DAMAGE[kind]
    changed = {name: header for name, header in {**layer, **change}.items() if header[0]}
    with pytest.raises(CheckpointError, match=message):
        svdq.schemes(make_checkpoint({"a": changed}))


@pytest.mark.parametrize("other", ["rank", "precision"])
def test_layers_of_two_checkpoints_are_refused(other: str) -> None:
    ranks = dict.fromkeys(("proj_down", "proj_up"), ("BF16", (256, 64)))
    second: Headers = FP4 if other == "precision" else {**NEW, **ranks}
    with pytest.raises(CheckpointError, match=r"layer a is int4 of rank 32, layer b is"):
        svdq.schemes(make_checkpoint({"a": NEW, "b": second, "c": AWQ}))


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.mlp_fc1.lora_down",
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight",
    ],
)
def test_lora_files_are_refused_by_name(name: str) -> None:
    layer, _, leaf = name.rpartition(".")
    checkpoint = make_checkpoint({layer: {leaf: ("BF16", (256, 32))}}, "svdq-int4-x-lora")
    assert re.search(f"{re.escape(name)} .*is a LoRA", str(explain_unknown(checkpoint)))


# --- flags -----------------------------------------------------------------------------------

GOOD = "svdq-int4_r32-qwen-image.safetensors"


def check_fit(
    enable: bool | None,
    precision: str | None,
    rank: int | None,
    checkpoint: Checkpoint,
    steps: int | None = None,
) -> list[str]:
    """The warnings of a request with these flags."""
    request = Request(
        enable_svdquant=enable,
        quantization_precision=precision,
        quantization_rank=rank,
        num_inference_steps=steps,
    )
    return svdq.check_fit(request, checkpoint)


@pytest.mark.parametrize(
    ("reference", "flags"),
    [
        (GOOD, (None, None, None)),
        (GOOD, (True, "int4", 32)),
        ("custom.safetensors", (True, "int4", 32)),
        ("custom.safetensors", (None, None, None)),
        ("svdq-fp4_r128-mislabelled.safetensors", (None, "int4", 32)),
    ],
)
def test_flags_that_agree(
    reference: str, flags: tuple[bool | None, str | None, int | None]
) -> None:
    assert check_fit(*flags, make_checkpoint({"a": NEW, "b": AWQ}, reference)) == []


@pytest.mark.parametrize(
    ("reference", "flags", "message"),
    [
        ("svdq-fp4_r32-x", (None, None, None), "file name says nvfp4, but .* int4.*overrule"),
        ("svdq-int4_r128-x", (True, None, None), "file name says 128, but .* 32"),
        (GOOD, (True, "nvfp4", None), "--quantization-precision nvfp4, but .* int4.*the flag"),
        (GOOD, (None, None, 64), "--quantization-rank 64, but its tensors are of 32"),
        (GOOD, (False, None, None), "--enable-svdquant false, but .*leave the flag out"),
    ],
)
def test_flags_and_names_that_contradict(
    reference: str, flags: tuple[bool | None, str | None, int | None], message: str
) -> None:
    with pytest.raises((CheckpointError, UsageError), match=message):
        check_fit(*flags, make_checkpoint({"a": NEW}, reference))


def test_flags_for_a_file_that_is_not_svdquant() -> None:
    plain, named = (make_checkpoint({"a": PLAIN}, name) for name in ("x", GOOD))
    assert check_fit(None, None, None, plain) == []
    assert check_fit(False, "int4", 32, plain) == []
    assert check_fit(False, None, None, named) == []
    [warning] = check_fit(None, "int4", None, plain)
    assert "SVDQuant files only" in warning
    for enable, checkpoint, why in ((True, plain, "was given"), (None, named, "is named like")):
        with pytest.raises(CheckpointError, match=f"{why}.*--enable-svdquant false"):
            check_fit(enable, None, None, checkpoint)


def test_the_only_file_of_a_folder_is_named_too() -> None:
    """A folder without a telling name: the file in it counts."""
    file = "/m/qwen/svdq-fp4_r64-qwen-image-lightningv1.0-4steps.safetensors"
    checkpoint = replace(make_checkpoint({"a": NEW}, "/m/qwen"), files=(file,))
    with pytest.raises(CheckpointError, match="file name says nvfp4, but its tensors are of int4"):
        check_fit(None, None, None, checkpoint)
    [warning] = check_fit(None, "int4", 32, checkpoint, steps=50)
    assert "pass --num-inference-steps 4" in warning
    plain = replace(make_checkpoint({"a": PLAIN}, "/m/qwen"), files=(file,))
    with pytest.raises(CheckpointError, match="named like an SVDQuant file"):
        check_fit(None, None, None, plain)
    two = replace(checkpoint, files=(file, "/m/qwen/b.safetensors"))
    assert check_fit(None, None, None, two) == []


def test_a_rank_is_asked_of_a_file_that_has_none() -> None:
    with pytest.raises(CheckpointError, match="rank 32, but its tensors are of AWQ layers only"):
        check_fit(True, None, 32, make_checkpoint({"a": AWQ}, "custom.safetensors"))


def test_lightning_steps_are_compared() -> None:
    name = "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors"
    checkpoint = make_checkpoint({"a": NEW}, name)
    assert check_fit(None, None, None, checkpoint, steps=4) == []
    assert check_fit(None, None, None, checkpoint) == []
    [warning] = check_fit(None, None, None, checkpoint, steps=50)
    assert "for 4 steps, this run takes 50: pass --num-inference-steps 4" in warning


# --- files -----------------------------------------------------------------------------------


def test_older_folders_of_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "svdq-int4-flux.1-dev"
    blocks = {f"transformer_blocks.0.mlp_fc1.{name}": header for name, header in OLD.items()}
    write_weights(folder / "transformer_blocks.safetensors", blocks)
    rest: Headers = {"x_embedder.weight": ("BF16", (8, 8))}
    write_weights(folder / "unquantized_layers.safetensors", rest)
    write_json(folder / "comfy_config.json", {})
    checkpoint = open_weights(str(folder), Hub())
    assert len(checkpoint.files) == 2
    assert svdq.schemes(checkpoint) == {"transformer_blocks.0.mlp_fc1": INT4}
    assert check_fit(None, None, None, checkpoint) == []
    write_weights(folder / "third.safetensors")
    with pytest.raises(CheckpointError, match="third"):
        open_weights(str(folder), Hub())


def test_declaration_is_the_engines(tmp_path: Path) -> None:
    stored = svdq.quantize(torch.randn(256, 256), NVFP4)
    declared = svdq.declare({"layers.0.a": NVFP4, "b": svdq.SCHEMES["awq"]}, ["x_embedder"])
    assert declared.config is None
    path = tmp_path / "svdq-fp4_r32-x.safetensors"
    save_file({f"layers.0.a.{n}": t for n, t in stored.items()}, path, declared.metadata)
    checkpoint = open_weights(str(path), Hub())
    assert checkpoint.quantization == {
        "method": "svdquant",
        "rank": 32,
        "weight": {
            "dtype": "fp4_e2m1_all",
            "scale_dtype": [None, "fp8_e4m3_nan"],
            "group_size": 16,
        },
        "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16},
    }
    assert svdq.schemes(checkpoint) == {"layers.0.a": NVFP4}
    assert check_fit(None, None, None, checkpoint) == []
    kept = ["noise_refiner.0.attention.to_q", "x_embedder"]
    assert parse_block(json.dumps(make_block())) == make_block()
    [text] = svdq.declare({"a": INT4}, kept).metadata.values()
    assert parse_block(text) == {**make_block(), "skip_refiners": True}


# --- the writer ------------------------------------------------------------------------------


def make_weight(rows: int = 256, columns: int = 384) -> torch.Tensor:
    return weights.draw_weight("w", (rows, columns), structured=True).bfloat16()


def make_range(weight: torch.Tensor) -> Calibration:
    """Inputs in which the large columns of the weight are small, and others are large."""
    size = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) * 4
    return Calibration(-size, size)


@pytest.mark.parametrize("word", ["int4_r16", "int4_r128", "nvfp4_r32", "nvfp4_r256"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_written_layers_are_as_specified(word: str, dtype: torch.dtype) -> None:
    scheme, weight = svdq.SCHEMES[word], make_weight().to(dtype)
    bias = torch.randn(256).to(dtype)
    stored = svdq.quantize(weight, scheme, bias=bias, calibration=make_range(weight), parts=2)
    spelling = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
    spelling |= {torch.bfloat16: "BF16", torch.float16: "F16"}
    headers: Headers = {n: (spelling[t.dtype], tuple(t.shape)) for n, t in stored.items()}
    assert svdq.schemes(make_checkpoint({"a": headers})) == {"a": scheme}
    layer = oracle.read_layer(stored)
    assert torch.equal(layer.bias.to(dtype), bias)
    assert oracle.relative_error(layer.weight, weight) < 0.15
    assert oracle.relative_error(svdq.dequantize(stored, scheme), layer.weight) < 2e-6
    assert all(tensor.is_contiguous() for tensor in stored.values())


def test_fused_layers_have_a_scale_per_part() -> None:
    weight = make_weight()
    weight[128:] *= 50
    one, two = (svdq.quantize(weight, NVFP4, parts=parts) for parts in (1, 2))
    assert {"wtscale", "wcscales"} & one.keys() == {"wtscale"}
    assert {"wtscale", "wcscales"} & two.keys() == {"wcscales"}
    channel = oracle.take_channels(two["wcscales"].double())
    assert channel[:128].unique().numel() == channel[128:].unique().numel() == 1
    assert channel[255] > 20 * channel[0]


def test_an_unsigned_layer_has_its_shift_folded_into_the_bias() -> None:
    weight, bias = make_weight(), torch.randn(256).bfloat16()
    ranges = make_range(weight)
    plain = svdq.quantize(weight, INT4, bias=bias, calibration=ranges)
    folded = svdq.quantize(weight, replace(INT4, unsigned=True), bias=bias, calibration=ranges)
    layer = oracle.read_layer(folded, unsigned=True)
    assert torch.equal(folded["qweight"], plain["qweight"])
    assert oracle.relative_error(layer.plain_bias, bias) < 5e-3
    assert oracle.relative_error(layer.bias, bias) > 0.01
    bare = svdq.quantize(weight, replace(INT4, unsigned=True), calibration=ranges)
    assert oracle.read_layer(bare, unsigned=True).plain_bias.abs().max() < 5e-3


def test_smoothing_and_rank_each_lower_the_error() -> None:
    """An input channel that is far larger than its neighbours is what smoothing is for."""
    weight = make_weight()
    x = torch.randn(64, 384, generator=torch.Generator().manual_seed(3))
    x[:, ::96] *= 30
    ranges = Calibration(x.amin(0), x.amax(0))
    exact = functional.linear(x, weight.float())
    found = {}
    for name, word, calibration in (
        ("neither", "int4_r16", None),
        ("smooth", "int4_r16", ranges),
        ("both", "int4_r128", ranges),
    ):
        scheme = svdq.SCHEMES[word]
        stored = svdq.quantize(weight, scheme, calibration=calibration)
        found[name] = oracle.relative_error(svdq.reference(x, stored, scheme), exact)
    assert found["both"] < 0.8 * found["smooth"] < 0.64 * found["neither"]
    gone = svdq.quantize(weight, INT4)
    assert torch.equal(gone["smooth_factor"], torch.ones(384).bfloat16())


@pytest.mark.parametrize("shape", [(256, 384), (384, 256)])
def test_low_rank_part_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).double()
    down, up = writer.find_low_rank(weight, 48)
    left, size, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :48] * size[:48]) @ right[:48]
    assert torch.allclose(up @ down, best, atol=1e-9)
    again = writer.find_low_rank(weight.clone(), 48)
    assert torch.equal(again[0], down)
    basis = up if shape[0] <= shape[1] else down.T
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_rank_above_the_full_one_is_filled_with_zeros() -> None:
    weight = make_weight(128, 128)
    stored = svdq.quantize(weight, svdq.SCHEMES["int4_r256"])
    assert stored["proj_down"].shape == (128, 256)
    assert oracle.relative_error(svdq.dequantize(stored, svdq.SCHEMES["int4_r256"]), weight) < 0.01


@pytest.mark.parametrize("word", ["int4_r32", "nvfp4_r32", "awq"])
def test_zeros_stay_zeros(word: str) -> None:
    scheme = svdq.SCHEMES[word]
    stored = svdq.quantize(torch.zeros(128, 128).bfloat16(), scheme)
    assert svdq.dequantize(stored, scheme).abs().max() < 1e-2
    assert all(tensor.double().isfinite().all() for tensor in stored.values())


@pytest.mark.parametrize(
    ("word", "shape"), [("int4_r32", (200, 128)), ("nvfp4_r32", (128, 64)), ("awq", (6, 64))]
)
def test_sizes_that_tiles_cannot_hold(word: str, shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"{shape[0]} x {shape[1]}: keep it in full precision"):
        svdq.quantize(torch.zeros(shape), svdq.SCHEMES[word])


def test_older_names_mean_the_same() -> None:
    stored = svdq.quantize(make_weight(), INT4, bias=torch.randn(256))
    older = {{v: k for k, v in svdq.OLDER_NAMES.items()}.get(n, n): t for n, t in stored.items()}
    assert older.keys() == OLD.keys()
    new, old = svdq.canonical(stored, INT4), svdq.canonical(older, INT4)
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_a_declaration_is_that_of_the_low_rank_layers_wherever_they_stand() -> None:
    schemes = {"a": svdq.SCHEMES["awq"], "b": NVFP4, "c": svdq.SCHEMES["awq"]}
    assert svdq.declare(schemes, []) == svdq.declare({"b": NVFP4}, [])
    assert svdq.declare(schemes, []) != svdq.declare({"a": schemes["a"]}, [])
