"""Checkpoints made by `quantmatrix quantize`: what they say they are, how far from BF16 they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantmatrix import api, families, load_pipeline, models
from quantmatrix.api import plan
from quantmatrix.checkpoints.opening import fetch_pipeline
from quantmatrix.cli import main
from quantmatrix.errors import UsageError
from quantmatrix.request import Request
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny.hub import use_tiny
from quantmatrix.tools import quantize

BASES = {
    "flux-1": "black-forest-labs/FLUX.1-dev",
    "flux-2": "black-forest-labs/FLUX.2-dev",
    "wan-2-2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
}
MADE: list[tuple[str, str, dict[str, Any], str, float]] = [
    ("fp8", "flux-2", {"scheme": "tensor-static"}, "folder", 0.15),
    ("fp8", "z-image", {"scheme": "channel-dynamic"}, "x.safetensors", 0.15),
    ("modelopt-fp8", "qwen-image", {}, "folder", 0.15),
    ("modelopt-nvfp4", "flux-1", {}, "folder", 0.4),
    ("modelopt-nvfp4", "wan-2-2", {}, "folder", 0.4),
    ("nunchaku-svdq", "flux-1", {"precision": "int4", "rank": 16}, "svdq-int4_r16-x", 0.5),
    ("nunchaku-svdq", "z-image", {"precision": "nvfp4"}, "svdq-fp4_r32-x", 0.5),
    ("msmodelslim", "wan-2-2", {"scheme": "W8A8"}, "folder", 0.15),
    ("msmodelslim", "wan-2-2", {"scheme": "W8A8_DYNAMIC"}, "folder", 0.15),
    ("msmodelslim", "wan-2-2", {"scheme": "W4A4_DYNAMIC"}, "folder", 0.9),
]


def make(tmp_path: Path, family: str, model: str, options: dict[str, Any], name: str) -> Path:
    output = tmp_path / (f"{name}.safetensors" if name.startswith("svdq") else name)
    request = Request(model_path=BASES[model], tiny=True, device="cpu")
    found = quantize.quantize(
        use_tiny(request), family=family, output=output, prompts=["a fox"], **options
    )
    assert found["output"] == str(output)
    assert all(counts["quantized"] >= 6 for counts in found["components"].values())
    return output


def use(output: Path, family: str, model: str, backend: str | None = "reference") -> Request:
    """The request that runs what was made, as its form wants it."""
    options: dict[str, Any] = {
        "tiny": True,
        "device": "cpu",
        "dtype": "float32",
        "prompt": ("a fox",),
    }
    if family == "msmodelslim":
        return Request(model_path=str(output), backend=backend, **options)
    options |= {"model_path": BASES[model], "backend": backend}
    if output.suffix == ".safetensors":
        return Request(weights_paths={"transformer": str(output)}, **options)
    parts = [path.name for path in sorted(output.iterdir()) if path.is_dir()]
    paths = {part: str(output / part) for part in parts} or {"transformer": str(output)}
    return Request(component_paths=paths, **options)


@pytest.mark.parametrize("made", MADE, ids=lambda made: f"{made[0]}-{made[1]}-{made[3]}-{made[2]}")
def test_what_is_made_runs_and_is_near(made: Any, tmp_path: Path) -> None:
    family, model, options, name, limit = made
    output = make(tmp_path, family, model, options, name)
    request = use(output, family, model)
    planned = plan(request)
    assert isinstance(planned, Plan)
    for component in planned.components.values():
        assert component.family == family
        assert len(component.layers) >= 6
        assert component.backends.keys() == {"reference"}
    if "rank" in options:
        assert planned.components["transformer"].rank == options["rank"]
    plain = Request(
        model_path=BASES[model], tiny=True, device="cpu", dtype="float32", prompt=("a fox",)
    )
    got, expected = api.generate(request).latents[-1], api.generate(plain).latents[-1]
    distance = (
        torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
    ).item()
    assert 1e-4 < distance < limit


def read_all(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path.parent)): file.read_bytes() for file in quantize.list_files(path)
    }


@pytest.mark.parametrize(
    ("family", "model", "options", "name"),
    [
        ("nunchaku-svdq", "flux-1", {"precision": "int4"}, "svdq-int4_r32-x"),
        ("modelopt-fp8", "wan-2-2", {}, "folder"),
        ("msmodelslim", "wan-2-2", {"scheme": "W8A8"}, "folder"),
    ],
)
def test_two_runs_give_the_same_bytes(
    family: str, model: str, options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = (make(folder, family, model, options, name) for folder in folders)
    assert read_all(one) == read_all(two)


def read_tensors(path: Path, ending: str) -> dict[str, torch.Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ending)}  # noqa: SIM118


def test_input_scales_are_those_of_the_run(tmp_path: Path) -> None:
    """The largest magnitude that a hook of our own sees, over 448, and not rounded."""
    pipeline = load_pipeline(model_path=BASES["flux-1"], tiny=True, device="cpu")
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), arguments[0].abs().max().item())

        return hook

    for name, layer in pipeline.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(watch(name))
    arguments = models.load("flux-1").call_arguments(Request(model_path="x", tiny=True))
    with torch.inference_mode():
        seed = torch.Generator("cpu").manual_seed(0)
        pipeline(prompt="a fox", generator=seed, output_type="latent", **arguments)
    output = make(tmp_path, "modelopt-fp8", "flux-1", {}, "x.safetensors")
    scales = read_tensors(output, ".input_scale")
    assert len(scales) >= 6
    for name, scale in scales.items():
        amax = seen[name.removesuffix(".input_scale")]
        assert scale.float().item() == pytest.approx(amax / 448, rel=1e-6)


DEFAULTS = [
    ("fp8", "flux-1", {"scheme": "tensor-static"}, "quantmatrix/flux-1-fp8-tensor-static"),
    ("modelopt-fp8", "flux-1", {}, "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"),
    ("modelopt-nvfp4", "flux-1", {}, "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"),
    ("fp8", "qwen-image", {"scheme": "tensor-static"}, "quantmatrix/qwen-image-fp8-tensor-static"),
]


@pytest.mark.parametrize(("family", "model", "options", "like"), DEFAULTS, ids=lambda v: str(v))
def test_the_layers_kept_are_those_of_the_tables(
    family: str, model: str, options: dict[str, Any], like: str, tmp_path: Path
) -> None:
    output = make(tmp_path, family, model, options, "folder")
    plans = (
        plan(
            Request(
                model_path=BASES[model], tiny=True, device="cpu",
                component_paths={"transformer": path},
            )
        )
        for path in (str(output), like)
    )  # fmt: skip
    made, expected = (set(one.components["transformer"].layers) for one in plans)
    assert made == expected


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    planned = plan(Request(model_path=BASES["z-image"], tiny=True, device="cpu"))
    assert isinstance(planned, Plan)
    base = tmp_path / "models" / "base"
    shutil.copytree(fetch_pipeline(planned.base, planned.request.hub), base)
    before = read_all(base)
    request = Request(model_path=str(base), tiny=True, device="cpu")
    for output in (base, base / "transformer", base.parent, base / "new"):
        with pytest.raises(UsageError, match="would be written over"):
            quantize.quantize(use_tiny(request), family="fp8", output=output, overwrite=True)
    assert read_all(base) == before


def test_an_expert_that_never_runs_is_named(tmp_path: Path) -> None:
    request = Request(model_path=BASES["wan-2-2"], tiny=True, device="cpu", num_inference_steps=1)
    with pytest.raises(UsageError, match=r"transformer_2; .* give more --num-inference-steps"):
        quantize.quantize(
            use_tiny(request), family="modelopt-fp8", output=tmp_path / "x", prompts=["a"]
        )
    assert list(tmp_path.iterdir()) == []


def test_smoothing_follows_the_prompts_and_helps(tmp_path: Path) -> None:
    """A channel with outliers is divided by more than the others; without ranges by one."""
    from quantmatrix.families import nunchaku_svdq
    from quantmatrix.families.protocol import Calibration

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator) / 12
    x = torch.randn(64, 128, generator=generator)
    x[:, 5] *= 60
    scheme = nunchaku_svdq.SCHEMES["int4_r16"]
    errors = []
    for calibration in (Calibration(x.amin(dim=0), x.amax(dim=0)), None):
        made = nunchaku_svdq.quantize(weight.bfloat16(), scheme, calibration=calibration)
        y = nunchaku_svdq.reference(x, made, scheme)
        errors.append(torch.linalg.vector_norm(y - x @ weight.T).item())
    assert errors[0] < 0.6 * errors[1]
    output = make(tmp_path, "nunchaku-svdq", "flux-1", {"precision": "int4"}, "svdq-int4_r32-x")
    smoothing = read_tensors(output, ".smooth_factor")
    assert any(tensor.float().std() > 0.05 for tensor in smoothing.values())


WRONG = [
    (["--family", "fp9"], "--family fp9: expected one of"),
    (["--family", "fp8", "--scheme", "x"], "--scheme x: fp8 has tensor-dynamic"),
    (["--family", "fp8", "--rank", "32"], "are not for fp8: give --scheme"),
    (
        ["--family", "nunchaku-svdq", "--precision", "fp4"],
        "--precision fp4: expected int4 or nvfp4",
    ),
    (["--family", "nunchaku-svdq", "--precision", "int4", "--rank", "0"], "--rank 0: expected"),
    (["--family", "nunchaku-svdq", "--precision", "int4"], "call it svdq-int4_r32-flux-1"),
    (["--family", "nunchaku-svdq", "--scheme", "x"], "give --precision and --rank"),
    (
        ["--family", "msmodelslim"],
        "msmodelslim describes Wan2.2-T2V-A14B only, the model is flux-1",
    ),
    (["--family", "fp8", "--keep", "no_such.*"], "--keep no_such.*: matches none of the"),
    (["--family", "fp8", "--keep", "("], "--keep (: neither a set of flux-1"),
    (["--family", "fp8", "--calibration-prompts", "none.txt"], "No such file"),
]


@pytest.mark.parametrize(
    ("words", "said"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_words_are_refused_before_any_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("calibration began")

    monkeypatch.setattr(quantize, "calibrate", fail)
    monkeypatch.chdir(tmp_path)
    start = ["quantize", "--tiny", "--model-path", BASES["flux-1"], "--output-path", "out"]
    assert main.main([*start, *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "components", "name", "refused"),
    [
        ("fp8", 1, "x.safetensors", False),
        ("fp8", 2, "x.safetensors", True),
        ("fp8", 2, "x", False),
        ("msmodelslim", 1, "x.safetensors", True),
        ("msmodelslim", 2, "x.safetensors", True),
        ("msmodelslim", 1, "x", False),
    ],
)
def test_one_file_is_for_one_component_that_stands_alone(
    family: str,
    components: int,
    name: str,
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "list_sources", lambda plan: [])
    part = SimpleNamespace(family=None)
    plan: Any = SimpleNamespace(
        components=dict.fromkeys(("transformer", "transformer_2")[:components], part),
        pipeline_class="WanPipeline", model="wan-2-2", base="a base",
    )  # fmt: skip
    scheme = next(iter(families.load(family).SCHEMES.values()))
    asked = plan, family, tmp_path / name, scheme, False
    if not refused:
        quantize.check_base(*asked)
        return
    with pytest.raises(UsageError, match="several components need a folder"):
        quantize.check_base(*asked)


def test_what_is_there_stays_unless_it_may_go(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    words = ["quantize", "--tiny", "--model-path", BASES["z-image"], "--family", "fp8"]
    words += ["--output-path", str(target), "--device", "cpu", "--json"]
    assert main.main(words) == 2
    assert target.read_text() == "old"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\na cat\n")
    assert main.main([*words, "--overwrite", "--calibration-prompts", str(prompts)]) == 0
    found = json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(["{", ""]))
    assert found["prompts"] == 2
    assert found["bytes"] == target.stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "prompts.txt"]


def test_a_quantized_model_is_no_base(tmp_path: Path) -> None:
    request = Request(
        model_path=BASES["flux-1"], tiny=True, device="cpu",
        component_paths={"transformer": "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"},
    )  # fmt: skip
    with pytest.raises(UsageError, match="is quantized already"):
        quantize.quantize(use_tiny(request), family="fp8", output=tmp_path / "x")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "write_folder", fail)
    request = Request(model_path=BASES["flux-1"], tiny=True, device="cpu")
    with pytest.raises(UsageError, match="No space left on device; nothing was left behind"):
        quantize.quantize(use_tiny(request), family="fp8", output=tmp_path / "x", prompts=["a"])
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    write_all = quantize.write_all

    def write_beside_another(*args: Any) -> Any:
        output.mkdir()
        (output / "theirs").touch()
        return write_all(*args)

    monkeypatch.setattr(quantize, "write_all", write_beside_another)
    with pytest.raises(UsageError, match="appeared while this ran"):
        make(tmp_path, "fp8", "flux-1", {}, "out")
    assert [path.name for path in output.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
