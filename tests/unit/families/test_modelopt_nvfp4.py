"""modelopt-nvfp4: detection, schemes per layer, four layouts, refusals by name, round trips."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import find_block
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import modelopt_nvfp4
from quantmatrix.families.producers import modelopt
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import linear_fp8
from quantmatrix.scheme import Scheme

N, K = 130, 96
NVFP4 = modelopt_nvfp4.NVFP4
WORDS = dict(modelopt_nvfp4.SCHEMES)
LAYOUTS = [
    replace(NVFP4, swap_nibbles=swap, tiled_scales=tiled)
    for swap, tiled in itertools.product((False, True), repeat=2)
]
DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}
Layers = Mapping[str, Mapping[str, torch.Tensor]]


def make_weight(rows: int = N, columns: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.1).bfloat16()


def make_input(columns: int = K) -> torch.Tensor:
    return torch.randn(20, columns, generator=torch.Generator().manual_seed(3))


def calibrate(columns: int = K) -> Calibration:
    x = make_input(columns)
    return Calibration(x.amin(dim=0), x.amax(dim=0))


def quantize(scheme: Scheme = NVFP4, rows: int = N, columns: int = K) -> dict[str, torch.Tensor]:
    return modelopt_nvfp4.quantize(
        make_weight(rows, columns), scheme, calibration=calibrate(columns)
    )


def quantize_fp8() -> dict[str, torch.Tensor]:
    return quantize(modelopt.FP8)


def make_checkpoint(
    layers: Layers,
    block: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    **fields: Any,
) -> Checkpoint:
    """A checkpoint of headers; every second tensor is said to lie in a second file."""
    headers = {}
    for layer, tensors in layers.items():
        for i, (suffix, tensor) in enumerate(tensors.items()):
            name = f"{layer}.{suffix}"
            shape = tuple(tensor.shape)
            headers[name] = TensorHeader(name, DTYPES[tensor.dtype], shape, f"{i % 2}.safetensors")
    config = None if block is None else {"quantization_config": dict(block)}
    found = find_block(config, "config.json", metadata or {}, ("0.safetensors",))
    return Checkpoint(
        "here",
        ("0.safetensors", "1.safetensors"),
        headers,
        metadata=metadata or {},
        quantization=found[0],
        quantization_from=found[1],
        **fields,
    )


PLAIN = {"weight": torch.zeros(N, K, dtype=torch.bfloat16)}
BLOCK = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
LISTED = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "nvfp4"}}})}
SCRIPT = {"quantization": "nvfp4"}
PACKED = "double_blocks.3.img_attn.qkv"
KEYS = ("swap_weight_nibbles", "checkpoint_weight_scale_layout", "checkpoint_uses_packed_qkv")


def read(
    layers: Layers, block: Mapping[str, Any] | None = None, **fields: Any
) -> dict[str, Scheme]:
    checkpoint = make_checkpoint(layers, block, **fields)
    assert modelopt_nvfp4.detect(checkpoint)
    return modelopt_nvfp4.schemes(checkpoint)


def test_bf16_fp8_and_nvfp4_side_by_side() -> None:
    layers = {"a": quantize(), "b": quantize_fp8(), "c": PLAIN}
    found = read(layers, BLOCK)
    assert found == {"a": NVFP4, "b": modelopt.FP8}
    weight = make_weight().float()
    for name, scheme in found.items():
        error = modelopt_nvfp4.dequantize(layers[name], scheme) - weight
        assert error.norm() / weight.norm() < (0.12 if name == "a" else 0.04)


def test_fp8_layers_use_the_fp8_arithmetic() -> None:
    stored, x = quantize_fp8(), make_input()
    canonical = modelopt_nvfp4.canonical(stored, modelopt.FP8)
    assert canonical["weight"] is stored["weight"]
    assert canonical["weight_scale"].shape == ()
    expected = linear_fp8.reference(x, canonical, modelopt.FP8)
    assert torch.equal(modelopt_nvfp4.reference(x, stored, modelopt.FP8), expected)


@pytest.mark.parametrize("word", ["false", 1])
def test_the_nibble_order_is_a_yes_or_no(word: Any) -> None:
    """The text "false" is true to Python, and swapped nibbles decode without an error."""
    with pytest.raises(CheckpointError, match=r"swap_weight_nibbles is .*: expected true or"):
        read({"a": quantize()}, {**BLOCK, "swap_weight_nibbles": word})
    assert read({"a": quantize()}, {**BLOCK, "swap_weight_nibbles": None}) == {"a": NVFP4}


def test_nvfp4_without_a_layer_of_it_is_a_contradiction() -> None:
    with pytest.raises(CheckpointError, match="quant_algo is NVFP4, but all 1 quantized layers"):
        read({"a": quantize_fp8(), "b": PLAIN}, BLOCK)


def test_an_fp8_layer_with_smoothing_is_refused() -> None:
    smoothed = {**quantize_fp8(), "pre_quant_scale": torch.ones(K)}
    with pytest.raises(CheckpointError, match="layer b has pre_quant_scale beside input_scale"):
        read({"a": quantize(), "b": smoothed}, BLOCK)


def test_fp8_without_a_calibration_is_dynamic() -> None:
    stored = {k: v for k, v in quantize_fp8().items() if k != "input_scale"}
    found = read({"a": quantize(), "b": stored}, BLOCK)
    assert found["b"].activation == "tensor-dynamic"


def test_stale_exclusions_do_not_matter() -> None:
    found = read({"a": quantize(), "b": PLAIN}, {**BLOCK, "ignore": ["a", "*"]})
    assert list(found) == ["a"]


def test_structure_alone_is_enough() -> None:
    found = read(
        {"blocks.0.a": quantize(), "b": PLAIN}, metadata=SCRIPT
    )  # only its layout is declared
    assert found == {"blocks.0.a": NVFP4}


def test_a_scalar_scale_beside_e4m3_is_no_nvfp4() -> None:
    assert modelopt_nvfp4.detect(make_checkpoint({"a": quantize_fp8(), "b": PLAIN})) is None


def test_only_this_family_claims_it() -> None:
    assert families.detect(make_checkpoint({"a": quantize()}, BLOCK)) is not None
    nested = {"quantization": {"quant_algo": "NVFP4", "swap_weight_nibbles": True}}
    assert read({"a": quantize()}, nested)["a"].swap_nibbles


@pytest.mark.parametrize("version", [{}, {"format_version": "1.0"}])
def test_a_list_of_fp8_and_nvfp4_layers(version: dict[str, str]) -> None:
    """ComfyUI's mixed files: the FP8 layers do not make it a file of the other family."""
    full = {"full_precision_matrix_mult": True}
    raw = LAYOUTS[3]
    listed = {
        "double_blocks.0.img_attn.qkv": {"format": "nvfp4"},
        "double_blocks.0.img_mlp.0": {"format": "nvfp4", **full},
        "double_blocks.0.txt_attn.qkv": {"format": "float8_e4m3fn"},
        "double_blocks.0.txt_mlp.0": {"format": "float8_e4m3fn", **full},
    }
    stored = {"nvfp4": quantize(raw), "float8_e4m3fn": quantize_fp8()}
    checkpoint = make_checkpoint(
        {name: stored[entry["format"]] for name, entry in listed.items()},
        metadata={"_quantization_metadata": json.dumps({**version, "layers": listed})},
    )
    assert families.detect(checkpoint)[0] == "modelopt-nvfp4"
    found = modelopt_nvfp4.schemes(checkpoint)
    activations = ["group-dynamic", "none", "tensor-static", "none"]
    assert [scheme.activation for scheme in found.values()] == activations
    x = make_input()
    for name, scheme in found.items():
        tensors = stored[listed[name]["format"]]
        y = modelopt_nvfp4.reference(x, tensors, scheme)
        exact = functional.linear(x, modelopt_nvfp4.dequantize(tensors, scheme))
        error = (y - exact).norm() / exact.norm()
        assert error < 1e-6 if scheme.activation == "none" else error > 1e-3


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        {"quant_method": "fp8"},
    ],
)
def test_other_declarations_are_not_ours(block: dict[str, Any]) -> None:
    assert modelopt_nvfp4.detect(make_checkpoint({"a": quantize()}, block)) is None


def test_files_of_other_families_are_not_ours() -> None:
    described = make_checkpoint({"a": quantize()}, description={"a.weight": "W8A8"})
    assert modelopt_nvfp4.detect(described) is None
    svdq = {
        "qweight": torch.zeros(N, K // 2, dtype=torch.int8),
        "wscales": torch.zeros(K // 16, N).to(torch.float8_e4m3fn),
    }
    header = {"quantization_config": json.dumps({"method": "svdquant"})}
    assert modelopt_nvfp4.detect(make_checkpoint({"a": svdq}, metadata=header)) is None


@pytest.mark.parametrize(
    ("method", "algorithm"), [("modelopt_fp4", "FP8"), ("modelopt_fp8", "NVFP4")]
)
def test_contradicting_words(method: str, algorithm: str) -> None:
    block = {"quant_method": method, "quant_algo": algorithm}
    with pytest.raises(CheckpointError, match="contradict"):
        modelopt_nvfp4.detect(make_checkpoint({"a": quantize()}, block))


def test_legacy_method_without_an_algorithm() -> None:
    assert read({"a": quantize()}, {"quant_method": "modelopt_fp4"}) == {"a": NVFP4}


@pytest.mark.parametrize(
    ("layer", "block", "metadata", "layout"),
    [
        ("a", BLOCK, {}, 0),
        ("a", {**BLOCK, KEYS[0]: True}, {}, 2),
        ("a", {**BLOCK, KEYS[1]: "swizzled"}, {}, 1),
        ("a", {**BLOCK, KEYS[0]: True, KEYS[1]: "swizzled", KEYS[2]: True}, {}, 3),
        ("a", {**BLOCK, KEYS[2]: True}, {}, 3),
        (PACKED, {**BLOCK, KEYS[0]: False, KEYS[1]: "linear", KEYS[2]: True}, {}, 0),
        (PACKED, {**BLOCK, KEYS[2]: False}, {}, 0),
        ("a", BLOCK, LISTED, 0),  # ModelOpt's enable_layerwise_quant_metadata
        ("a", None, LISTED, 3),
        (PACKED, None, {**LISTED, "format": "pt"}, 3),
        (PACKED, None, SCRIPT, 0),
        ("single_blocks.0.linear1", None, SCRIPT, 0),
    ],
)
def test_a_declared_layout_is_honoured(
    layer: str, block: Mapping[str, Any] | None, metadata: Mapping[str, str], layout: int
) -> None:
    expected = LAYOUTS[layout]
    stored = quantize(expected)
    assert read({layer: stored, "img_in": PLAIN}, block, metadata=metadata) == {layer: expected}


def test_marker_tensors_mean_comfyuis_layout() -> None:
    marked = {**quantize(LAYOUTS[3]), "comfy_quant": torch.zeros(20, dtype=torch.uint8)}
    assert read({"blocks.0.ff": marked}) == {"blocks.0.ff": LAYOUTS[3]}


@pytest.mark.parametrize(
    ("layer", "block", "metadata", "said"),
    [
        ("a", None, {}, "nothing in 0.safetensors or 1.safetensors declares it"),
        (PACKED, None, {}, "nothing in .* declares it"),
        (PACKED, BLOCK, {}, "nothing in .* declares it"),
        ("a", None, {**LISTED, **SCRIPT}, "contradict each other"),
        (PACKED, {**BLOCK, KEYS[0]: True}, {}, "swap_weight_nibbles in config.json"),
    ],
)
def test_what_nothing_declares_is_never_assumed(
    layer: str, block: Mapping[str, Any] | None, metadata: Mapping[str, str], said: str
) -> None:
    checkpoint = make_checkpoint({layer: quantize(NVFP4, 128, 64)}, block, metadata)
    assert modelopt_nvfp4.detect(checkpoint)
    with pytest.raises(CheckpointError, match=said) as caught:
        modelopt_nvfp4.schemes(checkpoint)
    layout = modelopt_nvfp4.layout(checkpoint)
    assert layout is not None
    for reading in layout.readings:
        words = f"--nibble-order {reading['nibble_order']} --nvfp4-layout {reading['nvfp4_layout']}"
        assert words in str(caught.value)
        chosen = modelopt_nvfp4.schemes(replace(checkpoint, chosen=reading))
        high, tiles = reading["nibble_order"] == "high", reading["nvfp4_layout"] == "tiles"
        assert chosen == {layer: replace(NVFP4, swap_nibbles=high, tiled_scales=tiles)}
    assert len(layout.readings) == (2 if block and len(block) > 2 else 4)


@pytest.mark.parametrize(
    "name", ["/hub/FLUX.2-dev-NVFP4/x.safetensors", "flux2-dev-nvfp4-mixed.safetensors"]
)
def test_the_official_files_are_known_by_their_name(name: str) -> None:
    checkpoint = replace(make_checkpoint({PACKED: quantize(LAYOUTS[3])}), reference=name)
    assert modelopt_nvfp4.schemes(checkpoint) == {PACKED: LAYOUTS[3]}
    named = replace(make_checkpoint({"a": quantize(LAYOUTS[3])}), reference=name)
    with pytest.raises(CheckpointError, match="the layout of its NVFP4 codes is unknown"):
        modelopt_nvfp4.schemes(named)


@pytest.mark.parametrize(("key", "value"), [(KEYS[1], "tiled"), (KEYS[1], True), (KEYS[2], "yes")])
def test_a_wrong_value_of_a_layout_key_is_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is .*: expected"):
        read({"a": quantize()}, {**BLOCK, key: value})


@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(N, K), (128, 64), (256, 128)])
def test_only_the_right_layout_decodes(stored: Scheme, rows: int, columns: int) -> None:
    """All four decode without an error where the shapes agree, and exactly one is right."""
    weight = make_weight(rows, columns).float()
    tensors = quantize(stored, rows, columns)
    plain = modelopt_nvfp4.dequantize(quantize(NVFP4, rows, columns), NVFP4)
    errors = {}
    for scheme in LAYOUTS:
        if scheme.tiled_scales != stored.tiled_scales and rows % 128:
            continue
        decoded = modelopt_nvfp4.dequantize(tensors, scheme)
        errors[scheme] = ((decoded - weight).norm() / weight.norm()).item()
        assert torch.equal(decoded, plain) == (scheme == stored)
    assert errors.pop(stored) < 0.12
    assert all(error > 0.2 for error in errors.values())


def test_golden_raw_bytes() -> None:
    """Even column in the high nibble; the scale of row 1, group 2 in byte 16 * 1 + 2 of a tile."""
    scheme = LAYOUTS[3]
    weight = torch.zeros(128, 32, dtype=torch.uint8)
    weight[1, 16] = 0x2B
    scales = torch.zeros(128, 4).to(torch.float8_e4m3fn)
    scales.view(torch.uint8).view(-1)[18] = (
        torch.tensor(2.0).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    stored = {"weight": weight, "weight_scale": scales, "weight_scale_2": torch.tensor([0.25])}
    decoded = modelopt_nvfp4.dequantize(stored, scheme)
    assert decoded[1, 32:34].tolist() == [0.5, -0.75]
    assert decoded.count_nonzero() == 2


def test_missing_input_scale_is_dynamic_in_the_raw_layout_only() -> None:
    raw = modelopt_nvfp4.quantize(make_weight(), LAYOUTS[3])
    assert "input_scale" not in raw
    found = read({"single_blocks.0.linear1": raw}, metadata=LISTED)
    x = make_input() * 50
    y = modelopt_nvfp4.reference(x, raw, found["single_blocks.0.linear1"])
    exact = x @ make_weight().float().T
    assert (y - exact).norm() / exact.norm() < 0.2
    plain = {k: v for k, v in quantize().items() if k != "input_scale"}
    for block, metadata in ((BLOCK, {}), (None, SCRIPT)):
        with pytest.raises(CheckpointError, match=r"layer a has no input_scale.*W4A16_NVFP4"):
            read({"a": plain}, block, metadata=metadata)


def test_stray_input_scales_are_left_aside() -> None:
    """FLUX.2's mixed file keeps the calibrated ranges of layers that it stores in BF16."""
    layers = {"double_blocks.0.img_attn.qkv": quantize(LAYOUTS[3])}
    layers["single_blocks.0.linear1"] = {**PLAIN, "input_scale": torch.ones(())}
    assert list(read(layers, metadata=LISTED)) == ["double_blocks.0.img_attn.qkv"]
    assert modelopt_nvfp4.ignored("single_blocks.0.linear1.input_scale")
    assert modelopt_nvfp4.ignored("a.weight_quantizer._amax")
    assert modelopt_nvfp4.ignored("a.comfy_quant")
    assert modelopt_nvfp4.ignored("a.weight_scale") is None


def test_weight_only() -> None:
    scheme = WORDS["W4A16_NVFP4"]
    stored = modelopt_nvfp4.quantize(make_weight(), scheme)
    block = {**BLOCK, "quant_algo": "W4A16_NVFP4"}
    assert read({"a": stored}, block) == {"a": scheme}
    x = make_input()
    exact = x @ modelopt_nvfp4.dequantize(stored, scheme).T
    assert torch.allclose(modelopt_nvfp4.reference(x, stored, scheme), exact, atol=1e-5)
    with pytest.raises(CheckpointError, match="has an input_scale"):
        read({"a": quantize()}, block)


def test_a_header_that_may_hide_tiled_scales_is_told() -> None:
    """ModelOpt's enable_swizzle_layout shows in no shape; headers hint at it."""
    exported = {**BLOCK, "producer": {"name": "modelopt", "version": "0.47.0"}}
    built = {**exported, "swap_weight_nibbles": False}

    def warn(layer: str, header: Mapping[str, Any] | None) -> list[str]:
        metadata = {} if header is None else {"quantization_config": json.dumps(header)}
        checkpoint = make_checkpoint({layer: quantize()}, exported, metadata)
        return modelopt_nvfp4.doubts(checkpoint, {})

    [said] = warn("a", exported)
    assert "0.safetensors" in said
    assert "enable_swizzle_layout" in said
    assert warn("a", None) == []
    assert warn("a", built) == []
    assert warn("single_blocks.0.linear1", exported) == []


def test_svd() -> None:
    scheme = WORDS["NVFP4_SVD"]
    stored = quantize(scheme)
    found = read({"a": stored}, {**BLOCK, "quant_algo": "NVFP4_SVD"})
    assert found == {"a": scheme}
    weight = make_weight().float()
    plain = modelopt_nvfp4.dequantize(quantize(), NVFP4) - weight
    error = modelopt_nvfp4.dequantize(stored, scheme) - weight
    assert error.norm() < 0.8 * plain.norm()
    del stored["svdquant_lora_a"]
    with pytest.raises(CheckpointError, match="has no svdquant_lora_a"):
        read({"a": stored}, {**BLOCK, "quant_algo": "NVFP4_SVD"})


@pytest.mark.parametrize(
    ("word", "missing", "message"),
    [
        ("NVFP4_SVD", ["svdquant_lora_a", "svdquant_lora_b"], "has no svdquant_lora_a"),
        ("NVFP4_SVD", ["svdquant_lora_b"], "has no svdquant_lora_b"),
        ("NVFP4_SVD", ["pre_quant_scale"], "has no pre_quant_scale"),
        (
            "NVFP4_SVD",
            ["pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"],
            "has no pre_quant_scale",
        ),
        ("NVFP4_AWQ", ["pre_quant_scale"], "has no pre_quant_scale"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_what_the_algorithm_promises_must_be_there(
    word: str, missing: list[str], message: str, listed: bool
) -> None:
    """Without its smoothing or its branch a layer would still decode, to other numbers."""
    scheme = {**WORDS, "NVFP4_AWQ": replace(NVFP4, name="NVFP4_AWQ", smoothed=True)}[word]
    block = {**BLOCK, "quant_algo": word}
    if listed:
        layers = {"a": {"quant_algo": word}, "b": {"quant_algo": word}}
        block |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    whole = quantize(scheme)
    assert read({"a": whole, "b": whole}, block) == {"a": scheme, "b": scheme}
    damaged = {k: v for k, v in whole.items() if k not in missing}
    with pytest.raises(CheckpointError, match=f"layer a {message}: the checkpoint is incomplete"):
        read({"a": damaged, "b": whole}, block)


def test_svd_gives_the_same_bytes_on_any_number_of_threads() -> None:
    scheme, threads = WORDS["NVFP4_SVD"], torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(quantize(scheme, 256, 192))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(same(found[0][name], tensor) for name, tensor in other.items())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def test_awq_is_nvfp4_with_smoothing() -> None:
    scheme = replace(NVFP4, name="NVFP4_AWQ", smoothed=True)
    stored = quantize(scheme)
    assert read({"a": stored}, {**BLOCK, "quant_algo": "NVFP4_AWQ"}) == {"a": scheme}
    weight = make_weight().float()
    decoded = modelopt_nvfp4.dequantize(stored, scheme)
    assert (decoded - weight).norm() / weight.norm() < 0.12


def test_mixed_precision_must_agree_with_the_tensors() -> None:
    listed = {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}}
    block = {**BLOCK, "quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    layers = {"a": quantize(), "b": quantize_fp8(), "c": PLAIN}
    assert read(layers, block) == {"a": NVFP4, "b": modelopt.FP8}
    with pytest.raises(CheckpointError, match=r"layer b is NVFP4, but .* declares it FP8"):
        read({**layers, "b": quantize()}, block)
    assert read({**layers, "a": PLAIN}, block) == {"b": modelopt.FP8}
    only = {**block, "quantized_layers": {"a": {"quant_algo": "W4A16_NVFP4"}}}
    weight_only = modelopt_nvfp4.quantize(make_weight(), WORDS["W4A16_NVFP4"])
    assert read({"a": weight_only}, only)["a"].activation == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_scale": torch.ones(())}, "layer a has output_scale beside input_scale, weight,"),
        ({"weight_scale_2": None}, "layer a has no weight_scale_2"),
        ({"weight_scale": None}, "layer a has no weight_scale"),
        ({"weight": None}, "layer a has weight_scale, weight_scale_2 but no weight"),
        ({"weight": torch.zeros(N, K, dtype=torch.bfloat16)}, "but a BF16 weight"),
        ({"weight": torch.zeros(N, K // 2, dtype=torch.int8)}, "but a I8 weight"),
        (
            {"weight_scale": torch.zeros(N, 16).to(torch.float8_e4m3fn)},
            "weight_scale F8_E4M3 .130, 16.: expected F8_E4M3 .130, 6.. These scales are padded",
        ),
        (
            {"weight_scale": torch.zeros(N, 3).to(torch.float8_e4m3fn)},
            r"expected F8_E4M3 \[130, 6\]",
        ),
        ({"weight_scale": torch.zeros(N, 6, dtype=torch.uint8)}, "expected F8_E4M3"),
        ({"weight_scale_2": torch.zeros(2)}, r"weight_scale_2 F32 \[2\]: expected F32 \[\]"),
        ({"weight": torch.zeros(N, 44, dtype=torch.uint8)}, "K a multiple of 16"),
    ],
)
def test_refusals_name_the_layer(change: dict[str, Any], message: str) -> None:
    stored = {k: v for k, v in {**quantize(), **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        read({"a": stored, "b": quantize()}, BLOCK)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.zeros(N, K // 32, dtype=torch.uint8), "MXFP8"),
        (torch.zeros(N), "per-channel FP8"),
        (None, "weight_scale missing"),
    ],
)
def test_other_fp8_formats_are_refused_by_name(scale: torch.Tensor | None, message: str) -> None:
    stored = {**quantize_fp8(), "weight_scale": scale}
    layers = {"a": quantize(), "b": {k: v for k, v in stored.items() if v is not None}}
    with pytest.raises(CheckpointError, match=f"layer b is .*{message}"):
        read(layers, BLOCK)


@pytest.mark.parametrize("word", [*WORDS, "FP8", "raw"])
def test_specs_describe_what_is_written(word: str) -> None:
    scheme = {**WORDS, "FP8": modelopt.FP8, "raw": LAYOUTS[3]}[word]
    stored = quantize(scheme)
    specs = modelopt_nvfp4.tensors(scheme, N, K)
    assert set(stored) == set(specs)
    for suffix, spec in specs.items():
        assert DTYPES[stored[suffix].dtype] in spec.dtypes
        assert tuple(stored[suffix].shape) in spec.shapes


def test_canonical_does_not_copy_what_fits() -> None:
    stored = quantize()
    canonical = modelopt_nvfp4.canonical(stored, NVFP4)
    assert canonical["weight"] is stored["weight"]
    assert canonical["weight_scale"] is stored["weight_scale"]


def test_coded_inputs_need_a_calibration() -> None:
    with pytest.raises(UsageError, match="calibration"):
        modelopt_nvfp4.quantize(make_weight(), NVFP4)


def test_a_weight_of_zeros() -> None:
    stored = modelopt_nvfp4.quantize(torch.zeros(4, 32), NVFP4, calibration=calibrate(32))
    assert torch.equal(modelopt_nvfp4.dequantize(stored, NVFP4), torch.zeros(4, 32))


@pytest.mark.parametrize("word", [*WORDS, "mixed", "raw", "swapped"])
def test_what_is_declared_is_read_back(word: str) -> None:
    mixed = {"a": NVFP4, "b": modelopt.FP8}
    schemes = {
        "mixed": mixed,
        "raw": {"single_blocks.0.linear1": LAYOUTS[3]},
        "swapped": {"a": LAYOUTS[2]},
        **{word: {"a": scheme} for word, scheme in WORDS.items()},
    }[word]
    declared = modelopt_nvfp4.declare(schemes, ["c"])
    layers = {name: quantize(scheme) for name, scheme in schemes.items()}
    if schemes.get("a") == WORDS["W4A16_NVFP4"]:
        layers = {"a": modelopt_nvfp4.quantize(make_weight(), schemes["a"])}
    found = read({**layers, "c": PLAIN}, declared.config, metadata=declared.metadata)
    assert found == schemes


@pytest.mark.parametrize(
    ("op", "raw", "turned"),
    [
        ("linear.nvfp4", True, True),
        ("linear.nvfp4", False, False),
        ("linear.fp8", True, False),
        ("linear.w4a16", True, False),
    ],
)
def test_nvfp4_alone_lies_otherwise_under_original_names(op: str, raw: bool, turned: bool) -> None:
    given = Scheme(op, "NVFP4", "e2m1", "group", "group-dynamic", group_size=16)
    found = modelopt_nvfp4.scheme_of(
        "a.b", given, raw=raw, gelu=False, interleaved=False, columns=64
    )
    expected = replace(given, swap_nibbles=True, tiled_scales=True) if turned else given
    assert found == expected
