"""What a refusal says, for tests that compare it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refusal(error: type[Exception], act: Callable[..., Any], *given: Any, **named: Any) -> str:
    """The text of the error that a call ends in."""
    with pytest.raises(error) as caught:
        act(*given, **named)
    return str(caught.value)
