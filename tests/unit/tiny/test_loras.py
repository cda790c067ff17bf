"""Adapters of stand-ins: they fit the models of the rows, and layers beside which they stand are still judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from quantmatrix import models
from quantmatrix.measure.layers import make_hook
from quantmatrix.runtime.empty_model import build_plain
from quantmatrix.runtime.lora import add_adapter
from quantmatrix.tables import read
from quantmatrix.tiny import hub
from quantmatrix.tiny.loras import RANK, TARGETS, write_lora

TABLES = read.read()


@pytest.mark.parametrize("model", models.IDS)
def test_an_adapter_has_factors_of_its_models_layers(model: str, tmp_path: Path) -> None:
    write_lora(model, "lora.safetensors", tmp_path)
    tensors = load_file(tmp_path / "lora.safetensors")
    plain = build_plain(model, "tiny")
    layers = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in tensors}
    assert len(layers) >= 6
    assert len(tensors) == 2 * len(layers)
    for layer in layers:
        module = plain.get_submodule(layer)
        down, up = (tensors[f"transformer.{layer}.lora_{half}.weight"] for half in "AB")
        assert layer.rpartition(".")[2] in TARGETS
        assert tuple(down.shape) == (RANK, module.in_features)
        assert tuple(up.shape) == (module.out_features, RANK)
        assert 0.1 < float((up.float() @ down.float()).norm() / module.out_features**0.5) < 1


def test_every_adapter_of_a_row_is_one_of_the_hub() -> None:
    named = {
        flag: cell.model
        for cell in TABLES.cells
        for flag in cell.flags
        if flag.startswith(hub.PLACEHOLDER) and flag.endswith("-lora.safetensors")
    }
    assert named.items() <= hub.LORA_PATHS.items()
    assert len(named) == len(set(named.values())) == 5
    assert len({cell.family for cell in TABLES.cells if "--lora-path" in cell.flags}) == 5


class Weights:
    """A reader of one layer's weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def read(self, name: str) -> torch.Tensor:
        return self.weight


def test_what_an_adapter_adds_is_no_error_of_its_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.layer = nn.Linear(16, 8, bias=False)
    weight = model.layer.weight.detach() * 1.01
    factors = {
        "layer.lora_A.weight": torch.randn(2, 16, generator=generator),
        "layer.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    add_adapter(model, factors, "one", 1.0, "transformer", "here")
    errors: dict[str, float] = {}
    model.layer.register_forward_hook(make_hook("layer", Weights(weight), {}, errors))  # type: ignore[arg-type]
    x = torch.randn(3, 16, generator=generator)
    with torch.no_grad():
        added = model.layer(x) - functional.linear(x, weight / 1.01)
    assert float(added.norm()) > 1
    assert errors["layer"] == pytest.approx(0.01 / 1.01, rel=1e-3)
