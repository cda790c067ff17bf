"""Files in the first names of a model: known by them, and refused for another model."""

from __future__ import annotations

from pathlib import Path

import pytest
from original_states import SPACES
from weight_files import write_weights

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.checkpoints.original_names import explain_original, find_original, is_original
from quantmatrix.cli.main import main
from quantmatrix.errors import CheckpointError
from quantmatrix.runtime.plan.inspect import inspect
from quantmatrix.tiny import hub

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"
SHARED = (f"{DOUBLE}.img_attn.qkv.weight", f"{SINGLE}.linear1.weight", "img_in.weight")
FLUX_1 = (
    f"{DOUBLE}.img_mod.lin.weight",
    f"{DOUBLE}.txt_mod.lin.bias",
    f"{SINGLE}.modulation.lin.weight",
    "vector_in.in_layer.weight",
)
NAMES = {
    "flux-1": [(*SHARED, name) for name in FLUX_1],
    "chroma": [(*SHARED, "distilled_guidance_layer.in_proj.weight")],
    "hunyuan-video": [(f"{DOUBLE}.img_attn_qkv.weight", f"{DOUBLE}.img_mod.linear.weight")],
    "z-image": [("layers.0.attention.qkv.weight",), ("context_refiner.1.attention.qkv.weight",)],
}
"""Some names of each space."""


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("model", "names"), [(model, names) for model, sets in NAMES.items() for names in sets]
)
def test_inspect_names_the_model(
    tmp_path: Path,
    model: str,
    names: tuple[str, ...],
    prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, {prefix + name: ("BF16", (4, 8)) for name in names})
    said = inspect(str(path))["components"]["transformer"]
    assert said["names"] == [f"original ({model})"]
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    if model in models.IDS:
        assert said["names_note"] is None
        after = f" after the prefix {prefix}" if prefix else ""
        assert f"names        original ({model}){after}\n" in shown
    else:
        assert "original names. It is none of the base models here" in said["names_note"]
        assert f"names        original ({model})" in shown
        assert ": These are" in shown


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (SHARED, ["bfl (flux-2)"]),
        (("double_stream_modulation_img.lin.weight",), ["original (flux-2)"]),
        ((*SHARED, "double_stream_modulation_img.lin.weight"), ["bfl (flux-2)"]),
        (("blocks.0.self_attn.q.weight",), ["wan-original (wan-2-2)"]),
        (("transformer_blocks.0.attn.to_q.weight",), ["diffusers"]),
    ],
)
def test_names_that_a_dialect_reads_have_no_note(
    tmp_path: Path, names: tuple[str, ...], expected: list[str]
) -> None:
    write_weights(tmp_path / "w.safetensors", dict.fromkeys(names, ("BF16", (4, 8))))
    said = inspect(str(tmp_path / "w.safetensors"))["components"]["transformer"]
    assert said["names"] == expected
    assert said["names_note"] is None


@pytest.mark.parametrize("model", models.IDS)
def test_no_dialect_of_a_model_is_taken_for_another_models_names(model: str) -> None:
    for dialect in models.load(model).DIALECTS:
        rules = (*dialect.layers, *dialect.tensors)
        found = find_original(f"{rule.source.replace('{i}', '0')}.weight" for rule in rules)
        assert found is None or found.model == model
    reference, folder = models.load(model).REPO, hub.default_folder()
    hub.ensure(reference, folder)
    for part in inspect(str(hub.find_snapshot(reference, folder)))["components"].values():
        assert part["names"] == ["diffusers"]
        assert part["names_note"] is None


@pytest.mark.parametrize("base", ["flux-2", "z-image"])
@pytest.mark.parametrize("coded", [False, True])
def test_a_plan_says_whose_names_they_are(tmp_path: Path, base: str, coded: bool) -> None:
    names = dict.fromkeys((*SHARED, *FLUX_1), ("BF16", (8, 8)))
    header = {"format": "pt"}
    if coded:
        names |= {
            f"{DOUBLE}.img_mod.lin.weight": ("F8_E4M3", (8, 8)),
            f"{DOUBLE}.img_mod.lin.weight_scale": ("F32", ()),
        }
        header["quantization_config"] = '{"quant_method": "fp8"}'
    write_weights(tmp_path / "w.safetensors", names, header)
    reference, folder = models.load(base).REPO, hub.default_folder()
    hub.ensure(reference, folder)
    with pytest.raises(CheckpointError) as caught:
        plan(
            model_path=str(hub.find_snapshot(reference, folder)),
            weights_paths={"transformer": str(tmp_path / "w.safetensors")},
        )
    text = str(caught.value)
    assert "These are FLUX.1's original names" in text
    assert "the file belongs to a FluxTransformer2DModel" in text
    assert "another model" not in text


def test_names_of_nobody_have_no_explanation() -> None:
    assert explain_original(["proj_out.weight"]) is None
    assert explain_original(FLUX_1, "FluxTransformer2DModel") is None
    assert is_original(FLUX_1, "FluxTransformer2DModel")
    assert not is_original(FLUX_1, "Flux2Transformer2DModel")
    assert not is_original(["proj_out.weight"], "FluxTransformer2DModel")


@pytest.mark.parametrize("space", SPACES)
def test_every_space_is_known_by_its_names(space: str) -> None:
    found = find_original(SPACES[space].shapes_by_name())
    assert found is not None
    assert found.transformer == space.split()[0].replace("WanVACE", "Wan")
