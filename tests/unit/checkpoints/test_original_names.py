"""Files in the first names of a model: distinguished, and refused with what can be done."""

from __future__ import annotations

from pathlib import Path

import pytest
from weight_files import write_weights

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.checkpoints.original_names import explain_original, find_original
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
SPACES = {
    "flux-1": [(*SHARED, name) for name in FLUX_1],
    "chroma": [(*SHARED, "distilled_guidance_layer.in_proj.weight")],
    "hunyuan-video": [(f"{DOUBLE}.img_attn_qkv.weight", f"{DOUBLE}.img_mod.linear.weight")],
    "z-image": [("layers.0.attention.qkv.weight",), ("context_refiner.1.attention.qkv.weight",)],
}
"""Names of each space of which no dialect reads any."""


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("model", "names"), [(model, names) for model, sets in SPACES.items() for names in sets]
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
    assert "original names, which are not read here" in said["names_note"]
    assert main(["inspect", str(path)]) == 0
    assert f"names        original ({model}): These are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (SHARED, ["bfl (flux-2)"]),
        (("double_stream_modulation_img.lin.weight",), ["diffusers"]),
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
def test_no_dialect_of_a_model_is_taken_for_one_that_is_not_read(model: str) -> None:
    for dialect in models.load(model).DIALECTS:
        rules = (*dialect.layers, *dialect.tensors)
        assert find_original(f"{rule.source.replace('{i}', '0')}.weight" for rule in rules) is None
    reference, folder = models.load(model).REPO, hub.default_folder()
    hub.ensure(reference, folder)
    for part in inspect(str(hub.find_snapshot(reference, folder)))["components"].values():
        assert part["names"] == ["diffusers"]
        assert part["names_note"] is None


@pytest.mark.parametrize("base", ["flux-1", "flux-2"])
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
    assert "FluxTransformer2DModel.from_single_file" in text
    assert "another model" not in text


def test_names_of_nobody_have_no_explanation() -> None:
    assert explain_original(["proj_out.weight"]) is None
