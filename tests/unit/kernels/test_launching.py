"""Kernels are looked up once per kind of arguments; a call of another kind never gets that program."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantmatrix.kernels import launching


class Program:
    """What a compiled kernel does: it records how it was started."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *words: self.started.append((grid, words))


class Kernel:
    """Stands for `triton.jit`: compiles at every lookup, and says how often."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_start(*words: Any, **options: int) -> Program:
            self.programs.append(Program())
            return self.programs[-1]

        return compile_and_start


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_programs", {})


def draw(size: int, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    return torch.zeros(size + 16, dtype=dtype)[start : start + size]


def test_equal_calls_start_the_first_ones_program() -> None:
    kernel, x, y = Kernel(), draw(32), draw(32)
    launching.launch(kernel, (7,), (x,), (48,), (True, 128), num_warps=8)
    launching.launch(kernel, (3, 2), (y,), (32,), (True, 128), num_warps=8)
    [program] = kernel.programs
    [(grid, words)] = program.started
    assert grid == (3, 2, 1)
    assert words[0] is y
    assert words[1:] == (32, True, 128)


@pytest.mark.parametrize(
    "other",
    [
        lambda: ((draw(32, torch.bfloat16),), (48,), (128,)),
        lambda: ((draw(32, start=1),), (48,), (128,)),
        lambda: ((draw(32),), (1,), (128,)),
        lambda: ((draw(32),), (47,), (128,)),
        lambda: ((draw(32),), (2**31,), (128,)),
        lambda: ((draw(32),), (48,), (64,)),
        lambda: ((torch.empty(32, device="meta"),), (48,), (128,)),
    ],
    ids=["dtype", "alignment", "one", "no multiple", "wide number", "constant", "device"],
)
def test_another_kind_of_call_is_compiled(other: Any) -> None:
    kernel = Kernel()
    launching.launch(kernel, (1,), (draw(32),), (48,), (128,))
    launching.launch(kernel, (1,), *other())
    assert len(kernel.programs) == 2
    launching.launch(Kernel(), (1,), (draw(32),), (48,), (128,))
    assert not any(program.started for program in kernel.programs)
