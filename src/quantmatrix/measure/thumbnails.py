"""Thumbnails: small pictures of two runs and their difference, as PNG (see `quantmatrix.proof.thumbnails`)."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from quantmatrix.proof.thumbnails import PNG

if TYPE_CHECKING:
    from typing import Any

    import torch
    from numpy.typing import NDArray


LARGEST = 96
"""Pixels of the longer side of a picture."""

LARGEST_FRAME = 64
"""The same for each frame of a clip; three of them stand side by side."""

GAIN = 8

LEVELS = (6, 7, 6)
"""Steps of red, green and blue in the palette; the eye is best at green."""

GREYS = bytes(17 * step for step in range(16) for _ in "rgb")


def draw(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, Any]:
    """The three pictures of two runs' uint8 [frames, height, width, 3], as a record holds them."""
    count = len(reference)
    chosen = sorted({0, count // 2, count - 1})
    pair = [frames[chosen].numpy() for frames in (reference, candidate)]
    distance = GAIN * np.abs(pair[0].astype(np.int32) - pair[1]).max(axis=-1)
    numbers = ", ".join(str(number + 1) for number in chosen)
    return {
        "baseline": draw_colours(pair[0]),
        "quantized": draw_colours(pair[1]),
        "difference": encode(np.minimum((shrink(distance) + 8) // 17, 15), GREYS, bits=4),
        "gain": GAIN,
        "shown": f"frames {numbers} of {count}" if count > 1 else "the picture",
    }


def shrink(frames: NDArray[Any]) -> NDArray[Any]:
    """Frames side by side, each pixel the mean of a whole box; rows and columns that fill none are cut.

    `frames` is uint8 [frames, height, width, 3] or int32 [frames, height, width].
    """
    high, wide = frames.shape[1:3]
    box = -(-max(high, wide) // (LARGEST if len(frames) == 1 else LARGEST_FRAME))
    tall, broad = (min(box, side) for side in (high, wide))
    whole = (0, 0, wide - wide % broad, high - high % tall)
    small = [Image.fromarray(frame).crop(whole).reduce((broad, tall)) for frame in frames]
    return np.concatenate([np.asarray(frame) for frame in small], axis=1)


def draw_colours(frames: NDArray[Any]) -> str:
    """A palette PNG of uint8 [frames, height, width, 3]."""
    red, green, blue = (
        (channel.astype(np.int32) * (levels - 1) + 127) // 255
        for channel, levels in zip(np.moveaxis(shrink(frames), -1, 0), LEVELS, strict=True)
    )
    return encode((red * LEVELS[1] + green) * LEVELS[2] + blue, list_colours())


def list_colours() -> bytes:
    """Red, green and blue of every index."""
    ramps = [[step * 255 // (levels - 1) for step in range(levels)] for levels in LEVELS]
    return bytes(part for r in ramps[0] for g in ramps[1] for b in ramps[2] for part in (r, g, b))


def encode(indices: NDArray[Any], palette: bytes, *, bits: int = 8) -> str:
    """A data URI of places in a palette, [height, width]."""
    picture = Image.fromarray(indices.astype(np.uint8)).convert("L")
    picture.putpalette(palette)
    stream = io.BytesIO()
    picture.save(stream, "PNG", bits=bits, optimize=True)
    return PNG + base64.b64encode(stream.getvalue()).decode()
