"""LoRA beside layers of compiled blocks: one graph a block, scales that change, adapters that come late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantmatrix.hardware import probe
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime import acceleration, lora
from quantmatrix.runtime.lora import list_branches
from quantmatrix.tiny.loras import TARGETS

FORMS = [
    ("flux-1", "fp8", "tensor-dynamic", "reference"),
    ("flux-2", "modelopt-nvfp4", "NVFP4", "reference"),
    ("wan-2-2", "modelopt-fp8", "FP8", "decode"),
    ("qwen-image", "nunchaku-svdq", "int4_r32", "decode"),
    ("z-image", "gguf", "Q8_0", "packed"),
    ("flux-1", "msmodelslim", "W8A8_DYNAMIC", "int8"),
    ("flux-1", "comfyui-int8", "int8", "int8"),
]
QUICK = FORMS[2]
"""Of one kind of block, which is followed in a third of the time."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(form: tuple[str, str, str, str]) -> tuple[Any, dict[str, Any]]:
    """A tiny quantized transformer and the inputs of one forward."""
    model, family, scheme, backend = form
    machine = probe.probe("cpu")
    made = synthesize(
        model, machine, family=family, scheme=scheme, backend=backend, size="tiny",
        dtype=torch.float32,
    )  # fmt: skip
    return made, make_inputs(model, made, "cpu", torch.float32, size="tiny")


def add(transformer: Any, name: str, scale: float, seed: int = 0) -> None:
    """An adapter of rank 4 for every query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, module in transformer.named_modules():
        if layer.rpartition(".")[2] in TARGETS and hasattr(module, "in_features"):
            down = torch.randn(4, module.in_features, generator=generator) / 16
            tensors[f"transformer.{layer}.lora_A.weight"] = down
            up = torch.randn(module.out_features, 4, generator=generator)
            tensors[f"transformer.{layer}.lora_B.weight"] = up
    lora.add_adapter(transformer, tensors, name, scale, "transformer", "drawn")


def run(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = transformer(**inputs)[0]
    return found[0] if isinstance(found, list) else found  # Z-Image gives a list


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_a_branch_is_compiled_without_a_break(form: tuple[str, str, str, str]) -> None:
    made, inputs = build(form)
    bare = run(made, inputs)
    add(made, "a", 0.5)
    eager = run(made, inputs)
    assert not torch.allclose(eager, bare, rtol=1e-3, atol=1e-3)
    acceleration.compile_blocks(made, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    compiled = run(made, inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-5)


def test_scales_change_without_compiling_again() -> None:
    """But where one becomes 0 or is no longer: then once."""
    made, inputs = build(QUICK)
    add(made, "a", 0.5)
    add(made, "b", 1.0, seed=1)
    acceleration.compile_blocks(made, backend="eager", fullgraph=True)
    run(made, inputs)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for scales in ({"a": 0.25, "b": -2.0}, {"a": 3.0, "b": 0.1}):
        lora.set_scales([made], scales)
        compiled = run(made, inputs)
        torch._dynamo.config.disable = True
        try:
            eager = run(made, inputs)
        finally:
            torch._dynamo.config.disable = False
        assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    lora.set_scales([made], {"a": 1.0})
    for _ in range(2):
        run(made, inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * graphs


def test_adapters_that_come_or_go_after_compiling_count() -> None:
    made, inputs = build(QUICK)
    bare = run(made, inputs)
    acceleration.compile_blocks(made, backend="eager", fullgraph=True)
    assert torch.allclose(run(made, inputs), bare, rtol=1e-4, atol=1e-5)
    add(made, "a", 0.5)
    assert not torch.allclose(run(made, inputs), bare, rtol=1e-3, atol=1e-3)
    lora.remove([made])
    assert torch.allclose(run(made, inputs), bare, rtol=1e-4, atol=1e-5)


def test_a_captured_graph_is_made_again() -> None:
    made, _ = build(FORMS[0])
    graphed = acceleration.graph_forward(made)
    graphed.graphs["key"] = None  # type: ignore[assignment]
    add(made, "a", 0.5)
    assert graphed.graphs == {}


def test_scales_stay_exact_in_a_model_of_sixteen_bits() -> None:
    made, _ = build(FORMS[0])
    add(made, "a", 0.7)
    made.to(torch.bfloat16)
    [scale] = {float(branch.get_buffer("scale_a")) for _, branch in list_branches(made)}
    assert scale == pytest.approx(0.7, rel=1e-6)
    assert branch_dtype(made) == torch.float32


def branch_dtype(transformer: Any) -> torch.dtype:
    _, branch = list_branches(transformer)[0]
    return branch.get_buffer("scale_a").dtype
