"""Launching: a Triton kernel is looked up once per kind of arguments, then started directly.

Triton binds, specialises and hashes the arguments of every call again, which takes longer than many
of the kernels here run: at a few hundred layers a step the GPU waits for Python. What Triton
specialises on is little: the dtype of each tensor and whether its address is a multiple of 16,
whether a number is 1 or a multiple of 16, and the constants. Calls that agree in these get the
program that the first of them got.

Inside `watch` nothing is started: tensors of the device `meta` take the same way through the layers,
and each launch that they would lead to is kept, with its grid and everything that it is specialised
on. `quantmatrix.kernels.compiling` builds these for any architecture, so no second table says how kernels
are launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import util
from typing import Any

import torch

from quantmatrix.hardware.probe import name_arch

TRITON = ("nvidia", "amd")
"""Vendors of GPUs that kernels of ours are built for."""
E4M3_CAPABILITY = (8, 9)
"""First compute capability whose Triton target has the type e4m3."""

_programs: dict[tuple[Any, ...], Any] = {}
_watches: list[Watch] = []


@dataclass(frozen=True)
class Launch:
    """One start of a kernel; its parameters are tensors, numbers and constants, in this order."""

    kernel: Any
    """The `triton.jit` function."""
    grid: tuple[int, ...]
    tensors: tuple[torch.Tensor, ...]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    options: dict[str, int] = field(default_factory=dict)
    """Triton's own: `num_warps`, `num_stages`."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All parameters."""
        return (*self.tensors, *self.numbers, *self.constants)


@dataclass
class Watch:
    """What is seen of kernels while nothing is started."""

    arch: str
    """Architecture that the launches are meant for: `sm90`, `gfx942` ..."""
    launches: list[Launch] = field(default_factory=list)


@contextmanager
def watch(arch: str) -> Iterator[list[Launch]]:
    """Keep the launches of `meta` tensors on an architecture, in their order, and start none."""
    seen = Watch(arch)
    _watches.append(seen)
    try:
        yield seen.launches
    finally:
        _watches.remove(seen)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    constants: Sequence[Any],
    **options: int,
) -> None:
    """Start a `triton.jit` kernel over a grid of at most three dimensions.

    Its parameters are the tensors (any shape and dtype, all on one device), then the integers, then
    the constants, in order. `options` are Triton's (`num_warps`, `num_stages`); a kernel with the
    same constants has the same options. What the kernel writes is among its tensors.
    """
    if _watches and tensors[0].is_meta:
        seen = Launch(kernel, grid, tuple(tensors), tuple(numbers), tuple(constants), options)
        _watches[-1].launches.append(seen)
        return
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


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether a tensor, of any shape and dtype, stands for one of a GPU whose launches are watched."""
    return bool(_watches) and tensor.is_meta


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether kernels take a tensor, of any shape and dtype.

    They do when it lies on a GPU and triton is there, or when it is watched.
    """
    return (tensor.is_cuda and has_triton()) or is_watched(tensor)


@cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return util.find_spec("triton") is not None


def view_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales of any shape as a kernel reads them: e4m3 as uint8 where the device has no such type.

    AMD's e4m3 of that generation is another one (`fnuz`: bias 8, no negative zero), so bytes are
    read there, too, and decoded by integer arithmetic. Other dtypes come back as they are.
    """
    if scales.dtype != torch.float8_e4m3fn or has_e4m3(find_arch(scales)):
        return scales
    return scales.view(torch.uint8)


def has_e4m3(arch: str) -> bool:
    """Whether an architecture (`sm90`, `gfx942` ...) has e4m3 as a type of its own."""
    number = arch.removeprefix("sm")
    return number.isdecimal() and divmod(int(number), 10) >= E4M3_CAPABILITY


def find_arch(tensor: torch.Tensor) -> str:
    """Architecture that a tensor's kernels are built for: `sm90`, `gfx942` ..., or `cpu`.

    Only the tensor's device counts; it may have any shape and dtype.
    """
    return _watches[-1].arch if is_watched(tensor) else _read_arch(tensor.device)


@cache
def _read_arch(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return name_arch(torch.cuda.get_device_properties(device))
