"""Choices: what `quantmatrix quantize` makes of a model, and what its file must be called."""

from __future__ import annotations

from pathlib import Path

from quantmatrix.errors import UsageError
from quantmatrix.families.nunchaku_svdq.layers import PRECISIONS, RANKS, SCHEMES, after_gelu
from quantmatrix.scheme import Scheme

FILE = ".safetensors"


def name_scheme(scheme: str | None, precision: str | None, rank: int | None) -> str:
    """The word in `SCHEMES` for a precision and a rank (None: 32); UsageError for others."""
    if scheme is not None:
        raise UsageError("--scheme is not for nunchaku-svdq: give --precision and --rank")
    if precision not in PRECISIONS.values():
        raise UsageError(f"--precision {precision}: expected {' or '.join(PRECISIONS.values())}")
    rank = 32 if rank is None else rank
    if rank not in RANKS:
        raise UsageError(f"--rank {rank}: expected one of {', '.join(map(str, RANKS))}")
    return f"{precision}_r{rank}"


def scheme_of(
    layer: str, scheme: Scheme, *, raw: bool, gelu: bool, interleaved: bool, columns: int
) -> Scheme | None:
    """Modulation, whose rows are interleaved, is AWQ; norms stay in full precision."""
    if interleaved:
        return SCHEMES["awq"]
    if "norm" in layer or "adaLN" in layer:
        return None
    return after_gelu(scheme) if gelu else scheme


def check_output(model: str, scheme: Scheme, path: Path) -> None:
    """One file, whose name says precision and rank; UsageError for another path."""
    wanted = f"svdq-{'int4' if scheme.weight == 'int4' else 'fp4'}_r{scheme.rank}-"
    if wanted not in path.name or path.suffix != FILE:
        raise UsageError(
            f"--output-path {path}: readers take precision and rank from the file's name: "
            f"call it {wanted}{model}{FILE}"
        )
