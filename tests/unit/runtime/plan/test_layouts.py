"""A plan says where codes and block scales lie of the one format whose files differ in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantmatrix import families
from quantmatrix.runtime.plan.layouts import describe_layout, describe_layouts
from quantmatrix.scheme import Scheme

SCHEMES = {
    f"{family} {name}": scheme
    for family in families.IDS
    for name, scheme in families.load(family).SCHEMES.items()
}


@pytest.mark.parametrize("op", sorted({scheme.op for scheme in SCHEMES.values()}))
def test_layers_of_nvfp4_alone_have_a_layout(op: str) -> None:
    schemes = {name: scheme for name, scheme in SCHEMES.items() if scheme.op == op}
    assert {bool(describe_layout(scheme)) for scheme in schemes.values()} == {op == "linear.nvfp4"}
    assert sum(describe_layouts(schemes, None).values()) == len(schemes) * (op == "linear.nvfp4")


def test_layouts_are_told_apart() -> None:
    plain = Scheme("linear.nvfp4", "", "e2m1", "group", "none", group_size=16)
    four = [
        describe_layout(replace(plain, swap_nibbles=swapped, tiled_scales=tiled))
        for swapped in (False, True)
        for tiled in (False, True)
    ]
    assert len(set(four)) == 4
    assert ["low" in text for text in four] == [True, True, False, False]
    assert ["tiles" in text for text in four] == [False, True, False, True]
