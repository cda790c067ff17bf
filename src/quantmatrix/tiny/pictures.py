"""Tiny pictures: what rows of pipelines that look at something are given, the same bytes everywhere.

A PNG of 64 x 64 pixels whose data are stored, not packed, so that no version of zlib can write another.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.models.generic import read_call

if TYPE_CHECKING:
    from quantmatrix.models import Model

SIDE = 64
PICTURES = ("picture.png", "picture-2.png", "mask.png")
"""Files that rows may name below /path/to/."""


def give_pictures(model: Model, root: str) -> dict[str, Any]:
    """Fields of a request with what a model looks at, below `root`; none for most models."""
    count: int = getattr(model, "PICTURES", 0)
    if not count:
        return {}
    given = {"image_path": tuple(f"{root}{name}" for name in PICTURES[:count])}
    return {
        **given,
        **({"mask_path": f"{root}mask.png"} if "mask_image" in read_call(model.PIPELINE) else {}),
    }


def write_picture(name: str, folder: Path) -> Path:
    """Write one of `PICTURES` into a folder: colours that rise, the other way round, or a square."""
    path = folder / name
    path.write_bytes(encode(draw(name)))
    return path


def draw(name: str) -> bytes:
    """Red, green and blue of each pixel, row by row, each row with a filter byte of 0 before it."""
    rows = []
    for y in range(SIDE):
        row = bytearray(b"\0")
        for x in range(SIDE):
            if name == "mask.png":
                inside = SIDE // 4 <= x < 3 * SIDE // 4 and SIDE // 4 <= y < 3 * SIDE // 4
                row += bytes((255 * inside,) * 3)
            else:
                pixel = (4 * x, 4 * y, 255 - 2 * (x + y))
                row += bytes(pixel if name == PICTURES[0] else pixel[::-1])
        rows.append(bytes(row))
    return b"".join(rows)


def encode(rows: bytes) -> bytes:
    """A PNG file of 8-bit RGB rows with their filter bytes, as one stored block of data."""
    size = len(rows)
    stored = b"\x78\x01\x01" + struct.pack("<HH", size, size ^ 0xFFFF) + rows
    data = stored + struct.pack(">I", zlib.adler32(rows))
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG: length, kind, body and their sum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
