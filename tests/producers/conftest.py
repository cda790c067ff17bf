"""Tests against what others wrote. A package that is not installed skips its tests with a reason.

With `--strict-producers`, as the session of that name passes it, a missing package is an error.
"""

from __future__ import annotations

from importlib import util

import pytest

REQUIRED = ("modelopt", "comfy_kitchen", "convert_to_quant", "deepcompressor", "gguf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-producers", action="store_true", help="a missing third-party package is an error"
    )


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in REQUIRED if util.find_spec(name) is None]
    if config.getoption("--strict-producers") and missing:
        raise pytest.UsageError(
            f"not installed: {', '.join(missing)}; see tests/producers/requirements*.txt"
        )
