"""Contact sheet: every run of a validation on one picture, BF16, quantized and where they differ.

A line is a run: the two pictures, and the map of FLIP in the colours of magma, where black is equal; without
the package `flip-evaluator` it is the difference, amplified. What is seen is said above it, with the weights
that were used: pictures of random weights look like nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.runtime.run import Run

SIDE = 256
"""Pixels of the longer side of a picture."""
GAP, LINE = 8, 14
LETTERS = 110
"""Characters of a caption."""
AMPLIFIED = 4
PAPER, INK = (255, 255, 255), (31, 35, 40)


def draw_sheet(runs: Sequence[tuple[Run, Run]], captions: Sequence[str], scope: str) -> Any:
    """A PIL image of (BF16, quantized) runs, each below its caption; `scope` says what weights ran."""
    from PIL import Image, ImageDraw

    from quantmatrix.measure.quality import has_flip

    rows = [draw_row(*pair) for pair in runs]
    height = rows[0][0].height + 2 * LINE + GAP
    width = 3 * (rows[0][0].width + GAP) + GAP
    sheet = Image.new("RGB", (max(width, 640), 2 * LINE + len(rows) * height + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    third = "FLIP map (black: equal)" if has_flip() else f"difference, {AMPLIFIED} times"
    pen.text((GAP, GAP // 2), f"BF16 | quantized | {third}. {scope}"[:LETTERS], fill=INK)
    for number, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        top = 2 * LINE + number * height
        pen.text((GAP, top), write_ascii(caption), fill=INK)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + column * (picture.width + GAP), top + LINE))
    return sheet


def write_ascii(text: str) -> str:
    """A caption in the letters that the font surely has."""
    short = text if len(text) <= LETTERS else f"{text[: LETTERS - 4]} ..."
    return short.encode("ascii", "replace").decode()


def draw_row(base: Run, run: Run) -> list[Any]:
    """BF16, quantized, and where they differ, as PIL images of one size; of a video the middle frame."""
    import numpy as np
    from PIL import Image

    from quantmatrix.measure.quality import draw_flip, has_flip
    from quantmatrix.runtime.media import stack_frames

    left, right = (stack_frames(one.media) for one in (base, run))
    middle = len(left) // 2
    one, two = left[middle], right[middle]
    if has_flip():
        shown = (draw_flip(one, two, colour=True) * 255).round().clip(0, 255)
    else:
        distance = np.abs(two.numpy().astype(np.float64) - one.numpy())
        shown = (AMPLIFIED * distance).clip(0, 255)
    arrays = (one.numpy(), two.numpy(), shown.astype(np.uint8))
    pictures = [Image.fromarray(array) for array in arrays]
    scale = SIDE / max(pictures[0].size)
    size = tuple(max(1, round(side * scale)) for side in pictures[0].size)
    return [picture.resize(size) for picture in pictures]
