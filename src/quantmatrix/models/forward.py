"""Forward: one call of a model's transformer, described without torch.

A model module says with `Step` how its pipeline calls the transformer at a timestep, and builds the
arguments of one forward with a `Draw`, which decides where the numbers lie and what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Step:
    """How a pipeline passes a timestep and latents to the transformer, and takes its answer."""

    time: str = "timestep"
    """Argument that takes the time [1]."""
    per: int = 1000
    """The scheduler's timesteps, 0 to 1000, are divided by this."""
    left: bool = False
    """Whether the time that is left is passed: (1000 - timestep) / `per`."""
    latents: str = "hidden_states"
    """Argument that takes the latents."""
    listed: bool = False
    """Whether the latents come as a list, a sample each."""
    sign: int = 1
    """The scheduler takes the answer times this."""


class Draw(Protocol):
    """Numbers for the arguments of a forward, in one dtype on one device."""

    def normal(self, *shape: int) -> Any:
        """Normally distributed numbers of this shape, in the compute dtype."""

    def number(self, value: float) -> Any:
        """One number [1] in the compute dtype."""

    def whole_number(self, value: int) -> Any:
        """One number [1] in int64."""

    def side(self, *, tiny: bool) -> int:
        """Patches of a picture's side: 64 are 1024 pixels."""

    def text(self, *, tiny: bool) -> int:
        """Rows of the text encoder's output."""

    def packed(self, config: Any, *, tiny: bool) -> dict[str, Any]:
        """Latents [1, side * side, channels], text [1, rows, width] and a timestep [1]."""

    def positions(self, config: Any, *, tiny: bool) -> dict[str, Any]:
        """`img_ids` [side * side, axes] and `txt_ids` [rows, axes], float32."""
