"""The spread of a stand-in, measured: near, but not equal, and every linear layer is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from quantmatrix import models
from quantmatrix.measure import spread
from quantmatrix.proof import limits
from quantmatrix.tables import read

COMMITTED = limits.read(Path(__file__).parents[3] / "reports" / "limits.csv").spreads


def test_bf16_is_near_fp32_and_not_equal() -> None:
    found = spread.measure("flux-2", read.read().models["flux-2"].repo)
    assert (found.model, found.size, found.steps) == ("flux-2", "1x64x64", 4)
    assert found.layers == COMMITTED["flux-2"].layers
    assert 2**-10 < found.layer_error < 2**-8  # BF16 rounds outputs by at most 2^-9
    committed = COMMITTED["flux-2"]
    assert found.psnr_db == pytest.approx(committed.psnr_db, abs=6.0)  # other instruction sets
    assert found.relative_l2 == pytest.approx(committed.relative_l2, rel=1.0)


def test_every_linear_layer_of_every_transformer_counts() -> None:
    from diffusers import WanTransformer3DModel

    assert COMMITTED["wan-2-2"].layer.partition(".")[0] in ("transformer", "transformer_2")
    model = WanTransformer3DModel(**models.load("wan-2-2").TINY)
    linear = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    assert COMMITTED["wan-2-2"].layers == 2 * linear
