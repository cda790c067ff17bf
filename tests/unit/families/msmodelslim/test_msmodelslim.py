"""msmodelslim: detection, schemes per layer, both encodings, refusals by name, round trips."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import msmodelslim
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import int8_arithmetic

WORDS = ("W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC")
MX = ("W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE")
ALL = pytest.mark.parametrize("word", [*WORDS, *MX])
EACH = pytest.mark.parametrize("word", WORDS)
N, K = 24, 96
LIMITS = {"int8": 0.02, "e4m3": 0.06, "int4": 0.2, "e2m1": 0.25}
"""Relative errors of outputs that the number formats allow."""
DTYPES = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def make_weight(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 0.1
    return weight.bfloat16(), torch.randn(N, generator=generator).bfloat16()


def make_input(rows: int = 50) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(9)) + 0.3


def calibrate(x: torch.Tensor) -> Calibration:
    return Calibration(x.amin(dim=0), x.amax(dim=0))


def quantize(word: str, seed: int = 0) -> dict[str, torch.Tensor]:
    weight, bias = make_weight(seed)
    return msmodelslim.quantize(
        weight, msmodelslim.SCHEMES[word], bias=bias, calibration=calibrate(make_input())
    )


def make_checkpoint(layers: dict[str, Any], **settings: Any) -> Checkpoint:
    """A checkpoint of headers: layer -> (word, tensors), or a plain tensor."""
    headers, described = {}, {"version": "1.0.0", "model_quant_type": "W8A8", **settings}
    for layer, (word, tensors) in layers.items():
        for suffix, tensor in tensors.items():
            name = f"{layer}.{suffix}"
            headers[name] = TensorHeader(name, DTYPES[tensor.dtype], tuple(tensor.shape), "w.st")
            plain = suffix.rpartition(".")[2] in ("bias", "mul_scale")
            described[name] = "FLOAT" if plain else word
    return Checkpoint(
        reference="here",
        files=("w.st",),
        tensors=headers,
        metadata={},
        config={},
        config_file=None,
        quantization=None,
        quantization_from=None,
        description=described,
        description_file="quant_model_description.json",
        remote=None,
    )


def plain(word: str = "FLOAT") -> tuple[str, dict[str, torch.Tensor]]:
    return word, {"weight": torch.zeros(N, K, dtype=torch.bfloat16)}


def test_detection_names_the_file_and_the_schemes():
    checkpoint = make_checkpoint({"a": ("W8A8", quantize("W8A8")), "b": plain()})
    why = msmodelslim.detect(checkpoint)
    assert why == "quant_model_description.json describes layers as W8A8"
    assert msmodelslim.detect(make_checkpoint({"b": plain()})) is None


def test_a_description_without_layers_is_not_full_precision():
    checkpoint = make_checkpoint({})
    assert "describes no layer" in (msmodelslim.detect(checkpoint) or "")
    assert msmodelslim.schemes(checkpoint) == {}
    checkpoint.description.clear()
    assert msmodelslim.detect(checkpoint)


def test_schemes_are_per_layer():
    words = [*WORDS, *MX]
    layers = {f"blocks.0.{word}": (word, quantize(word)) for word in words}
    found = msmodelslim.schemes(make_checkpoint({**layers, "blocks.0.ffn.net.2": plain()}))
    assert {layer: scheme.name for layer, scheme in found.items()} == {
        f"blocks.0.{word}": word for word in words
    }
    assert found["blocks.0.W4A4_DYNAMIC"].weight == "int4"
    assert not any(scheme.smoothed for scheme in found.values())


@EACH
@pytest.mark.parametrize("wrapped", [False, True], ids=["repacked", "as-written"])
def test_smoothing_is_found_and_honoured(word, wrapped):
    weight, bias = make_weight()
    factors = torch.rand(K, generator=torch.Generator().manual_seed(3)) + 0.5
    x = make_input()
    known = msmodelslim.SCHEMES[word]
    stored = msmodelslim.quantize(
        weight / factors, known, bias=bias, calibration=calibrate(x * factors)
    )
    if wrapped:
        stored = {f"linear.{suffix}": tensor for suffix, tensor in stored.items()}
    stored["div.mul_scale" if wrapped else "mul_scale"] = factors
    scheme = msmodelslim.schemes(make_checkpoint({"q": (word, stored)}))["q"]
    assert scheme.smoothed
    exact = torch.nn.functional.linear(x, weight.float(), bias.float())
    y = msmodelslim.reference(x, stored, scheme)
    assert (y - exact).norm() / exact.norm() < LIMITS[scheme.weight]
    dense = msmodelslim.dequantize(stored, scheme)
    assert (dense - weight.float()).norm() / weight.float().norm() < 0.18


@EACH
def test_round_trip(word):
    scheme = msmodelslim.SCHEMES[word]
    weight, bias = make_weight()
    stored = quantize(word)
    steps = weight.float().abs().amax(dim=1, keepdim=True) / int8_arithmetic.LARGEST[scheme.weight]
    error = (msmodelslim.dequantize(stored, scheme) - weight.float()).abs()
    assert (error <= steps * 0.5001).all()
    exact = torch.nn.functional.linear(make_input(), weight.float(), bias.float())
    y = msmodelslim.reference(make_input(), stored, scheme)
    assert (y - exact).norm() / exact.norm() < LIMITS[scheme.weight]


@ALL
def test_written_tensors_are_the_declared_ones(word):
    scheme = msmodelslim.SCHEMES[word]
    specs = msmodelslim.tensors(scheme, N, K)
    stored = quantize(word)
    stored.pop("bias")
    assert {name for name, spec in specs.items() if not spec.optional} <= set(stored) <= set(specs)
    for suffix, tensor in stored.items():
        assert DTYPES[tensor.dtype] in specs[suffix].dtypes
        assert tuple(tensor.shape) in specs[suffix].shapes


def test_formulas_of_the_static_scheme():
    weight, bias = (t.float() for t in make_weight())
    x = make_input()
    stored = quantize("W8A8")
    scale = weight.abs().amax(dim=1) / 127
    step = (x.max() - x.min()) / 255
    offset = torch.round(-x.min() / step) - 128
    assert stored["input_scale"].item() == pytest.approx(step.item())
    assert stored["input_offset"].item() == offset.item()
    torch.testing.assert_close(stored["deq_scale"], step * scale)
    rows = stored["weight"].sum(dim=1)
    folded = bias.double() / stored["deq_scale"].double() - offset * rows
    assert torch.equal(stored["quant_bias"], folded.round().to(torch.int32))


def test_static_needs_calibration():
    with pytest.raises(UsageError, match="W8A8_DYNAMIC"):
        msmodelslim.quantize(make_weight()[0], msmodelslim.SCHEMES["W8A8"])


def test_one_sided_ranges_keep_zero_exact():
    scheme, x = msmodelslim.SCHEMES["W8A8"], make_input().abs() + 1
    stored = msmodelslim.quantize(make_weight()[0], scheme, calibration=calibrate(x))
    assert stored["input_offset"].item() == -128
    assert msmodelslim.reference(torch.zeros(1, K), stored, scheme).abs().max() == 0


def test_both_encodings_of_deq_scale_are_one():
    scheme, stored = msmodelslim.SCHEMES["W8A8"], quantize("W8A8")
    bits = stored["deq_scale"].view(torch.int32).long()
    other = stored | {"deq_scale": bits}
    assert (bits > 2**20).all()
    for name, tensor in msmodelslim.canonical(stored, scheme).items():
        assert torch.equal(tensor, msmodelslim.canonical(other, scheme)[name])


def test_static_bias_survives_without_its_copy():
    scheme, stored = msmodelslim.SCHEMES["W8A8"], quantize("W8A8")
    bias = stored.pop("bias")
    unfolded = msmodelslim.canonical(stored, scheme)["bias"]
    assert ((unfolded - bias).abs() <= stored["deq_scale"] * 0.51).all()


def test_a_layer_without_bias_unfolds_to_zeros():
    """The writer folds the zero point in float32, which cannot hold every large whole number."""
    weight = torch.full((2, 13824), 127, dtype=torch.int8)
    weight[0, 0], weight[1, ::2] = 126, -126
    folded = torch.round(-weight.float().sum(dim=1) * 127).to(torch.int32)
    stored = {
        "weight": weight,
        "input_scale": torch.tensor([0.1]),
        "input_offset": torch.tensor([127.0]),
        "deq_scale": torch.ones(2),
        "quant_bias": folded,
    }
    assert folded[0] != -weight[0].sum() * 127
    assert not msmodelslim.canonical(stored, msmodelslim.SCHEMES["W8A8"])["bias"].any()
    stored["quant_bias"] = folded + 100
    assert msmodelslim.canonical(stored, msmodelslim.SCHEMES["W8A8"])["bias"].all()


def test_static_weight_scale_of_older_writers_is_preferred():
    scheme, stored = msmodelslim.SCHEMES["W8A8"], quantize("W8A8")
    exact = torch.rand(N, 1)
    stored |= {"weight_scale": exact, "weight_offset": torch.zeros(N, 1)}
    found = msmodelslim.canonical(stored, scheme)
    assert torch.equal(found["weight_scale"], exact.flatten())
    checkpoint = make_checkpoint({"a": ("W8A8", stored)})
    assert set(msmodelslim.schemes(checkpoint)) == {"a"}


def test_asymmetric_weights_are_refused():
    stored = quantize("W4A4_DYNAMIC") | {"weight_offset": torch.full((N, 1), 2.0)}
    with pytest.raises(CheckpointError, match=r"weight_offset .*symmetric"):
        msmodelslim.canonical(stored, msmodelslim.SCHEMES["W4A4_DYNAMIC"])


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("W4A8_MXFP", "another MX format"),
        ("W4A4_MXFP4_SVD", "SVD residual"),
        ("W4A4_FLATQUANT_DYNAMIC", "FlatQuant"),
        ("W8A8_SVD_DYNAMIC", "SVD residual"),
        ("W8A8_MIX", "prefill/decode"),
        ("W4A16", "unknown"),
    ],
)
def test_other_schemes_are_refused_by_name(word, named):
    checkpoint = make_checkpoint({"blocks.0.q": (word, plain()[1])})
    assert msmodelslim.detect(checkpoint)
    with pytest.raises(CheckpointError, match=f"blocks.0.q.weight is {word} .*{named}"):
        msmodelslim.schemes(checkpoint)


@pytest.mark.parametrize(
    ("suffix", "named"),
    [
        ("left_trans", "FlatQuant"),
        ("clip_ratio", "FlatQuant"),
        ("svd_lowrank_l1", "SVD residual"),
        ("surprise", "unknown attachment"),
        ("linear.surprise", "unknown attachment"),
    ],
)
def test_attachments_are_refused_by_name(suffix, named):
    stored = quantize("W8A8_DYNAMIC") | {suffix: torch.zeros(K)}
    with pytest.raises(CheckpointError, match=rf"blocks.0.q.{suffix} belongs to (an )?{named}"):
        msmodelslim.schemes(make_checkpoint({"blocks.0.q": ("W8A8_DYNAMIC", stored)}))


def test_scales_per_group_are_refused():
    stored = quantize("W4A4_DYNAMIC") | {"weight_scale": torch.ones(N, 4)}
    with pytest.raises(CheckpointError, match=r"\[24, 4\] per group"):
        msmodelslim.schemes(make_checkpoint({"q": ("W4A4_DYNAMIC", stored)}))


def test_smoothed_float_layers_are_refused():
    checkpoint = make_checkpoint(
        {
            "a": ("W8A8", quantize("W8A8")),
            "b.linear": plain(),
            "b.div": ("FLOAT", {"mul_scale": torch.ones(K)}),
        }
    )
    with pytest.raises(CheckpointError, match=r"b.div.mul_scale .*FLOAT layer"):
        msmodelslim.schemes(checkpoint)


@pytest.mark.parametrize(
    "layer", ["patch_embedding", "condition_embedder.time_proj", "text_embedding.0"]
)
def test_quantized_embeddings_are_refused(layer):
    with pytest.raises(CheckpointError, match=f"{layer} .*embeddings"):
        msmodelslim.schemes(make_checkpoint({layer: ("W8A8", quantize("W8A8"))}))


@pytest.mark.parametrize(
    "setting",
    [
        {"blocks.0.attn1.quant_type": "FP8_DYNAMIC"},
        {"fa_quant_type": "FAKQuant"},
        {"kv_quant_type": "C8"},
    ],
    ids=["layer", "model", "cache"],
)
def test_quantized_attention_is_refused(setting):
    checkpoint = make_checkpoint({"a": ("W8A8", quantize("W8A8"))}, **setting)
    with pytest.raises(CheckpointError, match="quantized attention"):
        msmodelslim.schemes(checkpoint)


@pytest.mark.parametrize("key", ["metadata", "optional"])
def test_rotated_activations_are_refused(key):
    layers = {"a": ("W8A8", quantize("W8A8"))}
    assert msmodelslim.schemes(make_checkpoint(layers, **{key: {}}))
    with pytest.raises(CheckpointError, match=f"{key} holds quarot"):
        msmodelslim.schemes(make_checkpoint(layers, **{key: {"quarot": {}}}))
    with pytest.raises(CheckpointError, match=f"{key} holds {{'quarot': 1}}"):
        msmodelslim.schemes(make_checkpoint(layers, **{key: [{"quarot": 1}]}))


def test_rotations_are_left_aside_with_a_reason():
    for name in ("blocks.0.attn1.to_q_rot", "blocks.3.self_attn.k_rot"):
        assert "rotates" in (msmodelslim.ignored(name) or "")
    assert msmodelslim.ignored("blocks.0.attn1.to_q.weight") is None
    rotated = {"blocks.0.attn1": ("FLOAT", {"to_q_rot": torch.eye(8)})}
    checkpoint = make_checkpoint({**rotated, "a": ("W8A8", quantize("W8A8"))})
    assert set(msmodelslim.schemes(checkpoint)) == {"a"}


def test_codes_that_nobody_describes_are_refused():
    checkpoint = make_checkpoint({"a": ("W8A8", quantize("W8A8")), "b": ("W8A8", quantize("W8A8"))})
    del checkpoint.description["b.weight"]
    with pytest.raises(CheckpointError, match=r"b.weight holds I8 codes"):
        msmodelslim.schemes(checkpoint)


def test_description_of_another_folder_is_refused():
    checkpoint = make_checkpoint({"a": ("W8A8", quantize("W8A8"))})
    checkpoint.description["blocks.0.q.weight"] = "W8A8"
    with pytest.raises(CheckpointError, match=r"blocks.0.q.weight is W8A8, but no such tensor"):
        msmodelslim.schemes(checkpoint)


@pytest.mark.parametrize("key", ["a.weight", "a.input_offset", "a.other", "fa3.quant_type"])
def test_values_of_a_description_are_shown_escaped(key):
    """A line that begins with two colons is a command to a CI."""
    checkpoint = make_checkpoint({"a": ("W8A8", quantize("W8A8"))})
    checkpoint.description[key] = "W8A8_x\n::error::c"
    with pytest.raises(CheckpointError, match=r"W8A8_x\\n::error::c") as caught:
        msmodelslim.schemes(checkpoint)
    assert "\n" not in str(caught.value)


def test_declaration_covers_every_tensor():
    layers = {f"blocks.0.{word}": (word, quantize(word)) for word in WORDS}
    checkpoint = make_checkpoint({**layers, "norm": plain()})
    schemes = {layer: msmodelslim.SCHEMES[word] for layer, (word, _) in layers.items()}
    names = tuple(checkpoint.tensors)
    declared = msmodelslim.declare(schemes, ("norm",), names)
    assert declared.config is None
    name, description = declared.description
    assert name == "quant_model_description.json"
    json.dumps(description)
    assert {key: description[key] for key in names} == {
        key: checkpoint.description[key] for key in names
    }
    assert description["model_quant_type"] == "W4A4_DYNAMIC"
    assert description["version"] == "1.0.0"
    short = msmodelslim.declare(schemes, ("norm",)).description[1]
    assert {key: short.get(key) for key in names} == {key: description[key] for key in names}


@ALL
def test_bias_may_be_absent(word):
    scheme = msmodelslim.SCHEMES[word]
    weight, _ = make_weight()
    x = make_input()
    stored = msmodelslim.quantize(weight, scheme, calibration=calibrate(x))
    assert "bias" not in stored
    exact = torch.nn.functional.linear(x, weight.float())
    y = msmodelslim.reference(x, stored, scheme)
    assert (y - exact).norm() / exact.norm() < LIMITS[scheme.weight]


def test_mxfp8_numbers():
    """Hand-made block: the exponent of its largest number, ties away from zero, 448 at most."""
    row = torch.zeros(1, 64)
    row[0, :6] = torch.tensor([1.99, 1.0625, -1.0625, 2**-18, 2**-19, 0.0])
    stored = msmodelslim.quantize(row, msmodelslim.SCHEMES["W8A8_MXFP8"])
    assert stored["weight_scale"].tolist() == [[127 + 0 - 8, 0]]
    codes = stored["weight"].float()[0, :6].tolist()
    assert codes == [448.0, 288.0, -288.0, 2**-9, 0.0, 0.0]


def test_mxfp8_round_trip():
    scheme = msmodelslim.SCHEMES["W8A8_MXFP8"]
    weight, bias = make_weight()
    stored = quantize("W8A8_MXFP8")
    error = msmodelslim.dequantize(stored, scheme) - weight.float()
    assert (error.abs() <= weight.float().abs() / 8 + 1e-4).all()
    exact = torch.nn.functional.linear(make_input(), weight.float(), bias.float())
    y = msmodelslim.reference(make_input(), stored, scheme)
    assert 0.01 < (y - exact).norm() / exact.norm() < 0.06


def test_mxfp8_inputs_have_scales_that_are_powers_of_two():
    """An input that MXFP8 holds exactly goes through unchanged, whatever its magnitude."""
    scheme = msmodelslim.SCHEMES["W8A8_MXFP8"]
    stored = quantize("W8A8_MXFP8")
    x = torch.tensor([1.0, -1.875, 0.25]).repeat(K // 3)[None] * torch.tensor(
        [[1e-3], [3.0], [512]]
    )
    x = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)
    plain = torch.nn.functional.linear(x, msmodelslim.dequantize(stored, scheme), stored["bias"])
    torch.testing.assert_close(msmodelslim.reference(x, stored, scheme), plain)
    assert torch.equal(msmodelslim.reference(x * 0, stored, scheme), stored["bias"].expand(3, N))


def test_mxfp8_needs_whole_blocks():
    with pytest.raises(UsageError, match="multiple of 32"):
        msmodelslim.quantize(torch.ones(4, 40), msmodelslim.SCHEMES["W8A8_MXFP8"])


def test_smoothed_mxfp8_is_refused():
    stored = quantize("W8A8_MXFP8") | {"mul_scale": torch.ones(K)}
    with pytest.raises(CheckpointError, match="smoothing of MXFP8"):
        msmodelslim.schemes(make_checkpoint({"q": ("W8A8_MXFP8", stored)}))


@pytest.mark.parametrize(
    ("word", "suffix", "change", "found"),
    [
        ("W8A8", "deq_scale", None, "q.deq_scale is missing: expected F32 or I64"),
        ("W8A8", "quant_bias", None, "q.quant_bias is missing: expected I32"),
        ("W8A8_DYNAMIC", "weight_scale", None, "q.weight_scale is missing"),
        ("W8A8_MXFP8", "weight_scale", None, "q.weight_scale is missing: expected U8"),
        ("W8A8", "deq_scale", lambda t: t.view(torch.int32), "is I32 [24]: expected F32 or I64"),
        ("W8A8", "deq_scale", lambda t: t[:1], "is F32 [1]: expected F32 or I64 [24]"),
        ("W8A8", "input_scale", lambda t: t.repeat(K), "is F32 [96]: expected"),
        ("W8A8", "quant_bias", lambda t: t.float(), "is F32 [24]: expected I32 [24]"),
        ("W8A8", "weight", lambda t: t.bfloat16(), "is BF16 [24, 96]: expected I8 [24, 96]"),
        ("W8A8_DYNAMIC", "weight_scale", lambda t: t.view(torch.int32), "is I32 [24, 1]"),
        ("W8A8_DYNAMIC", "weight_offset", lambda t: t[:3], "is F32 [3, 1]: expected"),
        ("W8A8_DYNAMIC", "bias", lambda t: t[:3], "is F32 [3]: expected"),
        ("W8A8_MXFP8", "weight_scale", lambda t: t.float(), "is F32 [24, 3]: expected U8"),
        ("W8A8_DYNAMIC", "weight", lambda t: t[0], "has shape [96]"),
    ],
)
def test_tensors_that_are_not_of_the_format_are_named(word, suffix, change, found):
    stored = quantize(word)
    if change is None:
        del stored[suffix]
    else:
        stored[suffix] = change(stored[suffix])
    with pytest.raises(CheckpointError, match=rf"w\.st: tensor .*{re.escape(found)}"):
        msmodelslim.schemes(make_checkpoint({"blocks.0.q": (word, stored)}))


def test_scales_in_the_dtype_of_the_model_are_read():
    stored = {
        suffix: tensor.bfloat16() if suffix.startswith("input_") else tensor
        for suffix, tensor in quantize("W8A8").items()
    }
    assert set(msmodelslim.schemes(make_checkpoint({"q": ("W8A8", stored)}))) == {"q"}


@pytest.mark.parametrize("suffix", ["weight_scale", "mul_scale"])
def test_two_tensors_of_one_meaning_are_refused(suffix):
    stored = {f"linear.{name}": tensor for name, tensor in quantize("W8A8_DYNAMIC").items()}
    stored |= {"div.mul_scale": torch.ones(K)}
    stored[suffix] = torch.ones(K) if suffix == "mul_scale" else torch.ones(N, 1)
    with pytest.raises(CheckpointError, match=f"both the {suffix} of q"):
        msmodelslim.schemes(make_checkpoint({"q": ("W8A8_DYNAMIC", stored)}))


@pytest.mark.parametrize("wrapped", [False, True], ids=["repacked", "as-written"])
def test_lost_smoothing_is_refused(wrapped):
    stored = quantize("W8A8_DYNAMIC")
    if wrapped:
        stored = {f"linear.{suffix}": tensor for suffix, tensor in stored.items()}
    checkpoint = make_checkpoint({"q": ("W8A8_DYNAMIC", stored)})
    assert msmodelslim.schemes(checkpoint)
    checkpoint.description["q.div.mul_scale" if wrapped else "q.mul_scale"] = "FLOAT"
    with pytest.raises(CheckpointError, match=r"q\.(div\.)?mul_scale .*other numbers"):
        msmodelslim.schemes(checkpoint)


def test_a_layer_may_be_called_linear():
    """As in FLUX.1, `transformer_blocks.0.norm1.linear`; smoothing makes a level of that name, too."""
    layers = {f"norm{i}.linear": ("W8A8_DYNAMIC", quantize("W8A8_DYNAMIC")) for i in (1, 2)}
    layers["norm2.div"] = ("FLOAT", {"mul_scale": torch.ones(K)})
    found = msmodelslim.schemes(make_checkpoint(layers))
    assert {name: scheme.smoothed for name, scheme in found.items()} == {
        "norm1.linear": False,
        "norm2": True,
    }


def test_entries_for_a_bias_that_is_not_stored_are_harmless():
    stored = quantize("W8A8")
    del stored["bias"]
    checkpoint = make_checkpoint({"q": ("W8A8", stored)})
    checkpoint.description.update({"q.bias": "FLOAT", "q.weight_scale": "W8A8"})
    assert set(msmodelslim.schemes(checkpoint)) == {"q"}


def test_one_layer_has_one_scheme():
    checkpoint = make_checkpoint({"q": ("W8A8_DYNAMIC", quantize("W8A8_DYNAMIC"))})
    checkpoint.description["q.weight"] = "W4A4_DYNAMIC"
    with pytest.raises(CheckpointError, match=r"q\.weight_scale is W8A8_DYNAMIC, but the weight"):
        msmodelslim.schemes(checkpoint)


def test_unknown_words_are_said_before_embeddings():
    checkpoint = make_checkpoint({"patch_embedding": plain("float")})
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight is float \(unknown\)"):
        msmodelslim.schemes(checkpoint)


@pytest.mark.parametrize(
    ("word", "suffix", "change", "found"),
    [
        ("W8A8", "deq_scale", lambda t: -t, "positive"),
        ("W8A8", "deq_scale", lambda t: t * 0, "holds 0"),
        ("W8A8", "deq_scale", lambda t: torch.full((N,), 0x7FC00000), "holds nan"),
        ("W8A8", "deq_scale", lambda t: torch.ones(N, dtype=torch.int64), "1.4013e-45"),
        ("W8A8", "input_offset", lambda t: t * torch.nan, "holds nan: expected a whole number"),
        ("W8A8", "input_offset", lambda t: t + 0.5, "whole number"),
        ("W8A8", "input_offset", lambda t: t + 1000, "-128 to 128"),
        ("W8A8", "quant_bias", lambda t: t.flip(0), "folds a bias of"),
        ("W8A8", "weight_scale", lambda t: torch.rand(N, 1), "expected their product"),
        ("W8A8_DYNAMIC", "weight_scale", lambda t: t * 0, "holds 0"),
        ("W8A8_DYNAMIC", "linear.weight_scale", lambda t: -t, "positive"),
        ("W8A8_DYNAMIC", "mul_scale", lambda t: torch.zeros(K), "holds 0"),
        ("W8A8_DYNAMIC", "div.mul_scale", lambda t: -torch.ones(K), "holds -1"),
        ("W4A4_DYNAMIC", "weight_offset", lambda t: t + 2, "holds 2: expected zeros"),
        ("W4A4_DYNAMIC", "weight", lambda t: (t.int() * 10).to(torch.int8), "expected -8 to 7"),
        ("W8A8_MXFP8", "weight_scale", lambda t: torch.full_like(t, 255), "exponents of 255"),
    ],
)
def test_impossible_values_are_named(word, suffix, change, found):
    stored, named = quantize(word), suffix
    if suffix.startswith("linear."):
        stored = {f"linear.{name}": tensor for name, tensor in stored.items()}
    stored[suffix] = change(stored.get(suffix))
    if suffix == "weight_scale" and word == "W8A8":
        named = "deq_scale"
    fault = msmodelslim.find_fault(stored, msmodelslim.SCHEMES[word])
    assert fault is not None
    assert fault[0] == named
    assert found in fault[1]


@pytest.mark.parametrize("first", [0, 5, N - 2])
@pytest.mark.parametrize(
    ("suffix", "stated"),
    [
        ("deq_scale", "holds {found:g}, where input_scale * weight_scale is {product:g}: expected"),
        ("quant_bias", "folds a bias of {folded:g}, where bias is {bias:g}: expected round("),
    ],
)
def test_the_first_row_that_contradicts_is_told(suffix, stated, first):
    """Two rows do, and no two rows of the layer have the same numbers."""
    stored = quantize("W8A8")
    stored["deq_scale"] = torch.linspace(0.25, 0.5, N)
    stored["weight_scale"] = stored["deq_scale"][:, None] / stored["input_scale"]
    stored["bias"] = torch.linspace(-1, 2, N)
    zero_point = stored["input_offset"] * stored["weight"].sum(dim=1)
    stored["quant_bias"] = (stored["bias"] / stored["deq_scale"] - zero_point).round().int()
    assert msmodelslim.find_fault(stored, msmodelslim.SCHEMES["W8A8"]) is None
    rows = torch.tensor([first, N - 1])
    if suffix == "deq_scale":
        stored["weight_scale"][rows] *= 3
    else:
        stored["quant_bias"][rows] += 1000
    deq = stored["deq_scale"][first].item()
    numbers = {
        "found": deq,
        "product": (stored["input_scale"] * stored["weight_scale"][first]).item(),
        "folded": deq * (stored["quant_bias"] + zero_point)[first].item(),
        "bias": stored["bias"][first].item(),
    }
    fault = msmodelslim.find_fault(stored, msmodelslim.SCHEMES["W8A8"])
    assert fault is not None
    assert fault[0] == suffix
    assert stated.format(**numbers) in fault[1]


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_writers_round_is_no_fault(word, dtype):
    """The writer computes in the model's dtype; a row of zeros may have any scale."""
    stored = quantize(word)
    if word == "W8A8":
        scale = (stored["deq_scale"] / stored["input_scale"]).to(dtype)
        stored["input_scale"] = stored["input_scale"].to(dtype).float()
        deq_scale, bias = stored["input_scale"].to(dtype) * scale, stored["bias"].to(dtype)
        rows = stored["weight"].float().sum(dim=1) * stored["input_offset"]
        stored["quant_bias"] = torch.round(bias / deq_scale - rows).int()
        stored |= {"deq_scale": deq_scale.float(), "weight_scale": scale.float()[:, None]}
    elif word not in MX:
        stored["weight"][3], stored["weight_scale"][3] = 0, 0
    assert msmodelslim.find_fault(stored, msmodelslim.SCHEMES[word]) is None
