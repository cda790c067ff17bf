"""Pipelines without a model file: what their classes say of them, planned, loaded and run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantmatrix import families, models
from quantmatrix.api import plan
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.request import Request
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub
from quantmatrix.tiny.pipelines import save_pipeline
from quantmatrix.tiny.text_encoders import KINDS
from quantmatrix.tiny.weights import fill
from quantmatrix.tools.quantize import quantize
from quantmatrix.tools.recipe import Recipe, choose_schemes

FLUX, WAN = "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
QWEN, FLUX_2 = "Qwen/Qwen-Image", "black-forest-labs/FLUX.2-dev"


def as_another(repository: str, class_name: str, folder: Path) -> Path:
    """The stand-in of a repository whose index names another pipeline class."""
    hub.ensure(repository, hub.default_folder())
    shutil.copytree(hub.find_snapshot(repository, hub.default_folder()), folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": class_name}))
    return folder


def decide(model_path: Path, **fields: Any) -> Plan:
    planned = plan(Request(model_path=str(model_path), device="cpu", **fields))
    assert isinstance(planned, Plan)
    return planned


@pytest.fixture(scope="module")
def aura_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of which no model file knows a class, 64 pixels a side."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=128, caption_projection_dim=64, pos_embed_max_size=64,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    fill(transformer, "aura", structured=generic_blocks(transformer))
    fill(vae, "vae")
    text, tokenizer = KINDS["umt5"]("aura.text_encoder")
    folder = tmp_path_factory.mktemp("aura") / "pipeline"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    save_pipeline(diffusers.AuraFlowPipeline(tokenizer, text, vae, transformer, scheduler), folder)
    return folder


def generic_blocks(transformer: torch.nn.Module) -> tuple[str, ...]:
    lists = [n for n, m in transformer.named_children() if isinstance(m, torch.nn.ModuleList)]
    return tuple(lists)


@pytest.mark.parametrize(
    ("repository", "class_name", "model"),
    [
        (FLUX, "FluxKontextPipeline", "flux-1"),
        (FLUX, "FluxFillPipeline", "flux-1"),
        (FLUX_2, "Flux2KleinPipeline", "flux-2"),
        (QWEN, "QwenImageEditPipeline", "qwen-image"),
        (QWEN, "QwenImageEditPlusPipeline", "qwen-image"),
        (WAN, "WanImageToVideoPipeline", "wan-2-2"),
    ],
)
def test_the_class_of_the_transformer_decides_the_model_file(
    repository: str, class_name: str, model: str, tmp_path: Path
) -> None:
    folder = as_another(repository, class_name, tmp_path / "base")
    planned = decide(folder, quantization="fp8")
    assert planned.model == f"{model}/{class_name}"
    assert any(f"{class_name}: its transformer is that of {model}" in w for w in planned.warnings)
    own, known = models.load(planned.model), models.load(model)
    assert own.DIALECTS == known.DIALECTS
    assert own.FALLBACKS == known.FALLBACKS
    part = planned.components["transformer"]
    assert {name.split(".")[0] for name in part.layers} == set(known.BLOCKS)
    assert list(planned.components) == list(known.COMPONENTS)


def test_kontext_runs_quantized_by_its_own_signature(tmp_path: Path) -> None:
    folder = as_another(FLUX, "FluxKontextPipeline", tmp_path / "base")
    request = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    planned = decide(folder, quantization="fp8", **request)
    run = generate(planned.request, plan=planned)
    assert isinstance(build_pipeline(planned), diffusers.FluxKontextPipeline)
    assert run.census["transformer"] == planned.components["transformer"].backends
    assert len(run.latents) == 2
    assert run.degenerate is None


@pytest.mark.parametrize("family", ["fp8", "modelopt-nvfp4"])
def test_a_pipeline_that_no_file_describes_is_quantized_and_run(
    family: str, aura_flow: Path, tmp_path: Path
) -> None:
    size: Mapping[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    base = Request(model_path=str(aura_flow), device="cpu", **size)
    written = quantize(base, family=family, output=tmp_path / "coded", prompts=["a cat"])
    planned = decide(aura_flow, component_paths={"transformer": str(tmp_path / "coded")}, **size)
    assert planned.model == "generic/AuraFlowPipeline"
    assert any("AuraFlowPipeline has no model file" in text for text in planned.warnings)
    part = planned.components["transformer"]
    assert len(part.layers) == written["components"]["transformer"]["quantized"] > 8
    assert {name.split(".")[0] for name in part.layers} == {
        "joint_transformer_blocks",
        "single_transformer_blocks",
    }
    run = generate(planned.request, plan=planned)
    plain = generate(base, plan=decide(aura_flow, **size))
    assert run.census["transformer"] == part.backends
    assert plain.census["transformer"] == {}
    error = (run.latents[-1] - plain.latents[-1]).norm() / plain.latents[-1].norm()
    assert 0 < error < {"modelopt-nvfp4": 0.5}.get(family, 0.2)
    assert run.witness["transformer"]["verdict"] == "agrees"


def test_a_picture_that_no_flag_gives_is_asked_for_in_words(tmp_path: Path) -> None:
    to_video = decide(as_another(WAN, "WanImageToVideoPipeline", tmp_path / "wan"))
    with pytest.raises(UsageError, match=r"its call needs image: name a picture with --image-path"):
        generate(to_video.request, plan=to_video)
    fill_in = decide(as_another(FLUX, "FluxFillPipeline", tmp_path / "fill"), height=64, width=64)
    with pytest.raises(
        UsageError, match=r"FluxFillPipeline did not take its arguments \(.*want a picture"
    ):
        generate(fill_in.request, plan=fill_in)


def test_a_transformer_alone_is_loaded_and_makes_no_picture(aura_flow: Path) -> None:
    planned = decide(aura_flow / "transformer", quantization="fp8")
    assert planned.model == "generic/AuraFlowTransformer2DModel"
    assert len(planned.components["transformer"].layers) > 8
    with pytest.raises(UsageError, match="one transformer alone, which makes no picture"):
        generate(planned.request, plan=planned)


@pytest.mark.parametrize(
    ("class_name", "transformer"),
    [("StableDiffusionPipeline", "UNet2DConditionModel"), ("NoSuchPipeline", "FluxTransformer2DModel")],
)  # fmt: skip
def test_a_pipeline_without_a_transformer_is_refused(
    class_name: str, transformer: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": class_name, "unet": ["diffusers", transformer]})
    )
    with pytest.raises(CheckpointError, match=rf"{class_name} is none of the base models"):
        decide(tmp_path)


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("DiTPipeline", "takes no prompt"),
        ("AceStepPipeline", "neither pictures nor clips"),
        ("WanAnimatePipeline", "needs image, pose_video, face_video"),
    ],
)
def test_a_call_that_cannot_be_made_is_refused(class_name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.load(f"generic/{class_name}").call_arguments(Request(model_path="x"))


def test_defaults_and_arguments_are_those_of_the_call() -> None:
    sana = models.load("generic/SanaPipeline")
    assert (sana.DEFAULTS.steps, sana.DEFAULTS.guidance, sana.DEFAULTS.frames) == (20, 4.5, 1)
    assert sana.call_arguments(Request(model_path="x")) == {}
    with pytest.raises(UsageError, match="--num-frames: SanaPipeline takes none"):
        sana.call_arguments(Request(model_path="x", num_frames=5))
    video = models.load("generic/LTXPipeline")
    assert (video.DEFAULTS.frames, video.DEFAULTS.fps, video.DEFAULTS.height) == (161, 25, 512)
    edit = models.load("qwen-image/QwenImageEditPipeline")
    given = Request(model_path="x", guidance_scale=2.0, num_inference_steps=3)
    assert edit.call_arguments(given) == {"true_cfg_scale": 2.0, "num_inference_steps": 3}
    kontext = models.load("flux-1/FluxKontextPipeline")
    asked = kontext.call_arguments(Request(model_path="x", negative_prompt="blurry"))
    assert asked == {"negative_prompt": "blurry", "true_cfg_scale": 3.5}


def test_unknown_ids_are_named() -> None:
    with pytest.raises(KeyError, match="no such pipeline or transformer in diffusers: Nothing"):
        models.load("generic/Nothing")
    with pytest.raises(KeyError, match="no such base model"):
        models.load("flux-9")


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A transformer of 40 columns: two groups of 16, and 8 that are left over."""
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=20,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=40, pos_embed_max_size=64,
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


LAYER = "joint_transformer_blocks.0.attn.to_q"


def test_codes_of_a_width_without_whole_groups_are_refused_in_words(narrow: Path) -> None:
    file = narrow / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors |= {
        f"{LAYER}.weight": torch.zeros(40, 20, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.ones(40, 2).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_scale_2": torch.ones(()),
        f"{LAYER}.input_scale": torch.ones(()),
    }
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((narrow / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=rf"{LAYER} has weight U8 \[40, 20\]: expected .*multiple of 16"
    ):
        decide(narrow)


def test_a_layer_without_whole_groups_stays_in_full_precision() -> None:
    nvfp4 = families.load("modelopt-nvfp4").SCHEMES["NVFP4"]
    packed = {f"{LAYER}.weight": torch.zeros(40, 40), "norm_out.weight": torch.zeros(8, 64)}
    packed[f"{LAYER}_out.weight"] = torch.zeros(40, 64)
    recipe = Recipe(
        "generic/AuraFlowTransformer2DModel", "modelopt-nvfp4", nvfp4, lambda _: False,
        linear=frozenset({LAYER, f"{LAYER}_out"}),
    )  # fmt: skip
    assert set(choose_schemes(recipe, packed)) == {f"{LAYER}_out"}
