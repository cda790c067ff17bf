"""Stand-ins by value: sizes of encoders, pixels of pictures, codes and scales, and where files lie."""

from __future__ import annotations

import io
import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from quantmatrix.errors import CheckpointError
from quantmatrix.families.protocol import Declaration
from quantmatrix.request import Hub, Request
from quantmatrix.scheme import Scheme
from quantmatrix.tables import read
from quantmatrix.tiny import (
    checkpoints,
    encoder_forms,
    encoders,
    fp8_forms,
    hub,
    loras,
    pictures,
    pipelines,
    text_encoders,
    weights,
)

TABLES = read.read()

# --- encoders -----------------------------------------------------------------------------------


ENCODERS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "clip": ("CLIPTextModel", 275_072, 35, {"num_attention_heads": 2, "max_position_embeddings": 77}),
    "t5": ("T5EncoderModel", 230_080, 20, {"num_heads": 2, "d_kv": 64}),
    "umt5": ("UMT5EncoderModel", 230_144, 21, {"num_heads": 2, "d_kv": 64}),
    "mistral": (
        "Mistral3ForConditionalGeneration", 1_588_224, 295,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "max_position_embeddings": 1024, "image_size": 32, "patch_size": 16, "heads of pictures": 2},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration", 275_904, 43,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "heads of pictures": 2,
         "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
    ),
    "qwen3": (
        "Qwen3Model", 197_504, 23,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    ),
    "qwen3-deep": (
        "Qwen3ForCausalLM", 1_385_344, 309,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0},
    ),
    "llama": ("LlamaModel", 295_808, 28, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "glm": ("GlmModel", 197_760, 23, {"num_attention_heads": 2, "head_dim": 64, "pad_token_id": 0}),
    "gemma2": (
        "Gemma2Model", 197_760, 23,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    ),
    "qwen2.5-text": (
        "Qwen2_5_VLTextModel", 296_576, 37,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "mrope_section": [8, 12, 12]},
    ),
    "qwen2.5-vl-deep": (
        "Qwen2_5_VLForConditionalGeneration", 374_720, 55,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "heads of pictures": 2},
    ),
    "qwen2.5-vl-edit": (
        "Qwen2_5_VLForConditionalGeneration", 275_904, 43,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "heads of pictures": 2},
    ),
    "clip-projection": ("CLIPTextModelWithProjection", 291_456, 36, {"num_attention_heads": 2}),
    "clip-vision": (
        "CLIPVisionModel", 298_752, 39,
        {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    ),
    "byt5": ("T5EncoderModel", 197_312, 18, {"num_heads": 2, "d_kv": 64}),
    "t5-wide": ("T5EncoderModel", 460_096, 20, {"num_heads": 2, "d_kv": 64}),
    "glm-image": (
        "GlmImageForConditionalGeneration", 143_392, 35,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 65,
         "heads of pictures": 2, "image_size": 64},
    ),
}  # fmt: skip
"""Class, numbers and tensors outside of the table of words, and what shapes do not show."""


def build_empty(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """An encoder without memory, and what comes with it."""
    for module in (encoders, text_encoders):
        monkeypatch.setattr(module, "fill", lambda *_: None)
    with torch.device("meta"):
        return encoders.KINDS[kind]("x")


def read_settings(config: Any) -> dict[str, Any]:
    text = getattr(config, "text_config", None) or config
    sight = getattr(config, "vision_config", None) if text is not config else None
    found = {**(sight.to_dict() if sight else {}), **text.to_dict()}
    found |= found.get("rope_parameters") or {}
    if sight:
        pair = [getattr(sight, name, None) for name in ("num_heads", "num_attention_heads")]
        found["heads of pictures"] = pair[0] or pair[1]
    return found


def test_the_size_of_every_encoder_is_known() -> None:
    assert set(ENCODERS) == set(encoders.KINDS)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_size_of_an_encoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, count, tensors, settings = ENCODERS[kind]
    model, other = build_empty(kind, monkeypatch)
    words = getattr(other, "tokenizer", other)
    longest = len(words) if hasattr(words, "__len__") else 0
    longest += 3 if kind == "byt5" else 0
    kept = [p for p in model.parameters() if p.shape[0] != longest]
    assert type(model).__name__ == name
    assert (sum(p.numel() for p in kept), len(kept)) == (count, tensors)
    found = read_settings(model.config)
    assert {key: found.get(key) for key in settings} == settings


def test_texts_begin_with_the_mark_of_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, first in (("glm", "<|im_start|>"), ("gemma2", "<s>")):
        tokenizer = build_empty(kind, monkeypatch)[1]
        ids = tokenizer("a fox")["input_ids"]
        assert ids[0] == tokenizer.convert_tokens_to_ids(first)
        assert tokenizer.decode(ids[1:]) == "a fox"
    plain = build_empty("llama", monkeypatch)[1]
    assert plain.decode(plain("a fox")["input_ids"]) == "a fox"
    assert plain.pad_token == "<pad>"


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "colour"),
    [
        ("picture.png", (0, 0), (0, 0, 255)),
        ("picture.png", (63, 0), (252, 0, 129)),
        ("picture.png", (5, 7), (20, 28, 231)),
        ("picture-2.png", (5, 7), (231, 28, 20)),
        ("mask.png", (15, 31), (0, 0, 0)),
        ("mask.png", (16, 16), (255, 255, 255)),
        ("mask.png", (47, 47), (255, 255, 255)),
        ("mask.png", (48, 31), (0, 0, 0)),
        ("mask.png", (31, 48), (0, 0, 0)),
        ("mask.png", (31, 15), (0, 0, 0)),
    ],
)
def test_pixels_of_a_picture(
    name: str, at: tuple[int, int], colour: tuple[int, ...], tmp_path: Path
) -> None:
    path = pictures.write_picture(name, tmp_path)
    with Image.open(path) as picture:
        assert (picture.size, picture.mode, picture.format) == ((64, 64), "RGB", "PNG")
        picture.verify()
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        assert picture.getpixel(at) == colour


@pytest.mark.parametrize(
    ("count", "call", "given"),
    [
        (0, "prompt mask_image", {}),
        (1, "prompt image", {"image_path": ("r/picture.png",)}),
        (
            2,
            "prompt mask_image",
            {"image_path": ("r/picture.png", "r/picture-2.png"), "mask_path": "r/mask.png"},
        ),
    ],
)
def test_pictures_that_a_model_is_given(
    count: int, call: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "read_call", lambda name: call.split())
    model: Any = SimpleNamespace(PICTURES=count, PIPELINE="P")
    assert pictures.give_pictures(model, "r/") == given
    without: Any = SimpleNamespace(PIPELINE="P")
    assert pictures.give_pictures(without, "r/") == {}


# --- weights ------------------------------------------------------------------------------------


def test_columns_of_a_timestep_are_damped_by_their_frequency() -> None:
    damped = weights.damp_frequencies(torch.ones(1, 4))[0]
    raw = [1 / math.sqrt(1 + (8 * f) ** 2) for f in (1.0, 0.01)]
    size = math.sqrt((raw[0] ** 2 + raw[1] ** 2) / 2)
    expected = [value / size for value in raw]
    assert damped.tolist() == pytest.approx([*expected, *expected])


def spread(parameter: torch.Tensor) -> tuple[float, float]:
    return float(parameter.mean()), float(parameter.std())


def test_parameters_are_drawn_by_their_kind() -> None:
    def draw(name: str, owner: nn.Module, *shape: int, structured: bool = False) -> torch.Tensor:
        return weights.draw_parameter(name, owner, nn.Parameter(torch.empty(shape)), structured)

    assert spread(draw("a.weight", nn.Embedding(2, 3), 200, 100)) == pytest.approx((0, 1), abs=0.02)
    linear = nn.Linear(2, 2)
    assert spread(draw("a.weight", linear, 200, 100)) == pytest.approx((0, 0.1), abs=0.002)
    assert spread(draw("a.weight", nn.LayerNorm(2), 5000)) == pytest.approx((1, 0.1), abs=0.005)
    assert spread(draw("a.bias", linear, 5000)) == pytest.approx((0, 0.02), abs=0.001)
    assert spread(draw("a.pad_token", linear, 5000)) == pytest.approx((0, 0.02), abs=0.001)
    table = draw("a.scale_shift_table", linear, 50, 100)
    assert spread(table) == pytest.approx((0, 0.1), abs=0.005)
    conv = draw("a.weight", nn.Conv2d(1, 1, 1), 100, 4, 5, 5, structured=True)
    assert spread(conv) == pytest.approx((0, 0.1), abs=0.003)
    one = draw("a.weight", linear, 64, 128, structured=True)
    assert not torch.equal(one, draw("a.weight", linear, 64, 128))
    assert torch.equal(
        draw("a.weight", nn.LayerNorm(2), 64, 128, structured=True),
        draw("a.weight", linear, 64, 128),
    )


@pytest.mark.parametrize(("columns", "large"), [(64, 1), (63, 1), (127, 1), (192, 3), (20, 1)])
def test_one_channel_of_64_is_large(columns: int, large: int) -> None:
    found = weights.draw_weight("a", (400, columns), structured=True)
    sizes = found.square().mean(0).sqrt()
    assert int((sizes > 3 * sizes.median()).sum()) == large
    assert float(sizes.max() / sizes.median()) == pytest.approx(6, rel=0.4)
    assert float(found.square().sum() / 400) == pytest.approx(2, rel=0.35)


def test_only_the_columns_of_a_timestep_are_damped() -> None:
    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.distilled_guidance_layer = nn.Module()
            self.distilled_guidance_layer.in_proj = nn.Linear(64, 16, bias=False)
            self.time_embedder = nn.Module()
            self.time_embedder.linear_1 = nn.Linear(64, 16, bias=False)
            self.blocks = nn.ModuleList([nn.Linear(64, 16, bias=False)])
            self.blocks_2 = nn.Linear(64, 16, bias=False)

    model = Embedder()
    weights.fill(model, "p", structured=("blocks",))
    part = model.distilled_guidance_layer.in_proj.weight
    plain = weights.draw_weight("p.distilled_guidance_layer.in_proj.weight", (16, 64))
    assert torch.equal(part[:, 16:], plain[:, 16:])
    assert torch.equal(part[:, :16], weights.damp_frequencies(plain[:, :16]))
    whole = weights.draw_weight("p.time_embedder.linear_1.weight", (16, 64))
    assert torch.equal(model.time_embedder.linear_1.weight, weights.damp_frequencies(whole))
    structured = weights.draw_weight("p.blocks.0.weight", (16, 64), structured=True)
    assert torch.equal(model.blocks[0].weight, structured)
    assert torch.equal(model.blocks_2.weight, weights.draw_weight("p.blocks_2.weight", (16, 64)))


def test_buffers_of_a_vae_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = nn.Module()
    vae.register_buffer("mean", torch.zeros(5))
    monkeypatch.setattr(pipelines, "make_part", lambda part: vae)
    monkeypatch.setattr(pipelines, "fill", lambda *_: None)
    own: Any = SimpleNamespace(
        vae=None, vae_buffers={"mean": SimpleNamespace(rise=2.0, start=-0.5)}
    )
    found = pipelines.build_vae("m", own)
    assert found.get_buffer("mean").tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5]


# --- eight-bit floats -----------------------------------------------------------------------------


def test_scales_of_a_weight() -> None:
    weight = torch.tensor([[1.0, -7.0], [0.5, 3.5]], dtype=torch.bfloat16)
    one = fp8_forms.scale_tensor(weight)
    assert one["scale_weight"].item() == 7 / 448
    assert one["weight"].float().tolist() == [[64.0, -448.0], [32.0, 224.0]]
    rows = fp8_forms.scale_rows(weight)
    assert rows["weight_scale"].tolist() == [[7 / 448], [3.5 / 448]]
    assert rows["weight"].float().tolist() == [[64.0, -448.0], [64.0, 448.0]]
    cast = fp8_forms.cast(weight)
    assert list(cast) == ["weight"]
    assert cast["weight"].dtype == torch.float8_e5m2
    assert cast["weight"].float().tolist() == weight.float().tolist()


@pytest.mark.parametrize(
    ("largest", "exponent"), [(448.0, 0), (449.0, 1), (896.0, 1), (224.0, -1), (3.0, -7)]
)
def test_the_least_power_of_two_that_holds_a_block(
    largest: float, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_forms, "tile_scales", lambda scales: scales)
    weight = torch.full((2, 64), largest / 4)
    weight[1, 40] = -largest
    found = fp8_forms.scale_blocks(weight)
    assert found["weight_scale"].dtype == torch.uint8
    quarter = exponent - 2 + 127
    assert found["weight_scale"].tolist() == [[quarter, quarter], [quarter, exponent + 127]]
    assert found["weight"].dtype == torch.float8_e4m3fn
    assert float(found["weight"][1, 40]) == pytest.approx(-largest / 2**exponent, rel=0.04)


def test_what_llm_compressor_declares() -> None:
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    assert fp8_forms.compress({"b", "a"}).config == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("form", "names", "metadata"),
    [
        ("scaled-fp8", {"a.scale_weight", "scaled_fp8"}, {}),
        ("fp8r", {"a.weight_scale"}, {"quantization": "fp8r"}),
        ("compressed-tensors", {"a.weight_scale"}, {}),
        ("e5m2", set(), {}),
        ("mxfp8", {"a.weight_scale", "a.comfy_quant"}, {}),
    ],
)
def test_files_of_eight_bit_floats(form: str, names: set[str], metadata: dict[str, str]) -> None:
    packed = {
        "a.weight": torch.ones(4, 64),
        "b.weight": torch.ones(4, 64),
        "n.weight": torch.ones(4),
    }
    tensors, declaration = fp8_forms.write(form, packed, ["a"])
    assert set(tensors) == {*packed, *names}
    assert torch.equal(tensors["b.weight"], packed["b.weight"])
    assert dict(declaration.metadata) == metadata
    assert "a.weight" in packed
    assert packed["a.weight"].dtype == torch.float32
    if form == "mxfp8":
        entry = json.loads(bytes(tensors["a.comfy_quant"].tolist()))
        assert entry == {"format": "mxfp8", "group_size": 32}
    if form == "scaled-fp8":
        assert tensors["scaled_fp8"].numel() == 0
    expected = ["b"] if form == "compressed-tensors" else None
    assert (declaration.config or {}).get("ignore") == expected


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "inner", "writer", "target", "options"),
    [
        ("pipeline", "p", "folder", "p/transformer", {"with_config": True}),
        ("component-folder", "p", "folder", "p", {"with_config": True}),
        ("compressed-tensors", "p", "folder", "p", {"with_config": True}),
        ("sharded", "p", "folder", "p", {"with_config": False, "shards": 3}),
        ("gguf-file", "a/b:Q8_0", "file", "a/b/flux-2-Q8_0.gguf", {}),
        ("raw", "x.safetensors", "file", "x.safetensors", {}),
        ("raw", "x", "file", "own-id.safetensors", {}),
        ("single-file", "deep/x.safetensors", "file", "deep/x.safetensors", {}),
    ],
)
def test_where_a_component_is_written(
    form: str,
    inner: str,
    writer: str,
    target: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    for name in ("folder", "file"):
        monkeypatch.setattr(
            checkpoints,
            f"write_{name}",
            lambda *given, name=name, **more: asked.append((name, given, more)),
        )
    old = tmp_path / "p" / "transformer"
    old.mkdir(parents=True)
    for file in ("x.safetensors", "x.safetensors.index.json", "config.json"):
        (old / file).touch()
    row = replace(TABLES.checkpoints["modelopt-fp8-flux-2"], id="own-id", form=form)
    own: Any = ("tensors", "declaration")
    found = checkpoints.write_component(row, own, "transformer", inner, tmp_path, Path("base"))
    assert found == tmp_path / target
    assert asked == [(writer, (*own, tmp_path / target, Path("base")), options)]
    left = {path.name for path in old.iterdir()}
    replaced = {"x.safetensors", "x.safetensors.index.json"} if form == "pipeline" else set()
    assert left == {"x.safetensors", "x.safetensors.index.json", "config.json"} - replaced


def scheme_of(scale: str) -> Any:
    return SimpleNamespace(scale=scale)


def test_marks_of_comfyui() -> None:
    chosen = {"a": scheme_of("tensor"), "b": scheme_of("channel")}
    found = checkpoints.mark_layers(chosen)
    assert {name: json.loads(bytes(one.tolist())) for name, one in found.items()} == {
        "a.comfy_quant": {"format": "float8_e4m3fn"},
        "b.comfy_quant": {"format": "float8_e4m3fn_rowwise"},
    }
    tensors = {"a.weight": torch.ones(1), "a.input_scale": torch.ones(1)}
    own = Declaration(metadata={"k": "v"})
    row = replace(TABLES.checkpoints["modelopt-fp8-flux-2"], form="comfyui", reference="o/x")
    made, declared = checkpoints.finish_tensors(row, tensors, own, chosen)
    assert set(made) == {*tensors, *found}
    assert declared == Declaration()
    plain = replace(row, form="raw")
    assert checkpoints.finish_tensors(plain, tensors, own, chosen) == (tensors, own)
    mixed = replace(plain, reference="o/x-mixed.safetensors")
    assert list(checkpoints.finish_tensors(mixed, tensors, own, chosen)[0]) == ["a.weight"]


@pytest.mark.parametrize(
    ("form", "model", "raw"),
    [
        ("raw", "flux-2", True),
        ("gguf-file", "qwen-image", True),
        ("scaled-fp8", "flux-1", True),
        ("comfyui", "flux-2", True),
        ("comfyui", "qwen-image", False),
        ("component-folder", "flux-2", False),
        ("sharded", "flux-2", False),
        ("a", "flux-2", False),
    ],
)
def test_files_with_the_original_names(form: str, model: str, raw: bool) -> None:
    row = replace(
        TABLES.checkpoints["modelopt-fp8-flux-2"], form=form, model=model, kept="", scheme="FP8"
    )
    assert checkpoints.find_recipe(row).raw is raw


# --- text encoders on disk --------------------------------------------------------------------------


def save_plain(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import save_file

    tensors = {
        "encoder.block.0.layer.0.q.weight": torch.full((4, 64), 7.0),
        "encoder.block.0.layer.0.relative_attention_bias.weight": torch.ones(4, 2),
        "encoder.block.0.layer.0.norm.weight": torch.ones(4),
        "shared.weight": torch.ones(4, 64),
    }
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_forms_of_a_text_encoder(tmp_path: Path) -> None:
    plain = save_plain(tmp_path)
    [layer, *_] = plain
    name = layer.removesuffix(".weight")
    assert encoder_forms.list_layers(plain) == [name]
    cast, declared = encoder_forms.cast(tmp_path, "T5EncoderModel")
    assert {one.dtype for one in cast.values()} == {torch.float8_e4m3fn}
    assert declared == Declaration()
    for class_name, more in (("T5EncoderModel", set()), ("UMT5EncoderModel", {"spiece_model"})):
        scaled = encoder_forms.scale(tmp_path, class_name)[0]
        assert set(scaled) == {*plain, f"{name}.scale_weight", "scaled_fp8", *more}
        assert scaled["shared.weight"].dtype == torch.float16
        assert float(scaled[f"{name}.scale_weight"]) == 7 / 448
    assert scaled["spiece_model"].tolist() == list(range(256))
    assert scaled["spiece_model"].dtype == torch.uint8
    marked = encoder_forms.mark(tmp_path, "x")[0]
    assert set(marked) == {*plain, f"{name}.weight_scale", f"{name}.comfy_quant"}
    assert bytes(marked[f"{name}.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'
    assert marked["shared.weight"].dtype == torch.bfloat16
    assert marked[layer].float().unique().tolist() == [448.0]


@pytest.mark.parametrize("folder", [True, False])
def test_a_text_encoder_is_written(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    (base / "text_encoder").mkdir(parents=True)
    out.mkdir()
    (base / "model_index.json").write_text('{"text_encoder": ["transformers", "Own"]}')
    (base / "text_encoder" / "config.json").write_text('{"a": 1}')

    def write(path: Path, class_name: str) -> tuple[dict[str, torch.Tensor], Declaration]:
        assert (path, class_name) == (base / "text_encoder", "Own")
        return {"t": torch.ones(1)}, Declaration(config={"m": 1}, metadata={"k": "v"})

    form = encoder_forms.Form("flux-1", "text_encoder", write, folder=folder)
    monkeypatch.setattr(encoder_forms, "FORMS", {"x.safetensors": form})
    encoder_forms.write_encoder("x.safetensors", base, out)
    names = {"config.json", "model.safetensors"} if folder else {"x.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        told = file.metadata()
    own = {} if folder else {"quantization_config": '{"m": 1}'}
    assert told == {"format": "pt", "k": "v", **own}
    if folder:
        config = json.loads((out / "config.json").read_text())
        assert config == {"a": 1, "quantization_config": {"m": 1}}


def test_names_of_text_encoders() -> None:
    forms = encoder_forms.FORMS
    assert {name: forms[name].folder for name in forms if name.startswith("t5-")} == {
        "t5-modelopt-fp8": True,
        "t5-modelopt-nvfp4": True,
        "t5-int8.safetensors": False,
    }
    assert len(forms) == 5 + 5 * 3
    assert (forms["t5-modelopt-fp8"].model, forms["t5-modelopt-fp8"].component) == (
        "flux-1",
        "text_encoder_2",
    )
    with pytest.raises(FrozenInstanceError):
        forms["t5-modelopt-fp8"].folder = False  # type: ignore[misc]


# --- the hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "repository", "path"),
    [
        ("o/n", "o/n", "models--o--n"),
        ("o/n/deep/x.safetensors", "o/n", "models--o--n"),
        ("o/n/deep:Q8_0", "o/n", "models--o--n"),
        ("/o/n/", "o/n", "models--o--n"),
        ("/path/to/x/y.safetensors", "/path/to/x", "local/path/to/x"),
    ],
)
def test_repositories_of_references(reference: str, repository: str, path: str) -> None:
    assert hub.repository_of(reference) == repository
    assert hub.path_of(repository, Path("hub")) == Path("hub") / path


def test_the_hub_of_a_folder(tmp_path: Path) -> None:
    assert hub.hub(tmp_path) == Hub(
        cache_dir=str(tmp_path), offline=True, local_root=str(tmp_path / "local")
    )
    with pytest.raises(CheckpointError) as caught:
        hub.ensure("no/such", tmp_path, TABLES)
    assert str(caught.value) == (
        "no/such: there is no tiny stand-in for it: the tables do not name it. Known are the "
        "repositories of matrix/models.csv and matrix/checkpoints.csv; without --tiny the real one "
        "is used"
    )


def test_a_snapshot_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    content = tmp_path / "content"
    (content / "a").mkdir(parents=True)
    (content / "a" / "x.txt").write_text("x")
    digest = hub.digest_folder(content)
    assert len(digest) == 64
    cache = hub.wrap_snapshot(content, tmp_path / "cache")
    commit = (cache / "refs" / "main").read_text()
    assert commit == digest[:40]
    assert (cache / "snapshots" / commit / "a" / "x.txt").read_text() == "x"
    assert hub.digest_folder(cache / "snapshots" / commit) == digest
    (cache / "snapshots" / commit / "a").rename(cache / "snapshots" / commit / "b")
    assert hub.digest_folder(cache / "snapshots" / commit) != digest


def test_what_was_made_by_a_quicker_process_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("it is there")

    monkeypatch.setattr(hub, "put", fail)
    built, there = tmp_path / "built", tmp_path / "deep" / "there"
    built.mkdir()
    with pytest.raises(OSError, match="it is there"):
        hub.move_into_place(built, there)
    assert built.exists()
    there.mkdir()
    hub.move_into_place(built, there)
    assert not built.exists()
    built.touch()
    hub.move_into_place(built, there)


def test_a_request_with_its_own_hub_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        hub, "open_tiny_hub", lambda wanted: asked.append(list(wanted)) or Hub(offline=True)
    )
    plain = Request(model_path="o/n", tiny=True)
    for other in (replace(plain, tiny=False), replace(plain, hub=Hub(cache_dir="x"))):
        assert hub.use_tiny(other) is other
    assert asked == []
    request = replace(
        plain,
        component_paths={"transformer": "o/t"},
        weights_paths={"transformer_2": "o/w"},
        image_path=("/path/to/picture.png#sha256:1", "/other/picture.png"),
        mask_path="/path/to/mask.png",
        lora_path=("/path/to/flux-1-lora.safetensors", "o/lora"),
    )
    assert hub.use_tiny(request).hub == Hub(offline=True)
    assert asked == [
        [
            "o/n",
            "o/t",
            "o/w",
            "/path/to/picture.png",
            "/path/to/mask.png",
            "/path/to/flux-1-lora.safetensors",
        ]
    ]
    assert hub.list_pictures(plain) == []


def test_factors_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict(
        {"blocks": nn.ModuleDict({"to_q": nn.Linear(128, 256), "to_out": nn.Linear(8, 8)})}
    )
    model["others"] = nn.ModuleDict({"to_q": nn.Linear(8, 8)})
    monkeypatch.setattr(loras, "build_plain", lambda *_: model)
    monkeypatch.setattr(loras.models, "load", lambda name: SimpleNamespace(BLOCKS=("blocks",)))
    loras.write_lora("m", "x.safetensors", tmp_path)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "x.safetensors")
    start = "transformer.blocks.to_q.lora"
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        f"{start}_A.weight": (4, 128),
        f"{start}_B.weight": (256, 4),
    }
    down, up = (found[f"{start}_{half}.weight"].float().std() for half in "AB")
    assert float(down) == pytest.approx(1 / math.sqrt(128), rel=0.1)
    assert float(up) == pytest.approx(0.3 / 2, rel=0.1)


def test_the_recipe_of_a_row() -> None:
    row = replace(TABLES.checkpoints["modelopt-fp8-flux-2"], kept="")
    found = checkpoints.find_recipe(row)
    assert isinstance(found.scheme, Scheme)
    assert (found.model, found.family, found.linear) == ("flux-2", "modelopt-fp8", None)
    assert not found.kept("anything")


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("clip", 2), ("t5", 1), ("llama", 0), ("qwen3", 0), ("mistral", 0), ("qwen2.5-vl", 0)],
)
def test_words_of_prompts_are_tokens_of_their_own(
    kind: str, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt lives through the limits of length: its words do not fall apart into letters."""
    tokenizer = build_empty(kind, monkeypatch)[1]
    for prompt in ("curious pikachu walking", "beautiful sunset fox"):
        ids = tokenizer(prompt)["input_ids"]
        assert len(ids) == len(prompt.split()) + ends
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt
    letters = tokenizer("xyzzyx")["input_ids"]
    assert len(letters) >= 4 + ends
