"""A process that a test starts ends at once: at its end Python walks every object once more, a second or
two where libraries were imported, but for those that are frozen.

As a plugin it does so for a run of pytest, which finds it with the variables here.
"""

from __future__ import annotations

import atexit
import gc
import os
from pathlib import Path

QUICK_END = "import atexit, gc; atexit.register(gc.freeze)\n"
"""The first line of a program."""


def find_plugin() -> dict[str, str]:
    """Variables with which a run of pytest has this plugin."""
    places = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTEST_PLUGINS": "quick_end"}


def pytest_configure() -> None:
    """Have the end in mind."""
    atexit.register(gc.freeze)
