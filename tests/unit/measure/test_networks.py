"""LPIPS and CLIP score by stand-ins of their weights, in caches of the layout that libraries leave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantmatrix.measure import networks, quality, validation_page
from quantmatrix.tiny import text_encoders

CHANNELS = (64, 192, 384, 256, 256)
SHAPES = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))
SIDE = 32


def picture(seed: int, height: int = 67, width: int = 90) -> torch.Tensor:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(noise)


def make_alexnet(folder: Path) -> None:
    """Weights with the names, shapes and files of torchvision's AlexNet."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (out, inner, kernel) in zip((0, 3, 6, 8, 10), SHAPES, strict=True):
        scale = (inner * kernel * kernel) ** -0.5
        noise = torch.randn(out, inner, kernel, kernel, generator=generator)
        weights[f"features.{number}.weight"] = scale * noise
        weights[f"features.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(weights, folder / "checkpoints" / networks.ALEXNET)


def make_linear(path: Path) -> Path:
    """Weights with the names and shapes of the package `lpips`."""
    generator = torch.Generator().manual_seed(1)
    heads = {
        f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator)
        for n, c in enumerate(CHANNELS)
    }
    torch.save(heads, path)
    return path


@pytest.fixture(scope="module")
def clip_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub with a tiny random CLIP in the place of the real one."""
    from transformers import CLIPConfig, CLIPModel

    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{networks.CLIP.replace('/', '--')}"
    folder = repository / "snapshots" / ("0" * 40)
    words, tokenizer = text_encoders.build_clip("clip")
    seeing = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    config = CLIPConfig(text_config=words.config.to_dict(), vision_config=seeing, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return cache


def test_nothing_is_measured_where_nothing_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "find_linear", lambda: None)
    found = networks.find_networks(tmp_path / "hub", tmp_path / "torch")
    assert (found.lpips, found.clip) == (None, None)
    assert "optional; the package lpips" in found.missing["lpips"]
    assert "pip install --no-deps lpips" in found.missing["lpips"]
    assert f"hf download {networks.CLIP}" in found.missing["clip"]
    assert str(tmp_path / "hub") in found.missing["clip"]
    monkeypatch.setattr(networks, "find_linear", lambda: tmp_path / "alex.pth")
    found = networks.find_networks(tmp_path / "hub", tmp_path / "torch")
    where = tmp_path / "torch" / "checkpoints" / networks.ALEXNET
    assert f"AlexNet is not at {where}" in found.missing["lpips"]
    measured = quality.measure_quality([picture(0)], [picture(1)], found, "a fox")
    assert [measured[name] for name in ("lpips", "clip", "clip_bf16")] == [None] * 3
    assert measured["missing"]["lpips"] == found.missing["lpips"]
    assert measured["missing"]["clip"] == found.missing["clip"]


@pytest.fixture
def found(tmp_path: Path, clip_cache: Path, monkeypatch: pytest.MonkeyPatch) -> networks.Networks:
    make_alexnet(tmp_path / "torch")
    linear = make_linear(tmp_path / "alex.pth")
    monkeypatch.setattr(networks, "find_linear", lambda: linear)
    return networks.find_networks(clip_cache, tmp_path / "torch")


def test_lpips_is_that_of_its_package(found: networks.Networks) -> None:
    """The numbers are lpips 0.1.4's, by torchvision 0.28.0's AlexNet, with these weights."""
    assert found.lpips is not None
    assert found.lpips(picture(0), picture(0)) == 0
    assert found.lpips(picture(0), picture(1)) == pytest.approx(EXPECTED[0], rel=1e-5)
    assert found.lpips(picture(0, 31, 64), picture(1, 31, 64)) == pytest.approx(
        EXPECTED[1], rel=1e-5
    )


EXPECTED = (0.97026265, 0.91624260)


def test_the_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lpips"
    path = package / networks.LINEAR
    path.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert networks.find_linear() is None  # a package that has other files
    make_linear(path)
    assert networks.find_linear() == path


def test_clip_is_the_cosine_of_picture_and_prompt(
    found: networks.Networks, clip_cache: Path
) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder = networks.find_clip(clip_cache)
    assert folder is not None
    assert found.clip is not None
    one, prompt = picture(0, SIDE, SIDE), "a logo with bold large text"  # nothing to resize
    model = CLIPModel.from_pretrained(folder).eval()
    words = CLIPTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    values = one.numpy().astype(np.float64) / 255
    values = (values - networks.MEAN) / networks.DEVIATION
    pixels = torch.from_numpy(values.transpose(2, 0, 1)).float()[None]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        read = model.text_projection(model.text_model(torch.tensor([words])).pooler_output)[0]
    cosine = float(seen @ read / (seen.norm() * read.norm()))
    assert abs(cosine) > 1e-3
    assert found.clip(one, prompt) == pytest.approx(100 * max(cosine, 0), abs=1e-4)
    scores = {found.clip(picture(seed), "word " * 200) for seed in range(8)}  # cut to what it reads
    assert len(scores) > 1
    assert min(scores) >= 0


def test_clip_without_its_words_is_not_there(clip_cache: Path, tmp_path: Path) -> None:
    folder = networks.find_clip(clip_cache)
    assert folder is not None
    other = tmp_path / folder.parents[1].name
    (other / "refs").mkdir(parents=True)
    (other / "refs" / "main").write_text("0" * 40)
    copy = other / "snapshots" / ("0" * 40)
    copy.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((folder / name).read_bytes())
    assert networks.find_clip(tmp_path) is None


def test_pictures_are_cut_from_the_middle() -> None:
    wide = torch.zeros(SIDE, 3 * SIDE, 3, dtype=torch.uint8)
    wide[:, SIDE : 2 * SIDE] = 255
    [channels] = networks.prepare_clip(wide, SIDE)
    for channel, mean, deviation in zip(channels, networks.MEAN, networks.DEVIATION, strict=True):
        assert torch.allclose(channel, torch.tensor((1 - mean) / deviation))
    assert networks.prepare_clip(picture(0, 67, 130), SIDE).shape == (1, 3, SIDE, SIDE)


def test_quality_takes_the_mean_over_frames_and_says_what_is_too_small() -> None:
    fake = networks.Networks(
        lpips=lambda r, c: float((r != c).any()),
        clip=lambda p, prompt: float(p[0, 0, 0]) + len(prompt),
    )
    dark, light = torch.zeros(40, 40, 3, dtype=torch.uint8), torch.full((40, 40, 3), 2).byte()
    frames = [x.numpy() for x in (dark, dark)], [x.numpy() for x in (dark, light)]
    measured = quality.measure_quality(*frames, fake, "abc")
    assert (measured["lpips"], measured["clip"], measured["clip_bf16"]) == (0.5, 4.0, 3.0)
    small = [np.zeros((30, 40, 3), np.uint8)]
    measured = quality.measure_quality(small, small, fake, "abc")
    assert measured["lpips"] is None
    assert measured["missing"]["lpips"] == "pictures of 40 x 30 pixels, AlexNet needs 31"


def test_columns_of_optional_metrics_are_there_where_they_were_measured() -> None:
    def describe(**optional: Any) -> dict[str, Any]:
        known = {"ms_ssim": None, "flip": 0.1, "missing": {}, **optional}
        run = {"prompt": "a", "seed": 1, "media": {"psnr_db": 30.0, "ssim": 0.9}, "quality": known}
        return {"runs": [run], "quality": quality.summarize_quality([run])}

    plain = validation_page.list_quality(describe())
    assert plain[-1] == ["worst", "30", "0.9", "–", "0.1"]
    more = validation_page.list_quality(describe(lpips=0.25, clip=21.5, clip_bf16=22.0))
    assert more[-1] == ["worst", "30", "0.9", "–", "0.1", "0.25", "21.5", "22"]
    names = [name for name, _, _ in validation_page.list_metrics(describe(lpips=0.25))]
    assert names[-1] == "lpips"


@pytest.mark.parametrize("damage", ["cut off", "another network"])
def test_damaged_weights_are_missing_with_a_reason(
    damage: str, tmp_path: Path, clip_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tmp_path / "torch" / "checkpoints" / networks.ALEXNET
    make_alexnet(tmp_path / "torch")
    if damage == "cut off":
        backbone.write_bytes(backbone.read_bytes()[:100])
    else:
        torch.save({"fc.weight": torch.zeros(2)}, backbone)
    linear = make_linear(tmp_path / "alex.pth")
    monkeypatch.setattr(networks, "find_linear", lambda: linear)
    cache = shutil.copytree(clip_cache, tmp_path / "hub")
    [weights] = {path.resolve() for path in cache.rglob("model.safetensors")}
    weights.write_bytes(weights.read_bytes()[:100])
    found = networks.find_networks(cache, tmp_path / "torch")
    assert (found.lpips, found.clip) == (None, None)
    assert str(backbone) in found.missing["lpips"]
    assert "is damaged, or of another network" in found.missing["lpips"]
    assert "is damaged, or of another network" in found.missing["clip"]
