"""Launching: a Triton kernel is looked up once per kind of arguments, then started directly.

Triton binds, specialises and hashes the arguments of every call again, which takes longer than many
of the kernels here run: at a few hundred layers a step the GPU waits for Python. What Triton
specialises on is little: the dtype of each tensor and whether its address is a multiple of 16,
whether a number is 1 or a multiple of 16, and the constants. Calls that agree in these get the
program that the first of them got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_programs: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    constants: Sequence[Any],
    **options: int,
) -> None:
    """Start a `triton.jit` kernel over a grid of at most three dimensions.

    Its parameters are the tensors, then the integers, then the constants, in order. `options` are
    Triton's (`num_warps`, `num_stages`); a kernel with the same constants has the same options.
    """
    key = (
        kernel,
        tensors[0].device,
        *[tensor.dtype for tensor in tensors],
        *[tensor.data_ptr() % 16 == 0 for tensor in tensors],
        *[(number == 1, number % 16 == 0, number < 2**31) for number in numbers],
        *constants,
    )
    program = _programs.get(key)
    if program is None:
        _programs[key] = kernel[grid](*tensors, *numbers, *constants, **options)
    else:
        program[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants)
