"""quantmatrix: which quantized diffusion checkpoint works on which hardware, with proof."""

from __future__ import annotations

__version__ = "0.1.0"
