"""What every Python process does that a test starts: it ends at once, and collects garbage seldom.

At its end Python walks all objects once more, a second or two where libraries were imported, but for those
that are frozen. `PYTHONPATH` leads here (see `conftest.py`); another module of this name is run, too.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib.machinery import PathFinder
from pathlib import Path

COLLECTED = (50_000, 20, 50)
"""As where cells are run, see `quantmatrix.harness.plugin`."""

gc.set_threshold(*COLLECTED)
atexit.register(gc.freeze)
others = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
found = PathFinder.find_spec("sitecustomize", others)
if found is not None and found.loader is not None:
    found.loader.exec_module(sys.modules[__name__])
