"""Thumbnails: small pictures of two runs and their difference, as PNG."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

from quantmatrix.proof.thumbnails import PNG, SIGNATURE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import torch


LARGEST = 96
"""Pixels of the longer side of a picture."""

LARGEST_FRAME = 64
"""The same for each frame of a clip; three of them stand side by side."""

GAIN = 8

LEVELS = (6, 7, 6)
"""Steps of red, green and blue in the palette; the eye is best at green."""


def draw(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, Any]:
    """The table above, of two runs' uint8 [frames, height, width, 3]."""
    count = len(reference)
    chosen = sorted({0, count // 2, count - 1})
    sides = [frames[chosen].long() for frames in (reference, candidate)]
    distance = GAIN * (sides[0] - sides[1]).abs().amax(dim=-1, keepdim=True)
    greys = ((shrink(distance) + 8) // 17).clamp(max=15).squeeze(-1)
    numbers = ", ".join(str(number + 1) for number in chosen)
    return {
        "baseline": encode_colours(shrink(sides[0])),
        "quantized": encode_colours(shrink(sides[1])),
        "difference": encode_png(greys.tolist(), bits=4),
        "gain": GAIN,
        "shown": f"frames {numbers} of {count}" if count > 1 else "the picture",
    }


def shrink(frames: torch.Tensor) -> torch.Tensor:
    """Frames side by side, [height, width, channels], each the mean of whole boxes of pixels.

    `frames` is int64 [frames, height, width, channels]; rows and columns that fill no box are cut.
    """
    high, wide = frames.shape[1:3]
    most = LARGEST if len(frames) == 1 else LARGEST_FRAME
    box = -(-max(high, wide) // most)
    high, wide = max(high // box, 1), max(wide // box, 1)
    boxes = frames[:, : high * box, : wide * box].unflatten(1, (high, -1)).unflatten(3, (wide, -1))
    area = boxes.shape[2] * boxes.shape[4]
    small = (boxes.sum(dim=(2, 4)) + area // 2) // area
    side_by_side: torch.Tensor = small.transpose(0, 1).flatten(1, 2)
    return side_by_side


def encode_colours(pixels: torch.Tensor) -> str:
    """A palette PNG of whole numbers [height, width, 3] in 0..255, of any integer dtype."""
    red, green, blue = (
        (pixels[..., n] * (levels - 1) + 127) // 255 for n, levels in enumerate(LEVELS)
    )
    indices = (red * LEVELS[1] + green) * LEVELS[2] + blue
    return encode_png(indices.tolist(), bits=8, palette=list_colours())


def list_colours() -> bytes:
    """Red, green and blue of every index."""
    ramps = [[step * 255 // (levels - 1) for step in range(levels)] for levels in LEVELS]
    return bytes(part for r in ramps[0] for g in ramps[1] for b in ramps[2] for part in (r, g, b))


def encode_png(rows: Sequence[Sequence[int]], *, bits: int, palette: bytes = b"") -> str:
    """A data URI of rows of indices of 4 or 8 bits: greys, or places in a palette."""
    packed = []
    for row in rows:
        if bits == 4:
            even = [*row, 0] if len(row) % 2 else row
            row = [16 * left + right for left, right in zip(even[::2], even[1::2], strict=True)]
        packed.append(b"\0" + bytes(row))  # each row says that it is not filtered
    kind = 3 if palette else 0
    parts = [(b"IHDR", struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, kind, 0, 0, 0))]
    parts += [(b"PLTE", palette)] if palette else []
    parts += [(b"IDAT", zlib.compress(b"".join(packed), 9)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    return PNG + base64.b64encode(SIGNATURE + b"".join(chunks)).decode()
