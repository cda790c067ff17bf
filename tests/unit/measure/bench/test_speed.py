"""Synthetic forwards, timed: every family on every model, and what the command says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from quantmatrix import families, models
from quantmatrix.cli import main
from quantmatrix.hardware import probe
from quantmatrix.measure.bench import speed, synthetic
from quantmatrix.measure.bench.synthetic import synthesize
from quantmatrix.runtime.quantized_linear import QuantizedLinear
from quantmatrix.scheme import BLOCKS


@pytest.mark.parametrize("model", models.IDS)
@pytest.mark.parametrize("family", families.IDS)
def test_every_family_runs_on_every_model(family: str, model: str) -> None:
    scheme = next(iter(families.load(family).SCHEMES))
    found = speed.compare_forms(
        model, probe.probe("cpu"), family=family, scheme=scheme, backend="reference",
        size="tiny", repeats=1,
    )  # fmt: skip
    assert set(found["backends"]) == {"reference"}
    assert sum(found["backends"].values()) >= 6
    assert found["bytes"]["quantized"] < found["bytes"]["bf16"]
    assert found["repeats_bit_identical"]
    assert found["finite"]
    assert found["ratio"] == found["milliseconds"]["quantized"] / found["milliseconds"]["bf16"]


@pytest.mark.parametrize("scheme", families.load("gguf").SCHEMES)
def test_rows_that_are_no_whole_blocks_have_another_type(scheme: str) -> None:
    """Z-Image's tiny rows are 384 columns; random blocks have scales that are numbers."""
    made = synthesize("z-image", probe.probe("cpu"), family="gguf", scheme=scheme, size="tiny")
    layers = [module for module in made.modules() if isinstance(module, QuantizedLinear)]
    assert layers
    for layer in layers:
        whole = layer.in_features % BLOCKS[scheme][0] == 0
        assert layer.scheme.name == (scheme if whole else "Q5_0")
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert 0.5 < layer(x.bfloat16()).float().std() < 2


def test_ways_take_turns() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = speed.measure_ways(ways, "cpu", repeats=3, burst=2)
    assert "".join(calls) == "aabb" + "aabb" * 3
    assert all(value >= 0 for value in found.values())


WORDS = [
    "speed",
    "--synthetic",
    "tiny",
    "--model-id",
    "flux-1",
    "--repeats",
    "1",
    "--device",
    "cpu",
]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*WORDS, "--family", "msmodelslim", "--backend", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == {"int8"}
    assert found["size"] == "tiny"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--family", "fp9"], "--family fp9: expected one of fp8, "),
        (["--family", "fp8", "--scheme", "x"], "--scheme x: fp8 has tensor-dynamic, "),
        (["--family", "fp8", "--repeats", "0"], "--repeats 0: expected 1 or more"),
        (["--family", "fp8", "--cuda-graph"], "--cuda-graph needs an NVIDIA GPU"),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_backend_that_does_not_run_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*WORDS, "--family", "modelopt-nvfp4", "--backend", "packed"]) == 3
    assert "nvidia" in capsys.readouterr().err


def test_random_layers_of_one_input_share_its_codes() -> None:
    """As in a real checkpoint, scale and zero point of q, k and v are equal: they were measured once."""
    made = synthesize(
        "flux-1", probe.probe("cpu"), family="msmodelslim", scheme="W8A8", size="tiny"
    )
    block = made.get_submodule("transformer_blocks.0.attn")
    assert block.to_q.shared is block.to_k.shared is block.to_v.shared is not None


def test_synthetic_weights_keep_the_size_of_what_goes_through_them() -> None:
    """Matrices by their columns, norms near 1, biases near 0: a deep model stays finite in BF16."""
    with torch.device("meta"):
        module = nn.ModuleDict(
            {
                "wide": nn.Linear(1024, 512),
                "patch": nn.Conv2d(16, 256, 4),
                "norm": nn.LayerNorm(4096),
            }
        )
    synthetic.fill_plain(module, "cpu", torch.float32, torch.Generator().manual_seed(0))
    spread = {
        name: (one.mean().item(), one.std().item()) for name, one in module.named_parameters()
    }
    assert spread["wide.weight"] == pytest.approx((0.0, 1024**-0.5), abs=2e-3)
    assert spread["patch.weight"] == pytest.approx((0.0, 256**-0.5), abs=2e-3)
    assert spread["norm.weight"] == pytest.approx((1.0, 0.1), abs=1e-2)
    assert spread["wide.bias"] == pytest.approx((0.0, 0.02), abs=3e-3)
    assert spread["norm.bias"] == pytest.approx((0.0, 0.02), abs=3e-3)
