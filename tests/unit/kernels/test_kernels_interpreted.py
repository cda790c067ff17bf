"""The numbers of our kernels without a GPU: run by Triton's interpreter, held against plain arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: the extra `compile`")

SCRIPT = Path(__file__).parents[1] / "interpreted.py"


@pytest.fixture(scope="module")
def differing() -> dict[str, int]:
    """Numbers that differ, by what was compared."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, str(SCRIPT)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_every_number_equals_plain_arithmetic(differing: dict[str, int]) -> None:
    assert {name: count for name, count in differing.items() if count} == {}
    assert len(differing) == 43


def test_scales_are_read_as_bytes_and_as_e4m3(differing: dict[str, int]) -> None:
    kinds = {name.partition(",")[0] for name in differing}
    assert {"all scales as bytes", "all scales as e4m3"} <= kinds
