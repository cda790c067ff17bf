"""Text encoders made by `quantmatrix quantize --component`: they load, and are what they were made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from quantmatrix.api import plan
from quantmatrix.cli.main import main
from quantmatrix.errors import UsageError
from quantmatrix.request import Request
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub
from quantmatrix.tiny.hub import use_tiny
from quantmatrix.tools.quantize_encoder import quantize_encoder

FLUX = "black-forest-labs/FLUX.1-dev"
COMMAND = ["quantize", "--tiny", "--model-path", FLUX, "--component", "text_encoder_2"]


def make(family: str, output: Path, **options: Any) -> dict[str, Any]:
    request = use_tiny(Request(model_path=FLUX, tiny=True, device="cpu", height=32, width=32))
    return quantize_encoder(
        request, "text_encoder_2", family=family, output=output, prompts=["a fox"], **options
    )


def use(output: Path) -> Plan:
    paths = {"text_encoder_2": str(output)}
    found = plan(Request(model_path=FLUX, tiny=True, device="cpu", component_paths=paths))
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize(
    ("family", "scheme", "name"),
    [
        ("modelopt-fp8", None, "folder"),
        ("modelopt-nvfp4", None, "folder"),
        ("fp8", "tensor-dynamic", "x.safetensors"),
        ("comfyui-int8", "int8", "x.safetensors"),
    ],
)
def test_what_is_made_loads_and_agrees_with_the_base(
    family: str, scheme: str | None, name: str, tmp_path: Path
) -> None:
    found = make(family, tmp_path / name, scheme=scheme)
    counts = found["components"]["text_encoder_2"]
    assert (tmp_path / name).is_file() == name.endswith(".safetensors")
    planned = use(tmp_path / name)
    part = planned.encoders["text_encoder_2"]
    assert (part.family, len(part.layers)) == (family, counts["quantized"])
    assert counts["quantized"] == 14  # q, k, v, o and the three of a gated MLP, in two blocks
    model = load_component(part, planned.request)
    assert model.witness.verdict == "agrees"  # type: ignore[union-attr]


def test_input_scales_are_of_the_prompts_and_kept_layers_stay(tmp_path: Path) -> None:
    make("modelopt-fp8", tmp_path / "t5", kept=[r".*\.wo"])
    tensors = load_file(tmp_path / "t5" / "model.safetensors")
    scales = {name: t for name, t in tensors.items() if name.endswith(".input_scale")}
    assert len(scales) == 12
    assert len({float(scale) for scale in scales.values()}) > 4  # q, k and v of a block share one
    assert not any(".wo.input_scale" in name for name in scales)
    assert len(use(tmp_path / "t5").encoders["text_encoder_2"].layers) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--family", "gguf"], "--family gguf: it is for transformers"),
        (["--family", "fp8", "--rank", "8"], "--rank: for nunchaku-svdq"),
        (["--family", "fp8", "--keep", "("], "--keep (: no regular expression"),
    ],
)
def test_wrong_words_are_refused_before_any_work(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *words, "--output-path", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_and_other_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        make("fp8", tmp_path / "t5", scheme="tensor-dynamic")
    named = {"text_encoder_2": "/path/to/t5-modelopt-fp8"}
    with pytest.raises(UsageError, match=r"--text-encoder-2-path: the base model's own"):
        quantize_encoder(
            use_tiny(Request(model_path=FLUX, tiny=True, device="cpu", component_paths=named)),
            "text_encoder_2", family="modelopt-fp8", output=tmp_path / "x",
        )  # fmt: skip
    with pytest.raises(UsageError, match="has the text encoders text_encoder, text_encoder_2"):
        quantize_encoder(
            use_tiny(Request(model_path=FLUX, tiny=True, device="cpu")),
            "vae", family="modelopt-fp8", output=tmp_path / "x",
        )  # fmt: skip


@pytest.mark.parametrize("entry", [None, 7, [], [None, None], "x"])
def test_an_index_that_names_no_part_is_no_traceback(
    entry: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.ensure(FLUX, hub.default_folder())
    model = shutil.copytree(hub.find_snapshot(FLUX, hub.default_folder()), tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": entry}))
    words = ["--family", "modelopt-fp8", "--model-path", str(model), "--device", "cpu"]
    more = ["--component", "text_encoder_9", "--output-path", str(tmp_path / "x")]
    assert main(["quantize", *words, *more]) == 2
    assert "has the text encoders text_encoder, text_encoder_2;" in capsys.readouterr().err


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    words = ["--family", "modelopt-fp8", "--calibration-prompts", str(prompts), "--json"]
    assert main([*COMMAND, *words, "--output-path", str(tmp_path / "t5")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["components"] == {"text_encoder_2": {"quantized": 14, "kept": 2}}
    assert (said["scheme"], said["prompts"]) == ("FP8", 1)
