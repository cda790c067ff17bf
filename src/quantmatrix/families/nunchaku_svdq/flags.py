"""Flags of SVDQuant: which file they choose, and whether they fit what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.errors import UsageError
from quantmatrix.request import PRECISIONS

if TYPE_CHECKING:
    from quantmatrix.request import Request


def check_svdquant_flags(request: Request) -> None:
    """Contradictions among the three SVDQuant flags, before any file is opened.

    Raises UsageError for the first of them.
    """
    if request.enable_svdquant and not request.weights_paths.get("transformer"):
        raise UsageError(
            "--enable-svdquant needs --transformer-weights-path: name the SVDQuant file"
        )
    precision = request.quantization_precision
    if precision is not None and precision not in PRECISIONS:
        hint = " (fp4 in file names is written nvfp4 here)" if precision == "fp4" else ""
        raise UsageError(
            f"--quantization-precision {precision}: expected {' or '.join(PRECISIONS)}{hint}"
        )
    rank = request.quantization_rank
    if rank is not None and rank <= 0:
        raise UsageError(f"--quantization-rank {rank}: must be greater than 0")
