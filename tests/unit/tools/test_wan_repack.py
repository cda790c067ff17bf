"""wan_repack: both forms, both writers' files, names after the format's table, all or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantmatrix.api import plan
from quantmatrix.errors import CheckpointError
from quantmatrix.families import msmodelslim
from quantmatrix.tools import wan_repack

D, FFN, TEXT, FREQ, BLOCKS = 24, 40, 16, 8, 2
REPLACEMENTS = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_", "attn1.norm_"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_", "attn2.norm_"),
    ("attn2.to_k_img", "attn2.add_k_proj"),
    ("attn2.to_v_img", "attn2.add_v_proj"),
    ("attn2.norm_k_img", "attn2.norm_added_k"),
    (".linear.", "."),
    (".div.", "."),
)
"""The substring replacements that other tools make, in their order: an independent statement."""


def replace_all(name: str) -> str:
    for old, new in REPLACEMENTS:
        name = name.replace(old, new)
    return name


def linear(out: int, into: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(out, into).bfloat16(), "bias": torch.randn(out).bfloat16()}


def make_float(image: bool = False) -> dict[str, torch.Tensor]:
    """A Wan transformer under its original names."""
    layers = {
        "patch_embedding": {
            "weight": torch.randn(D, 16, 1, 2, 2).bfloat16(),
            "bias": torch.randn(D).bfloat16(),
        },
        "text_embedding.0": linear(D, TEXT),
        "text_embedding.2": linear(D, D),
        "time_embedding.0": linear(D, FREQ),
        "time_embedding.2": linear(D, D),
        "time_projection.1": linear(6 * D, D),
        "head.head": linear(64, D),
        "head": {"modulation": torch.randn(1, 2, D).bfloat16()},
    }
    if image:
        layers |= {
            "img_emb.proj.0": {"weight": torch.ones(32), "bias": torch.zeros(32)},
            "img_emb.proj.1": linear(32, 32),
            "img_emb.proj.3": linear(D, 32),
            "img_emb.proj.4": {"weight": torch.ones(D), "bias": torch.zeros(D)},
        }
    for i in range(BLOCKS):
        block = f"blocks.{i}"
        layers[block] = {"modulation": torch.randn(1, 6, D).bfloat16()}
        layers[f"{block}.norm3"] = {"weight": torch.ones(D), "bias": torch.zeros(D)}
        layers[f"{block}.ffn.0"] = linear(FFN, D)
        layers[f"{block}.ffn.2"] = linear(D, FFN)
        for attention in ("self_attn", "cross_attn"):
            for leaf in "qkvo":
                layers[f"{block}.{attention}.{leaf}"] = linear(D, D)
            for leaf in ("norm_q", "norm_k"):
                layers[f"{block}.{attention}.{leaf}"] = {"weight": torch.ones(D)}
        if image:
            layers[f"{block}.cross_attn.k_img"] = linear(D, D)
            layers[f"{block}.cross_attn.v_img"] = linear(D, D)
            layers[f"{block}.cross_attn.norm_k_img"] = {"weight": torch.ones(D)}
    return {f"{layer}.{leaf}": t for layer, parts in layers.items() for leaf, t in parts.items()}


Quantized = tuple[dict[str, torch.Tensor], dict[str, str]]


def make_quantized(seed: int, image: bool = False) -> Quantized:
    """Tensors and description as msmodelslim writes them: ffn.2 kept, one layer smoothed."""
    torch.manual_seed(seed)
    scheme = msmodelslim.SCHEMES["W8A8_DYNAMIC"]
    rotated = ("self_attn.q_rot", "self_attn.k_rot", "cross_attn.q_rot", "cross_attn.k_rot")
    found = make_float(image) | {f"blocks.1.{name}": torch.eye(8).bfloat16() for name in rotated}
    words = dict.fromkeys(found, "FLOAT")
    for name in list(found):
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or not re.search(r"^blocks.*(attn\.[a-z_]+|ffn\.0)$", layer):
            continue
        if found[name].ndim != 2:
            continue
        smoothed = layer == "blocks.0.self_attn.q"
        weight, bias = (found.pop(f"{layer}.{leaf}") for leaf in ("weight", "bias"))
        del words[f"{layer}.weight"], words[f"{layer}.bias"]
        for suffix, tensor in msmodelslim.quantize(weight, scheme, bias=bias).items():
            place = f"{layer}.linear.{suffix}" if smoothed else f"{layer}.{suffix}"
            found[place] = tensor
            words[place] = "FLOAT" if suffix == "bias" else scheme.name
        if smoothed:
            found[f"{layer}.div.mul_scale"] = torch.ones(D).bfloat16()
            words[f"{layer}.div.mul_scale"] = "FLOAT"
    return found, words


def write_expert(
    folder: Path, tensors: dict[str, torch.Tensor], words: dict[str, str], sharded: bool = False
) -> None:
    """One expert's folder in the layout of one of the two writers."""
    folder.mkdir(parents=True)
    if not sharded:
        save_file(tensors, folder / "quant_model_weight_w8a8_dynamic.safetensors")
        settings = {"model_quant_type": "W8A8_DYNAMIC"}
        description = folder / "quant_model_description_w8a8_dynamic.json"
    else:
        names = sorted(tensors)
        files = [f"quant_model_weights-0000{i}-of-00002.safetensors" for i in (1, 2)]
        halves = [names[::2], names[1::2]]
        for file, half in zip(files, halves, strict=True):
            save_file({name: tensors[name] for name in half}, folder / file)
        weight_map = {n: file for file, half in zip(files, halves, strict=True) for n in half}
        index = folder / "quant_model_weights.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        settings = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "optional": {}}
        description = folder / "quant_model_description.json"
    description.write_text(json.dumps({**settings, **words}))


@pytest.fixture
def quantized(tmp_path):
    for seed, expert in enumerate(("high_noise_model", "low_noise_model")):
        write_expert(tmp_path / "in" / expert, *make_quantized(seed), sharded=seed == 1)
    return tmp_path / "in"


@pytest.fixture
def original(tmp_path):
    """A pipeline in Diffusers' layout, its transformers without weights worth reading."""
    folder = tmp_path / "original"
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "text_dim": TEXT,
        "freq_dim": FREQ,
        "ffn_dim": FFN,
        "num_layers": BLOCKS,
        "cross_attn_norm": True,
    }
    for name in ("transformer", "transformer_2", "vae", "scheduler"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config | {"of": name}))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"large")
    (folder / "model_index.json").write_text("{}")
    return folder


def check_component(folder: Path, seed: int, image: bool = False) -> None:
    tensors, words = make_quantized(seed, image)
    found = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert set(found) == {replace_all(name) for name in tensors}
    for name, tensor in tensors.items():
        assert found[replace_all(name)].dtype == tensor.dtype
        assert torch.equal(found[replace_all(name)], tensor)
    described = json.loads((folder / "quant_model_description.json").read_text())
    assert {name: described[replace_all(name)] for name in words} == words
    assert described["model_quant_type"] == "W8A8_DYNAMIC"
    assert not any(".linear." in key or re.search("(self|cross)_attn", key) for key in described)


def test_two_flags_write_both_transformers(quantized, tmp_path, capsys):
    out = tmp_path / "out"
    assert wan_repack.main(["--input-path", str(quantized), "--output-path", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["transformer", "transformer_2"]
    check_component(out / "transformer", seed=0)
    check_component(out / "transformer_2", seed=1)
    assert "config.json" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


BESIDE = {
    "original": ("diffusion_pytorch_model.safetensors",),
    "shards": (
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ),
    "lora": ("wan_lora_rank64.safetensors",),
    "mixed": ("a-mixed.safetensors",),
    "damaged": ("notes.safetensors",),
}


@pytest.mark.parametrize("names", BESIDE.values(), ids=BESIDE)
def test_other_weights_beside_an_expert_are_left_alone(quantized, tmp_path, names):
    for expert in ("high_noise_model", "low_noise_model"):
        for name in names:
            file = quantized / expert / name
            if name.endswith(".json"):
                index = {
                    "weight_map": {"blocks.0.ffn.2.weight": names[0], "head": "gone.safetensors"}
                }
                file.write_text(json.dumps(index))
            elif name == "notes.safetensors":
                file.write_text("no safetensors file at all")
            else:
                save_file({"blocks.0.ffn.2.weight": torch.zeros(2, 2)}, file)
    counts = wan_repack.repack(quantized, tmp_path / "out")
    for seed, name in enumerate(("transformer", "transformer_2")):
        check_component(tmp_path / "out" / name, seed)
        assert counts[name] == len(make_quantized(seed)[0])


def test_shards_that_an_index_lists_must_all_be_there(quantized, tmp_path, capsys):
    """msmodelslim's own index counts: a shard that is missing is not left out silently."""
    (quantized / "low_noise_model" / "quant_model_weights-00002-of-00002.safetensors").unlink()
    words = ["--input-path", str(quantized), "--output-path", str(tmp_path / "out")]
    assert wan_repack.main(words) == 1
    assert "quant_model_weights-00002-of-00002" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_flags_join_what_was_copied_first(quantized, original, tmp_path):
    out = tmp_path / "out"
    (out / "vae").mkdir(parents=True)
    assert set(wan_repack.repack(quantized, out)) == {"transformer", "transformer_2"}
    assert sorted(p.name for p in out.iterdir()) == ["transformer", "transformer_2", "vae"]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    """Give a transformer the input of image to video: noise, the first frame's latents and their mask."""
    tensors["patch_embedding.weight"] = torch.ones(D, 36, 1, 2, 2).bfloat16()


def test_image_to_video_has_both_experts_and_a_wider_input(original, tmp_path, capsys):
    for seed, expert in enumerate(("high_noise_model", "low_noise_model")):
        tensors, words = make_quantized(seed)
        widen(tensors)
        write_expert(tmp_path / "in" / expert, tensors, words)
    out = tmp_path / "out"
    words = ["--model-type", "Wan2.2-I2V-A14B", "--original-model-path", str(original)]
    words += ["--quant-path", str(tmp_path / "in"), "--output-path", str(out)]
    assert wan_repack.main(words) == 1
    assert "has shape [24, 36, 1, 2, 2], diffusers expects [24, 16, 1" in capsys.readouterr().err
    assert not out.exists()
    for name in ("transformer", "transformer_2"):
        file = original / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 36}))
    assert wan_repack.main(words) == 0
    for name in ("transformer", "transformer_2"):
        found = load_file(out / name / "diffusion_pytorch_model.safetensors")
        assert found["patch_embedding.weight"].shape == (D, 36, 1, 2, 2)
        assert json.loads((out / name / "config.json").read_text())["in_channels"] == 36


def test_four_flags_write_a_whole_pipeline(quantized, original, tmp_path):
    out = tmp_path / "new" / "out"
    words = ["--model_type", "Wan2.2-T2V-A14B", "--original-model-path", str(original)]
    words += ["--quant-path", str(quantized), "--output-path", str(out)]
    assert wan_repack.main(words) == 0
    check_component(out / "transformer", seed=0)
    check_component(out / "transformer_2", seed=1)
    for name in ("transformer", "transformer_2", "vae"):
        assert json.loads((out / name / "config.json").read_text())["of"] == name
    assert (out / "model_index.json").is_file()
    assert (out / "scheduler" / "config.json").is_file()


def test_single_transformer_model(original, tmp_path):
    write_expert(tmp_path / "in", *make_quantized(5))
    (original / "transformer_2" / "config.json").unlink()
    counts = wan_repack.repack_pipeline(
        "Wan2.2-TI2V-5B", original, tmp_path / "in", tmp_path / "out"
    )
    assert list(counts) == ["transformer"]
    check_component(tmp_path / "out" / "transformer", seed=5)
    assert not (tmp_path / "out" / "transformer_2").exists()


def test_image_embeddings_are_renamed(tmp_path):
    write_expert(tmp_path / "in", *make_quantized(6, image=True))
    wan_repack.repack(tmp_path / "in", tmp_path / "out")
    check_component(tmp_path / "out" / "transformer", seed=6, image=True)


def drop(tensors: dict, words: dict, name: str) -> None:
    del tensors[name], words[name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t, w: drop(t, w, "blocks.1.norm3.bias"), "lacks blocks.1.norm2.bias"),
        (lambda t, w: t.update(extra=torch.ones(1)), "does not know, extra"),
        (
            lambda t, w: t.update({"blocks.1.ffn.2.bias": torch.zeros(3)}),
            r"blocks.1.ffn.2.bias has shape \[3\]",
        ),
        (
            lambda t, w: t.update({"blocks.1.attn1.to_q.bias": torch.zeros(D)}),
            "both become blocks.1.attn1.to_q.bias",
        ),
        (
            lambda t, w: drop(t, w, "blocks.1.self_attn.q.weight_scale"),
            "self_attn.q.weight_scale is missing",
        ),
        (
            lambda t, w: t.update({"blocks.1.self_attn.q.weight": torch.zeros(D, D).bfloat16()}),
            "self_attn.q.weight is BF16",
        ),
        (
            lambda t, w: drop(t, w, "blocks.0.self_attn.q.div.mul_scale"),
            "self_attn.q.div.mul_scale is missing",
        ),
        (
            lambda t, w: t.update({"blocks.x.self_attn.q.bias": torch.zeros(D)}),
            "does not know, blocks.x.self_attn.q.bias",
        ),
    ],
    ids=["missing", "unknown", "size", "twice", "scale", "codes", "smoothing", "no-number"],
)
def test_nothing_is_written_when_something_is_wrong(quantized, tmp_path, change, named, capsys):
    tensors, words = make_quantized(1)
    change(tensors, words)
    folder = quantized / "low_noise_model"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write_expert(folder, tensors, words)
    out = tmp_path / "out"
    assert wan_repack.main(["--input-path", str(quantized), "--output-path", str(out)]) == 1
    message = capsys.readouterr().err
    assert re.search(named, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"_class_name": "FluxTransformer2DModel"}', "expected WanTransformer3DModel"),
        ('{"_class_name": "a\\n::error::b"}', r"""_class_name is "a\n::error::b", expected"""),
    ],
)
def test_configuration_of_the_original_is_checked(
    quantized, original, tmp_path, capsys, text, named
):
    config = original / "transformer_2" / "config.json"
    config.write_text(text)
    words = ["--model-type", "Wan2.2-T2V-A14B", "--original-model-path", str(original)]
    words += ["--quant-path", str(quantized), "--output-path", str(tmp_path / "out")]
    assert wan_repack.main(words) == 1
    message = capsys.readouterr().err
    assert f"{config}: " in message
    assert named in message
    assert not (tmp_path / "out").exists()


def test_existing_output_is_never_overwritten(quantized, original, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "transformer").mkdir(parents=True)
    assert wan_repack.main(["--input-path", str(quantized), "--output-path", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((out / "transformer").iterdir()) == []


def test_missing_expert(quantized, tmp_path, capsys):
    for path in (quantized / "low_noise_model").iterdir():
        path.unlink()
    (quantized / "low_noise_model").rmdir()
    assert wan_repack.main(["--input-path", str(quantized), "--output-path", str(tmp_path / "o")])
    assert "low_noise_model is missing" in capsys.readouterr().err


def test_repacked_input_is_refused(quantized, tmp_path, capsys):
    wan_repack.repack(quantized, tmp_path / "out")
    again = ["--input-path", str(tmp_path / "out" / "transformer"), "--output-path"]
    assert wan_repack.main([*again, str(tmp_path / "twice")]) == 1
    assert "needs no repacking" in capsys.readouterr().err


def test_half_a_set_of_flags_is_refused(capsys):
    with pytest.raises(SystemExit):
        wan_repack.main(["--quant-path", "a", "--output-path", "b"])
    assert "--original-model-path" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "high_noise_model"])
def test_a_folder_that_was_not_converted_is_told_so(quantized, place):
    """The folder that msmodelslim wrote, instead of the one that this tool makes of it."""
    (quantized / "high_noise_model" / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(CheckpointError, match=r"convert it with .*wan_repack"):
        plan(model_path=str(quantized / place))


def test_an_expert_that_was_not_converted_is_told_so(quantized, original):
    (quantized / "high_noise_model" / "config.json").write_text('{"_class_name": "WanModel"}')
    index = {name: ["diffusers", "WanTransformer3DModel"] for name in wan_repack.EXPERTS}
    (original / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    expert = {"transformer": str(quantized / "high_noise_model")}
    with pytest.raises(CheckpointError, match=r"WanModel, .*convert it with .*wan_repack"):
        plan(model_path=str(original), component_paths=expert)


def test_what_was_moved_goes_back_when_a_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, output = tmp_path / "built", tmp_path / "output"
    for name in ("a", "b", "c"):
        (built / name).mkdir(parents=True)
        (built / name / "weights").write_text(name)
    output.mkdir()
    put, moves = wan_repack.put, []

    def fail_at_third(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 3:
            raise OSError("no space left")
        put(source, target)

    monkeypatch.setattr(wan_repack, "put", fail_at_third)
    with pytest.raises(OSError, match="no space left"):
        wan_repack.move_into(built, output)
    assert list(output.iterdir()) == []
    assert {p.name: (p / "weights").read_text() for p in built.iterdir()} == {
        "a": "a", "b": "b", "c": "c",
    }  # fmt: skip


def test_what_was_written_is_listed_with_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"transformer": 825, "transformer_2": 1095}
    monkeypatch.setattr(wan_repack, "repack", lambda source, output: counts)
    out = tmp_path / "out"
    assert wan_repack.main(["--input-path", "x", "--output-path", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{out}/transformer: 825 tensors", f"{out}/transformer_2: 1095 tensors"]
    assert lines[2].endswith("config.json of transformer and transformer_2.")


@pytest.mark.parametrize("pictures", [False, True])
def test_a_configuration_is_read_off_the_shapes(pictures: bool) -> None:
    """Every number of the shapes is another one."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (48, 36, 1, 2, 3),
        "proj_out.weight": (6 * 16, 48),
        "condition_embedder.text_embedder.linear_1.weight": (48, 7),
        "condition_embedder.time_embedder.linear_1.weight": (48, 9),
        "blocks.0.ffn.net.0.proj.weight": (60, 48),
        "blocks.0.norm2.weight": (48,),
        "blocks.11.attn1.to_q.weight": (48, 48),
        "blocks.2.attn1.to_q.weight": (48, 48),
    }
    if pictures:
        shapes |= {
            "condition_embedder.image_embedder.norm1.weight": (13,),
            "condition_embedder.image_embedder.pos_embed": (1, 14, 13),
            "blocks.0.attn2.add_k_proj.weight": (48, 15),
        }
    source: Any = SimpleNamespace(reference="a file")
    found: Any = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    assert wan_repack.infer_config(source, found) == {
        "patch_size": (1, 2, 3), "num_attention_heads": 1, "attention_head_dim": 48,
        "in_channels": 36, "out_channels": 16, "text_dim": 7, "freq_dim": 9, "ffn_dim": 60,
        "num_layers": 12, "cross_attn_norm": True, "rope_max_seq_len": 32,
        "image_dim": 13 if pictures else None,
        "pos_embed_seq_len": 14 if pictures else None,
        "added_kv_proj_dim": 15 if pictures else None,
    }  # fmt: skip
    del found["blocks.0.norm2.weight"]
    assert not wan_repack.infer_config(source, found)["cross_attn_norm"]
    del found["proj_out.weight"]
    with pytest.raises(CheckpointError, match=r"a file: tensor proj_out\.weight .* is missing"):
        wan_repack.infer_config(source, found)
