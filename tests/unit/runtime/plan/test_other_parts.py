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


def test_a_vae_that_modelopt_quantized_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "vae", tmp_path / "plain")
    declare(base / "vae")
    made = decide(base)
    [note] = made.warnings
    assert "vae was quantized by ModelOpt (quant_algo FP8)" in note
    with pytest.raises(CheckpointError, match=r"vae was quantized .*--vae-path"):
        build_pipeline(made)
    replaced = decide(base, vae=str(tmp_path / "plain"))
    assert replaced.warnings == ()
    assert build_pipeline(replaced)
    with pytest.raises(CheckpointError, match=r"vae/config\.json.*vae was quantized"):
        build_pipeline(decide(base, vae=str(base / "vae")))


@pytest.mark.parametrize("given", [False, True])
def test_a_text_encoder_that_declares_codes_and_has_none_is_refused(
    base: Path, tmp_path: Path, given: bool
) -> None:
    """Of the base model, or named: what is declared must be there."""
    folder = tmp_path / "coded" if given else base / "text_encoder"
    if given:
        shutil.copytree(base / "text_encoder", folder)
    declare(folder)
    with pytest.raises(CheckpointError, match=r"declared as modelopt-fp8 .*no layer .*quantized"):
        decide(base, **({"text_encoder": str(folder)} if given else {}))


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
    message = rf"tensor {layer}\.qweight .*is quantized, but nothing.*--text-encoder-2-path"
    with pytest.raises(CheckpointError, match=message):
        decide(base, text_encoder_2=str(coded))
    shutil.copy(file, plain / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        decide(base)


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
