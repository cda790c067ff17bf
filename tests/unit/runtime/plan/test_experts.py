"""Wan2.2's experts: a name that says the other one brings a warning, and nothing else does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantmatrix.api import plan
from quantmatrix.runtime.plan.experts import EXPERTS, read_noise, warn_of_expert
from quantmatrix.tiny import hub

NAMES = {
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "low",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "high",
    "low_noise_model/diffusion_pytorch_model.safetensors": "low",
    "high-noise/a-00001-of-00002.safetensors": "high",
    "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors": "low",
    "Wan2_2-T2V-A14B_HIGH_fp8.safetensors": "high",
    "WanLowNoise.safetensors": "low",
    "wan22 High Noise.safetensors": "high",
    "Wan/transformer_2/diffusion_pytorch_model.safetensors": "low",
    "low_noise_model/high_noise.safetensors": "high",
    "low_noise_model/transformer_2/w.safetensors": "low",
    "transformer/diffusion_pytorch_model.safetensors": None,
    "wan_high_quality.safetensors": None,
    "HIGHRES.safetensors": None,
    "slow_noise.safetensors": None,
    "high_and_low_noise_high_noise.safetensors": None,
    "low_noise/a/b/c/wan.safetensors": None,
}


@pytest.mark.parametrize(("path", "noise"), NAMES.items())
def test_what_a_name_says(path: str, noise: str | None) -> None:
    assert read_noise(path) == noise
    assert read_noise(path.replace("/", "\\")) == noise


@pytest.mark.parametrize("component", EXPERTS)
@pytest.mark.parametrize(("path", "noise"), NAMES.items())
def test_the_other_expert_is_warned_of(component: str, path: str, noise: str | None) -> None:
    text = warn_of_expert(component, [path], EXPERTS)
    assert (text is not None) == (noise not in (None, EXPERTS[component]))
    other = next(name for name in EXPERTS if name != component)
    if text is not None:
        for word in (path, f"{noise}_noise", other, f"--{other.replace('_', '-')}-weights-path"):
            assert word in text


def test_a_model_without_experts_has_none() -> None:
    assert warn_of_expert("transformer", ["low_noise.safetensors"], ["transformer"]) is None
    assert warn_of_expert("vae", ["low_noise.safetensors"], [*EXPERTS, "vae"]) is None


@pytest.mark.parametrize("component", EXPERTS)
@pytest.mark.parametrize("noise", ["low", "high"])
@pytest.mark.parametrize("form", ["weights", "folder", "named folder"])
def test_a_plan_warns(tmp_path: Path, component: str, noise: str, form: str) -> None:
    reference, folder = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", hub.default_folder()
    hub.ensure(reference, folder)
    base = hub.find_snapshot(reference, folder)
    place = tmp_path / "given" / ("x" if form == "weights" else f"{noise}_noise_model")
    place.mkdir(parents=True)
    name = f"wan_{noise}_noise.safetensors" if form == "weights" else "w.safetensors"
    shutil.copy(base / component / "diffusion_pytorch_model.safetensors", place / name)
    config = json.loads((base / component / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config))
    given = str(place / name if form == "weights" else place)
    key = "component_paths" if form == "folder" else "weights_paths"
    planned = plan(model_path=str(base), **{key: {component: given}})
    assert planned.ok
    said = [text for text in planned.warnings if "by its name" in text]
    assert len(said) == (EXPERTS[component] != noise)
    assert all(f"{noise}_noise" in text and str(place) in text for text in said)


def test_the_base_itself_is_not_judged_by_its_place(tmp_path: Path) -> None:
    reference, folder = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", hub.default_folder()
    hub.ensure(reference, folder)
    base = tmp_path / "low_noise"
    base.symlink_to(hub.find_snapshot(reference, folder))
    assert not [text for text in plan(model_path=str(base)).warnings if "by its name" in text]
