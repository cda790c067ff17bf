"""Qwen2-VL's processor without torchvision: marks of pictures, and what its two halves give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from quantmatrix.runtime.light_processor import MARK, LightProcessor, load_processors, spread_marks
from quantmatrix.tiny import encoders
from quantmatrix.tiny.pictures import write_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a processor alone."""
    folder = tmp_path_factory.mktemp("edit")
    marks = [*encoders.CHAT_MARKS, *encoders.PICTURE_MARKS]
    tokenizer = encoders.train_bpe([], marks, pad_token="<|endoftext|>")
    (folder / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    encoders.write_qwen_processor(tokenizer, folder, "processor")
    return folder


def test_each_mark_becomes_as_many_as_its_picture_has_tokens() -> None:
    texts = [f"a{MARK}b{MARK}", "none", MARK]
    assert spread_marks(texts, [2, 1, 3]) == [f"a{MARK * 2}b{MARK}", "none", MARK * 3]
    with pytest.raises(ValueError, match="3 marks of pictures in the text, expected 2"):
        spread_marks(texts, [1, 1])


def test_pictures_and_text_become_one_input(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    found = load_processors(index, folder)
    if is_torchvision_available():
        pytest.skip("torchvision is installed: transformers' own class is used")
    assert "torchvision is not installed" in caplog.text  # another processor is not silent
    processor = found["processor"]
    assert isinstance(processor, LightProcessor)
    image = Image.open(write_picture("picture.png", tmp_path)).resize((112, 56))
    given = processor(
        text=[f"a {MARK} cat", "dog"], images=image, padding=True, return_tensors="pt"
    )
    grid = given["image_grid_thw"].tolist()
    assert grid == [[1, 4, 8]]  # patches of 14 pixels
    mark = processor.tokenizer.convert_tokens_to_ids(MARK)
    assert (given["input_ids"] == mark).sum(dim=1).tolist() == [8, 0]  # two by two patches a token
    assert given["input_ids"].shape == given["attention_mask"].shape
    red, green, _ = given["pixel_values"].reshape(32, 3, -1).mean(dim=(0, 2))
    mean, spread = 0.48145466, 0.26862954  # of CLIP, for red
    assert torch.allclose(red * spread + mean, torch.tensor(126 / 255), atol=0.02)
    assert green > 0


def test_a_text_alone_needs_no_picture(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_processors({"tokenizer": ["transformers", "Qwen2Tokenizer"]}, folder) == {}
    assert not caplog.text  # nothing is prepared in another way
    found = load_processors({"processor": ["transformers", "Qwen2VLProcessor"]}, folder)
    assert set(found) == (set() if is_torchvision_available() else {"processor"})
    if found:
        given = found["processor"](text=["a cat"], images=None, return_tensors="pt")
        assert set(given) == {"input_ids", "attention_mask"}
