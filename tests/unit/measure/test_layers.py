"""Errors of single layers, which the latents of a run may hide."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.measure import layers as layer_errors
from quantmatrix.measure.layers import USELESS, relative_error, watch_encoders, watch_layers


def test_relative_error_is_bounded_and_finite() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0.0
    assert relative_error(x, x * 1.1) == pytest.approx(0.1)
    assert relative_error(x * 0, x * 0) == 0.0
    for bad in (x * math.nan, x * math.inf):
        assert relative_error(x, bad) == USELESS
    assert relative_error(x * 0, x) == USELESS


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """(pipeline, its plan, the plan of the base model), on a model of two layers."""
    torch.manual_seed(0)
    model = Model()
    file = str(tmp_path / "base.safetensors")
    save_file(model.state_dict(), file)
    known = {name: TensorHeader(name, "F32", (), str(file)) for name in model.state_dict()}
    base = SimpleNamespace(
        components={"transformer": SimpleNamespace(checkpoint=SimpleNamespace(tensors=known))},
        request=SimpleNamespace(hub=None),
    )
    layers = {"first": (), "second": ()}
    made = SimpleNamespace(
        components={"transformer": SimpleNamespace(layers=layers)},
        machine=SimpleNamespace(device="cpu"),
    )
    monkeypatch.setattr(layer_errors, "fetch", lambda checkpoint, hub: checkpoint)
    return SimpleNamespace(transformer=model), made, base


def test_each_layer_is_measured_on_its_own_input(parts: tuple[Any, Any, Any]) -> None:
    pipeline, made, base = parts
    with torch.no_grad():
        pipeline.transformer.first.weight *= 1.25
        pipeline.transformer.first.bias *= 1.25
    with torch.no_grad(), watch_layers(pipeline, made, base) as errors:
        pipeline.transformer(torch.randn(5, 8))
        pipeline.transformer(torch.randn(5, 8) * math.nan)  # only the first call counts
    assert errors.found["transformer"]["first"] == pytest.approx(0.25, rel=1e-5)
    assert errors.found["transformer"]["second"] < 1e-6
    assert errors.to_json()["transformer"]["worst_layer"] == "first"
    assert errors.to_json()["transformer"]["layers"] == 2


def test_hooks_are_gone_afterwards(parts: tuple[Any, Any, Any]) -> None:
    pipeline, made, base = parts
    with watch_layers(pipeline, made, base) as errors:
        pass
    pipeline.transformer(torch.randn(5, 8))
    assert errors.found == {"transformer": {}}
    assert errors.to_json() == {}


def test_layers_of_a_text_encoder_are_measured_beside_the_base_that_its_plan_has(
    parts: tuple[Any, Any, Any],
) -> None:
    pipeline, _, base = parts
    own = SimpleNamespace(weights={"text_encoder": base.components["transformer"].checkpoint})
    alone = SimpleNamespace(layers={"first": ()}, base=SimpleNamespace(weights={}))
    planned: Any = SimpleNamespace(
        encoders={
            "text_encoder": SimpleNamespace(layers={"first": (), "second": ()}, base=own),
            "text_encoder_2": alone,
        },
        machine=SimpleNamespace(device="cpu"),
        request=SimpleNamespace(hub=None),
    )
    pipeline.text_encoder = pipeline.transformer
    with torch.no_grad():
        pipeline.text_encoder.second.weight *= 0.5
    with torch.no_grad(), watch_encoders(pipeline, planned) as errors:
        pipeline.text_encoder(torch.randn(5, 8))
    assert set(errors.found) == {"text_encoder"}
    assert errors.found["text_encoder"]["first"] < 1e-6
    assert errors.found["text_encoder"]["second"] == pytest.approx(0.5, rel=1e-5)
