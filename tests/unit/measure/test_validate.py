"""Validate: a sound checkpoint passes with everything measured, an unsound one is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from quantmatrix import api
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.cli.main import main
from quantmatrix.measure import validate
from quantmatrix.measure.census import (
    find_differences,
    find_undeclared,
    is_left_alone,
    matches,
    name_kind,
)
from quantmatrix.measure.validation_page import describe_scope, quote
from quantmatrix.proof.record import make_portable
from quantmatrix.request import Request
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan

FLUX = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev"]
FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
LAYER = "transformer_blocks.0.attn.to_q"


def plan_fp8(path: str | Path = FP8) -> Plan:
    plan = api.plan(Request.from_words([*FLUX, "--transformer-path", str(path)]))
    assert isinstance(plan, Plan)
    return plan


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with one layer in BF16 that no ignore list names."""
    files = [Path(file) for file in plan_fp8().components["transformer"].checkpoint.files]
    folder = tmp_path_factory.mktemp("damaged") / "transformer"
    folder.mkdir()
    shutil.copy(files[0].parent / "config.json", folder)
    for file in files:
        tensors = load_file(file)
        if f"{LAYER}.weight" in tensors:
            scale = tensors.pop(f"{LAYER}.weight_scale")
            tensors.pop(f"{LAYER}.input_scale", None)
            weight = tensors[f"{LAYER}.weight"].float() * scale
            tensors[f"{LAYER}.weight"] = weight.to(torch.bfloat16)
        save_file(tensors, folder / file.name)
    return folder


def run(*words: str, code: int) -> None:
    assert main(["validate", *FLUX, *words]) == code


def test_a_sound_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two of them\na red fox\n\n a blue <fox>\n")
    folder = tmp_path / "out"
    words = ("--transformer-path", FP8, "--prompts", str(prompts), "--output-path", str(folder))
    run(*words, "--json", code=0)
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((folder / "validation.json").read_text())
    assert report == {key: value for key, value in printed.items() if key != "output"}
    assert report["ok"] is True
    assert report["census"]["transformer"]["quantized"] == 26
    assert len(report["layers"]["errors"]["transformer"]) == 26
    assert 0 < report["layers"]["summary"]["transformer"]["worst"] < 0.1
    assert [run["prompt"] for run in report["runs"]] == ["a red fox", "a blue <fox>"]
    for one in report["runs"]:
        assert len(one["latents"]["steps"]) == 4
        assert 20 < one["latents"]["final"]["psnr_db"] < 80
        assert 0.9 < one["media"]["ssim"] < 1
        assert 0 < one["quality"]["flip"] < 0.5
    assert report["quality"]["flip"]["worst"] == max(r["quality"]["flip"] for r in report["runs"])
    assert (
        report["quality"]["ms_ssim"] is None
    )  # pictures of a stand-in are too small for five scales
    assert "176 x 176" in report["quality"]["missing"]["ms_ssim"]
    assert Image.open(folder / "contact-sheet.png").width >= 3 * 256
    assert report["memory"]["bf16"]["weight_bytes"] >= report["memory"]["quantized"]["weight_bytes"]
    assert "speed" not in report
    assert not any("seconds" in one for one in report["runs"])
    assert (report["scope"], report["base_id"]) == ("stand-in", "black-forest-labs/FLUX.1-dev")
    assert report["checkpoint"]["digest"].startswith("sha256:")
    assert str(Path.home()) not in json.dumps({**report, "command": ""})
    assert f"--prompts {prompts}" in report["command"]
    base, quantized, difference = (Image.open(folder / f"images/0-{k}.png") for k in
                                   ("bf16", "quantized", "difference"))  # fmt: skip
    assert base.size == quantized.size == difference.size == (64, 64)
    assert base.tobytes() != quantized.tobytes()
    page = (folder / "index.html").read_text()
    assert "a blue &lt;fox&gt;" in page
    assert page.count("<img") == 7
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("stand-in: random weights at a tiny size") == 8
    card = (folder / "model-card.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["quantized", "fp8", "modelopt-fp8"],
    }
    assert rest.startswith("\n## Quantization, measured")
    assert "| scope | stand-in: random weights at a tiny size |" in card
    assert "seconds per run" not in card
    assert "| verdict | as declared |" in card
    assert "\n\n```bash\nquantmatrix validate --model-path" in card
    assert "| latents, PSNR | at least " in card
    assert "| pictures, SSIM | at least 0.9" in card
    run(*words, code=2)  # nothing is written over


def test_a_snapshot_of_the_hub_is_told_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--some--flux-fp8"
    file = cache / "snapshots" / ("a" * 40) / "transformer" / "w.safetensors"
    (cache / "blobs").mkdir(parents=True)
    places = validate.name_folders([str(file)])
    assert make_portable(f"--x {file}", places) == "--x some/flux-fp8/transformer/w.safetensors"
    request = Request.from_words(["--model-path", "black-forest-labs/FLUX.1-dev"])
    assert validate.name_scope(request, [str(file)]) == "published"
    assert validate.name_scope(request, [str(tmp_path / "w.safetensors")]) == "local files"
    tiny = Request.from_words([*FLUX])
    assert validate.name_scope(tiny, [str(file)]) == "stand-in"
    plan = plan_fp8()
    assert validate.name_base(replace(request, model_path=str(tmp_path)), plan) == plan.base
    assert "weights that are in no repository yet" in describe_scope("local files")


@pytest.mark.parametrize("text", ["fp8", "no", "12", "a: b", "W8A8_DYNAMIC", "owner/name-1.0"])
def test_front_matter_is_text(text: str) -> None:
    assert yaml.safe_load(quote(text)) == text


def test_an_expert_that_no_step_called_is_said(tmp_path: Path) -> None:
    base = ["--tiny", "--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"]
    parts = "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"
    paths = ["--transformer-path", f"{parts}/transformer"]
    paths += ["--transformer-2-path", f"{parts}/transformer_2", "--num-inference-steps", "1"]
    folder = tmp_path / "out"
    assert main(["validate", *base, *paths, "--output-path", str(folder)]) == 0
    census = json.loads((folder / "validation.json").read_text())["census"]
    assert census["transformer"]["not_called"] == []
    assert len(census["transformer_2"]["not_called"]) == census["transformer_2"]["quantized"]
    count = census["transformer_2"]["quantized"]
    card = (folder / "model-card.md").read_text()
    assert f"| not called | {count} layers of transformer_2 |" in card


def test_a_layer_that_is_not_quantized_as_declared(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    run("--transformer-path", str(damaged), "--output-path", str(folder), code=1)
    assert f"transformer.{LAYER}: {LAYER}.weight is BF16 in" in capsys.readouterr().err
    report = json.loads((folder / "validation.json").read_text())
    assert report["ok"] is False
    assert list(report["census"]["transformer"]["not_as_declared"]) == [LAYER]
    assert "1 problems" in (folder / "model-card.md").read_text()
    assert LAYER in (folder / "index.html").read_text()


def test_a_declaration_may_leave_it_alone(damaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "declared"
    shutil.copytree(damaged, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(LAYER)
    (folder / "config.json").write_text(json.dumps(config))
    assert find_undeclared(plan_fp8(folder).components["transformer"]) == {}
    assert list(find_undeclared(plan_fp8(damaged).components["transformer"])) == [LAYER]


def test_a_model_that_is_not_as_planned() -> None:
    plan = plan_fp8()
    part = plan.components["transformer"]
    model = build_pipeline(plan).transformer
    assert find_differences(part, model) == {}
    parent = model.get_submodule(LAYER.rpartition(".")[0])
    parent.to_q = torch.nn.Linear(parent.to_q.in_features, parent.to_q.out_features)
    assert find_differences(part, model) == {
        LAYER: "in full precision, although the plan has it quantized"
    }
    layers = {name: pieces for name, pieces in part.layers.items() if not name.endswith("to_k")}
    fewer = replace(part, layers=layers)
    extra = [name for name in find_differences(fewer, model) if name.endswith("to_k")]
    assert len(extra) == len(part.layers) - len(layers) > 0


def test_a_wrong_scale_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [file] = [Path(f) for f in plan_fp8().components["transformer"].checkpoint.files]
    tensors = load_file(file)
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"] * 8
    folder = tmp_path / "transformer"
    folder.mkdir()
    shutil.copy(file.parent / "config.json", folder)
    save_file(tensors, folder / file.name)
    out = str(tmp_path / "out")
    run("--transformer-path", str(folder), "--output-path", out, code=1)
    said = capsys.readouterr().err
    assert f"transformer.{LAYER}: relative error" in said
    assert f"layer {LAYER} decodes to other weights" in said
    report = json.loads((Path(out) / "validation.json").read_text())
    assert report["witness"]["transformer"]["verdict"] == "disagrees"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--transformer-path", FP8), "--output-path is missing"),
        (("--output-path", "out"), "no transformer component is quantized"),
        (("--prompts", "none.txt", "--output-path", "out"), "--prompts none.txt"),
        (("--prompts", "a", "--prompt", "b", "--output-path", "out"), "give one of them"),
    ],
)
def test_usage(
    words: tuple[str, ...],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(*words, code=2)
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_a_refusal(tmp_path: Path) -> None:
    words = ("--transformer-path", FP8, "--backend", "torch", "--output-path")
    run(*words, str(tmp_path / "out"), code=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "name", "expected"),
    [
        ("proj_out", "proj_out", True),
        ("proj_out", "single_transformer_blocks.3.proj_out", True),
        ("transformer_blocks.0", "transformer_blocks.0.attn.to_q", True),
        ("transformer_blocks.0", "transformer_blocks.01.attn.to_q", False),
        ("transformer_blocks.0", "single_transformer_blocks.0.attn", False),
        ("*.attn.*", "blocks.3.attn.to_q", True),
        ("re:.*to_q$", "blocks.3.attn.to_q", True),
        ("re:to_q", "blocks.3.attn.to_q", False),
    ],
)
def test_entries_of_ignore_lists(entry: str, name: str, expected: bool) -> None:
    assert matches(entry, name) is expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"a.weight": "FLOAT"}, True),
        ({"a.weight": "W8A8"}, False),
        ({"layers": {"a": {"format": "bf16"}}}, True),
        ({"layers": {"a": "float8_e4m3fn"}}, False),
        ({"modules_to_not_convert": ["b"]}, False),
        ({}, False),
    ],
)
def test_words_of_declarations(block: dict[str, Any], expected: bool) -> None:
    checkpoint = Checkpoint.__new__(Checkpoint)
    object.__setattr__(checkpoint, "quantization", block)
    assert is_left_alone(checkpoint, "a", "a") is expected


def test_kinds_differ_in_block_numbers_only() -> None:
    assert name_kind("blocks.1.attn.0.to_q") == name_kind("blocks.12.attn.3.to_q")
    assert name_kind("blocks.1.to_q") != name_kind("blocks.1.to_k")
    assert name_kind("proj_out") == "proj_out"
