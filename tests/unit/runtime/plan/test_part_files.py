"""Damaged copies of each model's stand-in: the plan refuses them by the user's own path."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantmatrix import models
from quantmatrix.api import load_transformer, plan
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Request
from quantmatrix.runtime.pipeline import build_pipeline, readable_errors
from quantmatrix.runtime.plan.other_parts import find_class
from quantmatrix.runtime.plan.part_files import check_class, check_files, explain_vocabulary
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tables import read
from quantmatrix.tiny import hub

Damage = Callable[[Path], object]


@pytest.fixture(params=models.IDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a model's stand-in that a test may damage."""
    repo = models.load(request.param).REPO
    hub.ensure(repo, hub.default_folder())
    target = tmp_path / "base"
    shutil.copytree(hub.find_snapshot(repo, hub.default_folder()), target)
    return target


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def change_index(base: Path, name: str, entry: list[str]) -> None:
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, name: entry}))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES: list[tuple[Damage, str]] = [
    (
        lambda b: (b / "tokenizer/tokenizer.json").unlink(),
        r"tokenizer: tokenizer .* has no vocabulary: expected tokenizer\.json, or ",
    ),
    (
        lambda b: cut(b / "tokenizer/tokenizer.json"),
        r"tokenizer: tokenizer has a tokenizer\.json that is not a JSON object, or is cut off",
    ),
    (
        lambda b: (b / "tokenizer/tokenizer.json").write_text(""),
        r"tokenizer: tokenizer has a tokenizer\.json that is empty",
    ),
    (lambda b: shutil.rmtree(b / "tokenizer"), r"tokenizer: tokenizer is missing, or empty"),
    (lambda b: empty(b / "text_encoder"), r"text_encoder: text_encoder is missing, or empty"),
    (
        lambda b: cut(b / "text_encoder/model.safetensors"),
        r"text_encoder/model\.safetensors: .* truncated",
    ),
    (
        lambda b: (b / "text_encoder/model.safetensors").unlink(),
        r"text_encoder: no \.safetensors weights .*\(text_encoder of the pipeline\)",
    ),
    (
        lambda b: (b / "text_encoder/config.json").unlink(),
        r"text_encoder: text_encoder has no config\.json",
    ),
    (lambda b: cut(b / "text_encoder/config.json"), r"text_encoder/config\.json: not valid JSON"),
    (
        lambda b: cut(b / "vae/diffusion_pytorch_model.safetensors"),
        r"vae/diffusion_pytorch_model\.safetensors: .* truncated",
    ),
    (lambda b: shutil.rmtree(b / "vae"), r"vae: vae is missing, or empty"),
    (
        lambda b: (b / "scheduler/scheduler_config.json").rename(b / "scheduler/x.json"),
        r"scheduler: scheduler has no scheduler_config\.json",
    ),
    (
        lambda b: change_index(b, "vae", ["diffusers", "AutoencoderOfTomorrow"]),
        r"model_index\.json: vae is diffusers\.AutoencoderOfTomorrow: .* has no such class",
    ),
    (
        lambda b: change_index(b, "text_encoder", ["my_code", "Encoder"]),
        r"model_index\.json: text_encoder is my_code\.Encoder: .*never run",
    ),
    (
        lambda b: change_index(b, "vae", ["glm_image", "AutoencoderOfTomorrow"]),
        r"vae is glm_image\.AutoencoderOfTomorrow: .* glm_image [0-9.]+ has no such class",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_part_is_refused_by_the_plan(base: Path, damage: Damage, message: str) -> None:
    whole = plan(Request(model_path=str(base), device="cpu"))
    assert isinstance(whole, Plan)
    damage(base)
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(Request(model_path=str(base), device="cpu"))
    assert str(caught.value).startswith(str(base))
    assert "trust" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message) as caught:
        build_pipeline(whole)
    assert str(caught.value).startswith(str(base))


def test_parts_that_stand_under_the_name_of_their_pipelines_folder_are_known() -> None:
    """diffusers writes so what it loads itself: GLM-Image's language model, LTX-2's connectors."""
    import transformers

    for library, name in (("glm_image", "GlmImageProcessor"), ("ltx2", "LTX2TextConnectors")):
        check_class("part", library, name, "model_index.json")
    index = {"processor": ["glm_image", "GlmImageProcessor"], "vae": ["os", "system"]}
    assert find_class(index, "processor") is transformers.GlmImageProcessor
    assert find_class(index, "vae") is None
    for library in ("os", "pipeline_utils", "FluxPipeline", "__dict__", "glm_image.os", None):
        with pytest.raises(CheckpointError, match="never run"):
            check_class("part", library, "DiffusionPipeline", "model_index.json")


def test_the_transformer_does_without_the_rest(base: Path) -> None:
    """Parts of a pipeline matter to those who run it, not to who loads a transformer."""
    for part in ("tokenizer", "text_encoder", "vae"):
        shutil.rmtree(base / part)
    assert load_transformer(str(base))


@pytest.mark.parametrize("model", models.IDS)
def test_an_override_takes_the_place_of_a_damaged_part(model: str, tmp_path: Path) -> None:
    repo = models.load(model).REPO
    hub.ensure(repo, hub.default_folder())
    sound = hub.find_snapshot(repo, hub.default_folder())
    base = tmp_path / "base"
    shutil.copytree(sound, base)
    shutil.rmtree(base / "vae")
    paths = {"vae": str(sound / "vae")}
    assert plan(Request(model_path=str(base), component_paths=paths, device="cpu")).ok
    shutil.copytree(sound / "vae", tmp_path / "cut")
    cut(tmp_path / "cut/diffusion_pytorch_model.safetensors")
    paths = {"vae": str(tmp_path / "cut")}
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/cut/.*truncated"):
        plan(Request(model_path=str(base), component_paths=paths, device="cpu"))


def test_a_shard_of_a_text_encoder_that_is_missing(tmp_path: Path) -> None:
    repo = read.read().models["flux-1"].repo
    hub.ensure(repo, hub.default_folder())
    base = tmp_path / "base"
    shutil.copytree(hub.find_snapshot(repo, hub.default_folder()), base)
    weights = base / "text_encoder_2/model.safetensors"
    shard = "model-00001-of-00002.safetensors"
    weights.rename(weights.with_name(shard))
    index = {"weight_map": {"a": shard, "b": shard.replace("00001-of", "00002-of")}}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lists 2 shards, 1 are missing.*text_encoder_2 of"):
        plan(Request(model_path=str(base), device="cpu"))
    (weights.with_name("model.safetensors.index.json")).write_text(
        json.dumps({"weight_map": {"absent.weight": shard}})
    )
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002\.safetensors without absent\.weight"
    ):
        plan(Request(model_path=str(base), device="cpu"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1}\n', ""),
        (b"", "is empty"),
        (b'{"a": ', "is not a JSON object, or is cut off"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a JSON object, or is cut off"),
    ],
)
def test_vocabularies(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert explain_vocabulary(tmp_path / "tokenizer.json") == what


def test_every_class_of_the_stand_ins_is_known(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    for name, entry in index.items():
        if isinstance(entry, list) and entry[1]:
            check_class(name, *entry, "model_index.json")


def test_errors_of_libraries_name_the_folder_of_the_user() -> None:
    with (
        pytest.raises(
            CheckpointError, match=r"/mine: vae cannot .* \(OSError: no file in /mine/vae\)"
        ),
        readable_errors("/mine: vae", "/tmp/view", "/mine"),
    ):
        raise OSError("no file in\n /tmp/view/vae")
    with (
        pytest.raises(CheckpointError, match="code that comes with the model, which is never run"),
        readable_errors("/mine: text_encoder", "/tmp/view", "/mine"),
    ):
        raise ValueError("set the option `trust_remote_code=True` to remove this error")
    with pytest.raises(MemoryError), readable_errors("/mine", "/tmp/view", "/mine"):
        raise MemoryError


@pytest.mark.parametrize(
    ("class_name", "files", "message"),
    [
        ("CLIPTokenizer", ["vocab.json", "merges.txt"], ""),
        ("CLIPTokenizer", ["vocab.json"], "no vocabulary"),
        ("CLIPTokenizer", ["spiece.model"], "no vocabulary"),
        ("T5TokenizerFast", ["spiece.model"], ""),
        ("T5TokenizerFast", ["vocab.json", "merges.txt"], "no vocabulary"),
        ("Qwen2Tokenizer", ["tokenizer.json"], ""),
        ("PixtralProcessor", ["tekken.json"], ""),
        ("PixtralProcessor", ["tokenizer_config.json"], "no vocabulary"),
    ],
)
def test_vocabularies_by_class(
    class_name: str, files: list[str], message: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    if not message:
        check_files(LocalFolder(tmp_path), "tokenizer", class_name)
        return
    with pytest.raises(CheckpointError, match=message):
        check_files(LocalFolder(tmp_path), "tokenizer", class_name)


def test_a_processor_says_what_it_is_in_either_file(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json or processor_"):
        check_files(LocalFolder(tmp_path), "processor", "Qwen2VLProcessor")
    (tmp_path / "processor_config.json").write_text("{}")
    check_files(LocalFolder(tmp_path), "processor", "Qwen2VLProcessor")


def test_parts_of_guided_and_byte_pipelines_have_their_own_files(tmp_path: Path) -> None:
    """HunyuanVideo-1.5: a guider, and a tokenizer of bytes; Sana: a bound that is minus infinity."""
    for name, file, text in (
        ("guider", "guider_config.json", '{"_class_name": "ClassifierFreeGuidance"}'),
        ("tokenizer_2", "tokenizer_config.json", '{"tokenizer_class": "ByT5Tokenizer"}'),
        ("scheduler", "scheduler_config.json", '{"lambda_min_clipped": -Infinity}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    classes = {
        "guider": "ClassifierFreeGuidance",
        "tokenizer_2": "ByT5Tokenizer",
        "scheduler": "DPMSolverMultistepScheduler",
    }
    for name, class_name in classes.items():
        check_files(LocalFolder(tmp_path / name), name, class_name)
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"shift": NaN}')
    with pytest.raises(CheckpointError, match="NaN is not a finite number"):
        check_files(LocalFolder(tmp_path / "scheduler"), "scheduler", classes["scheduler"])
    (tmp_path / "guider/guider_config.json").rename(tmp_path / "guider/config.json")
    with pytest.raises(
        CheckpointError, match=r"guider has no guider_config\.json: expected one beside"
    ):
        check_files(LocalFolder(tmp_path / "guider"), "guider", classes["guider"])
