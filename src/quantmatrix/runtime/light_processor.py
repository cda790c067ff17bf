"""Light processor: Qwen2-VL's processor where torchvision is not installed.

The class of transformers wants torchvision for clips, which no pipeline of pictures hands it, and cannot be
made without. Here are its two halves alone: the image processor, transformers' own that reads with Pillow,
and the tokenizer. Between them each mark of a picture becomes as many as the picture has merged patches.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
CLASSES = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
"""Classes of transformers that this one stands for."""
MARK = "<|image_pad|>"


class LightProcessor:
    """Texts and pictures to the inputs of Qwen2-VL or Qwen2.5-VL."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        """The two halves, of transformers."""
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __call__(
        self, text: Sequence[str], images: Any = None, *, padding: Any = False, **options: Any
    ) -> Any:
        """`input_ids` and `attention_mask` [texts, tokens] int64, of pictures `pixel_values` [patches, numbers]
        float32 and `image_grid_thw` [pictures, 3] int64; `options` may hold `return_tensors`.
        """
        from transformers import BatchFeature

        seen: Mapping[str, Any] = {}
        texts = list(text)
        if images is not None:
            seen = self.image_processor(images=images, **options)
            merged = self.image_processor.merge_size**2
            counts = [int(grid.prod()) // merged for grid in seen["image_grid_thw"]]
            texts = spread_marks(texts, counts)
        return BatchFeature({**self.tokenizer(texts, padding=padding, **options), **seen})


def spread_marks(texts: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Texts in which the mark of each picture stands as often as the picture has tokens.

    Raises ValueError where texts have another number of marks than there are pictures.
    """
    marks = sum(text.count(MARK) for text in texts)
    if marks != len(counts):
        raise ValueError(f"{marks} marks of pictures in the text, expected {len(counts)}")
    left = iter(counts)
    found = []
    for text in texts:
        first, *rest = text.split(MARK)
        found.append(first + "".join(MARK * next(left) + piece for piece in rest))
    return found


def load_processors(index: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The processors of a pipeline folder that transformers cannot make on this machine, by component.

    `index` is the content of its model_index.json. None where torchvision is installed.
    """
    from transformers.utils import is_torchvision_available

    entries = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    wanted = [name for name, entry in entries.items() if entry[-1] in CLASSES]
    if not wanted or is_torchvision_available():
        return {}
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    logger.warning("torchvision is not installed: pictures are prepared with Pillow")
    return {
        name: LightProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(folder / name),
            AutoTokenizer.from_pretrained(folder / name),
        )
        for name in wanted
    }
