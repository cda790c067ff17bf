"""Arguments of a kernel's entry are found by name, by position, and in what it was copied from."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from quantmatrix.proof import kernel_tables
from quantmatrix.proof.kernel_tables import KERNEL, KernelTables
from quantmatrix.proof.source_modules import UnknownValueError

SECOND = KERNEL[1]


def find(text: str, name: str) -> str:
    tables: Any = KernelTables(None)  # type: ignore[arg-type]
    tables.is_replace = lambda placed: ast.unparse(placed[1].func) == "replace"
    module, node = tables.find_argument(("kernels.x", ast.parse(text, mode="eval").body), name)
    assert module == "kernels.x"
    return ast.unparse(node)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"Kernel('a', {SECOND}='b')", "'b'"),
        ("Kernel('a', 'c')", "'c'"),
        ("Kernel('a', 'c', 'd')", "'c'"),
        (f"replace(Kernel('a', 'c'), {SECOND}='b')", "'b'"),
        (f"replace(Kernel('a', {SECOND}='c'), {KERNEL[0]}='b')", "'c'"),
    ],
)
def test_where_an_argument_stands(text: str, found: str) -> None:
    assert find(text, SECOND) == found


@pytest.mark.parametrize("text", ["Kernel('a')", "Kernel()", f"Kernel({KERNEL[0]}='a')", "3"])
def test_what_is_not_given_is_unknown(text: str) -> None:
    with pytest.raises(UnknownValueError, match=SECOND):
        find(text, SECOND)
    assert kernel_tables.KERNEL.index(SECOND) == 1
