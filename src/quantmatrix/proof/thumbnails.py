"""Thumbnails: BF16, quantized and difference as three small PNGs that a record can hold.

| key          | content |
| ------------ | ------- |
| `baseline`   | what the BF16 run gave; a palette of 252 colours, at most `LARGEST` pixels long |
| `quantized`  | what the quantized run gave, in the same size and colours |
| `difference` | per pixel the largest absolute difference of a channel, times `gain`; 16 greys, black is |
|              | equal |
| `gain`       | how many times as strong the difference is drawn; white is `255 / gain` steps and more |
| `shown`      | what is drawn: `the picture`, or `frames 1, 3, 5 of 5` from left to right |

Each picture is a data URI. The difference is taken before pictures are shrunk and colours reduced. Everything is whole
numbers, so equal pixels give equal indices anywhere; the bytes of a PNG also depend on the build of
zlib, so nothing in this project takes a digest of them.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Mapping
from typing import Any

PICTURES = ("baseline", "quantized", "difference")
KEYS = {*PICTURES, "gain", "shown"}
PNG = "data:image/png;base64,"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
START = base64.b64encode(SIGNATURE + b"\0")
"""Of every PNG as base64: its signature, and the first zero of a length."""
BASE64 = (string.ascii_letters + string.digits + "+/").encode()
MOST_BYTES = 16 * 1024
"""What a picture of a record may take, as text."""


def list_problems(found: Any) -> list[str]:
    """What is wrong with the thumbnails of a record; empty when nothing is."""
    if not isinstance(found, Mapping) or set(found) != KEYS:
        return [f"expected an object with {', '.join(sorted(KEYS))}"]
    problems = []
    for name in PICTURES:
        if why := find_problem(found[name]):
            problems.append(f"{name}: {why}")
    if not isinstance(found["gain"], int) or isinstance(found["gain"], bool) or found["gain"] < 1:
        problems.append(f"gain: {found['gain']!r} is not a whole number from 1 on")
    if not isinstance(found["shown"], str) or not found["shown"]:
        problems.append(f"shown: {found['shown']!r} does not say what is drawn")
    return problems


def find_problem(picture: Any) -> str | None:
    """Why a value is not a picture that a page may show, or None."""
    if not isinstance(picture, str) or not picture.startswith(PNG):
        return f"{picture!r:.40} does not start with {PNG}"
    if len(picture) > MOST_BYTES:
        return f"takes {len(picture)} bytes, at most {MOST_BYTES} are kept"
    text = picture[len(PNG) :].encode()
    if len(text) % 4 or text.rstrip(b"=").translate(None, BASE64):
        return "is not base64"
    return None if text.startswith(START) else "is not a PNG"
