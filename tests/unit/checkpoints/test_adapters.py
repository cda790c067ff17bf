"""LoRA files: told from weights, left out of a folder by name, refused in a model's place."""

from __future__ import annotations

from pathlib import Path

import pytest
from weight_files import write_index, write_json, write_weights

from quantmatrix.checkpoints.adapters import explain_adapter, is_adapter
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.opening import open_component, open_weights
from quantmatrix.cli.main import main
from quantmatrix.request import Hub
from quantmatrix.runtime.plan.inspect import inspect

LAYER = "transformer_blocks.0.attn.to_q"
ADAPTERS = {
    "peft": (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"),
    "peft, named": (f"transformer.{LAYER}.lora_A.default.weight", f"{LAYER}.lora_magnitude_vector"),
    "kohya": ("lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", "lora_unet_a.alpha"),
    "comfyui": ("diffusion_model.blocks.0.ffn.0.lora_up.weight", "diffusion_model.x.diff_b"),
    "dora": (f"{LAYER}.lora_A.weight", f"{LAYER}.dora_scale"),
    "older diffusers": (f"{LAYER}_lora.down.weight", f"{LAYER}.lora.up.weight"),
    "lokr": ("lycoris_a.lokr_w1", "lycoris_a.lokr_w2_a", "lycoris_a.alpha"),
    "loha": ("lycoris_a.hada_w1_a", "lycoris_a.hada_t2"),
    "nunchaku": (f"{LAYER}.lora_down", f"{LAYER}.lora_up"),
}
MODELS = {
    "plain": (f"{LAYER}.weight", f"{LAYER}.bias"),
    "fp8": (f"{LAYER}.weight", f"{LAYER}.weight_scale"),
    "older SVDQuant": (f"{LAYER}.qweight", f"{LAYER}.wscales", f"{LAYER}.lora_down"),
    "ModelOpt's branch": (f"{LAYER}.weight", f"{LAYER}.svdquant_lora_a"),
    "nothing": (),
}
NAME = "pytorch_lora_weights.safetensors"


def write(path: Path, names: tuple[str, ...]) -> Path:
    return write_weights(path, dict.fromkeys(names, ("BF16", (4, 8))))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_factors_of_every_writer(kind: str) -> None:
    assert is_adapter(ADAPTERS[kind])
    assert not is_adapter([*ADAPTERS[kind], "proj_out.weight"])


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_no_factors(kind: str) -> None:
    assert not is_adapter(MODELS[kind])


def fill(folder: Path, form: str) -> list[str]:
    """Weights of a component in a folder; their names."""
    write_json(folder / "config.json", {"_class_name": "FluxTransformer2DModel"})
    names = {
        "shards": ["a.safetensors", "b.safetensors"],
        "files": ["a.safetensors", "b.safetensors"],
    }
    chosen = names.get(form, ["a-mixed.safetensors" if form == "mixed" else "a.safetensors"])
    for name in chosen:
        write(folder / name, (f"{name.split('.')[0]}.weight",))
    if form == "shards":
        write_index(folder / "model.safetensors.index.json", chosen)
    return chosen


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("form", ["file", "files", "shards", "mixed"])
def test_a_lora_beside_weights_is_left_out_and_named(
    tmp_path: Path, kind: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = fill(tmp_path, form)
    lora = write(tmp_path / NAME, ADAPTERS[kind])
    opened = open_component(str(tmp_path), Hub())
    assert sorted(opened.files) == [str(tmp_path / name) for name in chosen]
    assert opened.left_out == (str(lora),)
    shown = inspect(str(tmp_path))["components"]["transformer"]
    assert shown["left_out"] == [str(lora)]
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"left out     {lora}" in capsys.readouterr().out
    if form != "files":
        assert open_weights(str(tmp_path), Hub()).left_out == (str(lora),)
        assert open_weights(str(tmp_path / chosen[0]), Hub()).left_out == ()


def test_what_is_no_lora_is_not_left_out(tmp_path: Path) -> None:
    """Neither a damaged file nor another part of the weights."""
    fill(tmp_path, "shards")
    (tmp_path / "c.safetensors").write_text("no header")
    write(tmp_path / "d.safetensors", ("d.weight", f"{LAYER}.lora_A.weight"))
    assert open_component(str(tmp_path), Hub()).left_out == ()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("more", [(), ("proj_out.weight",)])
def test_factors_in_place_of_weights_are_refused(
    tmp_path: Path, kind: str, more: tuple[str, ...]
) -> None:
    path = write(tmp_path / NAME, (*ADAPTERS[kind], *more))
    said = inspect(str(path))["components"]["transformer"]
    assert said["unknown"]
    for text in (str(path), "LoRA"):
        assert text in said["why"]
    assert ("this is a LoRA" in said["why"]) is not bool(more)
    assert "svdq" not in said["why"]


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_not_explained(kind: str, tmp_path: Path) -> None:
    opened = open_weights(str(write(tmp_path / "a.safetensors", MODELS[kind])), Hub())
    assert isinstance(opened, Checkpoint)
    assert explain_adapter(opened) is None


def test_a_plan_warns_of_it(tmp_path: Path) -> None:
    import shutil

    from quantmatrix.api import plan
    from quantmatrix.tiny import hub

    reference, folder = "Qwen/Qwen-Image", hub.default_folder()
    hub.ensure(reference, folder)
    base = hub.find_snapshot(reference, folder)
    shutil.copytree(base / "transformer", tmp_path / "transformer")
    lora = write(tmp_path / "transformer" / NAME, ADAPTERS["peft"])
    planned = plan(
        model_path=str(base), component_paths={"transformer": str(tmp_path / "transformer")}
    )
    assert planned.ok
    assert [text for text in planned.warnings if str(lora) in text and "LoRA" in text]
