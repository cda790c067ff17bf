"""Kernel choice: the kernel of each layer, and why another was passed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix import kernels, models
from quantmatrix.kernels.choosing import choose
from quantmatrix.models import generic
from quantmatrix.request import DTYPES
from quantmatrix.runtime.plan.types import Piece

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantmatrix.hardware.machine import Machine
    from quantmatrix.request import Request
    from quantmatrix.runtime.plan.placement import Part
    from quantmatrix.scheme import Scheme


FP4_BACKEND = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"

PATCH, FRAMES = 16, 4
"""Pixels of a side, and frames after the first, that one patch of latents stands for."""

TEXT_ROWS = 512
"""Tokens of text that the models take at most."""


def wanted_backend(request: Request, warnings: list[str]) -> str | None:
    """The NVFP4 backend that the environment variable of the guide asks for, by our name.

    A value that it does not have is a warning, and the order of the architecture decides.
    """
    value = request.fp4_gemm_backend
    if not value:
        return None
    from quantmatrix.kernels.linear_nvfp4 import backend_alias

    try:
        return backend_alias(value)
    except KeyError as error:
        note = f"{FP4_BACKEND}={value} is not used: {error.args[0]}"
        if note not in warnings:
            warnings.append(note)
        return None


def choose_kernels(
    parts: Mapping[str, Sequence[Part]],
    model: str,
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each quantized module in the order of their columns, each with its kernel."""
    item = DTYPES[request.dtype]
    wanted, rows = wanted_backend(request, warnings), count_rows(model, request)
    layers: dict[str, tuple[Piece, ...]] = {}
    for module, own in parts.items():
        chosen = []
        for part in sorted(own, key=lambda part: part.target.columns):
            scheme, out, into = part.scheme, part.out_features, part.in_features
            kernel = choose_kernel(scheme, machine, (out, into), rows, request, wanted, warnings)
            size = kernel.footprint(scheme, out, into, item)
            numerics = name_numerics(kernel, scheme)
            chosen.append(
                Piece(part.layer, part.target, scheme, out, into, kernel.backend, numerics, size)
            )
        layers[module] = tuple(chosen)
    return layers


def choose_kernel(
    scheme: Scheme,
    machine: Machine,
    shape: tuple[int, int],
    rows: int,
    request: Request,
    wanted: str | None,
    warnings: list[str],
) -> kernels.Kernel:
    """The kernel of a layer: `--backend` alone, else what was wished for NVFP4, else the order.

    `rows` is the most rows that an input will have. A wish that this machine or shape cannot meet is a
    warning, and the order decides; so is a kernel that is passed over for the number of rows alone,
    or because the machine computes it wrongly.
    """
    if request.backend is None and wanted and scheme.op == "linear.nvfp4":
        try:
            return kernels.choose(scheme.op, machine, scheme, shape, wanted, rows)
        except kernels.NoKernel as error:
            note = f"{FP4_BACKEND}={request.fp4_gemm_backend} is not used: {error.message}"
            if not any(text.startswith(f"{FP4_BACKEND}=") for text in warnings):
                warnings.append(note)
    chosen = choose(scheme.op, machine, scheme, shape, request.backend, rows, warnings)
    first = choose(scheme.op, machine, scheme, shape, request.backend)
    if first is not chosen:
        why = first.needs.why_not(machine, scheme, shape, rows)
        note = f"{scheme.op}: {first.backend} {why}; {chosen.backend} is used"
        if note not in warnings:
            warnings.append(note)
    return chosen


def count_rows(model: str, request: Request) -> int:
    """Most rows of a linear layer's input: latent patches of the request's size, and text."""
    module = models.load(model)
    defaults = module.TINY_DEFAULTS if request.tiny else module.DEFAULTS
    height, width = request.height or defaults.height, request.width or defaults.width
    frames = request.num_frames or defaults.frames or 1
    patches = (height // PATCH) * (width // PATCH) * (1 + (frames - 1) // FRAMES)
    pictures = len(request.image_path) * generic.count_picture_rows(module.PIPELINE)
    return patches + pictures + TEXT_ROWS


def name_numerics(kernel: kernels.Kernel, scheme: Scheme) -> str:
    """The kernel's class of arithmetic; integer kernels serve 4-bit codes as they serve 8-bit ones."""
    if scheme.op == "linear.int8" and scheme.weight == "int4":
        return {"W8A8": "W4A4", "W8A16": "W4A16"}.get(kernel.numerics, kernel.numerics)
    return kernel.numerics
