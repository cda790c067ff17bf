"""quantmatrix: which quantized diffusion checkpoint works on which hardware, with proof.

The public functions are imported when they are first used, so that `import quantmatrix` costs
nothing:

| name | what it does |
| ---- | ------------ |
| `load_transformer` | a diffusers transformer with quantized layers, ready for `forward` |
| `load_pipeline` | the whole diffusers pipeline |
| `plan` | what would run, with which kernels, or why not; reads headers only |
| `inspect` | what a checkpoint is, from its headers |
| `matrix_frame` | the support matrix as a pandas DataFrame |
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.api import load_pipeline as load_pipeline
    from quantmatrix.api import load_transformer as load_transformer
    from quantmatrix.report.render import matrix_frame as matrix_frame
    from quantmatrix.runtime.plan.inspect import inspect as inspect

__version__ = "0.1.0"

_PUBLIC = {
    "inspect": "quantmatrix.runtime.plan.inspect",
    "load_pipeline": "quantmatrix.api",
    "load_transformer": "quantmatrix.api",
    "matrix_frame": "quantmatrix.report.render",
}

__all__ = ["__version__", "inspect", "load_pipeline", "load_transformer", "matrix_frame", "plan"]


def __getattr__(name: str) -> Any:
    """Import a public function on first use."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'quantmatrix' has no attribute {name!r}")


def plan(*args: Any, **fields: Any) -> Any:
    """What would run, with which kernels, or a refusal; see `quantmatrix.api.plan`.

    Raises CheckpointError and UsageError for what is wrong with the input.
    """
    from quantmatrix import api

    return api.plan(*args, **fields)
