"""What a description may say of a layer, each edge from both sides, and the texts as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError
from quantmatrix.families import msmodelslim
from quantmatrix.families.msmodelslim.description import (
    check_known,
    detect,
    find_layer,
    schemes,
    split_name,
)

SUPPORTED = "W8A8, W8A8_DYNAMIC, W4A4_DYNAMIC, W8A8_MXFP8, W4A4_MXFP4, W4A4_MXFP4_DUALSCALE"
DYNAMIC = {
    "weight": ("I8", (24, 96)),
    "weight_scale": ("F32", (24, 1)),
    "weight_offset": ("F32", (24, 1)),
}
STATIC = {
    "weight": ("I8", (24, 96)),
    "input_scale": ("F32", (1,)),
    "input_offset": ("F32", (1,)),
    "deq_scale": ("F32", (24,)),
    "quant_bias": ("I32", (24,)),
}
Headers = Mapping[str, tuple[str, tuple[int, ...]]]


def make(headers: Headers, described: Mapping[str, Any], word: str = "", *files: str) -> Checkpoint:
    """A checkpoint of these tensors; those of layer `a` are described as a word, where one is given."""
    tensors = {
        name: TensorHeader(name, dtype, shape, f"{name[:1]}.st")
        for name, (dtype, shape) in headers.items()
    }
    own = {name: word for name in headers if name.startswith("a.")} if word else {}
    return Checkpoint(
        "here",
        files or ("a.st",),
        tensors,
        description={**own, **described},
        description_file="folder/quant_model_description.json",
    )


def layer(form: Headers, name: str = "a", **changes: tuple[str, tuple[int, ...]]) -> Headers:
    return {f"{name}.{suffix}": spec for suffix, spec in {**form, **changes}.items()}


def refuse(checkpoint: Checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        schemes(checkpoint)
    return str(caught.value)


def test_detection_lists_schemes_in_order() -> None:
    described = {"b.weight": "W8A8_DYNAMIC", "a.weight": "W4A4_DYNAMIC", "c.weight": "FLOAT"}
    found = detect(make({}, {**described, "d.weight": "W8A8_DYNAMIC", "version": "AAA"}))
    assert found == ("quant_model_description.json describes layers as W4A4_DYNAMIC, W8A8_DYNAMIC")
    assert detect(make({}, {"c.weight": "FLOAT", "c.bias": "W8A8"})) is None
    assert detect(make({}, {"c.bias": "W8A8"})) == (
        "quant_model_description.json describes no layer at all"
    )
    assert detect(Checkpoint("here", (), {}, description={})) == (
        "quant_model_description.json describes no layer at all"
    )
    assert detect(Checkpoint("here", (), {})) is None


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("FLOAT", "FLOAT"),
        (None, "nothing"),
        ("A", ""),
        ("W8A8", ""),
    ],
)
def test_codes_need_the_name_of_a_scheme(dtype: str, word: str | None, said: str) -> None:
    """Words on either side of FLOAT in the alphabet are names of schemes as any other."""
    described = {} if word is None else {"table": word}
    checkpoint = make({"table": (dtype, (3, 5))}, described)
    if not said:
        assert schemes(checkpoint) == {}
        return
    assert refuse(checkpoint) == (
        f"t.st: tensor table holds {dtype} codes, but folder/quant_model_description.json calls it "
        f"{said}: expected the name of its scheme there"
    )


@pytest.mark.parametrize("dtype", ["BF16", "F32", "I64", "F8_E5M2", "BOOL"])
def test_plain_tensors_need_no_scheme(dtype: str) -> None:
    assert schemes(make({"table": (dtype, (3, 5))}, {})) == {}


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((24, 3), True),
        ((24, 2), True),
        ((24, 1, 2), True),
        ((24, 0), False),
        ((24,), False),
        ((23, 3), False),
        ((25, 3), False),
        ((1, 24), False),
        ((), False),
    ],
)
def test_scales_per_group_are_told_from_other_shapes(shape: tuple[int, ...], groups: bool) -> None:
    checkpoint = make(layer(DYNAMIC, weight_scale=("F32", shape)), {}, "W8A8_DYNAMIC")
    more = " per group of columns" if groups else ""
    assert refuse(checkpoint) == (
        f"a.st: tensor a.weight_scale is F32 {list(shape)}{more}: expected F32 or BF16 or F16 [24, 1] "
        "in a layer that folder/quant_model_description.json calls W8A8_DYNAMIC, with a weight of "
        "[24, 96]; the two are not of one checkpoint, or it is damaged: download both again, or "
        "quantize again per channel"
    )


def test_groups_of_columns_are_said_of_scales_alone() -> None:
    checkpoint = make(layer(DYNAMIC, weight_offset=("F32", (24, 3))), {}, "W8A8_DYNAMIC")
    assert "a.weight_offset is F32 [24, 3]: expected" in refuse(checkpoint)
    blocks = {"weight": ("F8_E4M3", (24, 96)), "weight_scale": ("U8", (24, 4))}
    checkpoint = make(layer(blocks), {}, "W8A8_MXFP8")
    assert "a.weight_scale is U8 [24, 4]: expected U8 [24, 3] in a layer" in refuse(checkpoint)
    assert list(schemes(make(layer(blocks, weight_scale=("U8", (24, 3))), {}, "W8A8_MXFP8"))) == [
        "a"
    ]


@pytest.mark.parametrize(
    ("word", "form", "suffix", "needed"),
    [
        *(("W8A8_DYNAMIC", DYNAMIC, suffix, suffix != "weight_offset") for suffix in DYNAMIC),
        *(("W8A8", STATIC, suffix, True) for suffix in STATIC),
    ],
)
def test_what_a_layer_may_lack(word: str, form: Headers, suffix: str, needed: bool) -> None:
    kept = {name: spec for name, spec in layer(form).items() if name != f"a.{suffix}"}
    checkpoint = make(kept, {"a.weight": word}, word)
    if not needed:
        assert list(schemes(checkpoint)) == ["a"]
    elif suffix == "weight":
        assert refuse(checkpoint) == (
            f"folder/quant_model_description.json: a.weight is {word}, but no such tensor is in "
            "a.st: is the description of another folder?"
        )
    else:
        assert refuse(checkpoint).startswith(f"a.st: tensor a.{suffix} is missing: expected ")


@pytest.mark.parametrize("shape", [(96,), (24, 96, 1)])
def test_weights_are_matrices(shape: tuple[int, ...]) -> None:
    checkpoint = make(layer(DYNAMIC, weight=("I8", shape)), {}, "W8A8_DYNAMIC")
    assert refuse(checkpoint) == (
        f"a.st: tensor a.weight has shape {list(shape)}, but folder/quant_model_description.json calls "
        "it W8A8_DYNAMIC: only linear layers, whose weights have two dimensions, are quantized; it "
        "should be FLOAT"
    )


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("W8A8_FLATQUANT_DYNAMIC", "FlatQuant"),
        ("W4A4_SVD", "an SVD residual"),
        ("W4A8_MXFP", "another MX format"),
        ("W8A8_MIX", "a prefill/decode mix"),
        ("W8A16", "unknown"),
        ("A", "unknown"),
    ],
)
def test_schemes_of_other_names(word: str, why: str) -> None:
    assert refuse(make(layer(DYNAMIC), {}, word)) == (
        f"folder/quant_model_description.json: a.weight is {word} ({why}), which is not supported; "
        f"supported are FLOAT, {SUPPORTED}"
    )


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("fa_quant_type", "FAKQuant", True),
        ("kv_cache_type", "C8", True),
        ("kv_quant_type", "C8", True),
        ("x.attn.quant_type", "FAKQuant", True),
        ("x.attn.quant_type", "A", True),
        ("x.attn.quant_type", "FLOAT", False),
        ("x.attn.quant_type", "", False),
        ("fa_quant_type", None, False),
        ("fa_quant_type", "FLOAT", False),
        ("model_quant_type", "C8", False),
        ("quant_type", "C8", False),
        ("aa_type", "C8", False),
    ],
)
def test_quantized_attention(key: str, value: Any, refused: bool) -> None:
    checkpoint = make({}, {key: value})
    if not refused:
        assert schemes(checkpoint) == {}
        return
    assert refuse(checkpoint) == (
        f"folder/quant_model_description.json: {key} is {value}: quantized attention is not supported, "
        "and its rotations would not cancel out; quantize again without fa3_quant"
    )


@pytest.mark.parametrize("key", ["metadata", "optional"])
@pytest.mark.parametrize(
    ("value", "held"),
    [({"b": 1, "a": 2}, "b, a"), (["q", 3], "q, 3"), ("quarot", "quarot"), ({}, ""), (None, "")],
)
def test_rotated_activations(key: str, value: Any, held: str) -> None:
    checkpoint = make({}, {key: value})
    if not held:
        assert schemes(checkpoint) == {}
        return
    assert refuse(checkpoint) == (
        f"folder/quant_model_description.json: {key} holds {held}: rotated activations (QuaRot) are "
        "not supported; quantize again without them"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.left_trans", "FlatQuant"),
        ("a.clip_ratio", "FlatQuant"),
        ("a.svd_lowrank_l1", "an SVD residual"),
        ("a.weight_dual_scale", "dual-scale MXFP4 (W4A4_MXFP4_DUALSCALE)"),
        ("a.zzz", "an unknown attachment"),
        ("a.aaa", "an unknown attachment"),
        ("b.mul_scale", "smoothing of a FLOAT layer"),
        ("b.svd_lowrank_l2", "an SVD residual"),
    ],
)
def test_attachments_that_nothing_computes(name: str, what: str) -> None:
    described = {name: "W8A8_DYNAMIC"}
    checkpoint = make({**layer(DYNAMIC), name: ("F32", (4,))}, described, "W8A8_DYNAMIC")
    assert refuse(checkpoint) == (
        f"{name[0]}.st: tensor {name} belongs to {what}, which is not supported: quantize again without "
        f"it, per channel, as one of {SUPPORTED}"
    )


def test_mxfp8_is_not_smoothed() -> None:
    blocks = {"weight": ("F8_E4M3", (24, 96)), "weight_scale": ("U8", (24, 3))}
    checkpoint = make(layer(blocks, mul_scale=("F32", (96,))), {}, "W8A8_MXFP8")
    assert "tensor a.mul_scale belongs to smoothing of MXFP8, which" in refuse(checkpoint)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("patch_embedding", True),
        ("condition_embedder.time_proj", True),
        ("text_embedding.0", True),
        ("time_emb", True),
        ("img_emb.proj.1", True),
        ("time_projection.1", True),
        ("patch_embeddings", False),
        ("blocks.0.time_emb", False),
    ],
)
def test_embeddings_stay_in_full_precision(name: str, refused: bool) -> None:
    headers = layer(DYNAMIC, name)
    checkpoint = make(headers, dict.fromkeys(headers, "W8A8_DYNAMIC"))
    if not refused:
        assert list(schemes(checkpoint)) == [name]
        return
    assert refuse(checkpoint) == (
        f"folder/quant_model_description.json: {name} is W8A8_DYNAMIC, but quantized embeddings are not "
        "supported: quantize again without them (they must be FLOAT)"
    )


@pytest.mark.parametrize(
    ("name", "word", "text"),
    [
        ("a.bias", "FLOAT", ""),
        ("a.bias", "W8A8", ""),
        ("a.weight_scale", "W8A8", ""),
        ("a.weight_offset", "W8A8", ""),
        ("a.mul_scale", "FLOAT", "describes a.mul_scale (FLOAT) of the quantized layer a"),
        ("a.bias", "A", "a.bias is A, but the weight of a is W8A8: expected one scheme"),
        ("a.bias", "W8A8_DYNAMIC", "a.bias is W8A8_DYNAMIC, but the weight of a is W8A8"),
        ("b.bias", "A", ""),
    ],
)
def test_what_is_described_beside_a_static_layer(name: str, word: str, text: str) -> None:
    checkpoint = make(layer(STATIC), {name: word}, "W8A8")
    if not text:
        assert list(schemes(checkpoint)) == ["a"]
    else:
        assert text in refuse(checkpoint)


def test_a_dynamic_layer_needs_the_scales_that_are_described() -> None:
    kept = {k: v for k, v in layer(DYNAMIC).items() if k != "a.weight_offset"}
    checkpoint = make(kept, {"a.weight_offset": "W8A8_DYNAMIC"}, "W8A8_DYNAMIC", "a.st", "b.st")
    assert refuse(checkpoint) == (
        "folder/quant_model_description.json: describes a.weight_offset (W8A8_DYNAMIC) of the quantized "
        "layer a, but no such tensor is in a.st, b.st: without it the layer would give other numbers; "
        "download the weights again"
    )


def test_a_tensor_under_two_names() -> None:
    headers = {
        **layer(DYNAMIC),
        "a.mul_scale": ("F32", (96,)),
        "a.div.mul_scale": ("F32", (96,)),
    }
    assert refuse(make(headers, {}, "W8A8_DYNAMIC")) == (
        "a.st: tensors a.mul_scale and a.div.mul_scale are both the mul_scale of a: expected one of "
        "them; write the checkpoint again"
    )


def test_a_level_that_smoothing_made_needs_its_factors() -> None:
    headers = {f"a.linear.{suffix}": spec for suffix, spec in DYNAMIC.items()}
    described = {"a.div.mul_scale": "FLOAT"}
    assert refuse(make(headers, described, "W8A8_DYNAMIC")) == (
        "a.st: tensor a.linear.weight lies in a level that only smoothing makes, but a.div.mul_scale is "
        "missing: without it the layer would give other numbers; quantize again, or name a folder "
        "that was written completely"
    )
    whole = {**headers, "a.div.mul_scale": ("F32", (96,))}
    [(name, scheme)] = schemes(make(whole, described, "W8A8_DYNAMIC")).items()
    assert (name, scheme.smoothed) == ("a", True)
    [(name, scheme)] = schemes(make(headers, {}, "W8A8_DYNAMIC")).items()
    assert (name, scheme.smoothed) == ("a.linear", False)


@pytest.mark.parametrize(
    ("name", "beside", "found"),
    [
        ("a.linear", "a.mul_scale", "a"),
        ("a.linear", "a.div.mul_scale", "a"),
        ("a.linear", "b.mul_scale", "a.linear"),
        ("a.linear", "a.linear.mul_scale", "a.linear"),
        ("a", "a.mul_scale", "a"),
        ("a.b", "a.mul_scale", "a.b"),
    ],
)
def test_the_level_of_a_smoothed_layer(name: str, beside: str, found: str) -> None:
    assert find_layer(name, make({beside: ("F32", (8,))}, {})) == found
    assert find_layer(name, make({}, {beside: "FLOAT"})) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.weight", ("a", "weight")),
        ("a.linear.weight", ("a", "weight")),
        ("a.div.mul_scale", ("a", "mul_scale")),
        ("a.other.weight", (None, "weight")),
        ("b.weight", (None, "weight")),
        ("linear.weight", (None, "weight")),
        ("weight", (None, "weight")),
        ("a.linear.linear.weight", (None, "weight")),
    ],
)
def test_names_are_split(name: str, found: tuple[str | None, str]) -> None:
    assert split_name(name, {"a": msmodelslim.SCHEMES["W8A8"]}) == found


def test_tools_that_copy_all_schemes_check_those_that_are_known() -> None:
    """`B` and `W9` sort before and after the known ones; neither is looked at."""
    other = layer(DYNAMIC, "b")
    described = dict.fromkeys(other, "B") | {"c.weight": "W9"}
    good = make({**layer(DYNAMIC), **other}, described, "W8A8_DYNAMIC")
    check_known(good)
    bad = make(
        {**layer(DYNAMIC, weight_scale=("F32", (1, 24))), **other}, described, "W8A8_DYNAMIC"
    )
    with pytest.raises(CheckpointError, match=re.escape("a.weight_scale is F32 [1, 24]: expected")):
        check_known(bad)
