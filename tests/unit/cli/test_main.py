"""The command line: JSON of every command, exit codes, the environment variable, dequantize."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import quantmatrix
from quantmatrix.api import load_transformer
from quantmatrix.cli.main import main
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE
from quantmatrix.request import FP4_BACKEND_VARIABLE
from quantmatrix.tiny import hub

FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
FLUX = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev"]


def run_json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", "--tiny", FP8)["components"]["transformer"]
    assert found["family"] == "modelopt-fp8"
    assert "quant_algo FP8" in found["why"]
    assert found["quantized_layers"] == len(found["layers"]) > 0
    assert found["layers"]["transformer_blocks.0.attn.to_q"]["activation"] == "tensor-static"
    assert found["bytes"] == sum(found["bytes_per_dtype"].values())


@pytest.mark.parametrize(
    ("reference", "names", "layout"),
    [
        (
            "black-forest-labs/FLUX.2-dev-NVFP4",
            "bfl (flux-2)",
            "even column in the high nibble, block scales in 128 x 4 tiles",
        ),
        (
            "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer",
            "diffusers",
            "even column in the low nibble, block scales in rows",
        ),
    ],
)
def test_inspect_shows_how_a_file_is_laid_out(
    capsys: pytest.CaptureFixture[str], reference: str, names: str, layout: str
) -> None:
    found = run_json(capsys, "inspect", "--tiny", reference)["components"]["transformer"]
    assert found["names"] == [names]
    assert found["layouts"] == {layout: found["quantized_layers"]}
    assert main(["inspect", "--tiny", reference]) == 0
    said = capsys.readouterr().out
    assert f"  names        {names}\n" in said
    assert f" layers: {layout}\n" in said


def test_inspect_a_whole_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", "--tiny", "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8")
    families = {name: part["family"] for name, part in found["components"].items()}
    assert families == {"transformer": "msmodelslim", "transformer_2": "msmodelslim"}


def test_plan_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *FLUX, "--transformer-path", FP8, "--backend", "torch", "--hardware", "a100"]
    found = run_json(capsys, *words, code=3)
    assert found["ok"] is False
    assert found["refusal"]["rule"] == "fp8-torch-sm89"


def test_errors_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "plan", *FLUX, "--quantization-rank", "0", code=2)
    assert found["ok"] is False
    assert "greater than 0" in found["error"]["message"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["plan", *FLUX, "--frobnicate", "1"], 2),
        (["inspect", "/no/such/file.safetensors"], 1),
        (["matrix", "list", "--family", "abacus"], 2),
        (["matrix", "show", "abacus"], 2),
        ([], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    assert "Traceback" not in capsys.readouterr().err


def test_matrix_list_filters(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(
        capsys,
        "matrix",
        "list",
        "--family",
        "modelopt-fp8",
        "--hardware",
        "cpu",
        "--claim",
        "refused",
    )["rows"]
    assert rows
    assert {row["family"] for row in rows} == {"modelopt-fp8"}
    assert {row["claim"] for row in rows} == {"refused"}
    assert {"id", "family", "model", "hardware", "claim", "state"} <= rows[0].keys()


def test_matrix_frame_has_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "matrix", "list")["rows"]
    frame = quantmatrix.matrix_frame()
    assert list(frame["id"]) == [row["id"] for row in rows]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch" in json.dumps(run_json(capsys, "doctor"))


def test_generate_dumps_performance(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*FLUX, "--transformer-path", FP8, "--prompt", "x", "--num-inference-steps", "2"]
    found = run_json(capsys, "generate", *words, "--output-path", str(tmp_path))
    assert Path(found["runs"][0]["output"]).is_file()
    assert found["runs"][0]["quantized_layers"]["transformer"] > 0


def test_dequantize_gives_the_decoded_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import diffusers

    words = [*FLUX, "--transformer-path", FP8, "--output-path", str(tmp_path / "plain")]
    made = run_json(capsys, "dequantize", *words)
    assert made["dtype"] == "float32"
    plain = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "plain")
    folder = hub.default_folder()
    source = load_file(hub.find_snapshot(FP8, folder) / "diffusion_pytorch_model.safetensors")
    layer = "transformer_blocks.0.attn.to_q"
    expected = source[f"{layer}.weight"].float() * source[f"{layer}.weight_scale"]
    assert torch.equal(plain.get_submodule(layer).weight, expected)
    assert main(["dequantize", *words]) == 2
    again = load_transformer(str(tmp_path / "plain"), dtype=torch.float32)
    assert torch.equal(again.get_submodule(layer).weight, expected)


@pytest.mark.parametrize(
    "value", ["cudnn", "flashinfer_cudnn", "FLASHINFER_CUTLASS", "auto", "abacus"]
)
def test_fp4_backend_variable(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FP4_BACKEND_VARIABLE, value)
    words = [*FLUX, "--transformer-path", "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"]
    found = run_json(capsys, "plan", *words, "--hardware", "b200")
    used = set(found["components"]["transformer"]["backends"])
    name = value.lower().removeprefix("flashinfer_")
    if name in ("cudnn", "cutlass"):
        assert used == {f"flashinfer-{name}"}
        assert found["warnings"] == []
    if name == "abacus":
        assert any("abacus" in warning for warning in found["warnings"])
    on_cpu = run_json(capsys, "plan", *words, "--hardware", "cpu")
    assert set(on_cpu["components"]["transformer"]["backends"]) == {"decode"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate"], "--model-path"),
        (["generate", *FLUX, "--quantization-rank", "abc"], "invalid int value: 'abc'"),
        (["abacus"], "invalid choice: 'abacus'"),
        (["matrix"], "ACTION"),
        ([], "which command"),
    ],
)
def test_wrong_words_are_json_too(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, *words, code=2)
    assert said in found["error"]["message"]
    assert "--help" in found["error"]["message"]


def test_a_full_disk_is_json_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device", "reports/index.html")

    monkeypatch.setattr("quantmatrix.report.render.write", fail)
    found = run_json(capsys, "report", code=ENVIRONMENT_UNUSABLE)
    assert found["error"]["message"].startswith("reports/index.html: No space left on device")


def test_prompts_of_one_name_do_not_overwrite_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["generate", *FLUX, "--num-inference-steps", "1", "--output-path", str(tmp_path)]
    runs = run_json(capsys, *words, "--prompt", "Fox!", "fox?", "fox")["runs"]
    saved = [Path(run["output"]).name for run in runs]
    assert saved == ["fox-0.png", "fox-0-2.png", "fox-0-3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(saved)


@pytest.mark.parametrize("target", ["x.mp4", "file", "file/x.png", "file/folder"])
def test_a_place_for_the_output_is_looked_at_before_the_work(
    target: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("work before the output path was looked at")

    (tmp_path / "file").touch()
    monkeypatch.setattr("quantmatrix.runtime.generate.build_pipeline", work)
    words = ["generate", *FLUX, "--output-path", str(tmp_path / target)]
    assert "--output-path" in run_json(capsys, *words, code=2)["error"]["message"]


def test_a_place_for_latents_is_looked_at_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    words = ["generate", *FLUX, "--save-latents", str(tmp_path / "file" / "run.safetensors")]
    assert "--save-latents" in run_json(capsys, *words, code=2)["error"]["message"]


def test_dequantize_is_quiet_without_a_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["dequantize", *FLUX, "--transformer-path", FP8, "--output-path", str(tmp_path / "x")]
    assert main(words) == 0
    assert capsys.readouterr().err == ""


def test_dequantize_through_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["dequantize", *FLUX, "--transformer-path", FP8]
    found = run_json(capsys, *words, "--output-path", str(tmp_path / "file" / "x"), code=2)
    assert "is not a folder" in found["error"]["message"]


@pytest.fixture
def strange_file(tmp_path: Path) -> str:
    """A file whose tensor belongs to no model."""
    save_file({"alien": torch.zeros(2, 2)}, tmp_path / "strange.safetensors")
    return str(tmp_path / "strange.safetensors")


def test_a_plan_of_a_file_without_a_layer_is_none(
    strange_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "plan", *FLUX, "--transformer-weights-path", strange_file, code=1)
    assert f"{strange_file}: no linear layer in it" in found["error"]["message"]
    assert "alien" in found["error"]["message"]


def test_a_file_without_tensors_is_no_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_file({}, tmp_path / "none.safetensors")
    found = run_json(capsys, "inspect", str(tmp_path / "none.safetensors"), code=1)
    assert "no tensor in it" in found["error"]["message"]


def test_a_pipe_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    found = run_json(capsys, "inspect", str(tmp_path / "pipe.safetensors"), code=1)
    assert "this is a pipe" in found["error"]["message"]


def test_a_backend_that_nothing_uses_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "plan", *FLUX, "--backend", "abacus")
    assert found["warnings"] == ["--backend abacus is not used: no layer is quantized"]


def test_calibration_prompts_that_are_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    words = ["quantize", *FLUX, "--family", "fp8", "--output-path", str(tmp_path / "out")]
    found = run_json(capsys, *words, "--calibration-prompts", str(tmp_path / "x.png"), code=2)
    assert "expected text" in found["error"]["message"]


def test_a_stand_in_that_does_not_fit_on_the_disk(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    found = run_json(capsys, "tiny-hub", str(tmp_path), code=ENVIRONMENT_UNUSABLE)
    assert "No space left on device" in found["error"]["message"]
    assert list(tmp_path.iterdir()) == []
