"""Loading: every tensor accounted for, nothing copied, nothing silently in full precision."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantmatrix
from quantmatrix.api import load_transformer
from quantmatrix.cli import main
from quantmatrix.errors import CheckpointError, RefusedError, UsageError, WitnessError
from quantmatrix.hardware.probe import multiplies_int8_exactly
from quantmatrix.request import Request
from quantmatrix.runtime import empty_model
from quantmatrix.runtime.load import count_quantized
from quantmatrix.runtime.quantized_linear import QuantizedLinear
from quantmatrix.tiny import hub
from quantmatrix.tools import dequantize as dequantize_module
from quantmatrix.tools.dequantize import dequantize

WEIGHTS = "diffusion_pytorch_model.safetensors"
BASES = {
    "flux-1": "black-forest-labs/FLUX.1-dev",
    "flux-2": "black-forest-labs/FLUX.2-dev",
    "wan-2-2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
}
WAN_W8A8 = "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"
FLUX_FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"


def find(reference: str) -> Path:
    folder = hub.default_folder()
    hub.ensure(reference, folder)
    return hub.find_snapshot(reference, folder)


@pytest.fixture
def flux() -> Path:
    return find(BASES["flux-1"])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the FLUX.1 ModelOpt FP8 folder that a test may damage."""
    target = tmp_path / "quantized"
    shutil.copytree(find(FLUX_FP8), target)
    return target


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_precision_equals_diffusers_bit_for_bit(model: str, dtype: torch.dtype) -> None:
    import diffusers

    folder = find(BASES[model])
    ours = load_transformer(str(folder), dtype=dtype)
    theirs = getattr(diffusers, type(ours).__name__).from_pretrained(
        folder / "transformer", dtype=dtype
    )
    expected = theirs.state_dict()
    got = ours.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert {n: b.shape for n, b in ours.named_buffers()} == {
        n: b.shape for n, b in theirs.named_buffers()
    }


@pytest.mark.parametrize("model", BASES)
def test_what_is_computed_when_a_model_is_built_goes_to_the_device(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan's rotary tables stayed on the CPU, and its first forward on a GPU failed."""
    moved: list[tuple[str, str]] = []
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, device: moved.append((type(self).__name__, device))
    )
    loaded = load_transformer(str(find(BASES[model])), device="cpu")
    assert moved == [(type(loaded).__name__, "cpu")]


def test_transformers_that_is_imported_late_fills_its_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had functions that do nothing, and Gemma's embeddings were scaled by what lay in memory."""
    name = "transformers.initialization"
    before = importlib.import_module(name)
    monkeypatch.setattr(sys.modules["transformers"], "initialization", before, raising=False)
    monkeypatch.delitem(sys.modules, name)
    with empty_model.without_memory():
        late: Any = importlib.import_module(name)
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert late is not before
    late.constant_(filled := torch.zeros(3), 7.0)
    assert filled.tolist() == [7.0] * 3


def test_weights_are_views_of_the_mapped_file(copy: Path, flux: Path) -> None:
    model = load_transformer(str(flux), transformer_path=str(copy), backend="reference")
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert isinstance(layer, QuantizedLinear)
    with (copy / WEIGHTS).open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        begin = header["transformer_blocks.0.attn.to_q.weight"]["data_offsets"][0]
        before = layer.q_weight.view(torch.uint8)[0, 0].item()
        file.seek(8 + length + begin)
        file.write(bytes([before ^ 1]))
    assert layer.q_weight.view(torch.uint8)[0, 0].item() == before ^ 1


def test_only_the_config_of_the_base_is_needed(copy: Path, flux: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(flux / "transformer" / "config.json", bare)
    model = load_transformer(str(bare), transformer_weights_path=str(copy), backend="decode")
    assert set(count_quantized(model).values()) == {"decode"}


def test_parameters_are_frozen_and_in_eval_mode(flux: Path) -> None:
    model = load_transformer(str(flux))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_aliases_of_the_weights_override(copy: Path, flux: Path) -> None:
    model = load_transformer(str(flux), quantized_model_path=str(copy))
    assert count_quantized(model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("transformer_blocks.0.attn.to_q.weight_scale"),
            r"transformer_blocks\.0\.attn\.to_q\.weight_scale is missing",
        ),
        (
            lambda t: t.update(
                {"transformer_blocks.0.attn.to_q.weight_scale": torch.tensor(torch.nan)}
            ),
            r"transformer_blocks\.0\.attn\.to_q\.weight_scale holds NaN",
        ),
        (lambda t: t.update({"stray.weight": torch.ones(2, 2)}), r"unknown to .*stray\.weight"),
        (lambda t: t.pop("x_embedder.weight"), r"not in .*x_embedder\.weight"),
        (
            lambda t: t.update({"x_embedder.weight": torch.ones(3, 3).bfloat16()}),
            r"x_embedder\.weight has shape \[3, 3\]",
        ),
        (
            lambda t: t.update({"x_embedder.weight": t["x_embedder.weight"].to(torch.int8)}),
            r"x_embedder\.weight .*(codes|quantized)",
        ),
        (
            lambda t: t.pop("transformer_blocks.0.attn.to_q.bias"),
            r"transformer_blocks\.0\.attn\.to_q has no bias",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.bias": torch.ones(1).bfloat16()}),
            r"transformer_blocks\.0\.attn\.to_q\.bias is a bias of shape \[1\]",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.input_scale": torch.zeros(1)}),
            r"transformer_blocks\.0\.attn\.to_q\.input_scale holds zero or negative scales",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.weight_scale": -torch.ones(1)}),
            r"transformer_blocks\.0\.attn\.to_q\.weight_scale holds negative scales",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.weight_scale": torch.zeros(1)}),
            r"transformer_blocks\.0\.attn\.to_q\.weight_scale holds zero .* scales",
        ),
        (
            lambda t: t.update(
                {"transformer_blocks.0.attn.to_q.bias": torch.ones(256).to(torch.float8_e4m3fn)}
            ),
            r"transformer_blocks\.0\.attn\.to_q\.bias holds F8_E4M3 codes",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.bias": torch.ones(256).int()}),
            r"transformer_blocks\.0\.attn\.to_q\.bias holds I32 codes",
        ),
        (
            lambda t: t.update({"x_embedder.weight": t["x_embedder.weight"].to(torch.int16)}),
            r"x_embedder\.weight holds I16 codes",
        ),
        (
            lambda t: t.update(
                {"x_embedder.weight": t["x_embedder.weight"].to(torch.float8_e4m3fnuz)}
            ),
            r"x_embedder\.weight \(F8_E4M3FNUZ .* belongs to FP8 in FNUZ",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.extra.weight": torch.ones(4, 256)}),
            r"unknown to .*transformer_blocks\.0\.attn\.to_q\.extra\.weight",
        ),
        (
            lambda t: t["transformer_blocks.0.attn.to_q.weight"].view(torch.uint8).fill_(0xFF),
            r"transformer_blocks\.0\.attn\.to_q\.weight holds NaN codes",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.pre_quant_scale": torch.ones(256)}),
            r"transformer_blocks\.0\.attn\.to_q has pre_quant_scale beside .*: no such layer",
        ),
    ],
)
def test_damaged_checkpoints_are_named(
    copy: Path, flux: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    change(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(str(flux), transformer_path=str(copy))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.update({"x_embedder.bias": t["x_embedder.bias"].to(torch.float8_e4m3fn)}),
            r"x_embedder\.bias holds F8_E4M3 codes",
        ),
        (
            lambda t: t.update({"stray.weight": torch.ones(2, 2)}),
            r"1 tensors are unknown to .*: stray\.weight",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.extra.weight": torch.ones(2, 2)}),
            r"unknown to .*to_q\.extra\.weight",
        ),
        (lambda t: t.pop("x_embedder.weight"), r"are not in .*: x_embedder\.weight"),
        (lambda t: t.pop("transformer_blocks.0.attn.to_q.bias"), r"to_q has no bias, "),
        (
            lambda t: t.update({"x_embedder.weight": torch.ones(3, 3)}),
            r"x_embedder\.weight has shape \[3, 3\], .* expects \[256, 64\]",
        ),
    ],
)
def test_damaged_checkpoints_are_not_dequantized(
    copy: Path,
    flux: Path,
    tmp_path: Path,
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    change(copy, edit)
    request = Request(model_path=str(flux), component_paths={"transformer": str(copy)})
    with pytest.raises(CheckpointError, match=message):
        dequantize(request, str(tmp_path / "plain"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized"]


def test_a_file_of_plain_weights_is_as_large_as_it_may_be(
    copy: Path, flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dequantize_module.SHARD_BYTES == 2_000_000_000
    request = Request(model_path=str(flux), component_paths={"transformer": str(copy)})
    stored = load_file(copy / WEIGHTS)
    whole = {name: x.numel() for name, x in stored.items() if not name.endswith("_scale")}
    size = torch.float32.itemsize * sum(whole.values())
    for limit, count in ((size, 1), (size - 1, 2)):
        monkeypatch.setattr(dequantize_module, "SHARD_BYTES", limit)
        folder = tmp_path / f"limit {limit}"
        dequantize(request, str(folder))
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == count
        found = {name: file.name for file in files for name in load_file(file)}
        assert found.keys() == whole.keys()
        for index in folder.glob("*.index.json"):
            written = json.loads(index.read_text())
            assert written == {"metadata": {"total_size": size}, "weight_map": found}
        assert len(list(folder.glob("*.index.json"))) == (count > 1)


def test_what_modelopt_writes_of_a_weight_of_zeros(copy: Path, flux: Path) -> None:
    """It divides the weight by its scale: 0 / 0."""
    name = "transformer_blocks.0.attn.to_q"

    def clear(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"] = torch.full((256, 256), torch.nan).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.zeros(())

    change(copy, clear)
    message = rf"{name}\.weight.*ModelOpt writes this of a layer whose weights are all zero"
    with pytest.raises(CheckpointError, match=message):
        load_transformer(str(flux), transformer_path=str(copy), backend="decode")


def test_a_scale_of_zero_may_stand_beside_codes_of_zero(copy: Path, flux: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"

    def clear(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"] = torch.zeros(256, 256).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.zeros(1)

    change(copy, clear)
    with pytest.raises(WitnessError, match="to_q decodes to other weights"):
        load_transformer(str(flux), transformer_path=str(copy), backend="decode")
    model = load_transformer(str(flux), transformer_path=str(copy), backend="decode", witness="off")
    assert not model.get_submodule(name).q_decoded.any()


@pytest.mark.parametrize(
    ("scheme", "place"), [("channel-dynamic", (3,)), ("block-dynamic", (1, 0))]
)
def test_one_scale_of_zero_among_many(
    flux: Path, tmp_path: Path, scheme: str, place: tuple[int, ...]
) -> None:
    from quantmatrix.families import fp8

    tensors = load_file(flux / "transformer" / WEIGHTS)
    name = "transformer_blocks.0.attn.to_q"
    made = fp8.quantize(tensors.pop(f"{name}.weight"), fp8.SCHEMES[scheme])
    suffix = next(suffix for suffix in made if suffix != "weight")
    made[suffix][place] = 0
    tensors |= {f"{name}.{key}": value for key, value in made.items()}
    kept = ["transformer_blocks.1.attn.to_q"]
    block = fp8.declare({name: fp8.SCHEMES[scheme]}, kept).config
    path = tmp_path / "one.safetensors"
    save_file(tensors, path, metadata={"quantization_config": json.dumps(block)})
    with pytest.raises(CheckpointError, match=rf"to_q\.{suffix} holds zero"):
        load_transformer(str(flux), transformer_weights_path=str(path))


def test_truncated_file(copy: Path, flux: Path) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_transformer(str(flux), transformer_path=str(copy))


def test_missing_shard(flux: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(find("quantmatrix/flux-1-fp8-sharded"), folder)
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="00002-of-00003"):
        load_transformer(str(flux), transformer_weights_path=str(folder))


def test_two_candidates(copy: Path, flux: Path) -> None:
    shutil.copy(copy / WEIGHTS, copy / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load_transformer(str(flux), transformer_weights_path=str(copy))


def test_wrong_model_for_the_checkpoint(flux: Path) -> None:
    other = find("BBuf/flux2-dev-modelopt-fp8-sglang-transformer")
    with pytest.raises(CheckpointError, match="wrong model"):
        load_transformer(str(flux), transformer_path=str(other))


@pytest.mark.parametrize("value", ["2", None, [2]])
def test_a_config_that_gives_no_model(copy: Path, flux: Path, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_layers": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: no FluxTransformer2DModel can be"):
        load_transformer(str(flux), transformer_path=str(copy))


def test_unknown_quant_method(copy: Path, flux: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "frobnicate"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="declares quant_method frobnicate, which no"):
        load_transformer(str(flux), transformer_path=str(copy))


@pytest.mark.parametrize("plain", [False, True])
def test_a_description_that_names_no_method(copy: Path, flux: Path, plain: bool) -> None:
    """Also where every tensor is in full precision: it would run as BF16 under a quantized label."""
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"activation_scheme": "dynamic", "quant_method": None}
    if plain:
        shutil.copy(flux / "transformer" / WEIGHTS, copy)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json.* by activation_scheme.*quant_method"):
        load_transformer(str(flux), transformer_path=str(copy))


@pytest.mark.parametrize("algorithm", ["MXFP8", "fp8_pb_wo", "W8A8_SQ_PER_CHANNEL", "NVFP5"])
@pytest.mark.parametrize("plain", [False, True])
def test_algorithms_that_no_family_takes_are_refused_by_name(
    copy: Path, flux: Path, algorithm: str, plain: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where every tensor is in full precision: it would run as BF16 under a quantized label."""
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = algorithm
    if plain:
        shutil.copy(flux / "transformer" / WEIGHTS, copy)
    (copy / "config.json").write_text(json.dumps(config))
    message = rf"config\.json.* declares quant_method modelopt, quant_algo {algorithm}, which no"
    with pytest.raises(CheckpointError, match=message):
        load_transformer(str(flux), transformer_path=str(copy))
    assert main.main(["inspect", str(copy)]) == 0
    said = capsys.readouterr().out
    assert f"transformer: unknown quantization ({copy}" in said
    assert algorithm in said


def test_quantized_tensors_without_a_declaration(
    copy: Path, flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="nothing declares how"):
        load_transformer(str(flux), transformer_path=str(copy))
    assert main.main(["inspect", str(copy)]) == 0
    assert "unknown quantization" in capsys.readouterr().out


def test_declaration_without_quantized_layers(flux: Path, tmp_path: Path) -> None:
    """BF16 weights under a quantized label are an error, never a silent BF16 load."""
    folder = tmp_path / "labelled"
    shutil.copytree(flux / "transformer", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no layer"):
        load_transformer(str(flux), transformer_path=str(folder))


def test_pickles_are_refused(flux: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="pickle"):
        load_transformer(str(flux), transformer_weights_path=str(path))


def test_native_kernel_is_refused_on_a_cpu(copy: Path, flux: Path) -> None:
    with pytest.raises(RefusedError, match="needs nvidia hardware") as caught:
        load_transformer(str(flux), transformer_path=str(copy), backend="torch")
    assert caught.value.rule == "fp8-torch-sm89"


def test_unknown_component(flux: Path) -> None:
    with pytest.raises(UsageError, match="transformer_9"):
        load_transformer(str(flux), component="transformer_9", transformer_path=str(flux))


def test_online_quantization_and_its_exceptions(flux: Path) -> None:
    all_layers = count_quantized(load_transformer(str(flux), quantization="fp8"))
    some = count_quantized(
        load_transformer(str(flux), quantization="fp8", quantization_ignored_layers=("to_q",))
    )
    assert set(all_layers) - set(some) == {n for n in all_layers if n.endswith(".to_q")}
    with pytest.raises(UsageError, match="matches no linear layer"):
        load_transformer(str(flux), quantization="fp8", quantization_ignored_layers=("nowhere",))


def pack_bfl(scheme: str | None, path: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """FLUX.2 in one file under the original names, q, k and v packed; scheme None: BF16."""
    from quantmatrix.families import fp8
    from quantmatrix.models import flux_2
    from quantmatrix.tools.packing import pack_tensors

    tensors = load_file(find(BASES["flux-2"]) / "transformer" / WEIGHTS)
    packed = pack_tensors(tensors, flux_2.BFL)
    metadata = {"format": "pt"}
    if scheme is not None:
        chosen = replace(fp8.SCHEMES[scheme], block=block)
        for name in [name for name in packed if packed[name].ndim == 2]:
            made = fp8.quantize(packed.pop(name), chosen)
            packed |= {f"{name.removesuffix('weight')}{key}": v for key, v in made.items()}
        metadata["quantization_config"] = json.dumps(fp8.declare({"": chosen}, []).config)
    save_file({k: v.contiguous() for k, v in packed.items()}, path, metadata=metadata)
    return path


def test_block_scales_of_packed_layers(tmp_path: Path) -> None:
    path = pack_bfl("block-dynamic", tmp_path / "packed.safetensors")
    base = find(BASES["flux-2"])
    model = load_transformer(str(base), transformer_weights_path=str(path), backend="decode")
    plain = load_file(base / "transformer" / WEIGHTS)
    for name in ("transformer_blocks.1.attn.to_k", "norm_out.linear"):
        weight = plain[f"{name}.weight"].float()
        got = model.get_submodule(name).q_decoded.float()
        assert ((got - weight).norm() / weight.norm()).item() < 0.03
    cut = pack_bfl("block-dynamic", tmp_path / "cut.safetensors", block=(96, 128))
    with pytest.raises(
        CheckpointError, match=r"img_attn\.qkv .* within blocks of 96 rows"
    ) as caught:
        load_transformer(str(base), transformer_weights_path=str(cut))
    assert "cut.safetensors" in str(caught.value)


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    path = pack_bfl(None, tmp_path / "raw.safetensors")
    tensors = load_file(path)
    tensors["proj_out.weight"] = torch.zeros_like(tensors["final_layer.linear.weight"])
    save_file(tensors, path, metadata={"format": "pt"})
    base = str(find(BASES["flux-2"]))
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.weight and proj_out\.weight"):
        load_transformer(base, transformer_weights_path=str(path))


def test_online_quantization_of_original_names(tmp_path: Path) -> None:
    path = pack_bfl(None, tmp_path / "raw.safetensors")
    base = str(find(BASES["flux-2"]))
    model = load_transformer(base, transformer_weights_path=str(path), quantization="fp8")
    assert count_quantized(model) == count_quantized(load_transformer(base, quantization="fp8"))
    some = load_transformer(
        base,
        transformer_weights_path=str(path),
        quantization="fp8",
        quantization_ignored_layers=("img_attn", "single_transformer_blocks.*"),
    )
    names = count_quantized(some)
    assert "transformer_blocks.0.attn.add_q_proj" in names
    assert not any("to_q" in name or name.startswith("single") for name in names)


def test_online_quantization_never_quantizes_nothing(flux: Path) -> None:
    with pytest.raises(UsageError, match=r"no linear layer of .* is left to quantize"):
        load_transformer(str(flux), quantization="fp8", quantization_ignored_layers=("*",))


def test_online_quantization_of_damaged_weights(flux: Path, tmp_path: Path) -> None:
    tensors = load_file(flux / "transformer" / WEIGHTS)
    tensors["transformer_blocks.0.attn.to_q.weight"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    path = str(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: .*to_q\.weight holds NaN or inf"):
        load_transformer(str(flux), transformer_weights_path=path, quantization="fp8")


def test_online_quantization_of_codes(flux: Path, tmp_path: Path) -> None:
    tensors = load_file(flux / "transformer" / WEIGHTS)
    name = "transformer_blocks.0.attn.to_q.weight"
    path = tmp_path / "w.safetensors"
    save_file({**tensors, name: tensors[name].int()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"to_q\.weight holds I32 codes"):
        load_transformer(str(flux), transformer_weights_path=str(path), quantization="fp8")


def test_online_quantization_tells_of_the_expert_that_it_leaves_alone() -> None:
    plan = quantmatrix.plan(model_path=str(find(BASES["wan-2-2"])), quantization="fp8")
    assert plan.components["transformer_2"].family is None
    assert any("transformer_2 is loaded as it is stored" in text for text in plan.warnings)


def test_online_quantization_of_a_quantized_checkpoint(copy: Path, flux: Path) -> None:
    with pytest.raises(UsageError, match="quantized already"):
        load_transformer(str(flux), transformer_path=str(copy), quantization="fp8")


def test_wan_override_leaves_the_second_expert_alone() -> None:
    base = str(find(BASES["wan-2-2"]))
    override = str(find("BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer"))
    plan = quantmatrix.plan(model_path=base, component_paths={"transformer": override})
    assert plan.components["transformer"].family == "modelopt-fp8"
    assert plan.components["transformer_2"].family is None
    both = quantmatrix.plan(
        model_path=base, component_paths={"transformer": override, "transformer_2": override}
    )
    assert both.components["transformer_2"].family == "modelopt-fp8"


def test_scales_keep_their_dtype_when_a_model_is_cast(copy: Path, flux: Path) -> None:
    model = load_transformer(str(flux), transformer_path=str(copy), backend="reference")
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    layer.to(torch.float16)
    assert layer.q_weight_scale.dtype == torch.float32
    assert layer.q_weight.dtype == torch.float8_e4m3fn


@pytest.fixture
def slim(tmp_path: Path) -> Path:
    """A copy of the W8A8 transformer of msmodelslim that a test may damage."""
    target = tmp_path / "slim"
    shutil.copytree(find(WAN_W8A8) / "transformer", target)
    return target


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deq_scale", -1.0, r"to_q\.deq_scale holds -1: expected positive"),
        ("input_offset", torch.nan, r"to_q\.input_offset holds nan: expected a whole number"),
        ("quant_bias", 1, r"to_q\.quant_bias folds a bias of"),
    ],
)
def test_values_that_a_family_knows_to_be_wrong(
    slim: Path, name: str, value: float, message: str
) -> None:
    change(slim, lambda t: t[f"blocks.1.attn1.to_q.{name}"].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor blocks\.1\.attn1\.{message}"):
        load_transformer(str(find(WAN_W8A8)), transformer_path=str(slim))


def test_two_names_of_one_parameter_are_refused(slim: Path) -> None:
    """Names of both layouts in one file: whichever came last would win."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.self_attn.norm_q.weight"] = tensors.pop("blocks.0.attn1.norm_q.weight")
        tensors["head.head.weight"] = tensors["proj_out.weight"] * 2

    change(slim, rename)
    with pytest.raises(
        CheckpointError, match=r"head\.head\.weight and proj_out\.weight are both proj_out\.weight"
    ):
        load_transformer(str(find(WAN_W8A8)), transformer_path=str(slim))


def test_a_folded_bias_of_zeros_is_none(tmp_path: Path) -> None:
    """W8A8 of msmodelslim folds the zero point of every layer, FLUX.2's layers have no bias."""
    base = find(BASES["flux-2"])
    folder = tmp_path / "folded"
    shutil.copytree(base / "transformer", folder)
    layer = "transformer_blocks.0.attn.to_q"
    codes = torch.randint(-127, 128, (256, 256), dtype=torch.int8)
    assert load_file(folder / WEIGHTS)[f"{layer}.weight"].shape == codes.shape
    stored = {
        "weight": codes,
        "input_scale": torch.tensor([0.01]),
        "input_offset": torch.tensor([7.0]),
        "deq_scale": torch.full((256,), 1e-5),
        "quant_bias": -7 * codes.sum(dim=1, dtype=torch.int32),
    }
    change(folder, lambda t: t.update({f"{layer}.{name}": x for name, x in stored.items()}))
    words = dict.fromkeys(load_file(folder / WEIGHTS), "FLOAT")
    words |= {f"{layer}.{name}": "W8A8" for name in stored}
    (folder / "quant_model_description.json").write_text(json.dumps(words))
    backends = ("int8", "reference", "decode")
    for backend in backends if multiplies_int8_exactly() else backends[1:]:
        model = load_transformer(
            str(base),
            transformer_path=str(folder),
            backend=backend,
            dtype=torch.float32,
            witness="off",
        )
        linear = model.get_submodule(layer)
        assert linear.bias is None
        x = (torch.randint(-100, 100, (3, 256)) * 0.01).float()
        exact = x.double() @ (codes.double() * 1e-3).T
        torch.testing.assert_close(linear(x).double(), exact, rtol=1e-4, atol=1e-4)
    request = Request(
        model_path=str(base), component_paths={"transformer": str(folder)}, witness="off"
    )
    dequantize(request, str(tmp_path / "plain"))
    written = load_file(tmp_path / "plain" / WEIGHTS)
    assert f"{layer}.bias" not in written
    torch.testing.assert_close(written[f"{layer}.weight"], codes.float() * 1e-3)
    change(folder, lambda t: t[f"{layer}.quant_bias"].add_(5000))
    with pytest.raises(CheckpointError, match=rf"layer {layer} has a bias, .* expects none"):
        dequantize(request, str(tmp_path / "other"))
