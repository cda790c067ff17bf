"""Layout: how the codes of a file can be read, and which of these readings are open.

Two choices have equal shapes and decode without an error: which nibble holds the even column, and
whether block scales lie in rows or in tiles of 128 x 4. A family whose files differ in these says in
`layout` what a file declares; what is open is chosen by the user (`Checkpoint.chosen`), or by the base
model's weights (`quantmatrix.runtime.witness.verdict`). A reading is never assumed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

NIBBLES, SCALES = ("low", "high"), ("rows", "tiles")
"""Values of `nibble_order` (where the even column lies) and `nvfp4_layout`, ModelOpt's first."""
DECIDES = "The base model's own weights decide when they are at hand"


@dataclass(frozen=True)
class Layout:
    """What is known of a file's layout; None: nothing declares it."""

    nibbles: str | None
    scales: str | None
    why: str
    """What says so, or why it is not known."""

    @property
    def known(self) -> bool:
        """Whether there is one reading only."""
        return self.nibbles is not None and self.scales is not None

    @property
    def readings(self) -> list[dict[str, str]]:
        """The readings that are open, as `Checkpoint.chosen` takes them; one if it is known."""
        nibbles = NIBBLES if self.nibbles is None else (self.nibbles,)
        scales = SCALES if self.scales is None else (self.scales,)
        return [
            {"nibble_order": nibble, "nvfp4_layout": scale}
            for nibble, scale in itertools.product(nibbles, scales)
        ]


def describe_reading(nibbles: str, scales: str) -> str:
    """A reading as text."""
    order = "128 x 4 tiles" if scales == "tiles" else "rows"
    return f"even column in the {nibbles} nibble, block scales in {order}"


def explain_open(checkpoint: Checkpoint, layout: Layout, why: str = "") -> str:
    """The refusal of a file whose layout nothing tells; `why` the base weights did not decide."""
    readings = "; ".join(
        f"{describe_reading(r['nibble_order'], r['nvfp4_layout'])} (--nibble-order "
        f"{r['nibble_order']} --nvfp4-layout {r['nvfp4_layout']})"
        for r in layout.readings
    )
    return (
        f"{checkpoint.reference}: the layout of its NVFP4 codes is unknown: {layout.why}, and the "
        f"wrong nibble order or scale layout gives noise without an error. Open readings: {readings}. "
        f"{why or DECIDES}; or choose with these flags"
    )
