"""The ModelOpt builders: what they write and refuse, the same bytes twice, all or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantmatrix import models
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.families import modelopt_fp8, modelopt_nvfp4
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import nvfp4_arithmetic
from quantmatrix.kernels.number_formats import round_e4m3
from quantmatrix.request import Hub
from quantmatrix.tools import build_modelopt_fp8_transformer as fp8
from quantmatrix.tools import build_modelopt_nvfp4_transformer as nvfp4

Tensors = dict[str, torch.Tensor]

KEPT = (
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.norm1_context.linear",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.0.ff_context.net.0.proj",
    "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.norm.linear",
)
CODED = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.proj_out",
)
LEFT = ("proj_out", "x_embedder")
N, K = 32, 48
CALIBRATION = Calibration(torch.full((K,), -3.0), torch.full((K,), 2.0))


def make_base() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in (*KEPT, *CODED, *LEFT):
        tensors[f"{module}.weight"] = torch.randn(N, K, generator=generator).bfloat16()
        tensors[f"{module}.bias"] = torch.randn(N, generator=generator).bfloat16()
    tensors["transformer_blocks.0.attn.norm_q.weight"] = torch.ones(8).bfloat16()
    return tensors


def write_folder(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return folder
    places = {}
    for i in range(shards):
        shard = f"{stem}-0000{i + 1}-of-0000{shards}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_config(algorithm: str | None, ignore: tuple[str, ...] = LEFT) -> dict[str, Any]:
    block = {"quant_method": "modelopt", "ignore": [f"{n}*" for n in ignore]}
    if algorithm:
        block["quant_algo"] = algorithm
    return {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "quantization_config": block}


def make_state(base: Tensors) -> Tensors:
    """ModelOpt's saved model: weights and the amaxes of every quantizer."""
    state = {}
    for module in (*KEPT, *CODED):
        weight = base[f"{module}.weight"]
        state[f"{module}.weight"] = weight
        state[f"{module}.weight_quantizer._amax"] = weight.abs().amax()
        state[f"{module}.input_quantizer._amax"] = torch.tensor(3.0)
    state["proj_out.input_quantizer._amax"] = torch.tensor(1.0)
    return state


class Fp8Case:
    """An export, its calibrated model and its base in a folder, and the words of a build."""

    def __init__(self, root: Path, *, coded: bool = True, shards: int = 1) -> None:
        self.base_tensors = make_base()
        self.base = write_folder(root / "base" / "transformer", self.base_tensors, {})
        self.export = root / "export"
        tensors = dict(self.base_tensors)
        for module in (*KEPT, *CODED):
            if coded:
                stored = modelopt_fp8.quantize(
                    tensors[f"{module}.weight"],
                    modelopt_fp8.SCHEMES["FP8"],
                    calibration=CALIBRATION,
                )
                tensors |= {f"{module}.{suffix}": t for suffix, t in stored.items()}
            tensors[f"{module}.weight_quantizer._amax"] = torch.ones(1)
        write_folder(self.export, tensors, make_config("FP8"), shards)
        self.export_tensors = tensors
        self.checkpoint = root / "backbone.pt"
        self.save(make_state(self.base_tensors))
        self.output = root / "built"

    def save(self, state: Tensors) -> None:
        torch.save({"modelopt_state": {}, "model_state_dict": state}, self.checkpoint)

    def words(self, *more: str) -> list[str]:
        return [
            *("--modelopt-hf-dir", str(self.export)),
            *("--modelopt-backbone-ckpt", str(self.checkpoint)),
            *("--base-transformer-dir", str(self.base.parent)),
            *("--output-dir", str(self.output)),
            *more,
        ]


class Nvfp4Case:
    """An NVFP4 export and its base."""

    def __init__(self, root: Path, shards: int = 1) -> None:
        self.base_tensors = make_base()
        self.base = write_folder(root / "base" / "transformer", self.base_tensors, {})
        tensors = dict(self.base_tensors)
        for module in (*KEPT, *CODED):
            stored = modelopt_nvfp4.quantize(
                tensors[f"{module}.weight"], modelopt_nvfp4.NVFP4, calibration=CALIBRATION
            )
            tensors |= {f"{module}.{suffix}": t for suffix, t in stored.items()}
            tensors[f"{module}.bias"] = tensors[f"{module}.bias"] + 1
        self.export = write_folder(root / "export", tensors, make_config("NVFP4"), shards)
        self.export_tensors = tensors
        self.output = root / "built"

    def words(self, *more: str) -> list[str]:
        return [
            *("--modelopt-hf-dir", str(self.export)),
            *("--base-transformer-dir", str(self.base)),
            *("--output-dir", str(self.output)),
            *more,
        ]


def read_all(folder: Path) -> tuple[Tensors, list[dict[str, str]]]:
    tensors, headers = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            headers.append(file.metadata())
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    return tensors, headers


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(left, right)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(
    main: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    assert main(words) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_fp8_output(
    tmp_path: Path, coded: bool, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Fp8Case(tmp_path, coded=coded, shards=shards)
    statistics = run(fp8.main, case.words(), capsys)
    assert statistics == {
        "quantized_weights": len(CODED),
        "bf16_fallback_weights": len(KEPT),
        "preserved_ignored_weights": len(LEFT) + 1,
        "added_scale_tensors": 2 * len(CODED),
        "output_shards": shards,
    }
    built, headers = read_all(case.output)
    for module in KEPT:
        assert same(built[f"{module}.weight"], case.base_tensors[f"{module}.weight"])
        assert f"{module}.weight_scale" not in built
        assert f"{module}.input_scale" not in built
    for module in CODED:
        weight = case.base_tensors[f"{module}.weight"].float()
        scale = weight.abs().amax() / 448
        assert torch.allclose(built[f"{module}.weight_scale"], scale.reshape(1))
        assert torch.equal(built[f"{module}.input_scale"], torch.tensor([3.0]) / 448)
        assert built[f"{module}.weight"].dtype == torch.float8_e4m3fn
        if coded:
            assert same(built[f"{module}.weight"], case.export_tensors[f"{module}.weight"])
        error = built[f"{module}.weight"].float() * scale - weight
        assert error.norm() / weight.norm() < 0.04
    assert not [name for name in built if "_quantizer." in name]
    assert all(same(built[f"{m}.bias"], case.export_tensors[f"{m}.bias"]) for m in (*KEPT, *CODED))
    config = json.loads((case.output / "config.json").read_text())
    block = config["quantization_config"]
    assert block["quant_type"] == "FP8"
    assert block["ignore"] == sorted(set(block["ignore"]))
    norm = "transformer_blocks.0.attn.norm_q"
    assert set(block["ignore"]) == {*KEPT, *LEFT, *(f"{n}*" for n in LEFT), norm}
    for header in headers:
        assert header["format"] == "pt"
        assert header["_class_name"] == "FluxTransformer2DModel"
        assert json.loads(header["config"]) == config
        assert json.loads(header["quantization_config"]) == block
        assert header["_quantization_metadata"] == header["quantization_config"]


@pytest.mark.parametrize("shards", [1, 2])
def test_index_and_other_files(
    tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Fp8Case(tmp_path, shards=shards)
    (case.export / "notes").mkdir()
    (case.export / "notes" / "read.me").write_text("hello")
    run(fp8.main, case.words(), capsys)
    assert (case.output / "notes" / "read.me").read_text() == "hello"
    index = json.loads((case.output / "diffusion_pytorch_model.safetensors.index.json").read_text())
    built, _ = read_all(case.output)
    assert set(index["weight_map"]) == set(built)
    total = sum(t.numel() * t.element_size() for t in built.values())
    assert index["metadata"]["total_size"] == total
    files = {path.name for path in case.output.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert files == {path.name for path in case.export.glob("*.safetensors")}
    for module in CODED:
        places = {index["weight_map"][f"{module}.{s}"] for s in ("weight", "weight_scale")}
        assert len(places) == 1


def test_fp8_output_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Fp8Case(tmp_path, shards=2)
    run(fp8.main, case.words(), capsys)
    checkpoint = open_component(str(case.output), Hub())
    assert modelopt_fp8.detect(checkpoint)
    assert set(modelopt_fp8.schemes(checkpoint)) == set(CODED)


def test_nvfp4_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Nvfp4Case(tmp_path, shards=2)
    words = case.words("--pattern-preset", "flux1-nvfp4", "--keep-bf16-pattern", "*.attn.to_k")
    statistics = run(nvfp4.main, words, capsys)
    kept = {*KEPT, "single_transformer_blocks.0.proj_mlp", "transformer_blocks.0.attn.to_k"}
    assert statistics == {
        "fallback_modules": len(kept),
        "replaced_tensors": 2 * len(kept),
        "removed_aux_tensors": 3 * len(kept),
        "output_shards": 2,
        "swap_weight_nibbles": False,
    }
    built, headers = read_all(case.output)
    for name, tensor in built.items():
        module = nvfp4.name_module(name)
        source = case.base_tensors if module in kept else case.export_tensors
        assert same(tensor, source[name]), name
    block = json.loads((case.output / "config.json").read_text())["quantization_config"]
    assert block["ignore"][:2] == ["proj_out*", "x_embedder*"]
    assert block["ignore"][-1] == "*.attn.to_k"
    assert block["swap_weight_nibbles"] is False
    assert block["quant_type"] == "NVFP4"
    assert all(json.loads(h["_quantization_metadata"]) == block for h in headers)
    checkpoint = open_component(str(case.output), Hub())
    assert modelopt_nvfp4.detect(checkpoint)
    assert set(modelopt_nvfp4.schemes(checkpoint)) == set(CODED) - kept


def test_nvfp4_of_an_export_that_lists_its_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is kept is no longer listed, neither by name nor as a target."""
    case = Nvfp4Case(tmp_path)
    config = make_config("MIXED_PRECISION")
    modules = sorted((*KEPT, *CODED))
    config["quantization_config"] |= {
        "config_groups": {"group_0": {"weights": {"num_bits": 4}, "targets": modules}},
        "quantized_layers": {module: {"quant_algo": "NVFP4"} for module in modules},
    }
    (case.export / "config.json").write_text(json.dumps(config))
    words = case.words("--pattern-preset", "flux1-nvfp4")
    assert run(nvfp4.main, words, capsys)["fallback_modules"] == len(KEPT) + 1
    left = sorted(set(CODED) - {"single_transformer_blocks.0.proj_mlp"})
    checkpoint = open_component(str(case.output), Hub())
    block = checkpoint.quantization
    assert sorted(block["quantized_layers"]) == left
    assert block["config_groups"]["group_0"]["targets"] == left
    assert sorted(modelopt_nvfp4.schemes(checkpoint)) == left
    for entry in config["quantization_config"]["quantized_layers"].values():
        entry["quant_algo"] = "FP8"
    (case.export / "config.json").write_text(json.dumps(config))
    (tmp_path / "built").rename(tmp_path / "before")
    expect_error(nvfp4.main, case, words, "quant_algo is MIXED_PRECISION: expected NVFP4", capsys)


def test_nvfp4_passes_on_what_an_export_leaves_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the export's header tells that its scales may lie in tiles."""
    case = Nvfp4Case(tmp_path)
    block = {**make_config("NVFP4")["quantization_config"], "producer": {"name": "modelopt"}}
    file = case.export / "diffusion_pytorch_model.safetensors"
    save_file(case.export_tensors, file, {"quantization_config": json.dumps(block)})
    with pytest.warns(UserWarning, match="enable_swizzle_layout"):
        run(nvfp4.main, case.words(), capsys)


def test_nibbles_are_declared_but_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Nvfp4Case(tmp_path)
    run(nvfp4.main, case.words("--swap-weight-nibbles"), capsys)
    built, _ = read_all(case.output)
    assert all(same(built[name], tensor) for name, tensor in case.export_tensors.items())
    schemes = modelopt_nvfp4.schemes(open_component(str(case.output), Hub()))
    assert all(scheme.swap_nibbles for scheme in schemes.values())


def test_presets_are_the_models_fallback_sets() -> None:
    regexes = models.load("flux-1").FALLBACKS["flux1-nvfp4"]
    modules = [*KEPT, *CODED, *LEFT, "single_transformer_blocks.12.proj_mlp"]
    chosen = [m for m in modules if any(re.fullmatch(r, m) for r in regexes)]
    globs = [re.escape(glob).replace(r"\*", ".*") for glob in nvfp4.PRESETS["flux1-nvfp4"]]
    assert chosen == [m for m in modules if any(re.fullmatch(g, m) for g in globs)]
    assert len(globs) == 8


@pytest.mark.parametrize(
    ("class_name", "model_type", "count"),
    [
        ("FluxTransformer2DModel", "auto", 3),
        ("WanTransformer3DModel", "auto", 0),
        ("HunyuanVideoTransformer3DModel", "auto", 7),
        ("HunyuanVideo15Transformer3DModel", "auto", 0),
        ("HunyuanVideoFramepackTransformer3DModel", "auto", 0),
        ("anything", "hunyuan-video", 7),
        ("FluxTransformer2DModel", "none", 0),
    ],
)
def test_profiles(class_name: str, model_type: str, count: int) -> None:
    assert len(fp8.find_profile(model_type, class_name)) == count


@pytest.mark.parametrize("profile", sorted(fp8.PROFILES))
def test_every_profile_is_declared_by_its_model(profile: str) -> None:
    model = models.load(fp8.PROFILES[profile])
    assert fp8.find_profile("auto", model.TRANSFORMER) == model.FALLBACKS[profile]


def test_fp8_weights_are_coded_a_few_rows_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No float32 copy of a whole weight: that of FLUX.2's largest would be 1.4 GB."""
    sizes = []

    def round_and_count(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return round_e4m3(x)

    case = Fp8Case(tmp_path, coded=False)
    run(fp8.main, case.words("--model-type", "none"), capsys)
    whole, _ = read_all(case.output)
    monkeypatch.setattr(nvfp4_arithmetic, "CHUNK", 5 * K)
    monkeypatch.setattr(fp8, "round_e4m3", round_and_count)
    run(fp8.main, case.words("--model-type", "none", "--overwrite"), capsys)
    cut, _ = read_all(case.output)
    assert max(sizes) == 5 * K < N * K
    assert all(same(cut[name], tensor) for name, tensor in whole.items())


def test_fp8_refuses_codes_of_another_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed codes divided by a scale would be written as if they were numbers."""
    case = Fp8Case(tmp_path)
    tensors = {**case.export_tensors, f"{CODED[0]}.weight": torch.ones(N, K // 2).byte()}
    save_file(tensors, case.export / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert fp8.main(case.words()) == 1
    assert f"{CODED[0]}.weight is U8: expected FP8 codes" in capsys.readouterr().err
    assert not case.output.exists()


@pytest.mark.parametrize("tool", ["fp8", "nvfp4"])
def test_two_runs_are_byte_identical(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"fp8": fp8.main, "nvfp4": nvfp4.main}[tool]
    case = Fp8Case(tmp_path, shards=2) if tool == "fp8" else Nvfp4Case(tmp_path, shards=2)
    run(main, case.words(), capsys)
    first = read_bytes(case.output)
    run(main, case.words("--overwrite"), capsys)
    assert read_bytes(case.output) == first
    assert len(first) == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def expect_error(
    main: Callable[[list[str]], int],
    case: Fp8Case | Nvfp4Case,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    code: int = 1,
) -> None:
    """The tool fails with this message and leaves nothing behind."""
    before = sorted(case.output.parent.iterdir())
    assert main(words) == code
    assert re.search(message, capsys.readouterr().err)
    assert sorted(case.output.parent.iterdir()) == before


def test_fp8_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Fp8Case(tmp_path)

    def expect(message: str, *more: str, code: int = 1) -> None:
        expect_error(fp8.main, case, case.words(*more), message, capsys, code)

    expect(r"pattern 'no_such' matches none", "--keep-bf16-pattern", "no_such")
    expect(r"pattern .* matches none", "--model-type", "flux2")
    expect(r"not of one export, or --maxbound", "--maxbound", "240")
    expect("keep-bf16-pattern", "--keep-bf16-pattern", "(", code=2)
    expect("no such file", "--modelopt-backbone-ckpt", str(tmp_path / "x.pt"), code=2)
    expect("no config.json", "--base-transformer-dir", str(tmp_path), code=2)
    case.output.mkdir()
    expect("exists already", code=2)
    expect("overlaps", "--overwrite", "--output-dir", str(case.export), code=2)
    case.checkpoint.write_bytes(b"no checkpoint")
    case.output.rmdir()
    expect("cannot be read")


def test_fp8_needs_a_base_for_kept_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Fp8Case(tmp_path)
    words = case.words()
    at = words.index("--base-transformer-dir")
    without = words[:at] + words[at + 2 :]
    expect_error(fp8.main, case, without, "--base-transformer-dir is missing", capsys, code=2)
    statistics = run(fp8.main, [*without, "--model-type", "none"], capsys)
    assert statistics["quantized_weights"] == len(KEPT) + len(CODED)


def test_fp8_checks_the_amaxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Fp8Case(tmp_path)
    state = make_state(case.base_tensors)
    name = f"{CODED[0]}.weight_quantizer._amax"
    case.save({**state, name: torch.ones(N, 1)})
    expect_error(fp8.main, case, case.words(), "has 32 elements", capsys)
    case.save({key: value for key, value in state.items() if key != name})
    expect_error(fp8.main, case, case.words(), "no amax pair", capsys)
    case.save({})
    expect_error(fp8.main, case, case.words(), "was the model calibrated", capsys)
    case.save({**state, f"{LEFT[0]}.weight_quantizer._amax": torch.ones(())})
    run(fp8.main, case.words(), capsys)


@pytest.mark.parametrize("quantizer", ["weight_quantizer", "input_quantizer"])
@pytest.mark.parametrize("amax", [0.0, -1.0, torch.nan, torch.inf])
def test_fp8_amaxes_are_positive_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantizer: str, amax: float
) -> None:
    """Zero divided by a scale of zero would be written as NaN codes."""
    case = Fp8Case(tmp_path, coded=False)
    state = make_state(case.base_tensors)
    case.save({**state, f"{CODED[0]}.{quantizer}._amax": torch.tensor(amax)})
    expect_error(fp8.main, case, case.words(), f"{CODED[0]} has the .*_scale", capsys)
    case.save({**state, f"{KEPT[0]}.{quantizer}._amax": torch.tensor(amax)})
    run(fp8.main, case.words(), capsys)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_fp8_amaxes_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    """Weights in BF16 have no scale to compare with, but the codes would not fit."""
    case = Fp8Case(tmp_path, coded=False)
    state = make_state(case.base_tensors)
    name = f"{CODED[0]}.weight_quantizer._amax"
    case.save({**state, name: state[name] * factor})
    expect_error(fp8.main, case, case.words(), f"{CODED[0]}.weight reaches .* of one model", capsys)
    case.save({**state, name: state[name] * 0.5})
    run(fp8.main, case.words(), capsys)


def test_fp8_leaves_convolutions_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wan's patch_embedding has amaxes, and ModelOpt neither writes it as FP8 nor ignores it."""
    case = Fp8Case(tmp_path)
    patch = torch.randn(N, 4, 1, 2, 2).bfloat16()
    tensors = {**case.export_tensors, "patch_embedding.weight": patch}
    save_file(tensors, case.export / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    state = make_state(case.base_tensors)
    for quantizer in ("weight_quantizer", "input_quantizer"):
        state[f"patch_embedding.{quantizer}._amax"] = torch.tensor(3.0)
    case.save(state)
    run(fp8.main, case.words(), capsys)
    built, _ = read_all(case.output)
    assert same(built["patch_embedding.weight"], patch)
    assert "patch_embedding.weight_scale" not in built
    config = json.loads((case.output / "config.json").read_text())
    assert "patch_embedding" in config["quantization_config"]["ignore"]


def test_fp8_refuses_other_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Fp8Case(tmp_path)
    config = case.export / "config.json"
    for other in ("NVFP4", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        config.write_text(json.dumps(make_config(other)))
        message = f"quant_algo is {other}: expected FP8"
        expect_error(fp8.main, case, case.words(), message, capsys)
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    expect_error(fp8.main, case, case.words(), "quant_method modelopt, found None", capsys)
    config.write_text(json.dumps(make_config(None)))
    run(fp8.main, case.words(), capsys)
    built = json.loads((case.output / "config.json").read_text())["quantization_config"]
    assert built["quant_algo"] == "FP8"


@pytest.mark.parametrize("tool", ["fp8", "nvfp4"])
def test_a_kept_layer_that_the_base_lacks(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"fp8": fp8.main, "nvfp4": nvfp4.main}[tool]
    case = Fp8Case(tmp_path) if tool == "fp8" else Nvfp4Case(tmp_path)
    file = case.base / "diffusion_pytorch_model.safetensors"
    words = case.words(*(("--pattern-preset", "flux1-nvfp4") if tool == "nvfp4" else ()))
    renamed = {k.replace("ff.net.2", "ff.net.3"): t for k, t in case.base_tensors.items()}
    save_file(renamed, file)
    expect_error(main, case, words, r"ff\.net\.2\.weight is to be kept .* no such tensor", capsys)
    changed = {**case.base_tensors, f"{KEPT[0]}.weight": torch.zeros(N, 2 * K).bfloat16()}
    save_file(changed, file)
    expect_error(main, case, words, r"the base has BF16 \[32, 96\]", capsys)


def test_nvfp4_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Nvfp4Case(tmp_path)
    words = case.words("--keep-bf16-pattern", "to_q")
    expect_error(nvfp4.main, case, words, "pattern 'to_q' matches none", capsys)
    (case.export / "config.json").write_text(json.dumps(make_config("FP8")))
    expect_error(nvfp4.main, case, case.words(), "build_modelopt_fp8_transformer", capsys)


def test_ambiguous_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Nvfp4Case(tmp_path)
    save_file({"a": torch.zeros(1)}, case.export / "other.safetensors")
    expect_error(nvfp4.main, case, case.words(), "2 .safetensors files and no index", capsys)
    (case.export / "other.safetensors").unlink()
    index = {"weight_map": {"a": "gone.safetensors"}}
    (case.export / "z.safetensors.index.json").write_text(json.dumps(index))
    message = "missing: gone.safetensors; an index left behind"
    expect_error(nvfp4.main, case, case.words(), message, capsys)


def test_a_failed_write_keeps_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Nvfp4Case(tmp_path)
    run(nvfp4.main, case.words(), capsys)
    before = read_bytes(case.output)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("quantmatrix.tools.transformer_folder.make_index", fail)
    words = case.words("--overwrite", "--swap-weight-nibbles")
    expect_error(nvfp4.main, case, words, "disk full", capsys)
    assert read_bytes(case.output) == before
