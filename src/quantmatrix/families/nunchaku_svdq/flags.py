"""Flags of SVDQuant: whether they fit each other, the name of a file and what it holds."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.nunchaku_svdq import layers
from quantmatrix.request import PRECISIONS

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.request import Request

FILE_NAME = re.compile(r"svdq-(int4|fp4)_r(\d+)")
LIGHTNING = re.compile(r"lightning.*?(\d+)-?steps?", re.IGNORECASE)


def check_flags(request: Request) -> None:
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


def infer_from_name(reference: str) -> tuple[str, int] | None:
    """(`int4` or `nvfp4`, rank) of a path whose last part holds svdq-{int4|fp4}_r{rank}."""
    match = FILE_NAME.search(PurePosixPath(reference.rstrip("/")).name)
    if match is None:
        return None
    return ("int4" if match[1] == "int4" else "nvfp4"), int(match[2])


def lightning_steps(reference: str) -> int | None:
    """Denoising steps that a Lightning checkpoint is named for, or None."""
    match = LIGHTNING.search(PurePosixPath(reference.rstrip("/")).name)
    return int(match[1]) if match else None


def check_file(request: Request, checkpoint: Checkpoint, why: str | None) -> list[str]:
    """Compare the guide's three SVDQuant flags and the file name with what the file holds.

    `why` says why the file is SVDQuant; None: it is not. An explicit `--enable-svdquant false` makes
    the name count for nothing. A flag overrules the name. Returns warnings, of a Lightning checkpoint
    about the steps of the run; contradictions raise UsageError or CheckpointError.
    """
    enable, precision = request.enable_svdquant, request.quantization_precision
    rank, steps = request.quantization_rank, request.num_inference_steps
    if enable is False:
        if why is not None:
            raise UsageError(
                f"--enable-svdquant false, but {checkpoint.reference} is an SVDQuant checkpoint "
                f"({why}): leave the flag out, or name full-precision weights"
            )
        return []
    names = (checkpoint.reference, *(checkpoint.files if len(checkpoint.files) == 1 else ()))
    named = next(filter(None, map(infer_from_name, names)), None)
    if why is None:
        return refuse_plain(checkpoint, bool(enable), named, (precision, rank))
    coded = [s for s in layers.schemes(checkpoint).values() if s.op == "linear.svdq"]
    held_precisions = {layers.PRECISIONS[scheme.weight] for scheme in coded}
    held_ranks = {scheme.rank for scheme in coded}
    for flag, given, of_name, held in (
        ("--quantization-precision", precision, named and named[0], held_precisions),
        ("--quantization-rank", rank, named and named[1], held_ranks),
    ):
        wanted = of_name if given is None else given
        if wanted is not None and wanted not in held:
            source = f"{flag} {given}" if given is not None else f"the file name says {of_name}"
            named_held = (
                " and ".join(map(str, sorted(held))) or "AWQ layers only, which have neither"
            )
            raise CheckpointError(
                f"{checkpoint.files[0]}: {source}, but its tensors are of {named_held}: correct the "
                f"{'flag' if given is not None else f'name, or overrule it with {flag}'}"
            )
    expected = next(filter(None, map(lightning_steps, names)), None)
    if expected is not None and steps is not None and steps != expected:
        return [
            f"{checkpoint.reference} is a Lightning checkpoint for {expected} steps, this run "
            f"takes {steps}: pass --num-inference-steps {expected}"
        ]
    return []


def refuse_plain(
    checkpoint: Checkpoint,
    enable: bool,
    named: tuple[str, int] | None,
    flags: tuple[str | None, int | None],
) -> list[str]:
    """Nothing in the file is SVDQuant: warnings about flags that then mean nothing.

    Raises CheckpointError where a flag or the file's name promised SVDQuant.
    """
    if enable or named:
        promise = "--enable-svdquant was given" if enable else "it is named like an SVDQuant file"
        raise CheckpointError(
            f"{checkpoint.reference}: {promise}, but no header says svdquant and no layer has "
            "qweight and wscales; --enable-svdquant false loads it as what it is"
        )
    if flags != (None, None):
        return ["--quantization-precision and --quantization-rank count for SVDQuant files only"]
    return []
