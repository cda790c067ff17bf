"""Failures: whether a runtime meant to refuse a file, or fell over it.

A refusal is an error that the runtime's own code raises on purpose, by a `raise` or an `assert`, before
the weights are loaded: somebody wrote the words for whoever brought the file. A call with an argument too
few, an index out of range, or what torch says of tensors that it was handed (`Cannot copy out of meta
tensor`) shows that nobody expected the file: a crash. The last frame of the traceback tells the two
apart; a program that ends without a traceback printed what it meant.
"""

from __future__ import annotations

import re
import traceback
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ON_PURPOSE = re.compile(r"(raise|assert)\b")
"""How the line begins that raises an error on purpose."""
LIBRARIES = frozenset({"torch", "numpy", "safetensors"})
"""Packages whose errors are about what they were handed: they know of no checkpoint."""
FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line \d+.*\n(?P<line>.*)$', re.MULTILINE)
"""A frame in a printed traceback, with its line of code."""


def is_meant(error: BaseException) -> bool:
    """Whether an exception was raised on purpose, and not by a library of numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    return judge_frames((frame.filename, frame.line or "") for frame in frames)


def reads_meant(text: str) -> bool:
    """The same of the last traceback that a program printed; True where it printed none."""
    return judge_frames((found["file"], found["line"]) for found in FRAME.finditer(text))


def judge_frames(frames: Iterable[tuple[str, str]]) -> bool:
    """Whether the last of (file, line of code) raises on purpose, outside `LIBRARIES`."""
    file, line = next(iter([*frames][-1:]), ("", "raise"))
    return bool(ON_PURPOSE.match(line.strip())) and not LIBRARIES & set(PurePath(file).parts)
