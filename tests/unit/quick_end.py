"""A process that a test starts collects garbage as seldom as where cells are run, and ends at once.

At its end Python walks every object once more, a second or two where libraries were imported, but for
those that are frozen. As a plugin this is for a run of pytest, which finds it with the variables here.
"""

from __future__ import annotations

import atexit
import gc
import os
from pathlib import Path

from quantmatrix.harness.plugin import COLLECTED

QUICK_END = f"import atexit, gc; gc.set_threshold(*{COLLECTED}); atexit.register(gc.freeze)\n"
"""The first line of a program."""


def find_plugin() -> dict[str, str]:
    """Variables with which a run of pytest has this plugin."""
    places = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTEST_PLUGINS": "quick_end"}


def pytest_configure() -> None:
    """Have the end in mind."""
    gc.set_threshold(*COLLECTED)
    atexit.register(gc.freeze)
