"""fp8 and modelopt-fp8: what is read from headers, arithmetic against plain formulas, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processors import skip_without_scaled_product
from safetensors.torch import save_file
from torch.nn import functional

from quantmatrix import families
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import fp8, modelopt_fp8
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import kernels_of, linear_fp8, take_rows
from quantmatrix.request import Hub
from quantmatrix.scheme import Scheme

CASES = [("fp8", name) for name in fp8.SCHEMES] + [("modelopt-fp8", "FP8")]
N, K = 144, 272  # ragged against blocks of 128, multiples of 16


def make_layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Calibration]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator).bfloat16()
    bias = torch.randn(N, generator=generator).bfloat16()
    x = torch.randn(3, 5, K, generator=generator) * torch.linspace(0.1, 3, 5).unsqueeze(-1)
    return weight, bias, x, Calibration(x.amin(dim=(0, 1)), x.amax(dim=(0, 1)))


def write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None
) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    text = json.dumps({"quantization_config": config} if config else {})
    (folder / "config.json").write_text(text)
    return open_weights(str(folder), Hub(offline=True))


def make_checkpoint(
    folder: Path, family: str, name: str, **changes: torch.Tensor | None
) -> Checkpoint:
    """One quantized layer `a` beside a plain one `b`; `changes` replace or drop tensors."""
    module = families.load(family)
    weight, bias, _, calibration = make_layer()
    scheme = module.SCHEMES[name]
    made = module.quantize(weight, scheme, bias=bias, calibration=calibration)
    tensors = {f"a.{k}": v for k, v in made.items()} | {"b.weight": weight}
    for key, value in changes.items():
        tensors.pop(f"a.{key}", None)
        if value is not None:
            tensors[f"a.{key}"] = value
    return write(folder, tensors, module.declare({"a": scheme}, ["b"]).config)


def decode_plainly(made: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight by the words of the format page, element by element."""
    codes = made["weight"].float()
    scale = made.get("weight_scale", made.get("weight_scale_inv", torch.ones(())))
    if "weight_scale_inv" in made:
        rows, columns = torch.arange(N) // 128, torch.arange(K) // 128
        return codes * scale[rows][:, columns]
    return codes * (scale if scale.ndim == 0 else scale.view(-1, 1))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_is_written_is_recognised(tmp_path: Path, family: str, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", family, name)
    found = families.detect(checkpoint)
    assert found is not None
    assert found[0] == family
    assert families.load(family).schemes(checkpoint) == {"a": families.load(family).SCHEMES[name]}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_dequantize_is_code_times_scale(family: str, name: str) -> None:
    module = families.load(family)
    weight, _, _, calibration = make_layer()
    made = module.quantize(weight, module.SCHEMES[name], calibration=calibration)
    got = module.dequantize(made, module.SCHEMES[name])
    assert torch.equal(got, decode_plainly(made))
    assert ((got - weight.float()).norm() / weight.float().norm()).item() < 0.03


@pytest.mark.parametrize(("family", "name"), CASES)
def test_reference_rounds_inputs_as_declared(family: str, name: str) -> None:
    module = families.load(family)
    weight, bias, x, calibration = make_layer()
    scheme = module.SCHEMES[name]
    made = module.quantize(weight, scheme, bias=bias, calibration=calibration)
    if scheme.activation == "tensor-static" or scheme.activation == "tensor-dynamic":
        scale = (x.abs().max() / 448).expand(3, 5, K)
    elif scheme.activation == "token-dynamic":
        scale = (x.abs().amax(-1, keepdim=True) / 448).expand(3, 5, K)
    elif scheme.activation == "none":
        expected = functional.linear(x, decode_plainly(made)) + bias.float()
        assert torch.equal(module.reference(x, made, scheme), expected)
        return
    else:
        parts = [p.abs().amax(-1, keepdim=True).expand_as(p) / 448 for p in x.split(128, dim=-1)]
        scale = torch.cat(parts, dim=-1)
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    expected = functional.linear(codes * scale, decode_plainly(made)) + bias.float()
    got = module.reference(x, made, scheme)
    assert got.shape == (3, 5, N)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6


def test_static_inputs_beyond_the_calibration_saturate() -> None:
    weight, _, x, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    got = modelopt_fp8.reference(x * 100, made, modelopt_fp8.FP8)
    held = modelopt_fp8.reference(
        (x * 100).clamp(-x.abs().max(), x.abs().max()), made, modelopt_fp8.FP8
    )
    assert torch.equal(got, held)


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("backend", ["reference", "decode", "torch"])
def test_every_kernel_gives_the_layer(family: str, name: str, backend: str) -> None:
    module = families.load(family)
    weight, bias, x, calibration = make_layer()
    scheme: Scheme = module.SCHEMES[name]
    kernel = next(k for k in kernels_of(scheme.op) if k.backend == backend)
    needs = kernel.needs
    known = not needs.activations or scheme.activation in needs.activations
    if not known or (needs.scales and scheme.scale not in needs.scales):
        pytest.skip("not declared by the kernel")
    if backend == "torch":
        skip_without_scaled_product()
    made = module.quantize(weight, scheme, bias=bias, calibration=calibration)
    canonical = module.canonical(made, scheme)
    kept = kernel.prepare(
        {k: v for k, v in canonical.items() if k != "bias"}, scheme, torch.float32
    )
    got = kernel.run(x, kept, bias.float(), scheme)
    exact = module.reference(x, made, scheme)
    plain = functional.linear(x, decode_plainly(made), bias.float())
    expected = plain if backend == "decode" else exact
    assert got.dtype == x.dtype
    assert ((got - expected).norm() / expected.norm()).item() < 4e-3
    size = sum(t.numel() * t.element_size() for t in kept.values())
    counted = kernel.footprint(scheme, N, K, 4) - N * 4
    assert 0 <= counted - size <= 8 or backend == "torch"


def test_torch_kernel_keeps_a_column_major_view() -> None:
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    kept = linear_fp8.prepare_torch(
        modelopt_fp8.canonical(made, modelopt_fp8.FP8), modelopt_fp8.FP8, torch.bfloat16
    )
    assert kept["columns"].shape == (K, N)
    assert kept["columns"].stride() == (1, K)
    moved = kept["columns"].to("cpu", copy=True)
    assert moved.stride() == (1, K)


def test_zero_input_gives_the_bias() -> None:
    weight, bias, x, calibration = make_layer()
    for name, scheme in fp8.SCHEMES.items():
        made = fp8.quantize(weight, scheme, bias=bias, calibration=calibration)
        got = fp8.reference(torch.zeros_like(x), made, scheme)
        assert torch.equal(got, bias.float().expand_as(got)), name


def test_zero_weight_is_representable() -> None:
    for scheme in fp8.SCHEMES.values():
        made = fp8.quantize(
            torch.zeros(32, 32), scheme, calibration=Calibration(torch.zeros(32), torch.ones(32))
        )
        assert torch.equal(fp8.dequantize(made, scheme), torch.zeros(32, 32))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_rows_can_be_taken(family: str, name: str) -> None:
    module = families.load(family)
    weight, bias, x, calibration = make_layer()
    scheme = module.SCHEMES[name]
    made = module.canonical(
        module.quantize(weight, scheme, bias=bias, calibration=calibration), scheme
    )
    rows = torch.tensor([5, 3, 140])
    if scheme.scale == "block":
        with pytest.raises(ValueError, match="cut within blocks of 128 rows"):
            take_rows(scheme, made, rows)
        rows = torch.arange(128, N)
    taken = take_rows(scheme, made, rows)
    whole = linear_fp8.reference(x, made, scheme)
    assert torch.allclose(
        linear_fp8.reference(x, taken, scheme), whole[..., rows], rtol=1e-5, atol=1e-4
    )


BROKEN = [
    ("fp8", "tensor-dynamic", {"weight_scale": None}, "a.weight_scale is missing"),
    ("fp8", "block-dynamic", {"weight_scale_inv": None}, "a.weight_scale_inv is missing"),
    ("fp8", "tensor-static", {"input_scale": None}, "a.input_scale is missing"),
    ("fp8", "tensor-dynamic", {"weight_scale": torch.ones(3)}, r"\[3\], expected F32"),
    ("fp8", "tensor-dynamic", {"weight_scale": torch.ones(()).double()}, "is F64"),
    ("fp8", "tensor-dynamic", {"input_scale": torch.ones(())}, "declares dynamic activations"),
    ("fp8", "tensor-dynamic", {"weight": torch.ones(N, K).bfloat16()}, "a.weight is BF16"),
    (
        "fp8",
        "block-dynamic",
        {"weight_scale_inv": torch.ones(1, 3)},
        r"expected F32 or BF16 or F16 \[2, 3\]",
    ),
    ("modelopt-fp8", "FP8", {"weight_scale": None}, "never assumed to be 1"),
    ("modelopt-fp8", "FP8", {"input_scale": None}, "a.input_scale is missing"),
    ("modelopt-fp8", "FP8", {"weight_scale": torch.ones(N)}, rf"\[{N}\], expected F32"),
]


@pytest.mark.parametrize(("family", "name", "changes", "message"), BROKEN)
def test_broken_layers_are_named(
    tmp_path: Path, family: str, name: str, changes: dict, message: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", family, name, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        families.load(family).schemes(checkpoint)
    assert "model.safetensors" in str(caught.value)
    assert any(word in str(caught.value) for word in ("again", "declare activation_scheme"))


def test_the_scale_of_an_older_comfyui_file_is_read(tmp_path: Path) -> None:
    scale = torch.ones(())
    checkpoint = make_checkpoint(
        tmp_path / "c", "fp8", "tensor-dynamic", weight_scale=None, scale_weight=scale
    )
    assert fp8.schemes(checkpoint) == {"a": fp8.TENSOR}
    assert checkpoint.tensors["a.weight_scale"].on_disk == "a.scale_weight"
    both = make_checkpoint(tmp_path / "d", "fp8", "tensor-dynamic", scale_weight=scale)
    with pytest.raises(CheckpointError, match=r"a\.scale_weight .* beside the codes of a"):
        fp8.schemes(both)


def test_ignored_layer_that_is_quantized(tmp_path: Path) -> None:
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    config = modelopt_fp8.declare({}, ["blocks.0*"]).config
    checkpoint = write(tmp_path / "c", {f"blocks.0.q.{k}": v for k, v in made.items()}, config)
    with pytest.raises(CheckpointError, match=r"`ignore` lists blocks\.0\.q"):
        modelopt_fp8.schemes(checkpoint)


@pytest.mark.parametrize(
    ("entry", "layer", "expected"),
    [
        ("norm_out*", "norm_out.linear", True),
        ("blocks.0*", "blocks.0.attn", True),
        ("blocks.0.*", "blocks.01.attn", False),
        ("proj_out", "proj_out", True),
        ("proj_out", "single.proj_out", False),
        ("proj_out", "proj_out2", False),
    ],
)
def test_ignore_patterns_match_whole_names(entry: str, layer: str, expected: bool) -> None:
    patterns = modelopt_fp8.read_ignore({"ignore": [entry]})
    assert any(pattern.match(layer) for pattern in patterns) is expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore": "norm_out*"}, '`ignore` is "norm_out\\*": expected a list'),
        ({"ignore": 5}, "`ignore` is 5: expected a list"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}, r"g\.weights is"),
        (
            {"config_groups": {"g": {"weights": {}, "input_activations": {"dynamic": True}}}},
            r"g\.input_activations is .*dynamic",
        ),
        ({"config_groups": [1]}, r"config_groups is .*: expected an object"),
        ({"config_groups": {}, "ignore": None}, None),
    ],
)
def test_a_modelopt_declaration_is_read_strictly(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    block = {"quant_method": "modelopt", "quant_algo": "FP8", **changes}
    checkpoint = write(tmp_path / "c", {f"a.{k}": v for k, v in made.items()}, block)
    if message is None:
        assert modelopt_fp8.schemes(checkpoint) == {"a": modelopt_fp8.FP8}
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        modelopt_fp8.schemes(checkpoint)
    assert "config.json" in str(caught.value)


def test_calibration_leftovers_are_never_loaded(tmp_path: Path) -> None:
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    tensors = {f"a.{k}": v for k, v in made.items()}
    tensors["a.input_quantizer._amax"] = torch.ones(())
    checkpoint = write(tmp_path / "c", tensors, modelopt_fp8.declare({}, []).config)
    assert set(modelopt_fp8.schemes(checkpoint)) == {"a"}
    assert modelopt_fp8.ignored("a.input_quantizer._amax")
    assert modelopt_fp8.ignored("a.input_scale") is None


def test_method_and_algorithm_that_contradict(tmp_path: Path) -> None:
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    block = {"quant_method": "modelopt_fp8", "quant_algo": "NVFP4"}
    checkpoint = write(tmp_path / "c", {f"a.{k}": v for k, v in made.items()}, block)
    with pytest.raises(CheckpointError, match="contradict"):
        modelopt_fp8.detect(checkpoint)


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}},
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["b"]}},
        {"quant_method": "ModelOpt", "quant_algo": "fp8"},
        {"quant_method": "modelopt_fp8"},
    ],
)
def test_other_spellings_of_a_modelopt_declaration(tmp_path: Path, block: dict) -> None:
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    checkpoint = write(tmp_path / "c", {f"a.{k}": v for k, v in made.items()}, block)
    assert families.detect(checkpoint)[0] == "modelopt-fp8"
    assert modelopt_fp8.schemes(checkpoint) == {"a": modelopt_fp8.FP8}
    if "exclude_modules" in block.get("quantization", {}):
        wrong = write(tmp_path / "d", {f"b.{k}": v for k, v in made.items()}, block)
        with pytest.raises(CheckpointError, match="`ignore` lists b"):
            modelopt_fp8.schemes(wrong)


def test_rowwise_header_form(tmp_path: Path) -> None:
    weight, _, _, calibration = make_layer()
    made = fp8.quantize(weight, fp8.CHANNEL, calibration=calibration)
    block = {
        "format_version": "1.1",
        "layers": {"a": "rowwise-float8_e4m3fn", "b": "bf16"},
        "quant_configs": {"rowwise-float8_e4m3fn": {"scale_recipe": "rowwise"}},
    }
    tensors = {f"a.{k}": v for k, v in made.items()} | {"b.weight": weight}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"_quantization_metadata": json.dumps(block)})
    checkpoint = open_weights(str(path), Hub(offline=True))
    assert families.detect(checkpoint)[0] == "fp8"
    assert fp8.schemes(checkpoint) == {"a": fp8.CHANNEL}


ROWWISE = "rowwise-float8_e4m3fn"
LISTED = {
    "format_version": "1.1",
    "layers": {"a": ROWWISE, "b": "bf16"},
    "quant_configs": {ROWWISE: {"scale_recipe": "rowwise"}},
}


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        ("tensor-dynamic", {}, r"a\.weight_scale is F32 \[\], expected F32 or BF16 or F16 \[144\]"),
        ("channel-dynamic", {"layers": {"a": ROWWISE, "b": "int3"}}, 'format of b is "int3"'),
        ("channel-dynamic", {"layers": {"a": "float8_e5m2"}}, "a has codes in float8_e5m2, but"),
        ("channel-dynamic", {"layers": {"a": "float8_e8m0"}}, 'format of a is "float8_e8m0"'),
        ("channel-dynamic", {"layers": {"b": "bf16", "z.a": ROWWISE}}, "that a is left alone"),
        ("channel-dynamic", {"layers": {"a": ROWWISE, "z": ROWWISE}}, "no such layer"),
        ("channel-dynamic", {"quant_configs": [1]}, "expected a JSON object"),
        (
            "channel-dynamic",
            {"layers": {"a": {"format": "float8_e4m3fn", "convrot": True}}},
            "convrot",
        ),
    ],
)
def test_listed_layers_are_as_the_list_says(
    tmp_path: Path, scheme: str, changes: dict[str, Any], message: str
) -> None:
    weight, *_ = make_layer()
    made = fp8.quantize(weight, fp8.SCHEMES[scheme])
    tensors = {f"a.{k}": v for k, v in made.items()} | {"b.weight": weight}
    path = tmp_path / "w.safetensors"
    text = json.dumps({**LISTED, **changes})
    save_file(tensors, path, metadata={"_quantization_metadata": text})
    with pytest.raises(CheckpointError, match=message) as caught:
        fp8.schemes(open_weights(str(path), Hub(offline=True)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["block-dynamic", "channel-dynamic"])
def test_scales_in_the_dtype_of_the_model(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """As other loaders of block-wise folders take them."""
    made = fp8.quantize(make_layer()[0], fp8.SCHEMES[name])
    suffix = next(suffix for suffix in made if suffix.startswith("weight_scale"))
    changes = {suffix: made[suffix].to(dtype)}
    checkpoint = make_checkpoint(tmp_path / "c", "fp8", name, **changes)
    assert fp8.schemes(checkpoint) == {"a": fp8.SCHEMES[name]}
    stored = {**made, **changes}
    expected = decode_plainly({**made, suffix: changes[suffix].float()})
    assert torch.equal(fp8.dequantize(stored, fp8.SCHEMES[name]), expected)


@pytest.mark.parametrize("beside", [{}, {"input_scale": torch.tensor(0.5)}])
@pytest.mark.parametrize("name", ["tensor-dynamic", "channel-dynamic"])
def test_inputs_that_a_list_leaves_alone(tmp_path: Path, name: str, beside: Any) -> None:
    """ComfyUI's writers list layers whose weight alone has codes."""
    weight, bias, x, _ = make_layer()
    made = {**fp8.quantize(weight, fp8.SCHEMES[name], bias=bias), **beside}
    entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    text = json.dumps({"layers": {"a": entry}})
    path = tmp_path / "w.safetensors"
    tensors = {f"a.{k}": v for k, v in made.items()}
    save_file(tensors, path, metadata={"_quantization_metadata": text})
    checkpoint = open_weights(str(path), Hub(offline=True))
    assert families.detect(checkpoint)[0] == "fp8"
    found = fp8.schemes(checkpoint)["a"]
    assert found.activation == "none"
    expected = functional.linear(x, decode_plainly(made), bias.float())
    for backend in ("reference", "decode"):
        kernel = next(k for k in kernels_of("linear.fp8") if k.backend == backend)
        buffers = kernel.prepare(fp8.canonical(made, found), found, torch.float32)
        buffers.pop("bias", None)
        y = kernel.run(x, buffers, bias.float(), found)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_scheme": "token"}, 'activation_scheme is "token": expected dynamic or stat'),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"weight_block_size": [0, 0]}, r"weight_block_size is \[0, 0\]"),
        ({"weight_block_size": 128}, "weight_block_size is 128"),
        ({"weight_block_size": [128, 128, 1]}, r"weight_block_size is \[128, 128, 1\]"),
        ({"ignored_layers": "b"}, 'ignored_layers is "b": expected a list'),
        ({"modules_to_not_convert": 5}, "modules_to_not_convert is 5: expected a list"),
        ({"quant_algo": "NVFP4"}, 'quant_algo is "NVFP4": expected FP8'),
        ({"fmt": "e3m4"}, 'fmt is "e3m4": expected e4m3'),
        ({"scale_fmt": "ue8m0"}, 'scale_fmt is "ue8m0"'),
    ],
)
def test_unknown_values_of_a_declaration(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = fp8.quantize(make_layer()[0], fp8.TENSOR)
    block = {"quant_method": "fp8", **changes}
    checkpoint = write(tmp_path / "c", {f"a.{k}": v for k, v in made.items()}, block)
    with pytest.raises(CheckpointError, match=message) as caught:
        fp8.schemes(checkpoint)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "alone"),
    [
        ("blocks.1.attn.to_q", True),
        ("blocks.1", True),
        ("blocks.*.to_q", True),
        ("blocks.1.attn.to_qkv", True),
        ("blocks", True),
        ("blocks.1.attn.to_added_qkv", False),
        ("blocks.11", False),
        ("attn.to_q", False),
        ("to_q", False),
    ],
)
def test_ignored_layers_name_a_layer_a_level_or_a_fused_one(
    tmp_path: Path, entry: str, alone: bool
) -> None:
    made = fp8.quantize(make_layer()[0], fp8.TENSOR)
    block = {"quant_method": "fp8", "ignored_layers": [entry]}
    tensors = {f"blocks.1.attn.to_q.{k}": v for k, v in made.items()}
    checkpoint = write(tmp_path / "c", tensors, block)
    if not alone:
        assert fp8.schemes(checkpoint) == {"blocks.1.attn.to_q": fp8.TENSOR}
        return
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.to_q is left alone"):
        fp8.schemes(checkpoint)


@pytest.mark.parametrize(
    ("ignored", "layer", "said"),
    [
        ([], "blocks.1.to_q", True),
        (["blocks.1"], "blocks.1.to_q", False),
        ([], "blocks.1.to_k", False),
        ([], "embedder", False),
    ],
)
def test_a_layer_that_was_forgotten_is_told(
    tmp_path: Path, ignored: list[str], layer: str, said: bool
) -> None:
    """A layer in BF16 that nothing leaves alone, while its like is quantized."""
    weight, *_ = make_layer()
    made = fp8.quantize(weight, fp8.TENSOR)
    tensors = {f"blocks.0.to_q.{k}": v for k, v in made.items()} | {f"{layer}.weight": weight}
    block = {"quant_method": "fp8", "ignored_layers": ignored}
    checkpoint = write(tmp_path / "c", tensors, block)
    notes = fp8.doubts(checkpoint, fp8.schemes(checkpoint))
    assert [f"{layer}.weight is BF16" in note for note in notes] == ([True] if said else [])


@pytest.mark.parametrize(
    "suffix", ["weight_scale_inv", "pre_quant_scale", "weight_zero_point", "extra.weight"]
)
def test_a_tensor_that_nothing_uses_is_refused(tmp_path: Path, suffix: str) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "c", "fp8", "tensor-dynamic", **{suffix: torch.full((K,), 2.0)}
    )
    with pytest.raises(CheckpointError, match=rf"a\.{suffix} .* beside the codes of a") as caught:
        fp8.schemes(checkpoint)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(("family", "name"), [("fp8", "tensor-static"), ("modelopt-fp8", "FP8")])
def test_static_scales_need_a_calibration(family: str, name: str) -> None:
    module = families.load(family)
    with pytest.raises(UsageError, match="calibration"):
        module.quantize(torch.ones(16, 16), module.SCHEMES[name])


def test_modelopt_divides_in_the_dtype_of_the_weight() -> None:
    """A BF16 weight is rounded twice, as ModelOpt's writer does; FP32 division differs."""
    weight, _, _, calibration = make_layer()
    made = modelopt_fp8.quantize(weight, modelopt_fp8.FP8, calibration=calibration)
    scale = made["weight_scale"]
    twice = (weight.float() / scale).bfloat16().clamp(-448, 448).to(torch.float8_e4m3fn)
    once = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(made["weight"].view(torch.uint8), twice.view(torch.uint8))
    assert not torch.equal(made["weight"].view(torch.uint8), once.view(torch.uint8))


def test_fp8r_in_the_header_means_a_scale_per_row_and_dynamic_inputs(tmp_path: Path) -> None:
    """What diffusers' conversion script writes: nothing but this word declares it."""
    weight, _, bias, _ = make_layer()
    made = fp8.quantize(weight, fp8.CHANNEL, bias=bias)
    tensors = {f"double_blocks.0.img_attn.qkv.{name}": tensor for name, tensor in made.items()}
    path = tmp_path / "fp8r.safetensors"
    save_file(tensors, path, metadata={"quantization": "fp8r"})
    checkpoint = open_weights(str(path), Hub())
    found = families.detect(checkpoint)
    assert found is not None
    assert found[0] == "fp8"
    assert "quantization fp8r" in found[1]
    assert fp8.schemes(checkpoint) == {"double_blocks.0.img_attn.qkv": fp8.CHANNEL}
    tensors["double_blocks.0.img_attn.qkv.weight_scale"] = torch.ones(())
    save_file(tensors, path, metadata={"quantization": "fp8r"})
    with pytest.raises(CheckpointError, match=r"weight_scale is F32 \[\], expected F32"):
        fp8.schemes(open_weights(str(path), Hub()))
