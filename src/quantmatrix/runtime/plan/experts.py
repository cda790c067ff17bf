"""Experts: which steps a Wan2.2 transformer is for, as far as names tell.

Both experts have the same tensors, so that one loads in the other's place without an error, and the
video is noise. Names mostly say which one a file is:

| expert | component | in names of files and folders |
| ------ | --------- | ----------------------------- |
| noisy steps | `transformer` | `high_noise`, `high-noise`, `HighNoise`, `HIGH` between separators |
| the rest | `transformer_2` | the same with `low`; the folder `transformer_2` |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

EXPERTS = {"transformer": "high", "transformer_2": "low"}
"""Noise of the steps that a component takes."""
NOISE_NAME = re.compile(
    r"(?<![A-Za-z])(?i:(low|high)[ ._-]?noise)|(?<![A-Za-z])(LOW|HIGH)(?![A-Za-z])"
    r"|(Low|High)(?=Noise)"
)
LEVELS = 3
"""Names of a path that are looked at: the file's, its folder's and the one's above."""


def read_noise(path: str) -> str | None:
    """`low` or `high`, whichever the last of a path's names says that says one; None: none does."""
    for name in reversed(PurePosixPath(path.replace("\\", "/")).parts[-LEVELS:]):
        found = {next(filter(None, match.groups())).lower() for match in NOISE_NAME.finditer(name)}
        if name == "transformer_2":
            found = {EXPERTS[name]}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def warn_of_expert(component: str, files: Iterable[str], components: Collection[str]) -> str | None:
    """A warning where a file's name says that it is the other expert's; None: it does not.

    `components` are those of the base model: one that has a single transformer has no experts.
    """
    if not set(EXPERTS) <= set(components) or component not in EXPERTS:
        return None
    for file in files:
        noise = read_noise(file)
        if noise is not None and noise != EXPERTS[component]:
            other = next(name for name, noise_name in EXPERTS.items() if noise_name == noise)
            return (
                f"{file}: by its name this is the {noise}_noise expert, and it is given to "
                f"{component}, which takes the steps of {EXPERTS[component]} noise. Nothing else "
                f"tells the two apart: is it meant for {other} "
                f"(--{other.replace('_', '-')}-weights-path)?"
            )
    return None
