"""Quantized text encoders: read as transformers are, in the forms that people have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.cli.main import main
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.protocol import Declaration
from quantmatrix.measure.comparison import make_request
from quantmatrix.request import Request, strip_quantization
from quantmatrix.runtime.empty_model import find_model_class
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.plan.config_limits import check_config
from quantmatrix.runtime.plan.encoders import drop_rotations
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import encoder_forms, hub
from quantmatrix.tiny.encoder_forms import FORMS

FLUX = "black-forest-labs/FLUX.1-dev"
T5 = "/path/to/t5xxl_fp8_e4m3fn_scaled.safetensors"
KEPT = "encoder.block.0.layer.0.SelfAttention.q"


def decide(model: str, **paths: str) -> Plan:
    planned = plan(Request(model_path=model, tiny=True, device="cpu", component_paths=paths))
    assert isinstance(planned, Plan)
    return planned


def find_plain(model: str, component: str) -> Path:
    """The folder of a stand-in's own text encoder."""
    hub.ensure(model, hub.default_folder())
    return hub.find_snapshot(model, hub.default_folder()) / component


def decode(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers of the forms with one scale a layer, or none, by their definition alone."""
    found = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        scale = [
            tensors[n] for n in (f"{layer}.scale_weight", f"{layer}.weight_scale") if n in tensors
        ]
        if name.endswith("weight") and layer != name:
            found[name] = tensor.float() * (scale[0].float() if scale else 1.0)
    return found


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("t5xxl_fp8_e4m3fn.safetensors", 14),
        ("t5xxl_fp8_e4m3fn_scaled.safetensors", 14),
        ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", 14),
        ("qwen_2.5_vl_7b_fp8_scaled.safetensors", 19),
        ("t5-modelopt-fp8", 14),
        ("clip-int8.safetensors", 12),
    ],
)
def test_an_encoder_computes_with_the_numbers_that_its_file_holds(name: str, layers: int) -> None:
    """Beside transformers' own model with the decoded weights; `decode` leaves inputs alone."""
    form = FORMS[name]
    model = models.load(form.model).REPO
    key = form.component
    planned = plan(
        Request(
            model_path=model, tiny=True, device="cpu", backend="decode", dtype="float32",
            component_paths={key: f"/path/to/{name}"},
        )
    )  # fmt: skip
    assert isinstance(planned, Plan)
    part = planned.encoders[key]
    assert len(part.layers) == layers
    own: Any = load_component(part, planned.request)
    assert own.witness.verdict == "agrees"
    folder = find_plain(model, key)
    other = find_model_class(part.class_name).from_pretrained(folder, dtype=torch.float32)
    bare = find_model_class(part.class_name).from_pretrained(folder, dtype=torch.float32)
    numbers = decode(load_file(part.checkpoint.files[0]))
    state = other.state_dict()
    for tensor, value in numbers.items():
        for target in part.dialect.tensor_targets(tensor) or ():
            state[target.module].copy_(value)
    words = torch.arange(2, 18)[None]

    def run(module: Any) -> torch.Tensor:
        with torch.inference_mode():
            return module(input_ids=words, output_hidden_states=True).hidden_states[-1].float()

    torch.testing.assert_close(run(own), run(other), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(run(own), run(bare), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("t5-modelopt-nvfp4", "NVFP4"),
        ("umt5-modelopt-fp8", "FP8"),
        ("umt5-int8.safetensors", "int8_tensorwise"),
        ("qwen2.5-vl-modelopt-nvfp4", "NVFP4"),
        ("qwen2.5-vl-int8.safetensors", "int8_tensorwise"),
        ("mistral_3_small_flux2_fp8.safetensors", "fp8"),
    ],
)
def test_every_kind_is_planned_in_every_family(name: str, scheme: str) -> None:
    form = FORMS[name]
    planned = decide(models.load(form.model).REPO, **{form.component: f"/path/to/{name}"})
    part = planned.encoders[form.component]
    assert part.precision == scheme
    assert len(part.layers) >= 14
    assert part.base.weights
    assert planned.to_json()["text_encoders"][form.component]["quantized_layers"] == len(
        part.layers
    )


def test_a_run_counts_the_layers_of_its_text_encoders(capsys: pytest.CaptureFixture[str]) -> None:
    planned = decide(FLUX, text_encoder="/path/to/clip-int8.safetensors", text_encoder_2=T5)
    run = generate(planned.request, plan=planned)
    assert run.encoders == {"text_encoder": {"int8": 12}, "text_encoder_2": {"decode": 14}}
    assert run.to_json()["text_encoders"] == run.encoders
    assert set(run.witness) == {"text_encoder", "text_encoder_2"}
    assert set(run.census) == {"transformer"}
    argv = ["plan", "--tiny", "--model-path", FLUX, "--device", "cpu", "--text-encoder-2-path", T5]
    assert main(argv) == 0
    assert "text_encoder_2: fp8 (" in capsys.readouterr().out


def test_a_base_model_may_have_a_quantized_text_encoder_itself(tmp_path: Path) -> None:
    hub.ensure(FLUX, hub.default_folder())
    base = tmp_path / "base"
    shutil.copytree(hub.find_snapshot(FLUX, hub.default_folder()), base)
    assert decide(str(base)).encoders == {}
    hub.ensure("/path/to/t5-modelopt-fp8", hub.default_folder())
    shutil.rmtree(base / "text_encoder_2")
    shutil.copytree(
        hub.path_of("/path/to/t5-modelopt-fp8", hub.default_folder()), base / "text_encoder_2"
    )
    planned = decide(str(base))
    assert planned.encoders["text_encoder_2"].family == "modelopt-fp8"
    assert planned.warnings == ()
    assert generate(planned.request, plan=planned).encoders == {"text_encoder_2": {"decode": 14}}


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{KEPT}.qweight": t.pop(f"{KEPT}.weight")}), r"is a scale, but .*q\.weight is missing"),
        (lambda t: t.update({f"{KEPT}.SCB": torch.ones(128)}), r"bitsandbytes.*--text-encoder-2-path"),
        (lambda t: t.pop("shared.weight"), r"1 tensors of T5EncoderModel are not in .*shared"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 tensors are unknown to T5EncoderModel"),
        (lambda t: t.update({f"{KEPT}.weight": t[f"{KEPT}.weight"][:64]}), r"is 64 x 128 .*expects 128 x"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_before_loading(
    tmp_path: Path, change: Change, message: str
) -> None:
    hub.ensure(T5, hub.default_folder())
    tensors = load_file(hub.path_of(T5, hub.default_folder()))
    change(tensors)
    file = tmp_path / "t5.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        decide(FLUX, text_encoder_2=str(file))


def test_tied_and_foreign_tensors_are_left_aside_with_a_reason(tmp_path: Path) -> None:
    """A file of the whole T5 has the decoder, and the embedding under both of its names."""
    hub.ensure(T5, hub.default_folder())
    tensors = load_file(hub.path_of(T5, hub.default_folder()))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    tensors["decoder.final_layer_norm.weight"] = torch.ones(128)
    file = tmp_path / "t5.safetensors"
    save_file(tensors, file, {"format": "pt"})
    part = decide(FLUX, text_encoder_2=str(file)).encoders["text_encoder_2"]
    assert set(part.ignored) >= {"encoder.embed_tokens.weight", "decoder.final_layer_norm.weight"}
    tensors.pop("shared.weight")
    save_file(tensors, file, {"format": "pt"})
    planned = decide(FLUX, text_encoder_2=str(file))
    own: Any = load_component(planned.encoders["text_encoder_2"], planned.request)
    assert own.shared.weight is own.encoder.embed_tokens.weight


def test_a_configuration_of_another_kind_is_refused(tmp_path: Path) -> None:
    hub.ensure("/path/to/t5-modelopt-fp8", hub.default_folder())
    folder = tmp_path / "t5"
    shutil.copytree(hub.path_of("/path/to/t5-modelopt-fp8", hub.default_folder()), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "umt5"}))
    with pytest.raises(CheckpointError, match=r"model_type is umt5, a T5EncoderModel is a t5"):
        decide(FLUX, text_encoder_2=str(folder))
    file.write_text(json.dumps({**config, "num_layers": 2**40}))
    with pytest.raises(CheckpointError, match="num_layers is 1099511627776, expected at most"):
        decide(FLUX, text_encoder_2=str(folder))


@pytest.mark.parametrize("value", [2**18, 2**31, 2**62])
def test_a_table_of_positions_that_fills_the_memory_is_refused(tmp_path: Path, value: int) -> None:
    """CLIP builds as many as its configuration says, before any weight is read."""
    hub.ensure("/path/to/clip-modelopt-fp8", hub.default_folder())
    folder = tmp_path / "clip"
    shutil.copytree(hub.path_of("/path/to/clip-modelopt-fp8", hub.default_folder()), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "max_position_embeddings": value}))
    with pytest.raises(CheckpointError, match=f"max_position_embeddings is {value}, expected at"):
        decide(FLUX, text_encoder=str(folder))


def test_positions_and_angles_of_published_encoders_are_taken() -> None:
    """Mistral Small 3.1 and Qwen2.5-VL 7B, as their configurations have them."""
    checkpoint = SimpleNamespace(tensors={"a": SimpleNamespace(shape=(131072, 5120))})
    mistral = {
        "text_config": {
            "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1000000000.0,
            "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "vocab_size": 131072,
        },
    }  # fmt: skip
    qwen = {
        "max_position_embeddings": 128000,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "default"},
    }
    for config in (mistral, qwen):
        check_config(drop_rotations(config), "config.json", checkpoint)  # type: ignore[arg-type]


def test_only_models_take_weights_alone() -> None:
    request = Request(model_path=FLUX, tiny=True, device="cpu", weights_paths={"vae": T5})
    with pytest.raises(
        UsageError, match=r"--vae-weights-path: only transformers and text encoders"
    ):
        plan(request)


def test_both_sides_of_a_comparison_have_the_text_encoder() -> None:
    request = Request(
        model_path=FLUX, weights_paths={"text_encoder_2": T5, "transformer": "a.gguf"}
    )
    assert strip_quantization(request, FLUX).weights_paths == {"text_encoder_2": T5}
    own = Request(model_path=FLUX, tiny=True, component_paths={"text_encoder_2": T5})
    side = make_request("BBuf/flux1-dev-modelopt-fp8-sglang-transformer", own)
    assert side.weights_paths["text_encoder_2"] == T5
    assert side.component_paths.keys() == {"transformer"}
    with pytest.raises(UsageError, match="name each side once"):
        make_request("BBuf/flux1-dev-modelopt-fp8-sglang-transformer", side)


@pytest.mark.parametrize("folder", [True, False])
def test_a_form_is_a_folder_with_its_config_or_one_file(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    (base / "text_encoder").mkdir(parents=True)
    (base / "model_index.json").write_text('{"text_encoder": ["transformers", "Some"]}')
    (base / "text_encoder" / "config.json").write_text('{"size": 3}')

    def write(source: Path, class_name: str) -> tuple[dict[str, torch.Tensor], Declaration]:
        assert (source, class_name) == (base / "text_encoder", "Some")
        return {"a.weight": torch.ones(2, 3)}, Declaration(config={"bits": 8})

    form = encoder_forms.Form("a model", "text_encoder", write, folder=folder)
    monkeypatch.setattr(encoder_forms, "FORMS", {"x.safetensors": form})
    out = tmp_path / "out"
    out.mkdir()
    encoder_forms.write_encoder("x.safetensors", base, out)
    if folder:
        config = json.loads((out / "config.json").read_text())
        assert config == {"size": 3, "quantization_config": {"bits": 8}}
    name = encoder_forms.WEIGHTS if folder else "x.safetensors"
    assert {path.name for path in out.iterdir()} == {name} | ({"config.json"} if folder else set())
    with safe_open(out / name, "pt") as file:
        said = {"format": "pt"} | ({} if folder else {"quantization_config": '{"bits": 8}'})
        assert file.metadata() == said
        assert torch.equal(file.get_tensor("a.weight"), torch.ones(2, 3))
