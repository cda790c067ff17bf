"""Parts beside the transformers: ModelOpt's are refused, half a model is told from a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantmatrix.api import plan
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Request
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub

FLUX = "black-forest-labs/FLUX.1-dev"
BLOCK = {"quant_method": "modelopt", "quant_algo": "FP8"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the tiny FLUX.1 that a test may change."""
    hub.ensure(FLUX, hub.default_folder())
    target = tmp_path / "base"
    shutil.copytree(hub.find_snapshot(FLUX, hub.default_folder()), target)
    return target


def decide(base: Path, **paths: str) -> Plan:
    planned = plan(Request(model_path=str(base), component_paths=paths, device="cpu"))
    assert isinstance(planned, Plan)
    return planned


def declare(folder: Path) -> None:
    """Put ModelOpt's declaration into a part's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": BLOCK}))


@pytest.mark.parametrize(
    ("part", "flag"), [("text_encoder", "--text-encoder-path"), ("vae", "--vae-path")]
)
def test_a_part_that_modelopt_quantized_is_refused(
    base: Path, tmp_path: Path, part: str, flag: str
) -> None:
    shutil.copytree(base / part, tmp_path / "plain")
    declare(base / part)
    made = decide(base)
    [note] = made.warnings
    assert f"{part} was quantized by ModelOpt (quant_algo FP8)" in note
    with pytest.raises(CheckpointError, match=rf"{part} was quantized .*{flag}"):
        build_pipeline(made)
    replaced = decide(base, **{part: str(tmp_path / "plain")})
    assert replaced.warnings == ()
    assert build_pipeline(replaced)


def test_a_quantized_part_is_refused_as_an_override(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "text_encoder", tmp_path / "coded")
    declare(tmp_path / "coded")
    with pytest.raises(CheckpointError, match=r"coded/config\.json.*text_encoder was quantized"):
        build_pipeline(decide(base, text_encoder=str(tmp_path / "coded")))


def test_a_text_encoder_of_codes_that_nothing_declares_is_refused(
    base: Path, tmp_path: Path
) -> None:
    """As the SVDQuant engine's T5 is: transformers drew the missing weights at random."""
    plain, coded = base / "text_encoder_2", tmp_path / "coded"
    shutil.copytree(plain, coded)
    file = coded / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("SelfAttention.q.weight"))
    rows, columns = tensors.pop(name).shape
    layer = name.removesuffix(".weight")
    tensors[f"{layer}.qweight"] = torch.zeros(rows // 4, columns // 2, dtype=torch.int32)
    save_file(tensors, file, {"format": "pt"})
    message = rf"tensor {layer}\.qweight holds codes.*random.*--text-encoder-2-path"
    with pytest.raises(CheckpointError, match=message):
        build_pipeline(decide(base, text_encoder_2=str(coded)))
    shutil.copy(file, plain / "model.safetensors")
    made = decide(base)
    assert any("text_encoder_2 would be loaded with random numbers" in w for w in made.warnings)
    with pytest.raises(CheckpointError, match=message):
        build_pipeline(made)


def test_an_export_of_the_transformer_alone_is_no_whole_model(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    kept = {key: index[key] for key in ("_class_name", "transformer")}
    (base / "model_index.json").write_text(json.dumps(kept))
    made = decide(base)
    [note] = made.warnings
    assert "a part of a model, without the other components" in note
    with pytest.raises(CheckpointError, match=r"without scheduler, text_encoder, .*--transformer-"):
        build_pipeline(made)


def test_an_override_is_of_the_class_that_the_base_names(base: Path) -> None:
    """The automatic class of a T5 encoder is the whole T5, which asks for a decoder's input."""
    made = decide(base, text_encoder_2=str(base / "text_encoder_2"))
    assert type(build_pipeline(made).text_encoder_2) is transformers.T5EncoderModel
