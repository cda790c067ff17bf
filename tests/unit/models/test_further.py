"""Models that are a stand-in alone: their data, and the models that run them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import quantmatrix
from quantmatrix import models
from quantmatrix.models import further, generic
from quantmatrix.request import Request
from quantmatrix.runtime.empty_model import build_plain, find_blocks, measure_model
from quantmatrix.tables import read
from quantmatrix.tables.lint import list_modules
from quantmatrix.tiny.encoders import KINDS, PROCESSORS

TABLES = read.read()
FOLDER = Path(quantmatrix.__file__).parent / "models/further"


def test_every_module_is_listed_and_has_a_row_that_is_claimed() -> None:
    assert set(list_modules(FOLDER)) == set(further.IDS) == set(TABLES.models) - set(models.IDS)
    claimed = {cell.model for cell in TABLES.select(family=["fp8"], hardware=["cpu"])}
    assert set(further.IDS) <= claimed
    assert len({models.load(name).REPO for name in further.IDS}) == len(further.IDS)


@pytest.mark.parametrize("name", further.IDS)
def test_a_row_says_what_its_module_says(name: str) -> None:
    row, model = TABLES.models[name], models.load(name)
    assert (row.name, row.repo, row.transformers) == (model.NAME, model.REPO, model.COMPONENTS)
    pipeline = getattr(diffusers, model.PIPELINE)
    assert issubclass(pipeline, diffusers.DiffusionPipeline)
    assert set(model.COMPONENTS) <= set(generic.list_transformers(model.PIPELINE))
    own = model.STAND_IN
    assert set(own.text_encoders.values()) <= set(KINDS)
    assert set(own.processors.values()) <= set(PROCESSORS)


@pytest.mark.parametrize("name", further.IDS)
def test_blocks_are_the_lists_that_a_plan_finds(name: str) -> None:
    """A stand-in's weights have structure in its blocks, and a plan quantizes those of its own finding."""
    model = models.load(name)
    options = {**model.TINY, "_class_name": model.TRANSFORMER}
    shapes = measure_model(model.TRANSFORMER, options, name)
    used = model.used.ID if model.PIPELINE in known_pipelines() else None  # type: ignore[attr-defined]
    planned = used or models.by_transformer(model.PIPELINE, model.TRANSFORMER) or ""
    assert set(model.BLOCKS) == set(find_blocks(planned, shapes))
    built = build_plain(name, "tiny")
    for block in model.BLOCKS:
        assert len(getattr(built, block)) > 0


PARAMETERS = {
    "flux-1": (7_266_880, 272_707),
    "flux-2": (6_653_440, 290_451),
    "wan-2-2": (2_243_392, 220_107),
    "qwen-image": (5_064_384, 220_107),
    "z-image": (8_993_600, 272_707),
    "flux-1-kontext": (3_913_280, 272_707),
    "flux-1-fill": (3_995_200, 272_707),
    "flux-1-krea": (3_913_280, 272_707),
    "flux-1-schnell": (3_781_696, 272_707),
    "flux-2-klein-4b": (3_965_696, 290_451),
    "flux-2-klein-9b": (4_817_920, 290_451),
    "qwen-image-2512": (2_696_896, 220_107),
    "qwen-image-edit": (2_696_896, 42_517),
    "qwen-image-edit-2509": (2_696_896, 42_517),
    "qwen-image-edit-2511": (2_696_896, 42_517),
    "z-image-base": (6_827_584, 272_707),
    "wan-2-1-t2v": (1_451_072, 220_107),
    "wan-2-1-i2v": (1_653_696, 220_107),
    "wan-2-2-i2v": (1_471_552, 220_107),
    "wan-2-2-ti2v": (1_451_072, 235_996),
    "hunyuan-video": (5_065_024, 781_955),
    "hunyuan-video-1-5": (5_766_920, 1_373_863),
    "hunyuan-image-2-1": (5_981_200, 1_190_827),
    "sd-3-5": (4_834_240, 272_707),
    "ltx-video": (2_751_264, 891_501),
    "cogview-4": (2_617_408, 272_707),
    "glm-image": (2_798_400, 272_707),
    "sana": (2_699_792, 171_735),
    "chroma": (2_507_328, 272_707),
}
"""Parameters of each stand-in's transformer and VAE: another number is another stand-in, whose records are stale."""


def test_every_stand_in_has_its_size() -> None:
    assert set(PARAMETERS) == {*models.IDS, *further.IDS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_stand_in_has_its_size_and_shares_heads_out_to_axes(name: str) -> None:
    model = models.load(name)
    own = model.STAND_IN
    with torch.device("meta"):
        transformer = getattr(diffusers, model.TRANSFORMER)(**own.transformer)
        vae = getattr(diffusers, own.vae.class_name)(**own.vae.options)
    found = tuple(sum(t.numel() for t in part.parameters()) for part in (transformer, vae))
    assert found == PARAMETERS[name]
    axes = own.transformer.get("axes_dims_rope") or own.transformer.get("axes_dims")
    if axes is not None:
        given = own.transformer
        wide = given.get("attention_head_dim") or given["dim"] // given["n_heads"]
        assert sum(axes) == wide
        assert not any(axis % 2 for axis in axes)  # pairs of numbers are turned


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("flux-2-klein-4b", 3.9),
        ("flux-2-klein-9b", 9.1),
        ("wan-2-2-ti2v", 5.0),
        ("wan-2-1-i2v", 16.4),
        ("hunyuan-video", 12.8),
        ("sd-3-5", 2.24),
        ("sana", 1.6),
    ],
)
def test_a_published_transformer_has_its_own_size(
    name: str, billions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_none(width: int, size: int, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(size * size, width, device="meta")

    # a table of positions is no parameter, and takes seconds
    monkeypatch.setattr(diffusers.models.embeddings, "get_2d_sincos_pos_embed", draw_none)
    built = build_plain(name, "full")
    found = sum(tensor.numel() for tensor in built.parameters()) / 1e9
    assert found == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", ["cogview-4", "glm-image"])
def test_the_shifts_of_a_schedule_are_those_that_its_pipeline_has(name: str) -> None:
    """Its own, for a scheduler that says none: diffusers' scheduler has others."""
    model = models.load(name)
    home = sys.modules[getattr(diffusers, model.PIPELINE).__module__]
    own = inspect.signature(home.calculate_shift).parameters
    options = model.STAND_IN.scheduler.options
    found = {word: options[word] for word in ("base_shift", "max_shift")}
    assert found == {word: own[word].default for word in found}
    assert options["use_dynamic_shifting"] is True


def known_pipelines() -> set[str]:
    return {models.load(name).PIPELINE for name in models.IDS}


def test_what_a_module_does_not_say_is_that_of_its_pipelines_model() -> None:
    schnell, own = models.load("flux-1-schnell"), models.load("flux-1")
    asked = Request(model_path="x", tiny=True)
    assert schnell.DIALECTS == own.DIALECTS
    assert schnell.call_arguments(asked) == own.call_arguments(asked)
    assert (schnell.ID, schnell.REPO) == ("flux-1-schnell", "black-forest-labs/FLUX.1-schnell")
    assert models.load("wan-2-1-t2v").COMPONENTS == ("transformer",)
    assert models.load("wan-2-2-i2v").COMPONENTS == ("transformer", "transformer_2")
    with pytest.raises(AttributeError):
        _ = schnell.NOTHING  # type: ignore[attr-defined]


def test_a_stand_in_runs_small_and_a_published_model_as_its_pipeline_says() -> None:
    kontext = models.load("flux-1/FluxKontextPipeline")
    small = kontext.call_arguments(Request(model_path="x", tiny=True))
    assert small == {
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 32,
        "max_area": 4096,
        "_auto_resize": False,
    }
    assert kontext.call_arguments(Request(model_path="x")) == {}
    asked = Request(model_path="x", height=512, width=256)
    assert kontext.call_arguments(asked) == {"height": 512, "width": 256, "max_area": 512 * 256}
    clip = models.load("generic/LTXPipeline")
    given = clip.call_arguments(Request(model_path="x", tiny=True, num_frames=17))
    assert (given["num_frames"], given["height"], given["guidance_scale"]) == (17, 64, 4.0)
    assert clip.TINY_DEFAULTS.frames == 9
    sana = models.load("generic/SanaPipeline").call_arguments(Request(model_path="x", tiny=True))
    assert sana["use_resolution_binning"] is False
    assert sana["complex_human_instruction"] is None
